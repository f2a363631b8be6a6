//! The node: it is given a whole document of what it is to have, and reports what it has.
//!
//! ```text
//!  document ──> state ──> loop: plan (pure) ──> instance actors, builds, disks ──> host seams
//!                 ^                                    │
//!                 └── status, own decisions ───────────┴──> report
//! ```
//!
//! It does not know who wrote its document: a person's agent, or a coordinator. It never changes what is
//! desired; what it decides by itself (to wake what somebody needs, to put to rest what nobody uses) is a
//! record of its own on top of the document. Each actor runs [`mvm_core::lifecycle`] and owns its
//! microVM. When the node ends, microVMs go on; the next one adopts them.

mod actor;
mod attach;
mod bases;
mod builder;
mod capture;
mod clock;
mod configs;
mod contact;
mod cut_off;
mod disks;
mod door;
mod effects;
mod exec;
mod forward;
mod guest_clocks;
mod housekeeping;
mod images;
mod logs;
mod main_process;
mod neighbours;
mod network;
mod node;
mod publish;
mod reconcile;
mod report;
mod sessions;
mod shared;
mod sleep;
mod sleep_policy;
mod space;
mod spares;
mod ssh;
mod state;
mod vcpus;
mod wake;
mod workers;

use std::sync::Arc;
use std::time::Duration;

use mvm_core::document::{NodeDocument, NodeReport};
use mvm_core::name::Selector;
use mvm_core::record::Desired;
use mvm_host::space::Reserve;
use mvm_store::{CommitError, Store};
use mvm_wire::door::{Answer, Channel, Question, Veto};
use mvm_wire::{ApiError, Connection, ConnectionError, HangUp};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

pub use clock::Clock;
pub use node::{Host, NodeConfig};
pub use publish::Prepared;

use node::Node;
use publish::Listeners;
use state::State;

/// A node that runs, until it is dropped or ended.
pub struct RunningNode {
    node: Arc<Node>,
    reports: watch::Receiver<Arc<NodeReport>>,
    tasks: Mutex<JoinSet<()>>,
}

impl RunningNode {
    /// Reads the node's own records, adopts what runs and starts to work on the document. What its ports
    /// are asked for after this, it is there for.
    ///
    /// # Errors
    /// The records cannot be read.
    pub async fn start(
        config: NodeConfig,
        host: Host,
        store: Arc<dyn Store>,
        document: &NodeDocument,
    ) -> Result<Self, CommitError> {
        let state = State::load(store, Reserve::of(&config.state_dir), document).await?;
        let node = Arc::new(Node::new(config, host, state, (document.epoch, document.generation)));
        let mut listeners = Listeners::default();
        listeners.ensure(&node, &node.state.now().desired).await;
        let (sender, reports) = watch::channel(Arc::new(report::make(&node)));
        let mut tasks = JoinSet::new();
        tasks.spawn(report::run(node.clone(), sender));
        tasks.spawn(reconcile::run(node.clone(), listeners));
        Ok(Self { node, reports, tasks: Mutex::new(tasks) })
    }

    /// From now on this is what the node is to have. An earlier document than the present one is ignored.
    pub fn set_document(&self, document: &NodeDocument) {
        self.node.set_document(document);
    }

    /// What the node has, now and after each change.
    pub fn reports(&self) -> watch::Receiver<Arc<NodeReport>> {
        self.reports.clone()
    }

    /// Takes what a document that is about to be written needs of the machine, so that one that cannot
    /// be carried out is not written: ports, and net ids.
    ///
    /// # Errors
    /// Somebody else has some of it.
    pub async fn prepare(&self, before: &Desired, after: &Desired) -> Result<Prepared, Veto> {
        publish::prepare(&self.node, before, after).await
    }

    /// Answers a question.
    ///
    /// # Errors
    /// The machine, or the guest that it is about, failed, or cannot be asked that.
    pub async fn ask(&self, question: Question) -> Result<Answer, ApiError> {
        door::ask(&self.node, question).await
    }

    /// Carries bytes between a connection and an instance, until either ends.
    ///
    /// # Errors
    /// The other end of the connection hung up.
    pub async fn open(
        &self,
        selector: &Selector,
        channel: Channel,
        connection: Connection,
        hang_up: &dyn HangUp,
    ) -> Result<(), ConnectionError> {
        door::open(&self.node, selector, channel, connection, hang_up).await
    }

    /// Has the loop make a round now, and says how long it took: for benchmarks.
    pub async fn round(&self) -> Duration {
        let mut rounds = self.node.rounds();
        rounds.mark_unchanged();
        self.node.poke();
        // The loop may just be ending.
        let _ = rounds.changed().await;
        rounds.borrow().1
    }

    /// Ends the node; microVMs keep running.
    pub async fn end(&self) {
        self.tasks.lock().await.shutdown().await;
    }
}
