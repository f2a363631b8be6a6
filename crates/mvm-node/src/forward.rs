//! Connections to sockets in guests, each carried by one connection to this agent.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::ForwardTarget;
use mvm_core::name::Selector;
use mvm_host::guest::{ExecInput, ForwardEvent};
use mvm_wire::{ApiError, Connection, ConnectionError, ErrorCode, HangUp, Item, ReadHalf, Reply};

use crate::door::finish;
use crate::exec::session_ended;
use crate::node::Node;
use crate::sessions::{guest_error, session};

/// How long a socket in a guest has to accept, and the guest to say so.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Connects to a socket in a guest and carries bytes both ways until both directions have ended, or
/// the caller hangs up.
pub(crate) async fn forward(
    node: &Arc<Node>,
    selector: &Selector,
    target: ForwardTarget,
    connection: Connection,
    hang_up: &dyn HangUp,
) -> Result<(), ConnectionError> {
    let Connection { read, mut write } = connection;
    let (instance, session) = tokio::select! {
        found = session(node, selector) => match found {
            Ok(found) => found,
            Err(error) => return finish(&mut write, Err(error)).await,
        },
        () = hang_up.wait() => return Ok(()),
    };
    let failed = |error| match guest_error(&instance, &error) {
        // A socket that refuses is no program that does not exist.
        ApiError { code: ErrorCode::GuestNotFound | ErrorCode::GuestDenied, message, hint } => {
            ApiError { code: ErrorCode::Guest, message, hint }
        }
        other => other,
    };
    let forward = match session.forward(target, CONNECT_TIMEOUT).await {
        Ok(forward) => forward,
        Err(error) => return finish(&mut write, Err(failed(error))).await,
    };
    let (mut events, input) = forward.split();
    // Dropping the events, however this ends, closes the socket in the guest.
    let carry_out = async {
        loop {
            match events.next().await {
                Some(Ok(ForwardEvent::Connected)) => {
                    let instance = instance.clone();
                    write.message(&Reply::Connected { instance }).await?;
                }
                Some(Ok(ForwardEvent::Data(bytes))) => write.data(KIND_STDOUT, &bytes).await?,
                Some(Ok(ForwardEvent::Eof)) => write.data(KIND_STDOUT, &[]).await?,
                Some(Ok(ForwardEvent::Closed)) => return write.message(&Reply::Done).await,
                Some(Err(error)) => {
                    return finish(&mut write, Err(failed(error))).await;
                }
                None => return session_ended(node, &mut write, &instance).await,
            }
        }
    };
    tokio::select! {
        carried = carry_out => carried,
        () = carry_in(read, input) => Ok(()),
        // Neither data nor room for more may ever come again.
        () = hang_up.wait() => Ok(()),
    }
}

/// Carries data to the socket; returns when the caller hangs up.
async fn carry_in(mut read: ReadHalf, mut input: ExecInput) {
    while let Ok(Some(item)) = read.next().await {
        let Item::Data { kind: KIND_STDIN, bytes } = item else { continue };
        if bytes.is_empty() {
            input.close_stdin();
        } else {
            // A failure means that the socket takes no more, which the other direction reports.
            let _ = input.write_stdin(&bytes).await;
        }
    }
}
