//! The main process: started once per boot, and not bound to a session with the host.
//!
//! ```text
//!             report pipe ends            the process ends          pipes end, or fall quiet
//!  Starting ────────────────────> Running ────────────────> Ended ────────────────> Exit is sent
//!      └─ the child reports why it cannot run the program ──────────────────────> Error is sent
//! ```
//!
//! A host attaches to it on a stream of its session, and is answered in any of these states, also
//! by a session that comes after the end. What the process writes meanwhile is in a [`Backlog`].

mod backlog;

use std::fs::{self, DirBuilder};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_core::credit::SendWindow;
use mvm_core::frame::{KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{
    ErrorKind, ExecRequest, ExitStatus, GuestError, GuestMessage, MainProgram, MainState,
    TerminalSize,
};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::identity::Identity;
use super::program::{ChildStep, Program};
use super::stdio::{Input, InputEnd, QUIET};
use super::{Pipe, Surroundings, spawn, spawn_failure, violation};
use crate::console::complain;
use crate::failure::{failure, invalid};
use crate::process;
use crate::session::{Link, Outbox};
use backlog::{Backlog, Channel};

/// Largest piece of output in one frame.
const PIECE: usize = 32 * 1024;
/// How long others may go on writing to the pipes of an ended process.
const LONGEST_DRAIN: Duration = Duration::from_secs(2);

/// Whether the program runs yet.
#[derive(Debug)]
enum Start {
    Pending { report: OwnedFd, program: Box<Program> },
    Done,
    Failed(GuestError),
}

/// A host that listens.
#[derive(Debug)]
struct Host {
    stream: u32,
    windows: [SendWindow; 2],
    from: [u64; 2],
    /// Whether it was told where the process stands.
    is_answered: bool,
}

/// How the process ended.
#[derive(Debug, Clone, Copy)]
struct End {
    status: ExitStatus,
    at: Instant,
    /// When its pipes last had something to say.
    last_output: Instant,
}

/// The main process of this boot.
#[derive(Debug)]
pub(crate) struct MainProcess {
    pid: i32,
    /// Whether it is process 1 for itself and those who join it.
    is_first: bool,
    start: Start,
    end: Option<End>,
    stop_signal: i32,
    stdin: Input,
    /// From standard output and error; a terminal is in the first place.
    pipes: [Option<OwnedFd>; 2],
    has_terminal: bool,
    backlog: Backlog,
    host: Option<Host>,
}

impl MainProcess {
    /// Forks a child for the program; whether it can run is known later.
    pub(crate) fn start(
        program: &MainProgram,
        surroundings: &mut Surroundings,
    ) -> Result<Self, GuestError> {
        let request = ExecRequest {
            argv: program.argv.clone(),
            env: program.env.clone(),
            cwd: Some(program.cwd.clone()).filter(|cwd| !cwd.is_empty()),
            user: program.user.clone(),
            stdin: program.stdin,
            terminal: program.terminal,
            ..ExecRequest::default()
        };
        let own_uid = rustix::process::geteuid().as_raw();
        let identity = Identity::resolve(request.user.as_deref(), own_uid)?;
        if let Some(cwd) = &request.cwd {
            ensure_directory(Path::new(cwd))?;
        }
        let MainProgram { stop_signal, is_first, .. } = *program;
        let program = Program::new(&request, identity)?;
        let child = spawn::spawn(&program, &request, &surroundings.entry(is_first))
            .map_err(|error| spawn_failure(&program.name, &error))?;
        // One that has failed already has no namespace any more, and tells why by its report.
        if is_first && let Err(error) = surroundings.join(child.pid) {
            complain(&format!("no program can join process {}: {error}", child.pid));
        }
        let input_end = match request.terminal {
            Some(_) => InputEnd::Character,
            None => InputEnd::Close,
        };
        Ok(Self {
            pid: child.pid,
            is_first,
            start: Start::Pending { report: child.report, program: Box::new(program) },
            end: None,
            stop_signal,
            stdin: Input::new(child.ends.stdin, input_end),
            pipes: [child.ends.stdout, child.ends.stderr],
            has_terminal: request.terminal.is_some(),
            backlog: Backlog::default(),
            host: None,
        })
    }

    /// Whether this is its process, and has not ended.
    pub(crate) fn runs_as(&self, pid: i32) -> bool {
        self.pid == pid && self.end.is_none()
    }

    /// Whether a host listens on this stream.
    pub(crate) fn is_on(&self, stream: u32) -> bool {
        self.host.as_ref().is_some_and(|host| host.stream == stream)
    }

    /// Lets a host listen on a stream, from these positions in standard output and error on.
    pub(crate) fn attach(&mut self, stream: u32, from: [u64; 2]) {
        let windows = [SendWindow::default(), SendWindow::default()];
        self.stdin.renew();
        self.host = Some(Host { stream, windows, from, is_answered: false });
    }

    /// The host listens no more; it, or another one, is about to attach again.
    pub(crate) fn detach(&mut self) {
        self.host = None;
        self.backlog.detach();
    }

    /// The host is gone: the process goes on without it.
    pub(crate) fn abandon(&mut self) {
        self.host = None;
        self.backlog.abandon();
    }

    /// The descriptors to poll now.
    pub(crate) fn wants<'a>(&'a self, mut add: impl FnMut(Pipe, BorrowedFd<'a>, PollFlags)) {
        if let Some(pipe) = self.stdin.wants().filter(|_| self.host.is_some()) {
            add(Pipe::Stdin, pipe, PollFlags::OUT);
        }
        if let Start::Pending { report, .. } = &self.start {
            add(Pipe::Report, report.as_fd(), PollFlags::IN);
        }
        if self.backlog.has_room() {
            for (name, pipe) in [Pipe::Stdout, Pipe::Stderr].into_iter().zip(&self.pipes) {
                if let Some(pipe) = pipe {
                    add(name, pipe.as_fd(), PollFlags::IN);
                }
            }
        }
    }

    /// Does what a ready descriptor allows.
    pub(crate) fn ready(&mut self, pipe: Pipe, outbox: &Outbox, now: Instant) {
        match pipe {
            Pipe::Report => self.read_report(),
            Pipe::Stdout => self.read(Channel::Stdout, now),
            Pipe::Stderr => self.read(Channel::Stderr, now),
            Pipe::Stdin => {
                if let Some(host) = &self.host {
                    self.stdin.write(Link { outbox, stream: host.stream });
                }
            }
        }
    }

    fn read_report(&mut self) {
        let Start::Pending { report, program } = &self.start else { return };
        let mut bytes = [0; 5];
        self.start = match rustix::io::read(report, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => return,
            Ok(5) => {
                let errno = i32::from_ne_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
                Start::Failed(program.explain(ChildStep::from_byte(bytes[0]), errno))
            }
            _ => Start::Done,
        };
    }

    fn read(&mut self, channel: Channel, now: Instant) {
        let slot = match channel {
            Channel::Stdout => &mut self.pipes[0],
            Channel::Stderr => &mut self.pipes[1],
        };
        let Some(pipe) = slot else { return };
        let mut piece = [0; PIECE];
        match rustix::io::read(pipe, &mut piece) {
            Ok(0) => *slot = None,
            Ok(len) => {
                self.backlog.push(channel, piece[..len].to_vec());
                if let Some(end) = &mut self.end {
                    end.last_output = now;
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => *slot = None,
        }
    }

    /// Data for the process's standard input; dropped if that is not open.
    pub(crate) fn input(&mut self, data: Vec<u8>, link: Link<'_>) -> Result<(), GuestError> {
        self.stdin.push(data, link).map_err(violation)
    }

    /// The end of data of a kind.
    pub(crate) fn end_of(&mut self, kind: u8) {
        if kind == KIND_STDIN {
            self.stdin.end();
        }
    }

    /// Credit that the host returned: it has taken so much.
    pub(crate) fn grant(&mut self, kind: u8, bytes: u32) -> Result<(), GuestError> {
        let (channel, index) = match kind {
            KIND_STDOUT => (Channel::Stdout, 0),
            KIND_STDERR => (Channel::Stderr, 1),
            _ => {
                let text = format!("credit for frames of kind {kind}, which are not sent");
                return Err(invalid(text));
            }
        };
        let Some(host) = &mut self.host else { return Ok(()) };
        host.windows[index].grant(bytes).map_err(violation)?;
        self.backlog.acknowledge(channel, bytes);
        Ok(())
    }

    /// Sends a signal to the process, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) {
        if self.end.is_none() {
            process::signal(self.pid, signal);
        }
    }

    /// Gives the process's terminal another size; without one there is nothing to resize.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = self.pipes[0].as_ref().filter(|_| self.has_terminal) {
            // A terminal that is closed by now needs no size.
            let _ = spawn::set_size(terminal, size);
        }
    }

    /// Asks the process to end, in the way that it wants to be asked.
    pub(crate) fn ask_to_end(&self) {
        self.signal(self.stop_signal);
    }

    /// Kills the process group, and the process itself if it has left that.
    pub(crate) fn kill(&self) {
        process::signal_group(self.pid, libc::SIGKILL);
        self.signal(libc::SIGKILL);
    }

    /// Notes that the process has ended and was reaped.
    pub(crate) fn ended(&mut self, status: ExitStatus, now: Instant) {
        self.end = Some(End { status, at: now, last_output: now });
    }

    /// When [`MainProcess::settle`] wants to be called at the latest.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        // A process that has to wait for the host has not been quiet.
        let is_open = self.pipes.iter().any(Option::is_some) && self.backlog.has_room();
        let end = self.end.filter(|_| is_open)?;
        Some((end.last_output + QUIET).min(end.at + LONGEST_DRAIN))
    }

    /// Whether the process has ended and all its output, as far as a host wants it, is on its way.
    pub(crate) fn is_over(&self) -> bool {
        match &self.start {
            Start::Pending { .. } => false,
            Start::Failed(_) => true,
            Start::Done => {
                self.end.is_some()
                    && self.pipes.iter().all(Option::is_none)
                    && (self.host.is_none() || self.backlog.is_sent())
            }
        }
    }

    /// Sends the host what there is room for, and its stream's last message when all is said.
    pub(crate) fn settle(&mut self, outbox: &Outbox, now: Instant) {
        if let Some(alarm) = self.alarm()
            && alarm <= now
        {
            // Others hold them open, who go with the microVM.
            self.pipes = [None, None];
        }
        let Some(host) = &mut self.host else { return };
        let link = Link { outbox, stream: host.stream };
        match &self.start {
            Start::Pending { .. } => return,
            Start::Failed(error) => {
                link.message(&GuestMessage::Error(error.clone()));
                self.detach();
                return;
            }
            Start::Done => {}
        }
        if !std::mem::replace(&mut host.is_answered, true) {
            let [stdout, stderr] = self.backlog.attach(host.from);
            let pid = if self.is_first { 1 } else { self.pid.unsigned_abs() };
            link.message(&GuestMessage::Main(MainState { pid, stdout, stderr }));
        }
        while outbox.has_room() {
            let windows = &host.windows;
            let Some((channel, bytes)) =
                self.backlog.next(PIECE, |channel| windows[channel as usize].available())
            else {
                break;
            };
            host.windows[channel as usize].take(bytes.len());
            let kind = match channel {
                Channel::Stdout => KIND_STDOUT,
                Channel::Stderr => KIND_STDERR,
            };
            link.data(kind, bytes);
        }
        if let Some(end) = self.end.filter(|_| self.is_over()) {
            link.message(&GuestMessage::Exit(end.status));
            self.detach();
        }
    }
}

/// Makes a directory and its parents, for everybody to enter.
fn ensure_directory(path: &Path) -> Result<(), GuestError> {
    let describe = |error: std::io::Error| {
        let kind = match error.kind() {
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            _ => ErrorKind::System,
        };
        failure(kind, format!("cannot make working directory `{}`: {error}", path.display()))
    };
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(describe)
}
