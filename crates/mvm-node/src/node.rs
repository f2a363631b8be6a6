//! One node: its state, its host seams, and the actors of its instances.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use imbl::OrdMap;
use mvm_core::admit::Capacity;
use mvm_core::document::{Gone, Needs, NodeDocument};
use mvm_core::name::{InstanceId, InstancePath};
use mvm_core::plan::Waiting;
use mvm_host::disks::Disks;
use mvm_host::guest::Session;
use mvm_host::images::Images;
use mvm_host::net::Network;
use mvm_host::platform::MemoryGauge;
use mvm_host::snapshots::Trust;
use mvm_host::state_dir::{InstanceDir, StateDir};
use mvm_host::vmm::{Vm, Vmm};
use mvm_store::{Op, StoreError};
pub(crate) use mvm_wire::chain;
use tokio::sync::{Notify, mpsc, watch};

use crate::actor::Message;
use crate::clock::Clock;
use crate::configs::ImageConfigs;
use crate::cut_off::CutOff;
use crate::main_process::MainHub;
use crate::network::Made;
use crate::publish::Published;
use crate::shared::SharedSnapshots;
use crate::sleep_policy::Activities;
use crate::space;
use crate::state::State;

/// Pause before a record that could not be written is written again.
pub(crate) const WRITE_RETRY: Duration = Duration::from_secs(1);

/// The seams to the machine that instances run on.
#[derive(Clone)]
pub struct Host {
    /// Starts microVMs.
    pub vmm: Arc<dyn Vmm>,
    /// Bridges, taps and the firewall.
    pub network: Arc<dyn Network>,
    /// Images and writable layers.
    pub images: Arc<dyn Images>,
    /// Data disks.
    pub disks: Arc<dyn Disks>,
    /// The machine's memory.
    pub memory: MemoryGauge,
}

/// What a node is set up with.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The state directory.
    pub state_dir: StateDir,
    /// What the node can hold.
    pub capacity: Capacity,
    /// Instances that may be starting at once.
    pub max_starting: usize,
    /// Why this VMM and accelerator were chosen, for people.
    pub chosen_because: String,
    /// What executes the instructions of new microVMs.
    pub accel: mvm_core::vmm::Accel,
    /// Files that the agent may have open at once.
    pub open_files: u64,
    /// What time it is.
    pub clock: Clock,
}

/// What others may ask of a running instance.
#[derive(Clone)]
pub(crate) struct InstanceHandle {
    /// The actor's mailbox.
    pub(crate) mailbox: mpsc::Sender<Box<Message>>,
    /// The session with the guest, while there is one.
    pub(crate) session: watch::Receiver<Option<Session>>,
    /// The microVM, while there is one.
    pub(crate) vm: watch::Receiver<Option<Arc<dyn Vm>>>,
    /// What the main process does.
    pub(crate) main: Arc<MainHub>,
}

/// One node.
pub(crate) struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) host: Host,
    pub(crate) state: State,
    pub(crate) clock: Clock,
    instances: Mutex<BTreeMap<InstancePath, InstanceHandle>>,
    /// Epoch and generation of the document that the state has in it.
    document: Mutex<(u64, u64)>,
    waiting: watch::Sender<OrdMap<InstancePath, Waiting>>,
    /// What was to go and is gone.
    gone: Mutex<Gone>,
    /// What only control can do.
    needs: Mutex<Needs>,
    /// Raised when there is something else to report than the state.
    news: watch::Sender<u64>,
    problems: Mutex<BTreeMap<String, String>>,
    /// Instances that stand still because the host's filesystem is full.
    lacking_space: Mutex<BTreeSet<InstancePath>>,
    poke: Notify,
    /// How many rounds there were, and how long the last one took.
    rounds: watch::Sender<(u64, Duration)>,
    /// What has been made of the machine's network.
    pub(crate) network: Made,
    /// Running microVMs that have lost their taps.
    pub(crate) cut_off: CutOff,
    /// Connections to published ports.
    pub(crate) published: Published,
    /// What instances of pools with a sleep policy do.
    pub(crate) activities: Activities,
    /// Snapshots that instances begin from.
    pub(crate) shared: SharedSnapshots,
    /// Files of snapshots that need not be read again.
    pub(crate) trust: Arc<Trust>,
    /// Shared by builds; whoever removes images has it alone.
    pub(crate) images: tokio::sync::RwLock<()>,
    /// What images say, of those that were looked at.
    pub(crate) image_configs: ImageConfigs,
}

impl Node {
    pub(crate) fn new(config: NodeConfig, host: Host, state: State, document: (u64, u64)) -> Self {
        let clock = config.clock;
        let shared = SharedSnapshots::new(config.state_dir.clone());
        let published = Published::new(config.open_files);
        Self {
            config,
            host,
            state,
            clock,
            instances: Mutex::default(),
            document: Mutex::new(document),
            waiting: watch::Sender::default(),
            gone: Mutex::default(),
            needs: Mutex::default(),
            news: watch::Sender::new(0),
            problems: Mutex::default(),
            lacking_space: Mutex::default(),
            poke: Notify::new(),
            rounds: watch::Sender::default(),
            network: Made::default(),
            cut_off: CutOff::default(),
            published,
            activities: Activities::default(),
            shared,
            trust: Arc::default(),
            images: tokio::sync::RwLock::default(),
            image_configs: ImageConfigs::default(),
        }
    }

    /// From now on this is what the node is to have, unless it was given a later document.
    pub(crate) fn set_document(&self, document: &NodeDocument) {
        let version = (document.epoch, document.generation);
        {
            let mut present = self.document.lock().unwrap_or_else(PoisonError::into_inner);
            if version <= *present {
                return;
            }
            self.state.set_document(document);
            *present = version;
        }
        self.lock_gone().retain_of(&document.desired);
        self.announce();
        self.poke();
    }

    /// Epoch and generation of the document that the state has in it, at least.
    pub(crate) fn document(&self) -> (u64, u64) {
        *self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of an instance.
    pub(crate) fn instance_dir(&self, id: &InstanceId) -> InstanceDir {
        self.config.state_dir.instance(id)
    }

    /// Makes the loop run its next round now.
    pub(crate) fn poke(&self) {
        self.poke.notify_one();
    }

    /// Resolves when the loop was poked.
    pub(crate) async fn poked(&self) {
        self.poke.notified().await;
    }

    /// Notes that a round took this long.
    pub(crate) fn note_round(&self, took: Duration) {
        self.rounds.send_modify(|(number, last)| (*number, *last) = (*number + 1, took));
    }

    /// How many rounds there were, and how long the last one took.
    pub(crate) fn rounds(&self) -> watch::Receiver<(u64, Duration)> {
        self.rounds.subscribe()
    }

    /// The handle of an instance's actor.
    pub(crate) fn instance(&self, path: &InstancePath) -> Option<InstanceHandle> {
        self.lock_instances().get(path).cloned()
    }

    /// Adds an instance's actor.
    pub(crate) fn add_instance(&self, path: InstancePath, handle: InstanceHandle) {
        self.lock_instances().insert(path, handle);
    }

    /// Forgets an instance's actor.
    pub(crate) fn forget_instance(&self, path: &InstancePath) {
        self.lock_instances().remove(path);
    }

    fn lock_instances(&self) -> std::sync::MutexGuard<'_, BTreeMap<InstancePath, InstanceHandle>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why instances wait, as of the last round.
    pub(crate) fn waiting(&self) -> watch::Receiver<OrdMap<InstancePath, Waiting>> {
        self.waiting.subscribe()
    }

    /// Publishes why instances wait.
    pub(crate) fn set_waiting(&self, waiting: BTreeMap<InstancePath, Waiting>) {
        self.waiting.send_if_modified(|before| {
            let has_changed = !before.iter().eq(&waiting);
            if has_changed {
                *before = waiting.into_iter().collect();
            }
            has_changed
        });
    }

    /// Notes what was to go and is gone, or what only control can do.
    pub(crate) fn note_gone(&self, note: impl FnOnce(&mut Gone)) {
        note(&mut self.lock_gone());
        self.announce();
    }

    /// What was to go, and is gone.
    pub(crate) fn gone(&self) -> Gone {
        self.lock_gone().clone()
    }

    fn lock_gone(&self) -> std::sync::MutexGuard<'_, Gone> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what only control can do.
    pub(crate) fn set_needs(&self, set: impl FnOnce(&mut Needs)) {
        let has_changed = {
            let mut needs = self.needs.lock().unwrap_or_else(PoisonError::into_inner);
            let before = needs.clone();
            set(&mut needs);
            *needs != before
        };
        if has_changed {
            self.announce();
        }
    }

    /// What only control can do.
    pub(crate) fn needs(&self) -> Needs {
        self.needs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has the next report made.
    pub(crate) fn announce(&self) {
        self.news.send_modify(|news| *news += 1);
    }

    /// Changes when there is something else to report than the state.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Records that an instance stands still because the host's filesystem is full, or does no longer.
    pub(crate) fn set_lacks_space(&self, path: &InstancePath, lacks_space: bool) {
        let has_changed = {
            let mut lacking = self.lock_lacking();
            match lacks_space {
                true => lacking.insert(path.clone()),
                false => lacking.remove(path),
            }
        };
        if has_changed {
            let problem = lacks_space.then(|| space::words(self));
            self.set_problem(&format!("instance {path}"), problem);
            self.announce();
        }
    }

    /// The instances that stand still because the host's filesystem is full.
    pub(crate) fn lacking_space(&self) -> BTreeSet<InstancePath> {
        self.lock_lacking().clone()
    }

    /// Whether an instance stands still because the host's filesystem is full.
    pub(crate) fn lacks_space(&self, path: &InstancePath) -> bool {
        self.lock_lacking().contains(path)
    }

    fn lock_lacking(&self) -> std::sync::MutexGuard<'_, BTreeSet<InstancePath>> {
        self.lacking_space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes records, however long that takes: a write that fails is a problem until it succeeds.
    pub(crate) async fn write_at_last(&self, what: &str, ops: Result<Vec<Op>, StoreError>) {
        loop {
            let written = match &ops {
                Ok(ops) => self.state.write(ops.clone()).await.map_err(|error| chain(&error)),
                Err(error) => Err(chain(error)),
            };
            let is_written = written.is_ok();
            self.set_problem(what, written.err());
            if is_written {
                return;
            }
            tokio::time::sleep(WRITE_RETRY).await;
        }
    }

    /// Records that something of the node itself fails, or works again.
    pub(crate) fn set_problem(&self, what: &str, problem: Option<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => {
                if problems.get(what) != Some(&problem) {
                    tracing::warn!(what, problem, "the node has a problem");
                }
                problems.insert(what.to_owned(), problem);
            }
            None => {
                if problems.remove(what).is_some() {
                    tracing::info!(what, "the node's problem is gone");
                }
            }
        }
    }

    /// What fails at present.
    pub(crate) fn problems(&self) -> Vec<String> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems.iter().map(|(what, problem)| format!("{what}: {problem}")).collect()
    }
}

/// Milliseconds since then, for the log.
pub(crate) fn ms_since(began: tokio::time::Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
