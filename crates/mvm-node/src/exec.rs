//! Programs in guests, each with one connection as its terminal.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame;
use mvm_core::guest::ExecRequest;
use mvm_core::main_process::check_size;
use mvm_core::name::{InstancePath, Selector};
use mvm_host::guest::{ExecEvent, ExecInput, SessionError};
use mvm_wire::{
    ApiError, Call, Connection, ConnectionError, ErrorCode, HangUp, Item, ReadHalf, Reply,
    WriteHalf,
};

use crate::configs::{self, Surroundings};
use crate::door::finish;
use crate::node::Node;
use crate::sessions::{guest_error, session, session_over};

/// Pieces of standard input, of at most 64 KiB, and signals that are kept for a program whose guest
/// still starts.
const EARLY_MAX: usize = 16;
/// What people type to look around.
const SHELLS: [&str; 5] = ["sh", "bash", "ash", "dash", "zsh"];
/// How long a guest has to start a program: hundreds may start at once, and the caller can hang up
/// at any time.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a program in a guest, with the connection as its terminal. It ends with the caller, unless
/// it was detached.
pub(crate) async fn exec(
    node: &Arc<Node>,
    selector: &Selector,
    request: ExecRequest,
    connection: Connection,
    hang_up: &dyn HangUp,
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
        () = hang_up.wait() => return Ok(()),
    };
    let request = as_beside_main(node, &instance, request).await;
    if let Err(error) = check_size(&request.argv, &request.env) {
        let error = ApiError::new(ErrorCode::Invalid, format!("{instance}: {error}"));
        return finish(&mut write, Err(error)).await;
    }
    let is_shell = request.argv.first().is_some_and(|program| is_shell(program));
    let exec = match session.exec(request, START_TIMEOUT).await {
        Ok(exec) => exec,
        Err(_) if session.is_over() => return session_ended(node, &mut write, &instance).await,
        Err(error) => return finish(&mut write, Err(refusal(&instance, &error, is_shell))).await,
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
                Some(Ok(ExecEvent::Detached)) => {
                    return write.message(&Reply::ExecDetached).await;
                }
                Some(Err(_)) if session.is_over() => {
                    return session_ended(node, &mut write, &instance).await;
                }
                Some(Err(error)) => {
                    return finish(&mut write, Err(refusal(&instance, &error, is_shell))).await;
                }
                None => return session_ended(node, &mut write, &instance).await,
            }
        }
    };
    tokio::select! {
        carried = carry_out => carried,
        () = carry_in(read, early, input) => Ok(()),
        // Neither output nor room for input may ever come again.
        () = hang_up.wait() => Ok(()),
    }
}

/// The request with the variables of the instance's main process, under its own, and in the
/// directory of the main process unless it names another.
async fn as_beside_main(node: &Node, instance: &InstancePath, request: ExecRequest) -> ExecRequest {
    if request.builtin {
        return request;
    }
    let Surroundings { mut env, cwd } = configs::surroundings(node, instance).await;
    env.retain(|(name, _)| !request.env.iter().any(|(own, _)| own == name));
    env.extend(request.env);
    let is_cwd_default = request.cwd.is_none() && cwd.is_some();
    ExecRequest { env, cwd: request.cwd.or(cwd), is_cwd_default, ..request }
}

fn is_shell(program: &str) -> bool {
    program.rsplit('/').next().is_some_and(|name| SHELLS.contains(&name))
}

/// What the guest says, and a way on for those who wanted to look around in an image without a shell.
fn refusal(instance: &InstancePath, error: &SessionError, is_shell: bool) -> ApiError {
    let error = guest_error(instance, error);
    match error.code {
        ErrorCode::GuestNotFound if is_shell => error.hint(format!(
            "run a program of the image by its path; `mvm cp {}:/PATH .` copies files out, and needs none",
            instance.id
        )),
        _ => error,
    }
}

/// Tells a caller that the guest is not there any more.
pub(crate) async fn session_ended(
    node: &Node,
    write: &mut WriteHalf,
    instance: &InstancePath,
) -> Result<(), ConnectionError> {
    finish(write, Err(session_over(node, instance))).await
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
                Ok(Call::Resize { size }) => input.resize(size).await,
                Ok(Call::Detach) => input.detach().await,
                Ok(_) | Err(_) => Ok(()),
            },
        };
    }
}
