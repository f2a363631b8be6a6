//! The node daemon: admission, reconcile loop, instance actors and API server.
//!
//! ```text
//!  caller ── Call ──> server ── submit ──> admission (pure) ──> state (store + mirror)
//!                        ^                                          │ poke
//!                        │ watch                                    v
//!                      state <── status ── instance actors <── loop: plan (pure)
//! ```
//!
//! A handler does no work: it writes what is desired and answers. The loop compares desired with
//! observed and tells the actors; each actor runs [`mvm_core::lifecycle`] and owns its microVM.
//! When the agent ends, microVMs go on; the next agent adopts them.

mod actor;
mod attach;
mod builder;
mod claim;
mod clock;
mod configs;
mod contact;
mod cut_off;
mod disks;
mod effects;
mod exec;
mod fork;
mod forward;
mod guest_clocks;
mod images;
mod lists;
mod lock;
mod logs;
mod main_process;
mod neighbours;
mod node;
mod publish;
mod reconcile;
mod server;
mod setup;
mod shared;
mod signals;
mod sleep;
mod sleep_policy;
mod space;
mod spares;
mod ssh;
mod state;
mod streams;
mod submit;
mod suggest;
mod vcpus;
mod views;
mod warm_up;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use mvm_host::space::Reserve;
use mvm_host::unix_socket::HangUp;
use mvm_store::{CommitError, OpenError, SqliteStore, Store};
use mvm_wire::Connection;
use tokio::task::JoinSet;

pub use claim::{Claimed, claim};
pub use clock::Clock;
pub use lock::{LockError, is_held};
pub use mvm_host::vmm::firecracker::Isolation;
pub use node::{Host, NodeConfig};
pub use setup::{ServeOptions, SetupError};

use node::Node;
use publish::Listeners;
use signals::Signals;
use state::State;

/// File in the state directory that is the agent's API socket.
pub const SOCKET: &str = "agent.sock";
/// File in the state directory that is the log of an agent in the background.
pub const LOG: &str = "agent.log";
/// File in the state directory that holds the state.
pub const DATABASE: &str = "mvm.db";

/// Why an agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine cannot run a node, or not as asked.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Another agent has the state directory, or it cannot be told.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A copy cannot be made a state directory of its own.
    #[error("cannot make it a state directory of its own")]
    Claim(#[from] claim::ClaimError),
    /// The state cannot be opened.
    #[error("cannot open the state")]
    Open(#[from] OpenError),
    /// The state cannot be read.
    #[error("cannot read the state")]
    Read(#[from] CommitError),
    /// The socket cannot be made.
    #[error("cannot listen on {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: mvm_host::unix_socket::SocketError,
    },
}

/// Serves a state directory on its socket until told to end, by a call or by SIGTERM or SIGINT.
///
/// # Errors
/// The state directory is in use, the machine cannot run a node as asked, or the state or socket
/// cannot be opened.
pub async fn serve(options: ServeOptions) -> Result<(), AgentError> {
    lock::private_dir(&options.state_dir)
        .map_err(|source| SetupError::StateDir { path: options.state_dir.clone(), source })?;
    let _lock = lock::acquire(&options.state_dir)?;
    let signals = Signals::watch();
    let (config, host) = setup::set_up(&options).await?;
    let dir = config.state_dir.clone();
    let store = open_store(&dir).await?;
    let node = RunningNode::start(config, host, Arc::new(store)).await?;
    let socket = dir.join(SOCKET);
    let listener = mvm_host::unix_socket::bind(&socket)
        .map_err(|source| AgentError::Socket { path: socket.clone(), source })?;
    tracing::info!(state_dir = %dir.display(), "serving");
    tokio::select! {
        never = server::run(node.node.clone(), listener) => match never {},
        () = node.stopped() => {}
        () = signals.until_end() => {}
    }
    // The socket goes before the lock, so that a caller never meets a socket of the past.
    drop(std::fs::remove_file(&socket));
    node.end().await;
    tracing::info!("ended; microVMs keep running");
    Ok(())
}

/// Opens the state; on a full filesystem with the space that was set aside for that.
async fn open_store(dir: &Path) -> Result<SqliteStore, OpenError> {
    let database = dir.join(DATABASE);
    let reserve = Reserve::of(dir);
    match SqliteStore::open(&database).await {
        Err(OpenError::Store(_)) if reserve.is_needed() && reserve.give_up() => {
            tracing::warn!("the filesystem is full: the reserve of space is given up");
            SqliteStore::open(&database).await
        }
        opened => opened,
    }
}

/// A node that serves callers in the same process: the agent itself, the simulated fleet of tests.
pub struct RunningNode {
    node: Arc<Node>,
    tasks: JoinSet<()>,
    /// What serves connections in memory; it ends with the node.
    connections: Mutex<JoinSet<()>>,
}

impl RunningNode {
    /// Reads the state, adopts what runs and starts the loop.
    ///
    /// # Errors
    /// The state cannot be read.
    pub async fn start(
        config: NodeConfig,
        host: Host,
        store: Arc<dyn Store>,
    ) -> Result<Self, CommitError> {
        let state = State::load(store, Reserve::of(&config.state_dir)).await?;
        let node = Arc::new(Node::new(config, host, state));
        // Before anybody asks for a base, which would be taken for a leftover.
        warm_up::end_leftovers(&node).await;
        // Whoever hears that the agent is there may connect to its ports.
        let mut listeners = Listeners::default();
        listeners.ensure(&node, &node.state.now().desired).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(reconcile::run(node.clone(), listeners));
        tasks.spawn(sleep_policy::run(node.clone()));
        tasks.spawn(spares::run(node.clone()));
        tasks.spawn(guest_clocks::run(node.clone()));
        tasks.spawn(neighbours::run(node.clone()));
        Ok(Self { node, tasks, connections: Mutex::default() })
    }

    /// Opens a connection to the node in memory.
    pub fn connect(&self) -> Connection {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let node = self.node.clone();
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            server::serve(&node, Connection::new(theirs), &HangUp::never()).await;
        });
        Connection::new(ours)
    }

    /// Resolves when a caller asked the node to end.
    pub async fn stopped(&self) {
        self.node.stop.notified().await;
    }

    /// Ends the node; microVMs keep running.
    pub async fn end(mut self) {
        self.node.stop.notify_waiters();
        let connections = self.connections.get_mut().unwrap_or_else(PoisonError::into_inner);
        connections.abort_all();
        self.tasks.shutdown().await;
    }
}
