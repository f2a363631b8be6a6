//! The agent's socket: one connection, one call.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mvm_control::{Control, Principal};
use mvm_host::unix_socket;
use mvm_wire::{Connection, HangUp};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

/// Connections that are served at once; more wait in the socket's queue.
const MAX_CONNECTIONS: u64 = 1_024;
/// The part of the agent's descriptors that they may come to, with two each.
const PART_OF_DESCRIPTORS: u64 = 8;
/// How long a caller that was answered may still send what nobody wants, before it is cut off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A caller's socket, which notices its hanging up.
struct Caller(unix_socket::HangUp);

impl HangUp for Caller {
    fn wait(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.0.wait())
    }
}

/// Serves a socket for as long as the agent runs.
pub(crate) async fn run(
    control: Arc<Control>,
    listener: UnixListener,
    open_files: u64,
) -> Infallible {
    let mut connections = JoinSet::new();
    let max = MAX_CONNECTIONS.min(open_files / PART_OF_DESCRIPTORS) as usize;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < max => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let control = control.clone();
                let hang_up = unix_socket::HangUp::of(&stream);
                let caller = Caller(hang_up.unwrap_or_else(|_| unix_socket::HangUp::never()));
                // The system knows who connected; the socket's directory is its owner's alone.
                let user =
                    stream.peer_cred().map_or(Principal::Process, |it| Principal::User(it.uid()));
                let connection = Connection::new(stream);
                connections.spawn(async move {
                    control.serve(connection, user, &caller).await;
                    caller.0.drain(LAST_WORDS).await;
                });
            }
            Err(error) => {
                // Out of descriptors, usually: wait for a connection to end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
