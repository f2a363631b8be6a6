//! The loop: gather what is desired and observed, plan, have the plan's actions done, wait.
//!
//! It compares levels: a lost poke costs a tick, never a wish. It waits for nothing but time and pokes: an
//! actor takes what it is told when it is free, and what takes time is a worker's. So one instance, tenant
//! or disk that hangs holds up nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use mvm_core::lifecycle::{Event, InstanceStatus};
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath};
use mvm_core::net::InstanceNetwork;
use mvm_core::plan::{Action, Plan, PlanLimits, Waiting, plan};
use mvm_core::record::{self, Desired, InstanceRecord, PoolRecord};
use mvm_store::Op;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::actor::{self, Message};
use crate::effects::Given;
use crate::guest_clocks::GuestClocks;
use crate::node::{Node, chain};
use crate::publish::Listeners;
use crate::workers::{Work, Workers};
use crate::{
    bases, builder, capture, disks, housekeeping, images, neighbours, network, sleep_policy, spares,
};

/// Longest time between two rounds, and how often housekeeping runs.
const TICK: Duration = Duration::from_secs(10);

/// Runs until the node ends.
pub(crate) async fn run(node: Arc<Node>, listeners: Listeners) {
    let mut rounds = Reconciler {
        clocks: GuestClocks::new(),
        listeners: Arc::new(tokio::sync::Mutex::new(listeners)),
        node,
        actors: JoinSet::new(),
        with_actors: OrdMap::new(),
        workers: Workers::default(),
        resting: BTreeMap::new(),
        resting_of: Default::default(),
        policy_due: None,
    };
    housekeeping::look_after_space(&rounds.node);
    let mut tick = Instant::now() + TICK;
    loop {
        let began = std::time::Instant::now();
        let next_unix_ms = rounds.round();
        rounds.node.note_round(began.elapsed());
        let planned = next_unix_ms.map(|at| rounds.node.clock.instant(at));
        rounds.wait(planned.map_or(tick, |planned| planned.min(tick))).await;
        if Instant::now() >= tick {
            housekeeping::begin(&rounds.node, &mut rounds.workers);
            rounds.watch_resting(true);
            tick = Instant::now() + TICK;
        }
    }
}

struct Reconciler {
    node: Arc<Node>,
    actors: JoinSet<()>,
    /// The instances of the last round that had actors by then.
    with_actors: OrdMap<InstancePath, InstanceRecord>,
    workers: Workers,
    listeners: Arc<tokio::sync::Mutex<Listeners>>,
    /// What rests and is woken by a neighbour's packet.
    resting: BTreeMap<InstanceNetwork, InstancePath>,
    /// What that follows from.
    resting_of: (Desired, OrdMap<InstancePath, InstanceStatus>),
    /// When guests are asked next what they do, if any pool has a sleep policy.
    policy_due: Option<Instant>,
    clocks: GuestClocks,
}

impl Reconciler {
    /// One round. Returns when time alone makes the next one due.
    fn round(&mut self) -> Option<u64> {
        let mirror = self.node.state.now();
        self.forget_settled(&mirror);
        self.spawn_actors(&mirror);
        let desired = mirror.touchable();
        network::ensure(&self.node, &mut self.workers, &desired);
        self.ensure_ports();
        let limits = PlanLimits { starting: self.node.config.max_starting };
        let now = self.node.clock.now_ms();
        let mut plan = plan(&desired, &mirror.observed, limits, now);
        let ended = plan.actions.iter().filter_map(|action| match action {
            Action::RemoveEnded(instance) => Some(instance.clone()),
            _ => None,
        });
        let removal = ended.chain(bases::left_over(&mirror)).collect();
        self.node.set_needs(|needs| needs.removal = removal);
        for action in std::mem::take(&mut plan.actions) {
            self.perform(&desired, action, &mut plan);
        }
        bases::begin(&self.node, &mut self.workers, &mirror);
        capture::begin(&self.node, &mut self.workers, &mirror, &desired);
        let next_unix_ms = self.apply_rules(&mirror, plan.next_unix_ms);
        self.node.set_waiting(plan.waiting);
        next_unix_ms
    }

    /// Waits until another round is due, by time or because something has changed.
    async fn wait(&mut self, due: Instant) {
        loop {
            let is_any_resting = !self.resting.is_empty();
            let policy = self.policy_due;
            tokio::select! {
                () = self.node.poked() => return,
                () = sleep_until(due) => return,
                () = sleep_until(policy.unwrap_or(due)), if policy.is_some() => {
                    self.begin_policy();
                }
                () = self.clocks.due() => self.clocks.look(&self.node, &mut self.workers),
                () = self.workers.ended() => {}
                Some(_) = self.actors.join_next() => {}
                visited = self.node.host.network.visited(), if is_any_resting => {
                    self.wake_visited(&visited);
                }
            }
        }
    }

    /// What follows from what is there, besides the plan. Returns when time alone changes it.
    fn apply_rules(&mut self, mirror: &Arc<Mirror>, mut next_unix_ms: Option<u64>) -> Option<u64> {
        let node = &self.node;
        let (needed, due) = spares::needed(mirror, node.host.memory.read(), node.clock.now_ms());
        node.set_needs(|needs| needs.spares = needed);
        if let Some(due) = due {
            next_unix_ms = Some(next_unix_ms.map_or(due, |next| next.min(due)));
        }
        self.policy_due = match (sleep_policy::interval(mirror), self.policy_due) {
            (None, _) => {
                node.activities.clear();
                None
            }
            (Some(_), Some(due)) => Some(due),
            (Some(_), None) => Some(Instant::now()),
        };
        self.watch_resting(false);
        next_unix_ms
    }

    fn forget_settled(&mut self, mirror: &Mirror) {
        if mirror.local.is_empty() || mirror.settled_local().is_empty() {
            return;
        }
        let node = self.node.clone();
        self.workers.begin(Work::Settled, || async move {
            let settled = node.state.forget_settled().await;
            let problem = settled.err().map(|error| chain(&error));
            node.set_problem("forgetting what control has taken over", problem);
        });
    }

    fn begin_policy(&mut self) {
        let mirror = self.node.state.now();
        let interval = sleep_policy::interval(&mirror);
        self.policy_due = interval.map(|interval| Instant::now() + interval);
        let node = self.node.clone();
        self.workers.begin(Work::Policy, || async move {
            sleep_policy::round(&node, &mirror).await;
        });
    }

    /// Looks out for neighbours of what rests; again if others rest than before, or now and then.
    fn watch_resting(&mut self, is_due: bool) {
        if self.workers.is_busy(&Work::Neighbours) {
            return;
        }
        let mirror = self.node.state.now();
        let of = (mirror.desired.clone(), mirror.observed.instances.clone());
        if of == self.resting_of && !is_due {
            return;
        }
        self.resting_of = of;
        let wanted = neighbours::resting(&mirror);
        if wanted == self.resting && (!is_due || wanted.is_empty()) {
            return;
        }
        let places: BTreeSet<InstanceNetwork> = wanted.keys().copied().collect();
        self.resting = wanted;
        let node = self.node.clone();
        self.workers.begin(Work::Neighbours, || async move {
            let result = node.host.network.watch_resting(&places).await;
            let problem = result.err().map(|error| chain(&error));
            node.set_problem("looking out for neighbours of what rests", problem);
            // Others may rest by now.
            node.poke();
        });
    }

    fn wake_visited(&mut self, visited: &InstanceNetwork) {
        if let Some(path) = self.resting.get(visited).cloned() {
            let node = self.node.clone();
            let work = Work::Wake(path.clone());
            self.workers.begin(work, || async move { neighbours::wake(&node, &path).await });
        }
    }

    fn ensure_ports(&mut self) {
        let (node, listeners) = (self.node.clone(), self.listeners.clone());
        if listeners.try_lock().is_ok_and(|it| it.is_as_desired(&node.state.now().desired)) {
            return;
        }
        self.workers.begin(Work::Ports, || async move {
            let mut listeners = listeners.lock().await;
            listeners.ensure(&node, &node.state.now().desired).await;
        });
    }

    fn spawn_actors(&mut self, mirror: &Mirror) {
        let before = std::mem::replace(&mut self.with_actors, mirror.desired.instances.clone());
        for change in before.diff(&mirror.desired.instances) {
            let DiffItem::Add(path, _) = change else { continue };
            // One whose tenant is not known waits until it is.
            let given = Given::of(&mirror.desired, path).filter(|_| !mirror.is_untouchable(path));
            if let Some(given) = given {
                actor::spawn(&self.node, path, given, &mut self.actors);
            } else {
                // It is new in the next round, too.
                self.with_actors.remove(path);
            }
        }
    }

    fn perform(&mut self, desired: &Desired, action: Action, plan: &mut Plan) {
        let node = self.node.clone();
        match action {
            Action::Build { pool, generation } => {
                if let Some(record) = desired.pools.get(&pool).cloned() {
                    let build = || builder::build(node, record, generation);
                    self.workers.begin(Work::Build(pool), build);
                }
            }
            Action::Start { instance, generation, revision } => {
                let Some(record) = desired.instances.get(&instance) else { return };
                if !node.network.is_there_for(desired, record) {
                    plan.waiting.insert(instance, Waiting::Network);
                    return;
                }
                let boot_timeout_ms = u64::from(record.spec.boot_timeout_s) * 1000;
                let origin = record.origin.clone();
                let start = Event::Start { generation, revision, boot_timeout_ms, origin };
                if let Some(given) = Given::of(desired, &instance) {
                    self.send(&instance, Message::Start(Arc::new(given), start));
                }
            }
            Action::Pause { instance } => self.tell(&instance, Event::Pause),
            Action::Sleep { instance, request, hooks_ms } => {
                self.tell(&instance, Event::Sleep { request, hooks_ms });
            }
            Action::Stop { instance, grace_ms, generation } => {
                self.tell(&instance, Event::Stop { grace_ms, generation });
            }
            Action::Destroy { instance, grace_ms } => {
                self.tell(&instance, Event::Destroy { grace_ms });
            }
            // Control removes it, as it is needed.
            Action::RemoveEnded(_) => {}
            Action::MakeDisk(disk) => {
                let work = Work::Disk(disk.clone());
                self.workers.begin(work, || disks::make(node, disk));
            }
            Action::RemoveDisk(disk) => {
                if !node.gone().disks.contains_key(&disk) {
                    let work = Work::Disk(disk.clone());
                    self.workers.begin(work, || disks::remove(node, disk));
                }
            }
            Action::RemovePool(pool) => self.remove_pool(desired, &pool),
            Action::RemoveTenant(tenant) => {
                let Some(record) = desired.tenants.get(&tenant).cloned() else { return };
                if !node.gone().tenants.contains_key(&tenant) {
                    self.workers.begin(Work::Tenant(tenant), || async move {
                        network::remove_tenant(&node, &record).await;
                    });
                }
            }
        }
    }

    /// Tells an actor what to do. One that is busy is told again in a later round, if that is still to be
    /// done; one that has just ended is planned for anew.
    fn tell(&self, instance: &InstancePath, event: Event) {
        self.send(instance, Message::Event(event));
    }

    fn send(&self, instance: &InstancePath, message: Message) {
        if let Some(handle) = self.node.instance(instance) {
            let _ = handle.mailbox.try_send(Box::new(message));
        }
    }

    fn remove_pool(&mut self, desired: &Desired, pool: &PoolPath) {
        let Some(record) = desired.pools.get(pool).cloned() else { return };
        if self.node.gone().pools.contains_key(pool) {
            return;
        }
        // A build that runs is nobody's any more.
        self.workers.abort(&Work::Build(pool.clone()));
        let node = self.node.clone();
        let work = Work::Pool(pool.clone());
        self.workers.begin(work, || async move { remove_pool(&node, &record).await });
    }
}

/// Removes what there is of a pool that goes.
async fn remove_pool(node: &Node, record: &PoolRecord) {
    let pool = &record.path;
    let mirror = node.state.now();
    images::forget_uploads(&mirror, pool, images::uploads_of(node, &mirror, pool));
    let op = Op::Delete { key: record::pool_status_key(pool) };
    let what = format!("removing pool {pool}");
    match node.state.write(vec![op]).await {
        Ok(()) => {
            node.set_problem(&what, None);
            node.note_gone(|gone| {
                gone.pools.insert(pool.clone(), record.created_unix_ms);
            });
        }
        Err(error) => node.set_problem(&what, Some(chain(&error))),
    }
}
