//! Published ports: the node listens, and carries each connection to an instance of the pool.
//!
//! ```text
//!  client ──> listener ──> pick: of those that run, the one with fewest ──> a socket in the guest
//!                                connections; if none runs, one is woken
//! ```
//!
//! Which listeners there are follows the desired documents, round by round. The way into a guest is
//! the host-guest channel, so a port is served without a network, and an instance is woken by a
//! connection exactly as it is by an exec. What keeps a port from being served is kept for whoever
//! looks at the pool; the client, whose protocol is not known here, sees a reset.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_core::guest::{ErrorKind, ForwardTarget};
use mvm_core::lifecycle::Phase;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::publish::Publish;
use mvm_core::record::{Desired, Existence};
use mvm_host::guest::{ExecInput, ForwardEvent, ForwardEvents, Session, SessionError};
use mvm_wire::ApiError;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::node::Node;
use crate::streams::{self, guest_error};

/// Most connections of one published port, those that wait for an instance included.
const CONNECTIONS_MAX: usize = 1024;
/// How long a client waits for an instance that is started or woken for it.
const REACH_LIMIT: Duration = Duration::from_secs(60);
/// How long a socket in a guest has to accept, and the guest to say so.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long after it is running a guest may take until its program listens, in milliseconds.
const SETTLE_MS: u64 = 10_000;
/// How often a program that does not listen yet is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// How long nobody is let in when the machine cannot make a connection, such as without descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// What is read from a client at once.
const PIECE: usize = 64 * 1024;

/// What is known of published ports at present.
#[derive(Default)]
pub(crate) struct Published(Mutex<State>);

#[derive(Default)]
struct State {
    problems: BTreeMap<(PoolPath, Publish), String>,
    loads: BTreeMap<InstancePath, Load>,
    /// Connections so far.
    connections: u64,
}

/// What an instance carries.
#[derive(Default)]
struct Load {
    open: u64,
    /// The number of the last connection that it was given.
    last: u64,
}

impl Published {
    /// What keeps ports of a pool from being served, each with its port.
    pub(crate) fn problems_of(&self, pool: &PoolPath) -> Vec<String> {
        let state = self.state();
        let of_pool = state.problems.iter().filter(|((of, _), _)| of == pool);
        of_pool.map(|((_, publish), problem)| format!("{publish}: {problem}")).collect()
    }

    /// Open connections to a pool's published ports.
    pub(crate) fn connections_of(&self, pool: &PoolPath) -> u64 {
        let state = self.state();
        state.loads.iter().filter(|(path, _)| path.pool == *pool).map(|(_, load)| load.open).sum()
    }

    fn set_problem(&self, pool: &PoolPath, publish: Publish, problem: Option<String>) {
        let key = (pool.clone(), publish);
        let mut state = self.state();
        match problem {
            Some(problem) => {
                // Once for each cause: clients may come again and again.
                if state.problems.get(&key) != Some(&problem) {
                    tracing::warn!(%pool, %publish, problem, "a published port is not served");
                }
                state.problems.insert(key, problem);
            }
            None => drop(state.problems.remove(&key)),
        }
    }

    /// Gives one more connection to the instance that has fewest, of those the one that was longest
    /// without a new one.
    fn pick(&self, ready: Vec<(InstancePath, Session)>) -> Option<(InstancePath, Session)> {
        let state = self.state();
        let load = |path: &InstancePath| {
            state.loads.get(path).map_or((0, 0), |load| (load.open, load.last))
        };
        ready.into_iter().min_by_key(|(path, _)| load(path))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that an instance carries, until it is dropped.
struct Carried<'a> {
    published: &'a Published,
    instance: InstancePath,
}

impl<'a> Carried<'a> {
    fn by(published: &'a Published, instance: InstancePath) -> Self {
        let mut state = published.state();
        state.connections += 1;
        let last = state.connections;
        let load = state.loads.entry(instance.clone()).or_default();
        *load = Load { open: load.open + 1, last };
        drop(state);
        Self { published, instance }
    }
}

impl Drop for Carried<'_> {
    fn drop(&mut self) {
        if let Some(load) = self.published.state().loads.get_mut(&self.instance) {
            load.open -= 1;
        }
    }
}

/// The ports that are listened on, each with the task that serves it.
#[derive(Default)]
pub(crate) struct Listeners {
    open: BTreeMap<(PoolPath, Publish), JoinHandle<()>>,
}

impl Listeners {
    /// Listens on what is desired, and on nothing else.
    pub(crate) async fn ensure(&mut self, node: &Arc<Node>, desired: &Desired) {
        let kept = desired.pools.values().filter(|pool| pool.existence == Existence::Kept);
        let wanted: BTreeSet<(PoolPath, Publish)> = kept
            .flat_map(|pool| pool.spec.publish.iter().map(|publish| (pool.path.clone(), *publish)))
            .collect();
        let is_over = |key: &(PoolPath, Publish), task: &JoinHandle<()>| {
            !wanted.contains(key) || task.is_finished()
        };
        let over: Vec<_> = self.open.extract_if(.., |key, task| is_over(key, task)).collect();
        for (_, task) in over {
            task.abort();
            // Another pool may want the port right now.
            drop(task.await);
        }
        {
            let mut state = node.published.state();
            state.problems.retain(|key, _| wanted.contains(key));
            state.loads.retain(|path, load| load.open > 0 || desired.instances.contains_key(path));
        }
        for (pool, publish) in wanted {
            if self.open.contains_key(&(pool.clone(), publish)) {
                continue;
            }
            match TcpListener::bind(publish.listen()).await {
                Ok(listener) => {
                    node.published.set_problem(&pool, publish, None);
                    let serve = serve(node.clone(), pool.clone(), publish, listener);
                    self.open.insert((pool, publish), tokio::spawn(serve));
                }
                // Tried again in the next round.
                Err(error) => {
                    let problem = format!("cannot listen: {error}");
                    node.published.set_problem(&pool, publish, Some(problem));
                }
            }
        }
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.open.values().for_each(JoinHandle::abort);
    }
}

/// Lets clients in, until it is aborted; the connections end with it.
async fn serve(node: Arc<Node>, pool: PoolPath, publish: Publish, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) if connections.len() < CONNECTIONS_MAX => {
                    connections.spawn(carry(node.clone(), pool.clone(), publish, socket));
                }
                Ok((socket, _)) => {
                    let problem = format!("{CONNECTIONS_MAX} connections are open already");
                    node.published.set_problem(&pool, publish, Some(problem));
                    reset(&socket);
                }
                Err(error) => {
                    let problem = format!("cannot accept a connection: {error}");
                    node.published.set_problem(&pool, publish, Some(problem));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection to its end.
async fn carry(node: Arc<Node>, pool: PoolPath, publish: Publish, mut socket: TcpStream) {
    let reached = reach(&node, &pool, publish.guest_port());
    let problem = match tokio::time::timeout(REACH_LIMIT, reached).await {
        Ok(Ok((carried, events, input))) => {
            node.published.set_problem(&pool, publish, None);
            if !relay(&mut socket, events, input).await {
                reset(&socket);
            }
            return drop(carried);
        }
        Ok(Err(error)) => error.message,
        Err(_) => format!("no instance of {pool} was ready within {REACH_LIMIT:?}"),
    };
    node.published.set_problem(&pool, publish, Some(problem));
    reset(&socket);
}

/// A connected socket in a guest of the pool.
async fn reach<'a>(
    node: &'a Arc<Node>,
    pool: &PoolPath,
    port: u16,
) -> Result<(Carried<'a>, ForwardEvents, ExecInput), ApiError> {
    loop {
        let ready = node.published.pick(streams::ready(node, pool));
        let (instance, session) = match ready {
            Some(ready) => ready,
            None => streams::session(node, &Selector::Pool(pool.clone())).await?,
        };
        let carried = Carried::by(&node.published, instance);
        match connect(&session, port).await {
            Ok(Some((events, input))) => return Ok((carried, events, input)),
            // It fell asleep or ended meanwhile.
            Ok(None) => {}
            Err(error) if is_settling(node, &carried.instance, &error) => {}
            Err(error) => return Err(guest_error(&carried.instance, &error)),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether a guest that runs nobody on the port may still come to it.
fn is_settling(node: &Node, instance: &InstancePath, error: &SessionError) -> bool {
    let is_refused = matches!(error, SessionError::Guest { error, .. }
        if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Denied | ErrorKind::System));
    let is_young = match node.state.now().status(instance).phase {
        Phase::Running { since_unix_ms } => node.clock.now_ms() < since_unix_ms + SETTLE_MS,
        _ => true,
    };
    is_refused && is_young
}

/// Connects to a port on the guest's loopback; nothing comes of it if the session is over.
async fn connect(
    session: &Session,
    port: u16,
) -> Result<Option<(ForwardEvents, ExecInput)>, SessionError> {
    let target = ForwardTarget::Tcp { address: Ipv4Addr::LOCALHOST.into(), port };
    let (mut events, input) = session.forward(target, CONNECT_TIMEOUT).await?.split();
    match events.next().await {
        Some(Ok(_)) => Ok(Some((events, input))),
        Some(Err(error)) => Err(error),
        None => Ok(None),
    }
}

/// Carries bytes both ways until both directions have ended; tells whether they have, or the
/// connection broke off in the guest or at the client.
async fn relay(socket: &mut TcpStream, mut events: ForwardEvents, mut input: ExecInput) -> bool {
    // What is small is somebody's question or answer.
    let _ = socket.set_nodelay(true);
    let (mut from_client, mut to_client) = socket.split();
    let out = async {
        loop {
            let is_written = match events.next().await {
                Some(Ok(ForwardEvent::Connected)) => Ok(()),
                Some(Ok(ForwardEvent::Data(bytes))) => to_client.write_all(&bytes).await,
                Some(Ok(ForwardEvent::Eof)) => to_client.shutdown().await,
                Some(Ok(ForwardEvent::Closed)) => return true,
                Some(Err(_)) | None => return false,
            };
            if is_written.is_err() {
                return false;
            }
        }
    };
    let into = async {
        let mut piece = vec![0; PIECE];
        loop {
            match from_client.read(&mut piece).await {
                Ok(0) => {
                    input.close_stdin();
                    // The other direction may go on.
                    pending::<()>().await;
                }
                // A failure means that the socket takes no more, which the other direction tells.
                Ok(len) => drop(input.write_stdin(&piece[..len]).await),
                Err(_) => return false,
            }
        }
    };
    tokio::select! {
        is_over = out => is_over,
        is_over = into => is_over,
    }
}

/// Makes the client see that its connection failed, and not that it ended.
fn reset(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _ = socket.set_zero_linger();
}
