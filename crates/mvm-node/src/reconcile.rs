//! The loop: gather what is desired and observed, plan, run the plan's actions, wait for a poke.
//!
//! It compares levels: a lost poke costs a tick, never a wish. It owns the instance actors and the
//! image builds, and ends them when the agent ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mvm_core::lifecycle::Event;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_core::net::{NetId, TenantNetwork};
use mvm_core::plan::{Action, PlanLimits, plan};
use mvm_core::record::{self, Desired, Existence};
use mvm_host::console;
use mvm_host::vmm::{CONSOLE_LOG, VMM_LOG};
use mvm_store::Op;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::actor::{self, Message};
use crate::builder;
use crate::cut_off;
use crate::disks;
use crate::images;
use crate::node::{Node, chain};
use crate::publish::Listeners;
use crate::space;
use crate::ssh;
use mvm_core::mirror::Mirror;

/// Longest time between two rounds, and how often is looked after what changes without a poke.
const TICK: Duration = Duration::from_secs(10);

/// Runs until the agent is told to end.
pub(crate) async fn run(node: Arc<Node>, listeners: Listeners) {
    let mut rounds = Reconciler {
        node,
        actors: JoinSet::new(),
        spawned: BTreeSet::new(),
        builds: BTreeMap::new(),
        disk_work: BTreeMap::new(),
        network: NetworkState::Unknown,
        bridged: BTreeSet::new(),
        listeners,
    };
    let mut tick = Instant::now() + TICK;
    rounds.look_after_space();
    loop {
        let next_unix_ms = rounds.round().await;
        if Instant::now() >= tick {
            rounds.look_after().await;
            tick = Instant::now() + TICK;
        }
        let due = next_unix_ms.map_or(tick, |at| rounds.node.clock.instant(at).min(tick));
        tokio::select! {
            () = rounds.node.poked() => {}
            () = sleep_until(due) => {}
            Some(_) = rounds.actors.join_next() => {}
        }
    }
}

struct Reconciler {
    node: Arc<Node>,
    actors: JoinSet<()>,
    spawned: BTreeSet<InstancePath>,
    builds: BTreeMap<PoolPath, tokio::task::AbortHandle>,
    /// What is being done to disks: one thing at a time to each, and always to its end.
    disk_work: BTreeMap<DiskPath, tokio::task::AbortHandle>,
    network: NetworkState,
    bridged: BTreeSet<TenantNetwork>,
    listeners: Listeners,
}

/// Whether the machine's network has been compared with the expected one since the agent started.
#[derive(PartialEq, Eq)]
enum NetworkState {
    Unknown,
    Ensured,
}

impl Reconciler {
    /// One round. Returns when time alone makes the next one due.
    async fn round(&mut self) -> Option<u64> {
        let settled = self.node.state.forget_settled().await;
        let problem = settled.err().map(|error| chain(&error));
        self.node.set_problem("forgetting what control has taken over", problem);
        let mirror = self.node.state.now();
        if self.network == NetworkState::Unknown {
            self.ensure_network(&mirror).await;
        }
        self.spawn_actors(&mirror);
        let desired = mirror.touchable();
        self.ensure_tenants(&desired).await;
        self.serve_names(&desired).await;
        self.listeners.ensure(&self.node, &mirror.desired).await;
        let limits = PlanLimits { starting: self.node.config.max_starting };
        let plan = plan(&desired, &mirror.observed, limits, self.node.clock.now_ms());
        let ended = plan.actions.iter().filter_map(|action| match action {
            Action::RemoveEnded(instance) => Some(instance.clone()),
            _ => None,
        });
        let ended = ended.collect();
        self.node.set_needs(|needs| needs.removal = ended);
        for action in plan.actions {
            self.perform(&desired, action).await;
        }
        self.node.set_waiting(plan.waiting);
        plan.next_unix_ms
    }

    fn spawn_actors(&mut self, mirror: &Mirror) {
        self.spawned.retain(|path| mirror.desired.instances.contains_key(path));
        for path in mirror.desired.instances.keys() {
            if !mirror.is_untouchable(path) && self.spawned.insert(path.clone()) {
                actor::spawn(&self.node, path, &mut self.actors);
            }
        }
    }

    async fn perform(&mut self, desired: &Desired, action: Action) {
        match action {
            Action::Build { pool, generation } => self.build(desired, &pool, generation),
            Action::Start { instance, generation, revision } => {
                let Some(record) = desired.instances.get(&instance) else { return };
                let boot_timeout_ms = u64::from(record.spec.boot_timeout_s) * 1000;
                let origin = record.origin.clone();
                let start = Event::Start { generation, revision, boot_timeout_ms, origin };
                self.tell(&instance, start).await;
            }
            Action::Pause { instance } => self.tell(&instance, Event::Pause).await,
            Action::Sleep { instance, request, hooks_ms } => {
                self.tell(&instance, Event::Sleep { request, hooks_ms }).await;
            }
            Action::Stop { instance, grace_ms, generation } => {
                self.tell(&instance, Event::Stop { grace_ms, generation }).await;
            }
            Action::Destroy { instance, grace_ms } => {
                self.tell(&instance, Event::Destroy { grace_ms }).await;
            }
            // Control removes it.
            Action::RemoveEnded(_) => {}
            Action::MakeDisk(disk) => self.work_on_disk(&disk, disks::make),
            Action::RemoveDisk(disk) => {
                if !self.node.gone().disks.contains_key(&disk) {
                    self.work_on_disk(&disk, disks::remove);
                }
            }
            Action::RemovePool(pool) => self.remove_pool(desired, &pool).await,
            Action::RemoveTenant(tenant) => self.remove_tenant(desired, &tenant).await,
        }
    }

    async fn tell(&self, instance: &InstancePath, event: Event) {
        if let Some(handle) = self.node.instance(instance) {
            // An actor that has just ended is planned for in the next round.
            let _ = handle.mailbox.send(Message::Event(event)).await;
        }
    }

    fn build(&mut self, desired: &Desired, pool: &PoolPath, generation: u64) {
        let running = self.builds.get(pool).is_some_and(|build| !build.is_finished());
        if running {
            return;
        }
        if let Some(record) = desired.pools.get(pool) {
            let build = builder::build(self.node.clone(), record.clone(), generation);
            self.builds.insert(pool.clone(), self.actors.spawn(build));
        }
    }

    fn work_on_disk<F>(&mut self, disk: &DiskPath, work: impl FnOnce(Arc<Node>, DiskPath) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.disk_work.retain(|_, work| !work.is_finished());
        if !self.disk_work.contains_key(disk) {
            let task = self.actors.spawn(work(self.node.clone(), disk.clone()));
            self.disk_work.insert(disk.clone(), task);
        }
    }

    async fn remove_pool(&mut self, desired: &Desired, pool: &PoolPath) {
        let Some(record) = desired.pools.get(pool) else { return };
        if self.node.gone().pools.contains_key(pool) {
            return;
        }
        if let Some(build) = self.builds.remove(pool) {
            build.abort();
        }
        let mirror = self.node.state.now();
        images::forget_uploads(&mirror, pool, images::uploads_of(&self.node, &mirror, pool));
        let op = Op::Delete { key: record::pool_status_key(pool) };
        let what = format!("removing pool {pool}");
        match self.node.state.write(vec![op]).await {
            Ok(()) => {
                self.node.set_problem(&what, None);
                let made = record.created_unix_ms;
                self.node.note_gone(|gone| {
                    gone.pools.insert(pool.clone(), made);
                });
            }
            Err(error) => self.node.set_problem(&what, Some(chain(&error))),
        }
    }

    async fn remove_tenant(&self, desired: &Desired, tenant: &TenantName) {
        let Some(record) = desired.tenants.get(tenant) else { return };
        if self.node.gone().tenants.contains_key(tenant) {
            return;
        }
        let what = format!("removing the SSH key of tenant {tenant}");
        if let Err(error) = ssh::remove_key(&self.node.config.state_dir, tenant) {
            return self.node.set_problem(&what, Some(chain(&error)));
        }
        self.node.set_problem(&what, None);
        let what = format!("removing the network of tenant {tenant}");
        if let Err(error) = self.node.host.network.remove_tenant(record.network).await {
            return self.node.set_problem(&what, Some(chain(&error)));
        }
        self.node.set_problem(&what, None);
        let made = record.created_unix_ms;
        self.node.note_gone(|gone| {
            gone.tenants.insert(tenant.clone(), made);
        });
    }

    /// Mends the machine's network, once after the agent's start and before any instance starts.
    /// What belongs to a tenant or instance whose desired record does not parse is not known and
    /// would be removed, so that waits until the record is mended.
    async fn ensure_network(&mut self, mirror: &Mirror) {
        let what = "network";
        let has_network = |key: &&String| record::has_network(key);
        if let Some(key) = mirror.bad.keys().find(has_network) {
            let problem = format!("left as it is, and no instance starts, until `{key}` is mended");
            return self.node.set_problem(what, Some(problem));
        }
        let ensured = match mirror.expected_network() {
            Ok(expected) => {
                let ensured = self.node.host.network.ensure(&expected).await;
                ensured.map_err(|error| chain(&error))
            }
            Err(conflict) => Err(chain(&conflict)),
        };
        if ensured.is_ok() {
            self.network = NetworkState::Ensured;
        }
        self.node.set_problem(what, ensured.err());
    }

    /// Makes the bridges of tenants that came since the network was ensured.
    async fn ensure_tenants(&mut self, desired: &Desired) {
        if self.network == NetworkState::Unknown {
            return;
        }
        self.remove_former(desired).await;
        for tenant in desired.tenants.values().filter(|t| t.existence == Existence::Kept) {
            if self.bridged.contains(&tenant.network) {
                continue;
            }
            let what = format!("network of tenant {}", tenant.name);
            match self.node.host.network.add_tenant(tenant.network).await {
                Ok(()) => {
                    self.bridged.insert(tenant.network);
                    self.node.set_problem(&what, None);
                    let what = format!("the SSH key of tenant {}", tenant.name);
                    let made = ssh::ensure_key(&self.node.config.state_dir, &tenant.name);
                    self.node.set_problem(&what, made.err().map(|error| chain(&error)));
                }
                Err(error) => self.node.set_problem(&what, Some(chain(&error))),
            }
        }
    }

    /// Removes the networks of tenants that have others by now, which have nothing running in them.
    async fn remove_former(&mut self, desired: &Desired) {
        let present: BTreeSet<_> = desired.tenants.values().map(|tenant| tenant.network).collect();
        let ids: BTreeSet<NetId> = present.iter().map(|network| network.net_id).collect();
        for former in self.bridged.clone().into_iter().filter(|it| !present.contains(it)) {
            self.bridged.remove(&former);
            // A tenant that is gone has had it removed with itself.
            if ids.contains(&former.net_id) {
                let removed = self.node.host.network.remove_tenant(former).await;
                let what = format!("removing the former subnet {}", former.subnet);
                self.node.set_problem(&what, removed.err().map(|error| chain(&error)));
                // What sleeps has rules, too.
                self.network = NetworkState::Unknown;
            }
        }
        if self.network == NetworkState::Unknown {
            self.ensure_network(&self.node.state.now()).await;
        }
    }

    /// Makes each tenant's gateway answer questions for names.
    async fn serve_names(&self, desired: &Desired) {
        let tenants = desired.tenants.values().map(|tenant| tenant.network);
        let bridged = tenants.filter(|network| self.bridged.contains(network)).collect();
        let served = self.node.host.network.serve_names(&bridged).await;
        self.node.set_problem("names in guests", served.err().map(|error| chain(&error)));
    }

    /// What nobody pokes for.
    async fn look_after(&self) {
        self.bound_own_log();
        self.look_after_space();
        self.bound_logs().await;
        self.tidy_snapshots();
        self.mend_firewall().await;
        self.mend_links().await;
    }

    async fn mend_links(&self) {
        let mended = self.node.host.network.mend_links().await;
        if let Ok(true) = mended {
            tracing::warn!("somebody else changed this agent's network links: they are put back");
        }
        self.node.set_problem("mending links", mended.err().map(|error| chain(&error)));
        let looked = cut_off::look(&self.node).await;
        self.node.set_problem("looking at links", looked.err().map(|error| chain(&error)));
    }

    fn look_after_space(&self) {
        let reserved = self.node.state.ensure_reserve();
        let problem = reserved.err().map(|error| error.to_string());
        self.node.set_problem("setting space aside", problem);
        space::note_free_space(&self.node);
    }

    async fn mend_firewall(&self) {
        let mended = self.node.host.network.mend_firewall().await;
        if let Ok(true) = mended {
            tracing::warn!(
                "somebody else changed the firewall's rules of this agent: they are put back"
            );
        }
        self.node.set_problem("mending the firewall", mended.err().map(|error| chain(&error)));
    }

    fn tidy_snapshots(&self) {
        let tidied = self.node.shared.tidy(&self.node.state.now());
        self.node.set_problem("removing snapshots", tidied.err().map(|error| chain(&error)));
    }

    /// Keeps small what this agent writes, whoever makes it do so.
    fn bound_own_log(&self) {
        let bound = mvm_host::process::bound_own_log(&self.node.config.state_dir.join(crate::LOG));
        self.node.set_problem("bounding the log", bound.err().map(|error| error.to_string()));
    }

    /// Keeps small what guests and VMMs go on writing.
    async fn bound_logs(&self) {
        for (path, status) in &self.node.state.now().observed.instances {
            if status.vm.is_none() {
                continue;
            }
            let dir = self.node.instance_dir(&path.id);
            for file in [CONSOLE_LOG, VMM_LOG].map(|name| dir.join(name)) {
                let problem = console::bound(&file).err().map(|error| error.to_string());
                self.node.set_problem(&format!("bounding {}", file.display()), problem);
            }
            let vm = self.node.instance(path).and_then(|handle| handle.vm.borrow().clone());
            if let Some(vm) = vm
                && let Err(error) = vm.tidy().await
            {
                // It may have ended just now.
                tracing::debug!(instance = %path, error = chain(&error), "cannot tidy up");
            }
        }
    }
}
