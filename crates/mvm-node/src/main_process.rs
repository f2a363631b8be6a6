//! An instance's main process, as the agent sees it: its output goes to the log and to those who
//! are attached, its end to the instance's actor.
//!
//! ```text
//!  guest ── MainEvents ──> pump ──┬─> LogWriter (kept)
//!                                 └─> listeners (attached callers)
//! ```
//!
//! A listener that does not listen stops the process, as a full pipe would; the log never does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_core::death::{Cause, ProgramFault};
use mvm_core::guest::{ErrorKind, ExitStatus, GuestError, MainRequest, TerminalSize};
use mvm_core::image::ImageConfig;
use mvm_core::main_process::{MainProcess, ProcessError, ProcessSpec, resolve};
use mvm_core::name::InstancePath;
use mvm_host::guest::{MainEvent, MainEvents, MainInput, Session, SessionError};
use mvm_host::main_log::{LogReader, LogSource, LogWriter};
use mvm_host::state_dir::InstanceDir;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc, watch};

use crate::node::Node;

/// Pieces of output, of at most 64 KiB, that wait for a listener.
const LISTENER_QUEUE: usize = 16;
/// How long a guest has to start its main process.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a main process cannot be started or joined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MainError {
    /// The image or the pool asks for something that makes no sense.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The guest refused: its words are what people need.
    #[error("{message}")]
    Refused {
        /// What it says.
        message: String,
        /// What is wrong with the program, if it is that.
        fault: Option<ProgramFault>,
    },
    /// The session failed.
    #[error(transparent)]
    Session(SessionError),
    /// The log cannot be used.
    #[error("cannot write the log in {}", dir.display())]
    Log {
        /// Its directory.
        dir: InstanceDir,
        /// Why.
        source: std::io::Error,
    },
}

/// What a listener hears.
#[derive(Debug, Clone)]
pub(crate) enum News {
    /// It runs, with this process id in the guest.
    Started(u32),
    /// It wrote this to its standard output.
    Stdout(Arc<[u8]>),
    /// It wrote this to its standard error.
    Stderr(Arc<[u8]>),
    /// It ended.
    Exited(ExitStatus),
    /// There is none to run.
    Nothing,
    /// The run of the instance ended, for this reason.
    Ended(Cause),
}

type Log = Option<LogWriter>;

/// Where an instance's main process, its log and those who listen to it meet.
pub(crate) struct MainHub {
    dir: InstanceDir,
    /// None once the instance is gone.
    listeners: Mutex<Option<Vec<mpsc::Sender<News>>>>,
    input: watch::Sender<Option<(u32, MainInput)>>,
    /// That of the terminal which was attached last.
    size: Mutex<TerminalSize>,
    /// Held by whoever writes.
    log: Arc<AsyncMutex<Log>>,
}

/// A main process that is joined, with its log.
pub(crate) struct Attached {
    pid: u32,
    events: MainEvents,
    input: MainInput,
    log: OwnedMutexGuard<Log>,
}

impl MainHub {
    /// The hub of an instance with this directory.
    pub(crate) fn new(dir: InstanceDir) -> Self {
        let input = watch::Sender::new(None);
        let (listeners, size) = (Mutex::new(Some(Vec::new())), Mutex::default());
        Self { dir, listeners, input, size, log: Arc::default() }
    }

    /// Hears everything from now on; nothing of an instance that is gone.
    pub(crate) fn listen(&self) -> mpsc::Receiver<News> {
        let (sender, receiver) = mpsc::channel(LISTENER_QUEUE);
        if let Some(listeners) = self.listeners().as_mut() {
            listeners.push(sender);
        }
        receiver
    }

    /// Lets the listeners go, now that the instance is gone.
    pub(crate) fn close(&self) {
        *self.listeners() = None;
    }

    /// The process's id in the guest and the way to it, while there is one.
    pub(crate) fn input(&self) -> watch::Receiver<Option<(u32, MainInput)>> {
        self.input.subscribe()
    }

    /// Notes the size of a caller's terminal: the next process's own is made like it.
    pub(crate) fn note_size(&self, size: TerminalSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    fn size(&self) -> TerminalSize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listeners(&self) -> MutexGuard<'_, Option<Vec<mpsc::Sender<News>>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all listeners, and waits for those who are slow as long as the session lasts.
    async fn tell(&self, news: News, session: &Session) {
        let listeners = self.listeners().clone();
        for listener in listeners.into_iter().flatten() {
            let sent = tokio::select! {
                biased;
                sent = listener.send(news.clone()) => sent.is_ok(),
                _ = session.closed() => false,
            };
            if !sent && let Some(listeners) = self.listeners().as_mut() {
                listeners.retain(|other| !other.same_channel(&listener));
            }
        }
    }

    /// Notes that a run of the instance has ended, behind all that its process had to say, and
    /// lets the listeners go.
    pub(crate) fn end(&self, cause: Cause, now_unix_ms: u64) {
        let listeners = self.listeners().as_mut().map(std::mem::take).unwrap_or_default();
        let (log, dir) = (self.log.clone(), self.dir.clone());
        tokio::spawn(async move {
            // A process that is still heard has its last words first.
            let waited = tokio::time::timeout(START_TIMEOUT, log.lock()).await;
            if let Ok(mut log) = waited
                && LogReader::exists(&dir)
            {
                let note = format!("mvm: the run ended: {cause}\n");
                if log.is_none() {
                    *log = LogWriter::open(&dir).ok();
                }
                // Who cannot be told now sees it in `mvm why`.
                let _ = log
                    .as_mut()
                    .map(|log| log.append(LogSource::Agent, note.as_bytes(), now_unix_ms));
            }
            for listener in listeners {
                let _ = listener.send(News::Ended(cause.clone())).await;
            }
        });
    }
}

/// Starts the main process that image and pool ask for, or joins it if this boot has started it.
/// `None` if they ask for none.
pub(crate) async fn attach(
    node: &Node,
    hub: &MainHub,
    session: &Session,
    image: &ImageConfig,
    spec: &ProcessSpec,
) -> Result<Option<Attached>, MainError> {
    let mut request = match resolve(image, spec)? {
        MainProcess::Nothing => {
            hub.tell(News::Nothing, session).await;
            return Ok(None);
        }
        MainProcess::Program(mut program) => {
            program.terminal = program.terminal.map(|_| hub.size());
            MainRequest { program: Some(*program), ..MainRequest::default() }
        }
        MainProcess::Init(program) => {
            let request = MainRequest {
                init: program.argv.first().cloned(),
                init_program: Some(*program),
                ..MainRequest::default()
            };
            // It has the console for what it writes, and ends with the machine.
            return match session.main_process(request, START_TIMEOUT).await {
                Ok(_) => Ok(None),
                Err(SessionError::Guest { error, .. }) => Err(refused(error)),
                Err(error) => Err(MainError::Session(error)),
            };
        }
    };
    let failed = |source| MainError::Log { dir: hub.dir.clone(), source };
    // Held until the end of the listening: an earlier session's last words come first.
    let mut log = hub.log.clone().lock_owned().await;
    let writer = log.insert(LogWriter::open(&hub.dir).map_err(failed)?);
    let now = node.clock.now_ms();
    let (kept, is_new) = writer.begin(&session.hello().boot_id, now).map_err(failed)?;
    [request.stdout_from, request.stderr_from] = kept;
    let words = command_line(&request);
    let answer = session.main_process(request, START_TIMEOUT).await;
    let mut note = |text: String| {
        let text = format!("mvm: {text}\n");
        writer.append(LogSource::Agent, text.as_bytes(), now).map_err(failed)
    };
    let (state, events, input) = match answer {
        Ok(answer) => answer,
        Err(SessionError::Guest { error, .. }) => {
            note(format!("{words}: {}", error.message))?;
            return Err(refused(error));
        }
        Err(error) => return Err(MainError::Session(error)),
    };
    if is_new {
        note(format!("a boot started {words} as process {}", state.pid))?;
    }
    let missing = state.stdout.saturating_sub(kept[0]) + state.stderr.saturating_sub(kept[1]);
    if missing > 0 {
        note(format!("{missing} bytes of output were dropped while no agent was running"))?;
    }
    if [state.stdout, state.stderr] != kept {
        writer.skip_to([state.stdout, state.stderr], now).map_err(failed)?;
    }
    Ok(Some(Attached { pid: state.pid, events, input, log }))
}

fn refused(error: GuestError) -> MainError {
    let fault = match error.kind {
        ErrorKind::NotFound => Some(ProgramFault::NotFound),
        ErrorKind::Denied => Some(ProgramFault::Denied),
        _ => None,
    };
    MainError::Refused { message: error.message, fault }
}

fn command_line(request: &MainRequest) -> String {
    let words = request.program.as_ref().map(|program| program.argv.join(" ")).unwrap_or_default();
    format!("`{}`", mvm_host::console::printable(&words))
}

/// Carries what the main process writes to the log and the listeners until it, or the session,
/// ends. Tells how the process ended.
pub(crate) async fn pump(
    node: &Node,
    path: &InstancePath,
    hub: &MainHub,
    attached: Attached,
    session: &Session,
) -> Option<ExitStatus> {
    let Attached { pid, mut events, input, mut log } = attached;
    hub.input.send_replace(Some((pid, input)));
    hub.tell(News::Started(pid), session).await;
    let problem = format!("writing the log of {path}");
    let mut lost = 0_usize;
    let mut write = |source, bytes: &[u8]| {
        let Some(log) = log.as_mut() else { return };
        let now = node.clock.now_ms();
        let note = format!("mvm: {lost} bytes of output could not be kept\n");
        let told = match lost {
            0 => Ok(()),
            _ => log.append(LogSource::Agent, note.as_bytes(), now),
        };
        match told.and_then(|()| log.append(source, bytes, now)) {
            Ok(()) => lost = 0,
            // A full disk must stop neither the process nor those who listen to it.
            Err(_) if lost > 0 => lost += bytes.len(),
            Err(error) => {
                lost += bytes.len();
                node.set_problem(&problem, Some(error.to_string()));
            }
        }
        if lost == 0 {
            node.set_problem(&problem, None);
        }
    };
    let status = loop {
        match events.next().await {
            Some(Ok(MainEvent::Stdout(bytes))) => {
                write(LogSource::Stdout, &bytes);
                hub.tell(News::Stdout(bytes.into()), session).await;
            }
            Some(Ok(MainEvent::Stderr(bytes))) => {
                write(LogSource::Stderr, &bytes);
                hub.tell(News::Stderr(bytes.into()), session).await;
            }
            Some(Ok(MainEvent::Exit(status))) => {
                let cause = Cause::from(status);
                write(LogSource::Agent, format!("mvm: process {pid} {cause}\n").as_bytes());
                hub.tell(News::Exited(status), session).await;
                break Some(status);
            }
            Some(Err(_)) | None => break None,
        }
    };
    hub.input.send_replace(None);
    status
}
