//! One actor per instance: it owns the instance's status and its VM.
//!
//! It feeds events into [`mvm_core::lifecycle::step`], makes each new status durable, and only then
//! performs the effects. Effects that take time run as tasks that it owns; their results come back
//! through its mailbox. When the agent ends, the actor ends and the VM goes on.

use std::sync::Arc;

use mvm_core::guest::{ExitStatus, WakeReason};
use mvm_core::lifecycle::{Effect, Event, InstanceStatus, Phase, StartFrom, step};
use mvm_core::name::InstancePath;
use mvm_core::record;
use mvm_core::stored::versioned;
use mvm_core::vmm::VmHandle;
use mvm_host::guest::{Session, SessionMode};
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::Vm;
use mvm_store::{Op, encode};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::contact::Contact;
use crate::effects::{self, Given, Guest};
use crate::main_process::{Attached, MainHub, pump};
use crate::node::{InstanceHandle, Node, chain};
use crate::sleep;
use crate::vcpus::{self, VcpuOrder};

/// Messages that may wait in an actor's mailbox, which has room for some even if there are none: so they
/// are boxed.
const MAILBOX: usize = 64;

/// What an actor is told.
pub(crate) enum Message {
    /// Something happened to the instance.
    Event(Event),
    /// It is to start as this.
    Start(Arc<Given>, Event),
    /// A VM was launched.
    Launched(Arc<dyn Vm>),
    /// An earlier agent's VM was found alive.
    Found(Arc<dyn Vm>),
    /// A session with the guest is open, and the main process, if there is one, runs or has run.
    Session(Session, Option<Box<Attached>>),
    /// The main process of a VM ended (or the session with it did).
    MainEnded(Option<VmHandle>, Option<ExitStatus>),
    /// The session with the guest is over.
    SessionEnded,
    /// A snapshot for others to begin from is to be made, in this directory.
    Capture(SnapshotDir, oneshot::Sender<Result<(), String>>),
}

/// Starts the actor of an instance, which first looks for what an earlier agent left.
pub(crate) fn spawn(node: &Arc<Node>, path: &InstancePath, given: Given, tasks: &mut JoinSet<()>) {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (session_tx, session) = watch::channel(None);
    let (vm_tx, vm) = watch::channel(None);
    let main = Arc::new(MainHub::new(node.instance_dir(&path.id)));
    node.add_instance(
        path.clone(),
        InstanceHandle { mailbox: mailbox.clone(), session, vm, main: main.clone() },
    );
    let actor = Actor {
        node: node.clone(),
        path: path.clone(),
        given: Arc::new(given),
        status: node.state.now().status(path).clone(),
        mailbox,
        session: session_tx,
        vm: vm_tx,
        main,
        tasks: JoinSet::new(),
        session_mode: SessionMode::Fresh,
        contact: Arc::default(),
        run_tasks: JoinSet::new(),
        vcpus: None,
        is_ending: watch::Sender::new(false),
    };
    tasks.spawn(actor.run(messages));
}

struct Actor {
    node: Arc<Node>,
    path: InstancePath,
    /// What it is to be, as of its last start.
    given: Arc<Given>,
    status: InstanceStatus,
    mailbox: mpsc::Sender<Box<Message>>,
    session: watch::Sender<Option<Session>>,
    vm: watch::Sender<Option<Arc<dyn Vm>>>,
    main: Arc<MainHub>,
    /// Boots and releases, which run to their end.
    tasks: JoinSet<()>,
    /// Whether the guest may be in the middle of an earlier agent's session.
    session_mode: SessionMode,
    /// How the VM's guest can be told something.
    contact: Arc<Contact>,
    /// What concerns the VM that runs: ended with it, so that no late word of it is heard.
    run_tasks: JoinSet<()>,
    /// What the VM's vCPUs are to do.
    vcpus: Option<mpsc::UnboundedSender<VcpuOrder>>,
    /// Whether the VM is to end: nobody needs what is being saved of it.
    is_ending: watch::Sender<bool>,
}

impl Actor {
    async fn run(mut self, mut messages: mpsc::Receiver<Box<Message>>) {
        self.recover().await;
        while self.status.phase != Phase::Destroyed {
            let deadline = self.status.deadline_unix_ms();
            let message = tokio::select! {
                Some(message) = messages.recv() => *message,
                () = sleep_until(&self.node, deadline) => Message::Event(Event::Tick),
                Some(_) = self.tasks.join_next() => continue,
                Some(_) = self.run_tasks.join_next() => continue,
            };
            self.handle(message).await;
        }
        self.main.close();
        self.node.forget_instance(&self.path);
        let made =
            self.node.state.now().desired.instances.get(&self.path).map(|it| it.created_unix_ms);
        if let Some(made) = made {
            self.node.note_gone(|gone| {
                gone.instances.insert(self.path.clone(), made);
            });
        }
        self.node.poke();
    }

    /// Looks for what an earlier agent left in the middle.
    async fn recover(&mut self) {
        match self.status.phase {
            Phase::Created | Phase::Stopped | Phase::Failed | Phase::Sleeping { .. } => {}
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
            | Phase::Stopping { .. } => {
                let message = effects::adopt(&self.node, &self.given, &self.status).await;
                self.handle(message).await;
            }
            Phase::Releasing { .. } | Phase::Destroyed => {
                let gone = effects::gone(&self.node, &self.given, &self.status).await;
                self.handle(Message::Event(gone)).await;
            }
        }
    }

    async fn handle(&mut self, message: Message) {
        let mut told = None;
        let event = match message {
            Message::Event(event) => event,
            Message::Start(given, event) => {
                told = Some(given);
                event
            }
            Message::Launched(vm) => {
                let handle = vm.handle().clone();
                self.session_mode = match self.status.phase {
                    Phase::Starting { begin: StartFrom::Boot, .. } => SessionMode::Fresh,
                    _ => SessionMode::Existing,
                };
                self.take_charge(vm);
                Event::Launched(handle)
            }
            Message::Found(vm) => {
                self.session_mode = SessionMode::Existing;
                self.take_charge(vm);
                Event::FoundAlive
            }
            Message::Session(session, main) => {
                self.contact.end();
                self.contact.met(&session);
                if let Some(attached) = main {
                    let (hub, vm) = (self.main.clone(), self.status.vm.clone());
                    let (path, session) = (self.path.clone(), session.clone());
                    // It outlives the VM until it has written the last words.
                    self.spawn(async move |node| {
                        let status = pump(&node, &path, &hub, *attached, &session).await;
                        Message::MainEnded(vm, status)
                    });
                }
                let ended = session.clone();
                self.session.send_replace(Some(session));
                self.spawn_for_run(async move |_node| {
                    ended.closed().await;
                    Message::SessionEnded
                });
                Event::Ready
            }
            Message::MainEnded(vm, Some(status)) if vm == self.status.vm => {
                Event::MainExited(status)
            }
            Message::Capture(dest, done) => return self.capture(dest, done).await,
            Message::MainEnded(..) => return,
            Message::SessionEnded => {
                self.session.send_replace(None);
                self.contact.let_go();
                if matches!(self.status.phase, Phase::Running { .. }) {
                    self.perform(Effect::Rejoin);
                }
                return;
            }
        };
        if matches!(event, Event::BootFailed { .. }) {
            self.contact.end();
        }
        let event = match (event, &self.status.phase) {
            (Event::Tick, Phase::Starting { .. }) if self.node.lacks_space(&self.path) => {
                Event::LacksSpace
            }
            (event, _) => event,
        };
        let (next, effects) = step(&self.status, event, self.node.clock.now_ms());
        // What is not started by it goes on as what it was.
        let is_start = matches!(next.phase, Phase::Starting { .. }) && next != self.status;
        if let Some(given) = told.filter(|_| is_start) {
            self.given = given;
        }
        if self.status.vm.is_some() && next.vm.is_none() {
            self.vm.send_replace(None);
            self.session.send_replace(None);
            self.contact.reset();
            self.vcpus = None;
            self.run_tasks.abort_all();
        }
        self.is_ending.send_replace(matches!(next.phase, Phase::Stopping { .. }));
        if next.last_death != self.status.last_death
            && let Some(death) = &next.last_death
        {
            self.main.end(death.cause.clone(), self.node.clock.now_ms());
        }
        if next != self.status {
            let (from, to) = (self.status.state(), next.state());
            if from != to {
                tracing::info!(instance = %self.path, %from, %to, generation = next.generation, "state changed");
            }
            self.status = next;
            self.persist().await;
            self.node.poke();
        }
        for effect in effects {
            self.perform(effect);
        }
    }

    /// From now on this VM is the instance's.
    fn take_charge(&mut self, vm: Arc<dyn Vm>) {
        let (orders, received) = mpsc::unbounded_channel();
        self.vcpus = Some(orders);
        self.contact.reset();
        self.run_tasks.spawn(vcpus::work(
            self.node.clone(),
            self.path.clone(),
            vm.clone(),
            (self.session.subscribe(), self.is_ending.subscribe()),
            received,
            self.mailbox.clone(),
        ));
        self.vm.send_replace(Some(vm));
    }

    /// What is needed to open a session with the guest of this VM.
    fn guest_of(&self, vm: Arc<dyn Vm>) -> Guest {
        let (hub, contact) = (self.main.clone(), self.contact.clone());
        Guest { vm, hub, contact, mode: self.session_mode }
    }

    /// Makes a snapshot for others, of what runs, stands still or sleeps.
    async fn capture(&mut self, dest: SnapshotDir, done: oneshot::Sender<Result<(), String>>) {
        let status = Box::new(self.status.clone());
        match self.status.phase {
            Phase::Running { .. } | Phase::Warm { .. } => {
                let given = self.given.clone();
                self.order(VcpuOrder::Capture { dest, status, given, done });
            }
            Phase::Sleeping { .. } => {
                // Here, so that it is not woken meanwhile.
                let copied = sleep::copy_for_others(&self.node, &self.given, &status, &dest).await;
                let _ = done.send(copied.map_err(|error| chain(&error)));
            }
            _ => {
                let state = self.status.activity().unwrap_or("not running");
                let _ = done.send(Err(format!("it is {state}: wait until it runs or sleeps")));
            }
        }
    }

    fn order(&self, order: VcpuOrder) {
        if let Some(vcpus) = &self.vcpus {
            // Without a VM there are no vCPUs.
            let _ = vcpus.send(order);
        }
    }

    /// Makes the status durable, however long that takes: no effect may run before.
    async fn persist(&self) {
        let key = record::instance_status_key(&self.path);
        let ops = if self.status.phase == Phase::Destroyed {
            let keys = [key, record::local_key(&self.path)];
            Ok(keys.map(|key| Op::Delete { key }).to_vec())
        } else {
            encode(key, &versioned(&self.status)).map(|op| vec![op])
        };
        self.node.write_at_last(&format!("writing the status of {}", self.path), ops).await;
    }

    /// Runs a task to its end; its message comes back through the mailbox.
    fn spawn<F>(&mut self, task: impl FnOnce(Arc<Node>) -> F)
    where
        F: Future<Output = Message> + Send + 'static,
    {
        let task = report(self.mailbox.clone(), task(self.node.clone()));
        self.tasks.spawn(task);
    }

    /// The same for as long as the present VM runs.
    fn spawn_for_run<F>(&mut self, task: impl FnOnce(Arc<Node>) -> F)
    where
        F: Future<Output = Message> + Send + 'static,
    {
        let task = report(self.mailbox.clone(), task(self.node.clone()));
        self.run_tasks.spawn(task);
    }

    fn perform(&mut self, effect: Effect) {
        let (path, given) = (self.path.clone(), self.given.clone());
        let vm = self.vm.borrow().clone();
        match effect {
            Effect::Boot => {
                let status = self.status.clone();
                self.spawn(async move |node| effects::boot(&node, &given, &status).await);
            }
            Effect::Restore => {
                let status = self.status.clone();
                self.spawn(async move |node| sleep::restore(&node, &given, &status).await);
            }
            Effect::Pause => self.order(VcpuOrder::Pause),
            Effect::Resume => self.order(VcpuOrder::Resume),
            Effect::Suspend { request, hooks_ms } => {
                let status = Box::new(self.status.clone());
                self.order(VcpuOrder::Suspend { request, hooks_ms, status, given });
            }
            Effect::Watch => {
                if let Some(vm) = vm {
                    self.spawn_for_run(async move |node| {
                        effects::watch_vm(&node, &path, &*vm).await
                    });
                }
            }
            Effect::Greet => {
                let woken = wake_reason(&self.status.phase);
                let session = self.session.borrow().clone();
                let Some(vm) = vm else { return };
                if let (Some(session), Some(reason)) = (session, woken) {
                    // It stood still with its session.
                    return self.spawn_for_run(async move |node| {
                        effects::greet_again(&node, &given, &*vm, &session, reason).await
                    });
                }
                let is_boot = self.session_mode == SessionMode::Fresh;
                if self.contact.begin(is_boot) {
                    let guest = self.guest_of(vm);
                    self.spawn_for_run(async move |node| {
                        effects::greet(&node, &given, &guest, woken).await
                    });
                }
            }
            Effect::Rejoin => {
                let has_session = self.session.borrow().is_some();
                if let Some(vm) = vm.filter(|_| !has_session)
                    && self.contact.begin(false)
                {
                    let guest = Guest { mode: SessionMode::Existing, ..self.guest_of(vm) };
                    self.spawn_for_run(async move |node| {
                        effects::rejoin(&node, &given, &guest).await
                    });
                }
            }
            Effect::Shutdown { grace_ms } => {
                let contact = self.contact.clone();
                if let Some(vm) = vm {
                    self.spawn_for_run(async move |_node| {
                        effects::shutdown(&path, &*vm, &contact, grace_ms).await
                    });
                }
            }
            Effect::Kill => {
                if let Some(vm) = vm {
                    // Its end comes back through the watch; a failure is tried again at the tick.
                    self.run_tasks.spawn(async move { effects::kill(&path, &*vm).await });
                }
            }
            Effect::Release | Effect::ReleaseAll => {
                let everything = effect == Effect::ReleaseAll;
                let status = self.status.clone();
                self.spawn(async move |node| {
                    effects::release(&node, &given, &status, everything).await
                });
            }
            // The status that brought it is durable, which removed the records.
            Effect::Forget => {}
        }
    }
}

/// Why a guest goes on, if it was stopped before.
fn wake_reason(phase: &Phase) -> Option<WakeReason> {
    let Phase::Starting { begin, .. } = phase else { return None };
    match begin {
        StartFrom::Boot => None,
        StartFrom::Warm => Some(WakeReason::Resumed),
        StartFrom::Own => Some(WakeReason::Restored),
        StartFrom::Shared { .. } => Some(WakeReason::Forked),
    }
}

async fn report(mailbox: mpsc::Sender<Box<Message>>, task: impl Future<Output = Message>) {
    let message = task.await;
    // The mailbox is closed only when the actor has ended.
    let _ = mailbox.send(Box::new(message)).await;
}

async fn sleep_until(node: &Node, deadline_unix_ms: Option<u64>) {
    match deadline_unix_ms {
        Some(at) => tokio::time::sleep_until(node.clock.instant(at)).await,
        None => std::future::pending().await,
    }
}
