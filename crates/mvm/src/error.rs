//! Every way in which a command fails: what is printed, and with which exit code it ends.
//!
//! Commands return an [`Error`]; only [`crate::cli`] prints it.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mvm_agent::LockError;
use mvm_core::death::{ProgramFault, last_words};
use mvm_core::image::ImageSpec;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_host::state_dir::StateDirError;
use mvm_wire::{ApiError, ConnectionError, ErrorCode};

use crate::document::DocumentError;
use crate::output::{printable, printable_text};
use crate::units::Seconds;
use crate::wait::Failure;

/// The exit codes; `docs/exit-codes.md` and `mvm --help` list them.
pub(crate) mod exit {
    /// It was done.
    pub(crate) const OK: u8 = 0;
    /// It failed.
    pub(crate) const FAILURE: u8 = 1;
    /// The command line, or a document, makes no sense.
    pub(crate) const USAGE: u8 = 2;
    /// The object does not exist.
    pub(crate) const NOT_FOUND: u8 = 3;
    /// A quota or the node's capacity is reached.
    pub(crate) const OVER_LIMIT: u8 = 4;
    /// The object is not in a state that allows it.
    pub(crate) const CONFLICT: u8 = 5;
    /// It was not done within `--timeout`.
    pub(crate) const WAIT_TIMEOUT: u8 = 6;
    /// The agent cannot be reached.
    pub(crate) const UNREACHABLE: u8 = 7;
    /// The program may not be run in the guest.
    pub(crate) const PROGRAM_DENIED: u8 = 126;
    /// The program does not exist in the guest.
    pub(crate) const PROGRAM_NOT_FOUND: u8 = 127;
    /// It was interrupted, as by Ctrl-C: 128 + SIGINT.
    pub(crate) const INTERRUPTED: u8 = 130;
    /// Whoever read the output went away: 128 + SIGPIPE.
    pub(crate) const BROKEN_PIPE: u8 = 141;
}

/// Lines of a microVM's console that are shown with a failure.
const CONSOLE_LINES: usize = 10;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The agent refused or failed the call.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The agent answered with something that is no answer to the call.
    #[error("the agent gave an answer of another kind ({0})")]
    UnexpectedReply(&'static str),
    /// The connection broke.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The agent went away under a program that it ran for this command.
    #[error("the agent ended, and with it the connection to the program, which ends too")]
    ProgramLost(#[source] ConnectionError),
    /// The agent went away while what it had accepted was waited for.
    #[error(
        "the agent ended before this was done; the request is recorded, and the next agent goes on with it"
    )]
    WaitLost(#[source] ConnectionError),
    /// No agent runs, and the command does not start one.
    #[error("no agent runs for {}", .state_dir.display())]
    NoAgent {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// There is a socket, but it cannot be used.
    #[error("cannot reach the agent at {}", .socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Somebody accepts on the socket and says nothing.
    #[error("the agent at {} did not answer within {} s", .socket.display(), .limit.as_secs())]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// A port of this machine cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Only root may do it.
    #[error("{what} needs root")]
    NeedsRoot {
        /// What.
        what: String,
    },
    /// The agent could not be started.
    #[error("cannot start the agent for {}", .state_dir.display())]
    AgentStart {
        /// The state directory.
        state_dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent was started, and did not answer.
    #[error("the agent (pid {pid}) {how}")]
    AgentDied {
        /// Its process id.
        pid: u32,
        /// What became of it.
        how: &'static str,
        /// Its log file.
        log: PathBuf,
        /// The log's last lines.
        tail: Vec<String>,
    },
    /// Another agent has the state directory.
    #[error(transparent)]
    AgentRuns(LockError),
    /// The state directory is a copy, or cannot be told from one.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The running agent uses something else than was asked for.
    #[error("the running agent uses {runs}, not {wanted}")]
    OtherVmm {
        /// What it uses.
        runs: String,
        /// What was asked for.
        wanted: String,
    },
    /// The agent itself failed.
    #[error("the agent for {} failed", .state_dir.display())]
    Serve {
        /// The state directory.
        state_dir: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Of several requests some were refused; each refusal is printed already.
    #[error("{count} of {total} were refused")]
    SomeRefused {
        /// How many.
        count: usize,
        /// Of how many.
        total: usize,
        /// The exit code of the first.
        code: u8,
    },
    /// What was waited for failed.
    #[error("{0}")]
    Failed(Failure),
    /// What was waited for took too long.
    #[error("not done after {after}, still waiting for:\n{}", list(.waiting))]
    WaitTimeout {
        /// How long was waited.
        after: Seconds,
        /// What is not done and why, one line each.
        waiting: Vec<String>,
    },
    /// The person stopped waiting.
    #[error("interrupted: the request goes on in the background")]
    StoppedWaiting,
    /// The person stopped waiting, and what was begun was removed.
    #[error("interrupted: nothing was started, and nothing is left of it")]
    GivenUp,
    /// The person hung up on a program.
    #[error("interrupted")]
    HungUp,
    /// Files cannot be copied.
    #[error(transparent)]
    Files(#[from] mvm_files::FilesError),
    /// The document cannot be used.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The arguments make no sense together.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to type instead.
        hint: String,
    },
    /// The machine is not ready.
    #[error("this machine is not ready for microVMs: {missing}")]
    NotReady {
        /// What is missing.
        missing: String,
    },
    /// The machine could not be made ready, or examined.
    #[error(transparent)]
    Host(Box<dyn StdError + Send + Sync>),
    /// The network is not as it should be; the differences are printed already.
    #[error("the kernel's network state differs from the expected one in {}", count(*.0, "point"))]
    NetworkDiffers(usize),
    /// A check of the machine failed; the findings are printed already.
    #[error("{} failed", count(*.0, "check"))]
    ChecksFailed(usize),
    /// A file or the terminal cannot be read.
    #[error("cannot read {what}")]
    Read {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Files cannot be written.
    #[error("cannot write into {}", .path.display())]
    Write {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

/// The result of a command.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

impl Error {
    /// An output failure; a reader that went away is told apart by [`Error::is_silent`].
    pub(crate) fn output(error: impl Into<io::Error>) -> Self {
        Self::Output(error.into())
    }

    /// Nothing that exists is meant.
    pub(crate) fn no_instance(selector: &Selector) -> Self {
        let message = format!("no instance matches {selector}");
        Self::Api(ApiError::new(ErrorCode::NotFound, message).hint("see `mvm ps -a`"))
    }

    /// Several instances are meant where one is needed.
    pub(crate) fn ambiguous<'a>(
        selector: &Selector,
        matches: impl Iterator<Item = &'a InstancePath>,
    ) -> Self {
        let matches: Vec<String> = matches.map(ToString::to_string).collect();
        let message =
            format!("{selector} matches {} instances: {}", matches.len(), matches.join(", "));
        Self::Api(ApiError::new(ErrorCode::Invalid, message).hint("name one of them"))
    }

    /// The exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Api(error) => api_exit_code(error.code),
            Self::Connection(_)
            | Self::ProgramLost(_)
            | Self::WaitLost(_)
            | Self::NoAgent { .. }
            | Self::Unreachable { .. } => exit::UNREACHABLE,
            Self::AgentStart { .. } | Self::AgentDied { .. } | Self::NoAnswer { .. } => {
                exit::UNREACHABLE
            }
            Self::SomeRefused { code, .. } => *code,
            Self::OtherVmm { .. }
            | Self::AgentRuns(_)
            | Self::StateDir(StateDirError::Copy { .. }) => exit::CONFLICT,
            Self::Failed(failure) if failure.superseded => exit::CONFLICT,
            Self::Failed(Failure { program: Some(ProgramFault::NotFound), .. }) => {
                exit::PROGRAM_NOT_FOUND
            }
            Self::Failed(Failure { program: Some(ProgramFault::Denied), .. }) => {
                exit::PROGRAM_DENIED
            }
            Self::WaitTimeout { .. } => exit::WAIT_TIMEOUT,
            Self::StoppedWaiting | Self::GivenUp | Self::HungUp => exit::INTERRUPTED,
            Self::Document(_) | Self::Usage { .. } => exit::USAGE,
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => exit::BROKEN_PIPE,
            Self::UnexpectedReply(_)
            | Self::NeedsRoot { .. }
            | Self::Serve { .. }
            | Self::StateDir(StateDirError::File { .. })
            | Self::Failed(_)
            | Self::NotReady { .. }
            | Self::Host(_)
            | Self::NetworkDiffers(_)
            | Self::ChecksFailed(_)
            | Self::Read { .. }
            | Self::Listen { .. }
            | Self::Write { .. }
            | Self::Files(_)
            | Self::Output(_) => exit::FAILURE,
        }
    }

    /// The same once everything that it is about was removed: a hint at what is gone helps nobody.
    #[must_use]
    pub(crate) fn after_removal(self) -> Self {
        const LEFT: &str = "nothing is left of it: `mvm pool create` and `mvm instance create --start` keep an instance that fails, for `mvm why` and `mvm logs`";
        let hint = |hint: &str| match hint.split_once("; then try again with `mvm pool build") {
            Some((first, _)) => format!("{first}; then run it again"),
            None => LEFT.to_owned(),
        };
        match self {
            Self::StoppedWaiting => Self::GivenUp,
            Self::Failed(failure) => Self::Failed(Failure { hint: hint(&failure.hint), ..failure }),
            // What is in the way is still there.
            Self::Api(error) if error.code == ErrorCode::OverLimit => Self::Api(error),
            Self::Api(error) => match error.hint {
                Some(text)
                    if ["mvm why", "mvm logs", "mvm ps", "mvm start", "mvm pool build"]
                        .iter()
                        .any(|verb| text.contains(verb)) =>
                {
                    Self::Api(ApiError { hint: Some(hint(&text)), ..error })
                }
                _ => Self::Api(error),
            },
            other => other,
        }
    }

    /// Whether nothing is to be printed: nobody reads any more.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Api(error) => return error.hint.clone(),
            Self::UnexpectedReply(_) => {
                "the agent may be of another version: see `mvm agent status`, and `mvm agent stop` to have a new one started".to_owned()
            }
            Self::Connection(ConnectionError::Frame(_) | ConnectionError::Message(_)) => {
                "the agent may be of another version: stop it with `mvm agent stop`, the next command starts a new one".to_owned()
            }
            Self::ProgramLost(_) => "the instance itself runs on: run the program again, or with -d, which leaves it running without a connection".to_owned(),
            Self::Connection(_) => "see `mvm agent status`, and `agent.log` in the state directory".to_owned(),
            Self::NoAgent { .. } => "the next command that needs an agent starts one, such as `mvm ps`; or run `mvm agent serve`".to_owned(),
            Self::Unreachable { source, .. } => {
                let denied = source
                    .downcast_ref::<io::Error>()
                    .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
                let what = "the agent's socket belongs to root: run the command with `sudo`";
                return denied.then(|| what.to_owned());
            }
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "name another port, or 0 for a free one".to_owned()
            }
            Self::NoAnswer { .. } => "it may be stuck or the machine overloaded: see `agent.log` in the state directory; when it is killed its microVMs keep running, and the next command starts another".to_owned(),
            Self::NeedsRoot { .. } => "run the command with `sudo`".to_owned(),
            Self::AgentStart { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "run the command with `sudo`, or pass another --state-dir".to_owned()
            }
            Self::AgentDied { log, .. } => format!("the whole log is in {}", log.display()),
            Self::AgentRuns(_) => {
                "see it with `mvm agent status`, or stop it with `mvm agent stop`".to_owned()
            }
            Self::StateDir(StateDirError::Copy { dir, .. }) => format!(
                "`mvm node claim --state-dir {}` makes it one of its own, with other networks and nothing that runs; the original stays as it is",
                dir.display()
            ),
            Self::OtherVmm { .. } => "stop it first with `mvm agent stop`: microVMs keep running, the next command starts a new agent".to_owned(),
            Self::Failed(failure) => return Some(failure.hint.clone()),
            Self::WaitTimeout { .. } => "the request goes on in the background: `mvm ps -a` shows how far it is".to_owned(),
            Self::StoppedWaiting => "`mvm ps -a` shows how far it is".to_owned(),
            Self::WaitLost(_) => "`mvm ps -a` starts an agent if none runs, and shows how far it is".to_owned(),
            Self::Usage { hint, .. } => hint.clone(),
            Self::NotReady { .. } => "run `mvm bootstrap`, or pass --yes to have it done".to_owned(),
            Self::NetworkDiffers(_) => "the agent puts links and firewall right within 10 s, and `mvm node info` says what it cannot; an instance that has lost its tap gets another with `mvm restart`".to_owned(),
            Self::Document(_)
            | Self::SomeRefused { .. }
            | Self::AgentStart { .. }
            | Self::StateDir(StateDirError::File { .. })
            | Self::Serve { .. }
            | Self::GivenUp
            | Self::HungUp
            | Self::Listen { .. }
            | Self::Files(_)
            | Self::Host(_)
            | Self::ChecksFailed(_)
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::Output(_) => return None,
        };
        Some(text)
    }

    /// Lines that somebody else wrote and that show more: a log's or a console's last ones.
    fn quoted(&self) -> &[String] {
        let lines: &[String] = match self {
            Self::AgentDied { tail, .. } => tail,
            Self::Failed(failure) => &failure.console,
            _ => &[],
        };
        last_words(lines, CONSOLE_LINES)
    }

    /// What is printed on standard error: what, why, and what to type next.
    pub(crate) fn report(&self, color: Color) -> String {
        let mut text = printable_text(&self.to_string());
        let mut source = match self {
            // Its text is the error's own.
            Self::Api(_) | Self::Document(_) => None,
            error => error.source(),
        };
        while let Some(cause) = source {
            let cause_text = printable_text(&cause.to_string());
            if !text.ends_with(&cause_text) {
                let _ = write!(text, ": {cause_text}");
            }
            source = cause.source();
        }
        let mut text = format!("{} {text}", color.bold_red("error:"));
        for line in self.quoted() {
            let _ = write!(text, "\n  | {}", printable(line));
        }
        if let Some(hint) = self.hint() {
            let _ = write!(text, "\n{} {}", color.bold("hint:"), printable_text(&hint));
        }
        text
    }
}

fn api_exit_code(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::Invalid => exit::USAGE,
        ErrorCode::NotFound => exit::NOT_FOUND,
        ErrorCode::OverLimit => exit::OVER_LIMIT,
        ErrorCode::Conflict => exit::CONFLICT,
        ErrorCode::OutOfScope => exit::OVER_LIMIT,
        ErrorCode::Late => exit::WAIT_TIMEOUT,
        ErrorCode::GuestNotFound => exit::PROGRAM_NOT_FOUND,
        ErrorCode::GuestDenied => exit::PROGRAM_DENIED,
        ErrorCode::Unsupported
        | ErrorCode::Protocol
        | ErrorCode::Guest
        | ErrorCode::BadRecord
        | ErrorCode::Internal
        | ErrorCode::Unknown => exit::FAILURE,
    }
}

/// Whether messages are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Color {
    /// With escape sequences of ANSI terminals.
    Ansi,
    /// As plain text.
    Plain,
}

impl Color {
    fn bold_red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn wrap(self, style: &str, text: &str) -> String {
        match self {
            Self::Ansi => format!("\x1b[{style}m{text}\x1b[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

/// The hint for a pool whose image cannot be built: what to look at depends on where it comes from.
pub(crate) fn build_hint(pool: &PoolPath, image: &ImageSpec) -> String {
    let look = match image {
        ImageSpec::Registry(reference) => {
            let registry = reference.registry();
            format!(
                "check the image's name and tag, that this machine reaches {registry}, and that the agent's user is logged in there if the image is not public"
            )
        }
        ImageSpec::Debian { .. } => {
            "check the names of the release and the packages, and that `apt-get update` works on this machine".to_owned()
        }
        ImageSpec::OciLayout { path, .. }
        | ImageSpec::OciArchive { path, .. }
        | ImageSpec::DockerArchive { path, .. }
        | ImageSpec::RootFs { path } => format!("check what is at {path} on this machine"),
        ImageSpec::Builtin => "`mvm doctor` examines the machine".to_owned(),
    };
    format!("{look}; then try again with `mvm pool build {pool}`")
}

#[cfg(test)]
mod tests;
