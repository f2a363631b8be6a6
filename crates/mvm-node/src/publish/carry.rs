//! Each connection of a published port: let in, carried to an instance, and ended with its client.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::{ErrorKind, Feature};
use mvm_core::lifecycle::Phase;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::publish::Publish;
use mvm_host::guest::{ExecInput, ForwardEvent, ForwardEvents, Session, SessionError};
use mvm_host::listen::keep_alive;
use mvm_wire::ApiError;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::tcp::ReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Carried, Place};
use crate::node::Node;
use crate::sessions::{self, guest_error};

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

/// Lets clients in, until it is aborted; the connections end with it.
pub(super) async fn serve(
    node: Arc<Node>,
    pool: PoolPath,
    publish: Publish,
    listener: TcpListener,
) {
    let mut connections = JoinSet::new();
    // However many wait, one of them looks for an instance.
    let turn = Arc::new(Semaphore::new(1));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, client)) => match Place::take(&node, &pool, client.ip()) {
                    Ok(place) => {
                        let (node, pool, turn) = (node.clone(), pool.clone(), turn.clone());
                        connections.spawn(async move {
                            carry(&node, &pool, publish, socket, &turn).await;
                            drop(place);
                        });
                    }
                    Err(full) => {
                        node.published.refuse(&pool, publish, full.to_string());
                        reset(&socket);
                    }
                },
                Err(error) => {
                    let problem = format!("cannot accept a connection: {error}");
                    node.published.refuse(&pool, publish, problem);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection to its end.
async fn carry(
    node: &Arc<Node>,
    pool: &PoolPath,
    publish: Publish,
    mut socket: TcpStream,
    turn: &Semaphore,
) {
    if let Err(error) = keep_alive(&socket) {
        // It may have gone already.
        tracing::debug!(%pool, %publish, %error, "a client cannot be kept an eye on");
    }
    let (from_client, _) = socket.split();
    let reached = reach(node, pool, publish.guest_port(), turn);
    let reached = tokio::select! {
        reached = tokio::time::timeout(REACH_LIMIT, reached) => reached,
        // Nobody is woken, or waited for, for somebody who has gone.
        () = broken(&from_client) => return,
    };
    let problem = match reached {
        Ok(Ok((carried, is_local, (events, input)))) => {
            let problem = is_local.then(|| looks_local(&carried.instance));
            node.published.set_problem(pool, publish, problem);
            if !relay(&mut socket, events, input).await {
                reset(&socket);
            }
            return drop(carried);
        }
        Ok(Err(error)) => error.message,
        Err(_) => format!("no instance of {pool} was ready within {REACH_LIMIT:?}"),
    };
    node.published.refuse(pool, publish, problem);
    reset(&socket);
}

fn looks_local(instance: &InstancePath) -> String {
    format!(
        "programs in {instance} take its clients for local ones, because its guest agent is of an earlier version and it has no network; `mvm restart {}` gives it this version's",
        instance.id
    )
}

/// A connection that an instance carries, and whether it looks to the program there as if it came from
/// the same machine.
type Reached<'a> = (Carried<'a>, bool, (ForwardEvents, ExecInput));

/// A connected socket in a guest of the pool.
async fn reach<'a>(
    node: &'a Arc<Node>,
    pool: &PoolPath,
    port: u16,
    turn: &Semaphore,
) -> Result<Reached<'a>, ApiError> {
    if let Some((carried, session)) = node.published.pick(sessions::ready(node, pool))
        && let Some(reached) = attempt(node, carried, &session, port).await?
    {
        return Ok(reached);
    }
    // It is never closed.
    let _turn = turn.acquire().await;
    loop {
        let (carried, session) = match node.published.pick(sessions::ready(node, pool)) {
            Some(ready) => ready,
            None => {
                let found = sessions::session(node, &Selector::Pool(pool.clone())).await?;
                (Carried::by(&node.published, found.0), found.1)
            }
        };
        if let Some(reached) = attempt(node, carried, &session, port).await? {
            return Ok(reached);
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Connects to one instance; `None` if it is worth another try.
async fn attempt<'a>(
    node: &Node,
    carried: Carried<'a>,
    session: &Session,
    port: u16,
) -> Result<Option<Reached<'a>>, ApiError> {
    let at = address_of(node, &carried.instance);
    match connect(session, port, at).await {
        Ok(Some(connected)) => {
            let is_local = at.is_loopback() && session.need(Feature::Published).is_err();
            Ok(Some((carried, is_local, connected)))
        }
        // It fell asleep or ended meanwhile.
        Ok(None) => Ok(None),
        Err(error) if is_settling(node, &carried.instance, &error) => Ok(None),
        Err(error) => Err(guest_error(&carried.instance, &error)),
    }
}

/// The guest's address, or its loopback if it has no network.
fn address_of(node: &Node, instance: &InstancePath) -> IpAddr {
    let mirror = node.state.now();
    let record = mirror.desired.instances.get(instance);
    let network = record.and_then(|record| mirror.desired.network_of(record));
    network.map_or(Ipv4Addr::LOCALHOST, |network| network.address()).into()
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

/// Connects to a port of the guest; nothing comes of it if the session is over.
async fn connect(
    session: &Session,
    port: u16,
    at: IpAddr,
) -> Result<Option<(ForwardEvents, ExecInput)>, SessionError> {
    let (mut events, input) = session.publish(port, at, CONNECT_TIMEOUT).await?.split();
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
                    // The other direction may go on, as long as there is somebody.
                    broken(&from_client).await;
                    return false;
                }
                Ok(len) => tokio::select! {
                    // A failure means that the socket takes no more, which the other direction tells.
                    _ = input.write_stdin(&piece[..len]) => {}
                    () = broken(&from_client) => return false,
                },
                Err(_) => return false,
            }
        }
    };
    tokio::select! {
        is_over = out => is_over,
        is_over = into => is_over,
    }
}

/// Waits until the client has reset the connection, or no longer answers.
async fn broken(client: &ReadHalf<'_>) {
    // It fails only if the runtime ends.
    let _ = client.ready(Interest::ERROR).await;
}

/// Makes the client see that its connection failed, and not that it ended.
fn reset(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _ = socket.set_zero_linger();
}
