//! An agent that answers each call with a script.

use std::path::Path;
use std::sync::mpsc;
use std::thread;

use mvm_wire::{ApiError, Call, Connection, ErrorCode, Reply, Welcome};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// One thing that the agent does on a connection.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// Answers.
    Reply(Reply),
    /// Sends bytes that are no frame.
    Bytes(Vec<u8>),
    /// Keeps the connection open until the caller hangs up.
    Stay,
    /// Hangs up, like the end of a script.
    HangUp,
    /// Hangs up and listens no more.
    Leave,
}

/// A listening agent; it ends with the test's process.
pub(super) struct FakeAgent {
    dir: TempDir,
}

impl FakeAgent {
    /// Listens in a state directory of its own.
    pub(super) fn new(script: impl Fn(Call) -> Vec<Act> + Send + 'static) -> Self {
        Self::start(0, true, script)
    }

    /// The same after one that was killed before it read its caller's call.
    pub(super) fn after_a_killed_one(script: impl Fn(Call) -> Vec<Act> + Send + 'static) -> Self {
        Self::start(1, true, script)
    }

    /// One of the first release, which takes a greeting for a call that it does not know.
    pub(super) fn that_knows_no_greeting(
        script: impl Fn(Call) -> Vec<Act> + Send + 'static,
    ) -> Self {
        Self::start(0, false, script)
    }

    fn start(
        unread: usize,
        greets: bool,
        script: impl Fn(Call) -> Vec<Act> + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let (ready, is_ready) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async move {
                let listener = mvm_host::unix_socket::bind(&socket).unwrap();
                ready.send(()).unwrap();
                for _ in 0..unread {
                    let (stream, _) = listener.accept().await.unwrap();
                    stream.readable().await.unwrap();
                }
                while let Ok((stream, _)) = listener.accept().await {
                    if serve(stream, greets, &script).await == Next::Leave {
                        return;
                    }
                }
            });
        });
        is_ready.recv().unwrap();
        Self { dir }
    }

    /// The state directory.
    pub(super) fn state_dir(&self) -> &Path {
        self.dir.path()
    }
}

/// What the agent does after a connection.
#[derive(PartialEq, Eq)]
enum Next {
    Listen,
    Leave,
}

async fn serve(stream: UnixStream, greets: bool, script: &impl Fn(Call) -> Vec<Act>) -> Next {
    let stream = stream.into_std().unwrap();
    // A second handle on the socket, for bytes that are no frame.
    let mut raw = UnixStream::from_std(stream.try_clone().unwrap()).unwrap();
    let mut connection = Connection::new(UnixStream::from_std(stream).unwrap());
    // A caller that only looks whether somebody listens sends nothing.
    let Ok(mut call) = connection.read.message().await else { return Next::Listen };
    // Nor are they about how callers greet.
    if let Call::Hello(_) = call
        && !greets
    {
        let unknown = ApiError::new(ErrorCode::Unsupported, "this agent does not know the call");
        let _ = connection.write.message(&Reply::Error(unknown)).await;
        return Next::Listen;
    }
    if let Call::Hello(hello) = call {
        let (version, principal) = (hello.version, "uid 0".to_owned());
        let welcome = Reply::Welcome(Welcome { version, protocol: 1, principal });
        if connection.write.message(&welcome).await.is_err() {
            return Next::Listen;
        }
        let Ok(next) = connection.read.message().await else { return Next::Listen };
        call = next;
    }
    // Scripts are about requests, and not about their ids.
    let call = match call {
        Call::SubmitOnce { change, .. } => Call::Submit(change),
        call => call,
    };
    for act in script(call) {
        let sent = match act {
            Act::Reply(reply) => connection.write.message(&reply).await.is_ok(),
            Act::Bytes(bytes) => raw.write_all(&bytes).await.is_ok(),
            Act::Stay => matches!(connection.read.next().await, Ok(Some(_))),
            Act::HangUp => false,
            Act::Leave => return Next::Leave,
        };
        if !sent {
            break;
        }
    }
    Next::Listen
}
