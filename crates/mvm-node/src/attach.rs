//! The call that attaches to an instance's main process.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::death::{Cause, ProgramFault};
use mvm_core::frame;
use mvm_core::guest::TerminalSize;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::record::DesiredState;
use mvm_host::guest::MainInput;
use mvm_wire::{
    ApiError, Call, Connection, ConnectionError, ErrorCode, HangUp, Item, ReadHalf, Reply,
    WriteHalf,
};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::door::{finish, one};
use crate::main_process::{MainHub, News};
use crate::node::Node;
use crate::{sessions, wake};
use mvm_core::mirror::Mirror;

/// How long a guest that an agent has just adopted has to tell of its main process.
const JOIN_LIMIT: Duration = Duration::from_secs(10);

/// How often an actor is looked for.
const ACTOR_POLL: Duration = Duration::from_millis(10);

/// Pieces of input, of at most 64 KiB, that wait for a process that does not run yet.
const MOST_WAITING: usize = 64;

type Input = watch::Receiver<Option<(u32, MainInput)>>;

/// Lets the caller hear, feed and signal the main process until that ends, or the caller hangs up.
pub(crate) async fn attach(
    node: &Arc<Node>,
    selector: &Selector,
    wait: bool,
    connection: Connection,
    hang_up: &dyn HangUp,
) -> Result<(), ConnectionError> {
    let Connection { read, mut write } = connection;
    let (path, hub, news) = match find(node, selector).await {
        Ok(found) => found,
        Err(error) => return finish(&mut write, Err(error)).await,
    };
    let mut input = hub.input();
    let running = match wait {
        true => Ok(None),
        false => tokio::select! {
            running = running(node, &path, &mut input) => running.map(Some),
            () = hang_up.wait() => return Ok(()),
        },
    };
    let pid = match running {
        Ok(pid) => pid,
        Err(error) => return finish(&mut write, Err(error)).await,
    };
    write.message(&Reply::Attached { instance: path.clone() }).await?;
    if let Some(pid) = pid {
        write.message(&Reply::ExecStarted { instance: path.clone(), pid }).await?;
    }
    tokio::select! {
        carried = carry_out(&path, news, &mut write, pid.is_some()) => return carried,
        () = carry_in(node, &path, &hub, read, input) => {}
        // Neither output nor room for input may ever come again.
        () = hang_up.wait() => return Ok(()),
    }
    // The caller wants no more of it, and may be there to hear that.
    write.message(&Reply::ExecDetached).await
}

/// The instance, and what its main process says from now on.
async fn find(
    node: &Arc<Node>,
    selector: &Selector,
) -> Result<(InstancePath, Arc<MainHub>, mpsc::Receiver<News>), ApiError> {
    let path = one(node, selector)?;
    // An instance that was made this moment has no actor yet.
    let actor = async {
        loop {
            match node.instance(&path) {
                Some(handle) => break handle.main.clone(),
                None => tokio::time::sleep(ACTOR_POLL).await,
            }
        }
    };
    match timeout(JOIN_LIMIT, actor).await {
        Ok(hub) => {
            let news = hub.listen();
            Ok((path, hub, news))
        }
        Err(_) => {
            let message = format!("{path} no longer exists");
            Err(ApiError::new(ErrorCode::Conflict, message).hint("see `mvm ps -a`"))
        }
    }
}

/// The process id of a main process that runs, or will once its machine has booted or been woken.
async fn running(
    node: &Arc<Node>,
    path: &InstancePath,
    input: &mut Input,
) -> Result<u32, ApiError> {
    if sessions::is_at_rest(&node.state.now(), path) {
        wake::wake(node, path).await?;
    }
    // Whoever left while it booted may come back before it has.
    let is_coming = |mirror: &Arc<Mirror>| {
        let instance = mirror.desired.instances.get(path);
        instance.is_some_and(|instance| instance.desired == DesiredState::Running)
            && matches!(
                mirror.status(path).state(),
                State::Created | State::Stopped | State::Sleeping | State::Warm
            )
    };
    // An agent that ends needs no answer.
    drop(node.state.follow().wait_for(|mirror| !is_coming(mirror)).await);
    let state = node.state.now().status(path).state();
    if state != State::Running {
        let message = format!("{path} is {state}, not running");
        let hint = format!("start it with `mvm start {}`, or see `mvm logs {}`", path.id, path.id);
        return Err(ApiError::new(ErrorCode::Conflict, message).hint(hint));
    }
    let joined = timeout(JOIN_LIMIT, input.wait_for(Option::is_some)).await;
    let pid =
        joined.ok().and_then(Result::ok).and_then(|input| input.as_ref().map(|(pid, _)| *pid));
    pid.ok_or_else(|| {
        let message = format!("{path} has no main process to attach to");
        let hint = format!("run a program in it with `mvm exec {} -- COMMAND`", path.id);
        ApiError::new(ErrorCode::Conflict, message).hint(hint)
    })
}

async fn carry_out(
    path: &InstancePath,
    mut news: mpsc::Receiver<News>,
    write: &mut WriteHalf,
    mut has_started: bool,
) -> Result<(), ConnectionError> {
    loop {
        match news.recv().await {
            // Another agent session with the same process is no other start.
            Some(News::Started(_)) if has_started => {}
            Some(News::Started(pid)) => {
                has_started = true;
                let instance = path.clone();
                write.message(&Reply::ExecStarted { instance, pid }).await?;
            }
            Some(News::Stdout(bytes)) => write.data(frame::KIND_STDOUT, &bytes).await?,
            Some(News::Stderr(bytes)) => write.data(frame::KIND_STDERR, &bytes).await?,
            Some(News::Exited(status)) => return write.message(&Reply::ExecExit(status)).await,
            Some(News::Ended(cause)) => {
                let code = match &cause {
                    Cause::StartFailed { program: Some(ProgramFault::NotFound), .. } => {
                        ErrorCode::GuestNotFound
                    }
                    Cause::StartFailed { program: Some(ProgramFault::Denied), .. } => {
                        ErrorCode::GuestDenied
                    }
                    _ => ErrorCode::Guest,
                };
                let error = ApiError::new(code, format!("{path}: {cause}"))
                    .hint(format!("see `mvm why {}` and `mvm logs {}`", path.id, path.id));
                return finish(write, Err(error)).await;
            }
            Some(News::Nothing) => {
                let message = format!("{path} runs no program: its image names none");
                let error = ApiError::new(ErrorCode::Invalid, message)
                    .hint("name one behind the image, such as `mvm run IMAGE -- COMMAND`");
                return finish(write, Err(error)).await;
            }
            None => {
                let message = format!("{path} is gone, or its guest was lost");
                let error = ApiError::new(ErrorCode::Guest, message).hint("see `mvm ps -a`");
                return finish(write, Err(error)).await;
            }
        }
    }
}

/// What a caller sends on.
enum Word {
    Input(Vec<u8>),
    EndOfInput,
    Signal(i32),
    Resize(TerminalSize),
    Detach,
    /// Of a newer caller.
    Unknown,
}

impl From<Item> for Word {
    fn from(item: Item) -> Self {
        match item {
            Item::Data { kind: frame::KIND_STDIN, bytes } if bytes.is_empty() => Self::EndOfInput,
            Item::Data { kind: frame::KIND_STDIN, bytes } => Self::Input(bytes),
            Item::Data { .. } => Self::Unknown,
            message @ Item::Message(_) => match message.parse::<Call>() {
                Ok(Call::Signal { signal }) => Self::Signal(signal),
                Ok(Call::Resize { size }) => Self::Resize(size),
                Ok(Call::Detach) => Self::Detach,
                Ok(_) | Err(_) => Self::Unknown,
            },
        }
    }
}

impl Word {
    /// Whether it is for the process, so that one at rest is to hear it.
    fn is_for_process(&self) -> bool {
        matches!(self, Self::Input(_) | Self::EndOfInput | Self::Signal(_))
    }
}

/// Carries standard input, sizes and signals to the process, and keeps what comes before there is
/// one, or while it is at rest, from which it is woken; returns when the caller hangs up or detaches,
/// which needs no process.
async fn carry_in(
    node: &Arc<Node>,
    path: &InstancePath,
    hub: &MainHub,
    mut read: ReadHalf,
    mut input: Input,
) {
    let mut state = node.state.follow();
    let mut waiting = VecDeque::new();
    loop {
        let way = input.borrow_and_update().clone();
        let mirror = state.borrow_and_update().clone();
        if let Some((_, way)) = way
            && sessions::is_up(&mirror, path)
            && let Some(word) = waiting.pop_front()
        {
            pass_on(word, &way).await;
            continue;
        }
        if waiting.iter().any(Word::is_for_process)
            && sessions::is_at_rest(&mirror, path)
            && let Err(error) = wake::wake(node, path).await
        {
            tracing::debug!(instance = %path, %error, "what was typed does not wake it");
        }
        tokio::select! {
            item = read.next(), if waiting.len() < MOST_WAITING => {
                let Ok(Some(item)) = item else { return };
                match Word::from(item) {
                    Word::Detach => return,
                    word => {
                        if let Word::Resize(size) = word {
                            hub.note_size(size);
                        }
                        waiting.push_back(word);
                    }
                }
            }
            changed = input.changed(), if !waiting.is_empty() => if changed.is_err() {
                // The instance is gone, which the other direction tells.
                return std::future::pending().await;
            },
            changed = state.changed(), if !waiting.is_empty() => if changed.is_err() {
                return std::future::pending().await;
            },
        }
    }
}

async fn pass_on(word: Word, way: &MainInput) {
    // A failure means that the process has ended, which the other direction tells.
    let _ = match word {
        Word::Input(bytes) => way.write_stdin(&bytes).await,
        Word::EndOfInput => way.close_stdin().await,
        Word::Signal(signal) => way.signal(signal).await,
        Word::Resize(size) => way.resize(size).await,
        Word::Detach | Word::Unknown => Ok(()),
    };
}
