//! The agent: control and a node in one process, on one state directory and one socket.
//!
//! What each of them does is its own affair ([`mvm_control`], [`mvm_node`]); here they are put together, on
//! what this machine has, and reached.

mod claim;
mod link;
mod lock;
mod setup;
mod signals;
mod socket;

use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mvm_control::{Ambient, Control, Kept, Principal};
use mvm_host::space::Reserve;
use mvm_host::state_dir::StateDir;
use mvm_store::{CommitError, OpenError, SqliteStore, Store, StoreError};
use mvm_wire::{Connection, NeverHangsUp};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

pub use claim::{Claimed, claim};
pub use lock::{LockError, is_held};
pub use mvm_host::vmm::firecracker::Isolation;
pub use mvm_node::{Clock, Host, NodeConfig};
pub use setup::{ServeOptions, SetupError};

use link::Local;
use signals::Signals;

/// Versions that the store's history keeps.
const HISTORY: u64 = 1_000;

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
    let (dir, open_files) = (config.state_dir.clone(), config.open_files);
    let store = open_store(&dir).await?;
    let node = RunningNode::start(config, host, Arc::new(store)).await?;
    let socket = dir.socket();
    let listener = mvm_host::unix_socket::bind(&socket)
        .map_err(|source| AgentError::Socket { path: socket.clone(), source })?;
    tracing::info!(state_dir = %dir.display(), "serving");
    {
        let mut server = pin!(node.listen(listener, open_files));
        tokio::select! {
            never = &mut server => match never {},
            () = node.stopped() => {}
            () = signals.until_end() => {}
        }
        // The socket goes before the lock, so that a caller never meets a socket of the past; and before the
        // connections, whose callers would take one that is left for that of an agent that died.
        drop(std::fs::remove_file(&socket));
    }
    node.end().await;
    tracing::info!("ended; microVMs keep running");
    Ok(())
}

/// Opens the state; on a full filesystem with the space that was set aside for that.
async fn open_store(dir: &StateDir) -> Result<SqliteStore, OpenError> {
    let database = dir.database();
    let reserve = Reserve::of(dir);
    match SqliteStore::open(&database).await {
        Err(OpenError::Store(_)) if reserve.is_needed() && reserve.give_up() => {
            tracing::warn!("the filesystem is full: the reserve of space is given up");
            SqliteStore::open(&database).await
        }
        opened => opened,
    }
}

/// Control and a node that serve callers in the same process: the agent itself, the simulated fleet of tests.
pub struct RunningNode {
    control: Arc<Control>,
    node: Arc<mvm_node::RunningNode>,
    /// Control's own work.
    upkeep: JoinSet<()>,
    /// What serves connections in memory; it ends with the node.
    connections: Mutex<JoinSet<()>>,
}

impl RunningNode {
    /// Reads the state, adopts what runs and starts to work.
    ///
    /// # Errors
    /// The state cannot be read.
    pub async fn start(
        config: NodeConfig,
        host: Host,
        store: Arc<dyn Store>,
    ) -> Result<Self, CommitError> {
        let clock = config.clock;
        // Without random bits, ids are drawn until one is free.
        let entropy = move || getrandom::u32().unwrap_or(clock.now_ms() as u32);
        Self::start_with(config, host, store, Arc::new(entropy)).await
    }

    /// The same, with ids out of these bits.
    ///
    /// # Errors
    /// The state cannot be read.
    pub async fn start_with(
        config: NodeConfig,
        host: Host,
        store: Arc<dyn Store>,
        entropy: Arc<dyn Fn() -> u32 + Send + Sync>,
    ) -> Result<Self, CommitError> {
        shorten(&*store).await?;
        let kept = Kept::load(store.clone(), spare_of(&config.state_dir)).await?;
        let clock = config.clock;
        let node = mvm_node::RunningNode::start(config, host, store, &kept.document()).await?;
        let node = Arc::new(node);
        let ambient = Ambient { now_ms: Arc::new(move || clock.now_ms()), entropy };
        let link = Arc::new(Local(node.clone()));
        let started = Control::start(kept, link, ambient).await;
        // A node in the same process says what it is.
        let (control, upkeep) = started.map_err(|_| CommitError::Store(StoreError::Closed))?;
        Ok(Self { control, node, upkeep, connections: Mutex::default() })
    }

    /// Opens a connection to control in memory.
    pub fn connect(&self) -> Connection {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let control = self.control.clone();
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            control.serve(Connection::new(theirs), Principal::Process, &NeverHangsUp).await;
        });
        Connection::new(ours)
    }

    /// Serves callers on a socket, of which each may take two of so many open files.
    pub async fn listen(&self, listener: UnixListener, open_files: u64) -> Infallible {
        socket::run(self.control.clone(), listener, open_files).await
    }

    /// Has the node make a round now, and says how long it took: for benchmarks.
    pub async fn round(&self) -> Duration {
        self.node.round().await
    }

    /// Resolves when a caller asked the agent to end.
    pub async fn stopped(&self) {
        self.control.stopped().await;
    }

    /// Ends control and the node; microVMs keep running.
    pub async fn end(mut self) {
        let connections = self.connections.get_mut().unwrap_or_else(PoisonError::into_inner);
        connections.shutdown().await;
        self.upkeep.shutdown().await;
        self.node.end().await;
    }
}

/// Keeps the history that nobody watches short; on a full filesystem it may be long for a while.
async fn shorten(store: &dyn Store) -> Result<(), CommitError> {
    match store.compact(HISTORY).await {
        Ok(_) | Err(StoreError::DiskFull { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Gives up the space that was set aside in a state directory.
fn spare_of(dir: &StateDir) -> mvm_store::GiveUpSpace {
    let reserve = Reserve::of(dir);
    Box::new(move || reserve.give_up())
}
