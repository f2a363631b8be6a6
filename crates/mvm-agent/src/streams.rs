//! Calls that stream: watches and execs.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame;
use mvm_core::guest::{ErrorKind, ExecRequest};
use mvm_core::lifecycle::{Phase, State};
use mvm_core::name::{InstancePath, PoolPath, Selector, TenantName};
use mvm_core::record::DesiredState;
use mvm_host::guest::{ExecEvent, ExecInput, Session, SessionError};
use mvm_wire::{ApiError, Call, Connection, ConnectionError, ErrorCode, Item, ReadHalf, Reply};
use tokio::time::Instant;

use crate::node::{Node, chain};
use crate::server::{finish, one};
use crate::state::Mirror;
use crate::views;

/// How long a guest has to answer a question.
pub(crate) const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest whose session is over has to open another one.
const REJOIN_LIMIT: Duration = Duration::from_secs(10);
/// How often sessions are looked for while one is waited for.
const SESSION_POLL: Duration = Duration::from_millis(20);
/// Pieces of standard input, of at most 64 KiB, and signals that are kept for a program whose guest
/// still starts.
const EARLY_MAX: usize = 16;

/// Sends what is watched now and after each change, until the caller hangs up.
pub(crate) async fn watch(
    node: &Node,
    instances: &[InstancePath],
    pools: &[PoolPath],
    tenant: Option<&TenantName>,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let mut state = node.state.follow();
    let mut waiting = node.waiting();
    let mut last = None;
    loop {
        let mirror = state.borrow_and_update().clone();
        waiting.borrow_and_update();
        let snapshot = Reply::Snapshot {
            instances: views::instances(node, &mirror, |path| instances.contains(path)),
            pools: views::pools(&mirror, |path| pools.contains(path)),
            tenant_exists: tenant.is_some_and(|name| mirror.desired.tenants.contains_key(name)),
        };
        if last.as_ref() != Some(&snapshot) {
            write.message(&snapshot).await?;
            last = Some(snapshot);
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return Ok(()) },
            changed = waiting.changed() => if changed.is_err() { return Ok(()) },
            // The caller says nothing more: whatever arrives is its hanging up.
            _ = read.next() => return Ok(()),
        }
    }
}

/// A session with an instance that a selector means: any running one will do. One that is starting
/// is waited for, and so, for a while, is a guest that an agent has just adopted.
pub(crate) async fn session(
    node: &Node,
    selector: &Selector,
) -> Result<(InstancePath, Session), ApiError> {
    let mut state = node.state.follow();
    let rejoined_by = Instant::now() + REJOIN_LIMIT;
    loop {
        let mirror = state.borrow_and_update().clone();
        let candidates: Vec<&InstancePath> =
            mirror.desired.instances.keys().filter(|path| selector.matches(path)).collect();
        for path in &candidates {
            let session = node.instance(path).and_then(|i| i.session.borrow().clone());
            if mirror.status(path).state() == State::Running
                && let Some(session) = session
            {
                return Ok(((*path).clone(), session));
            }
        }
        let is_near = |path: &&InstancePath| {
            let wanted = mirror.desired.instances.get(*path);
            wanted.is_some_and(|record| record.desired == DesiredState::Running)
                && match mirror.status(path).phase {
                    Phase::Starting { .. } => true,
                    Phase::Running { .. } => Instant::now() < rejoined_by,
                    _ => false,
                }
        };
        if !candidates.iter().copied().any(|path| is_near(&path)) {
            return Err(unavailable(&mirror, selector, &candidates));
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return Err(ApiError::new(ErrorCode::Internal, "the agent is ending"));
            },
            // Sessions are not part of the state that is followed.
            () = tokio::time::sleep(SESSION_POLL) => {}
        }
    }
}

fn unavailable(mirror: &Mirror, selector: &Selector, candidates: &[&InstancePath]) -> ApiError {
    match candidates {
        [] => match one(mirror, selector) {
            Err(error) => error,
            Ok(path) => ApiError::new(ErrorCode::Conflict, format!("{path} is not running")),
        },
        [path] => {
            let state = mirror.status(path).state();
            if state == State::Running {
                let message = format!("the guest agent of {path} does not answer");
                return ApiError::new(ErrorCode::Guest, message)
                    .hint(format!("see `mvm why {}`, or `mvm restart {}`", path.id, path.id));
            }
            ApiError::new(ErrorCode::Conflict, format!("{path} is {state}, not running")).hint(
                format!("start it with `mvm start {}`, or see `mvm why {}`", path.id, path.id),
            )
        }
        several => {
            let message =
                format!("none of the {} instances of {selector} is running", several.len());
            ApiError::new(ErrorCode::Conflict, message)
                .hint(format!("start them with `mvm start {selector} --all`"))
        }
    }
}

/// Runs a program in a guest, with the connection as its terminal.
pub(crate) async fn exec(
    node: &Arc<Node>,
    selector: &Selector,
    request: ExecRequest,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let mut early = Vec::new();
    let (instance, session) = tokio::select! {
        found = session(node, selector) => match found {
            Ok(found) => found,
            Err(error) => return finish(&mut write, Err(error)).await,
        },
        // Whoever hangs up while a guest starts wants the program no more.
        () = hung_up(&mut read, &mut early) => return Ok(()),
    };
    let exec = match session.exec(request, GUEST_TIMEOUT).await {
        Ok(exec) => exec,
        Err(error) => return finish(&mut write, Err(guest_error(&instance, &error))).await,
    };
    let (mut output, input) = exec.split();
    // Dropping the output, however this ends, cancels the program if it still runs.
    let carry_out = async {
        loop {
            match output.next().await {
                Some(Ok(ExecEvent::Started { pid })) => {
                    let instance = instance.clone();
                    write.message(&Reply::ExecStarted { instance, pid }).await?;
                }
                Some(Ok(ExecEvent::Stdout(bytes))) => {
                    write.data(frame::KIND_STDOUT, &bytes).await?;
                }
                Some(Ok(ExecEvent::Stderr(bytes))) => {
                    write.data(frame::KIND_STDERR, &bytes).await?;
                }
                Some(Ok(ExecEvent::Exit(status))) => {
                    return write.message(&Reply::ExecExit(status)).await;
                }
                Some(Err(error)) => {
                    return finish(&mut write, Err(guest_error(&instance, &error))).await;
                }
                None => {
                    let message = format!("the session with {instance} ended");
                    let error = ApiError::new(ErrorCode::Guest, message);
                    return finish(&mut write, Err(error)).await;
                }
            }
        }
    };
    tokio::select! {
        carried = carry_out => carried,
        () = carry_in(read, early, input) => Ok(()),
    }
}

/// Waits until the caller hangs up, and keeps what it says until then. A caller that says more than
/// is kept has to wait.
async fn hung_up(read: &mut ReadHalf, kept: &mut Vec<Item>) {
    while kept.len() < EARLY_MAX {
        match read.next().await {
            Ok(Some(item)) => kept.push(item),
            Ok(None) | Err(_) => return,
        }
    }
    std::future::pending().await
}

/// Carries standard input and signals to the guest, first the early ones; returns when the caller
/// hangs up.
async fn carry_in(mut read: ReadHalf, early: Vec<Item>, mut input: ExecInput) {
    let mut early = early.into_iter();
    loop {
        let item = match early.next() {
            Some(item) => item,
            None => match read.next().await {
                Ok(Some(item)) => item,
                Ok(None) | Err(_) => return,
            },
        };
        // A failure means that the program has ended, which the other direction reports.
        let _ = match item {
            Item::Data { kind: frame::KIND_STDIN, bytes } if bytes.is_empty() => {
                input.close_stdin();
                Ok(())
            }
            Item::Data { kind: frame::KIND_STDIN, bytes } => input.write_stdin(&bytes).await,
            Item::Data { .. } => Ok(()),
            message => match message.parse::<Call>() {
                Ok(Call::Signal { signal }) => input.signal(signal).await,
                Ok(_) | Err(_) => Ok(()),
            },
        };
    }
}

pub(crate) fn guest_error(instance: &InstancePath, error: &SessionError) -> ApiError {
    let SessionError::Guest { error: guest, .. } = error else {
        return ApiError::new(ErrorCode::Guest, format!("{instance}: {}", chain(error)));
    };
    let code = match guest.kind {
        ErrorKind::NotFound => ErrorCode::GuestNotFound,
        ErrorKind::Denied => ErrorCode::GuestDenied,
        ErrorKind::Invalid => ErrorCode::Invalid,
        _ => ErrorCode::Guest,
    };
    // What was asked for is what the person typed: the guest's own words say what is wrong with it.
    ApiError::new(code, format!("{instance}: {}", chain(guest)))
}
