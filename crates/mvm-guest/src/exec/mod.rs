//! One exec: a program, its pipes, its time limit and its end.
//!
//! ```text
//!             report pipe ends              the process ends          pipes end, or fall quiet
//!  Starting ────────────────────> Running ────────────────> Draining ────────────────> Exit is sent
//!      └─ the child reports why it cannot run the program ──────────────────────────> Error is sent
//! ```
//!
//! The server owns all execs on one thread: it forks, polls and reaps, so no process can end
//! between being started and being known.

mod absent;
mod hooks;
mod identity;
mod main_process;
mod program;
mod spawn;
pub(crate) mod stdio;
mod surroundings;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm_core::credit::CreditError;
use mvm_core::frame::{KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{ErrorKind, ExecRequest, ExitStatus, GuestError, GuestMessage, TerminalSize};
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::builtin;
use crate::failure::{failure, invalid};
use crate::process;
use crate::session::Link;
pub(crate) use hooks::{Hooks, Last};
pub(crate) use identity::Identity;
pub(crate) use main_process::MainProcess;
use program::ChildStep;
pub(crate) use program::Program;
use stdio::{Input, InputEnd, Output, QUIET};
pub(crate) use surroundings::Surroundings;

/// How long a program has to remove what it has not finished, once its input has ended.
const CLEAR_UP: Duration = Duration::from_secs(10);

/// Which of an exec's descriptors is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pipe {
    Report,
    Stdin,
    Stdout,
    Stderr,
}

/// Whether the program runs yet.
#[derive(Debug)]
enum Start {
    Pending { report: OwnedFd, program: Box<Program> },
    Done,
    Failed(GuestError),
}

/// A running program.
#[derive(Debug)]
pub(crate) struct Exec {
    pid: i32,
    start: Start,
    status: Option<ExitStatus>,
    stdin: Input,
    outputs: [Output; 2],
    has_terminal: bool,
    /// The terminal, held open until the program has ended.
    terminal: Option<OwnedFd>,
    /// Whether it is to run on without the host.
    is_detaching: bool,
    /// Whether it removes what it has not finished when its input ends early.
    clears_up: bool,
    deadline: Option<Instant>,
    is_timed_out: bool,
}

impl Exec {
    /// Forks a child for the program; whether it can run is known later.
    pub(crate) fn start(
        request: &ExecRequest,
        surroundings: &Surroundings,
        now: Instant,
    ) -> Result<Self, GuestError> {
        let own_uid = rustix::process::geteuid().as_raw();
        let identity = Identity::resolve(request.user.as_deref(), own_uid)?;
        let program = Program::new(request, identity)?;
        let child = spawn::spawn(&program, request, &surroundings.entry(false))
            .map_err(|error| spawn_failure(&program.name, &error))?;
        let input_end = match request.terminal {
            Some(_) => InputEnd::Character,
            None => InputEnd::Close,
        };
        Ok(Self {
            pid: child.pid,
            start: Start::Pending { report: child.report, program: Box::new(program) },
            status: None,
            stdin: Input::new(child.ends.stdin, input_end),
            outputs: [
                Output::new(KIND_STDOUT, child.ends.stdout),
                Output::new(KIND_STDERR, child.ends.stderr),
            ],
            has_terminal: request.terminal.is_some(),
            terminal: child.ends.terminal,
            is_detaching: request.detach,
            clears_up: builtin::clears_up(request),
            deadline: request.timeout_ms.map(|ms| now + Duration::from_millis(ms.min(FOREVER_MS))),
            is_timed_out: false,
        })
    }

    /// Whether this is its process, and has not ended.
    pub(crate) fn runs_as(&self, pid: i32) -> bool {
        self.pid == pid && self.status.is_none()
    }

    /// The descriptors to poll now.
    pub(crate) fn wants<'a>(
        &'a self,
        has_room: bool,
        mut add: impl FnMut(Pipe, BorrowedFd<'a>, PollFlags),
    ) {
        if let Some(pipe) = self.stdin.wants() {
            add(Pipe::Stdin, pipe, PollFlags::OUT);
        }
        if !has_room {
            return;
        }
        match &self.start {
            Start::Pending { report, .. } => add(Pipe::Report, report.as_fd(), PollFlags::IN),
            Start::Failed(_) => {}
            Start::Done => {
                for (name, output) in [Pipe::Stdout, Pipe::Stderr].into_iter().zip(&self.outputs) {
                    if let Some(pipe) = output.wants() {
                        add(name, pipe, PollFlags::IN);
                    }
                }
            }
        }
    }

    /// Does what a ready descriptor allows.
    pub(crate) fn ready(&mut self, pipe: Pipe, link: Link<'_>, now: Instant) {
        match pipe {
            Pipe::Report => self.read_report(link),
            Pipe::Stdin => self.stdin.write(link),
            Pipe::Stdout => self.outputs[0].read(link, now),
            Pipe::Stderr => self.outputs[1].read(link, now),
        }
    }

    fn read_report(&mut self, link: Link<'_>) {
        let Start::Pending { report, program } = &self.start else { return };
        let mut bytes = [0; 5];
        match rustix::io::read(report, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(5) => {
                let errno = i32::from_ne_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
                self.start = Start::Failed(program.explain(ChildStep::from_byte(bytes[0]), errno));
            }
            _ => {
                self.start = Start::Done;
                link.message(&GuestMessage::Started { pid: self.pid.unsigned_abs() });
            }
        }
    }

    /// Data for the program's standard input.
    pub(crate) fn input(&mut self, data: Vec<u8>, link: Link<'_>) -> Result<(), GuestError> {
        if !self.stdin.is_open() {
            return Err(invalid("data for a standard input that is not open"));
        }
        self.stdin.push(data, link).map_err(violation)
    }

    /// The end of data of a kind.
    pub(crate) fn end_of(&mut self, kind: u8) {
        if kind == KIND_STDIN {
            self.stdin.end();
        }
    }

    /// Credit that the host returned.
    pub(crate) fn grant(&mut self, kind: u8, bytes: u32) -> Result<(), GuestError> {
        match self.outputs.iter_mut().find(|output| output.kind() == kind) {
            Some(output) => output.grant(bytes).map_err(violation),
            None => Err(invalid(format!("credit for frames of kind {kind}, which are not sent"))),
        }
    }

    /// Gives the program's terminal another size; a program without one has nothing to resize.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = self.outputs[0].descriptor().filter(|_| self.has_terminal) {
            // A terminal that is closed by now needs no size.
            let _ = spawn::set_size(terminal, size);
        }
    }

    /// Wishes that it runs on without the host.
    pub(crate) fn detach(&mut self) {
        self.is_detaching = true;
    }

    /// Whether it runs, and nothing more is to be said of it.
    pub(crate) fn is_detached(&self) -> bool {
        self.is_detaching && matches!(self.start, Start::Done)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Leaves it to itself: it gets no more input, and its output is dropped.
    pub(crate) fn abandon(&mut self) {
        // The input of a terminal has no end as long as the terminal is there.
        if !self.has_terminal {
            self.stdin.end();
        }
        self.outputs.iter_mut().for_each(Output::discard);
    }

    /// Sends a signal to the process, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) {
        if self.status.is_none() {
            process::signal(self.pid, signal);
        }
    }

    /// Ends it, as nobody waits for it any more, and says whether it may still run for a while: it
    /// may if it has something to clear up. A copy would leave a part of a file behind.
    pub(crate) fn stop(&mut self, now: Instant) -> bool {
        let may_clear_up =
            self.clears_up && self.status.is_none() && matches!(self.start, Start::Done);
        if may_clear_up {
            self.stdin.give_up();
            self.outputs.iter_mut().for_each(Output::discard);
            self.deadline = Some(now + CLEAR_UP);
        } else {
            self.kill();
        }
        may_clear_up
    }

    /// Kills the process group. The process itself is named too, because it may not have reached
    /// the group's making, or have left it. After its end the group's number is still its own
    /// as long as anyone is in it.
    pub(crate) fn kill(&self) {
        // A shell with job control gives each of its jobs a group. The terminal tells which one is in
        // the foreground only as long as the shell lives.
        let terminal = self.outputs[0].descriptor().filter(|_| self.has_terminal);
        let foreground = terminal.and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok());
        process::signal_group(self.pid, libc::SIGKILL);
        self.signal(libc::SIGKILL);
        if let Some(foreground) = foreground {
            process::signal_group(foreground.as_raw_nonzero().get(), libc::SIGKILL);
        }
    }

    /// Notes that the process has ended and was reaped.
    pub(crate) fn ended(&mut self, status: ExitStatus, now: Instant) {
        self.status = Some(if self.is_timed_out { ExitStatus::TimedOut } else { status });
        self.deadline = None;
        self.terminal = None;
        for output in &mut self.outputs {
            output.begin_drain(now);
        }
    }

    /// When [`Exec::settle`] wants to be called at the latest.
    pub(crate) fn alarm(&self, now: Instant) -> Option<Instant> {
        if self.status.is_some() { Some(now + QUIET) } else { self.deadline }
    }

    /// Enforces the time limit, and tells the exec's last message when it is over.
    pub(crate) fn settle(&mut self, now: Instant) -> Option<GuestMessage> {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.deadline = None;
            self.is_timed_out = true;
            self.kill();
        }
        match (&self.start, self.status) {
            (Start::Failed(error), _) => Some(GuestMessage::Error(error.clone())),
            (Start::Done, Some(status)) => {
                let [stdout, stderr] = &mut self.outputs;
                let is_drained = stdout.is_drained(now) & stderr.is_drained(now);
                is_drained.then_some(GuestMessage::Exit(status))
            }
            _ => None,
        }
    }
}

/// A time limit that is none, in milliseconds: a hundred years.
const FOREVER_MS: u64 = 100 * 365 * 24 * 3600 * 1000;

/// No process could be made for a program.
fn spawn_failure(program: &str, error: &std::io::Error) -> GuestError {
    let limits = [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ENOMEM];
    let kind = match error.raw_os_error() {
        Some(errno) if limits.contains(&errno) => ErrorKind::Limit,
        _ => ErrorKind::System,
    };
    failure(kind, format!("cannot start a process for `{program}`: {error}"))
}

fn violation(error: CreditError) -> GuestError {
    invalid(error.to_string())
}
