//! One hook: its process, its pipes and the end of its output.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Instant;

use mvm_core::guest::{
    ErrorKind, ExecRequest, ExitStatus, GuestError, HookRun, LONGEST_HOOK_OUTPUT,
};
use rustix::io::Errno;

use super::super::identity::Identity;
use super::super::program::{ChildStep, Program};
use super::super::surroundings::Surroundings;
use super::super::{Pipe, spawn, spawn_failure};
use crate::process;

/// What is read at once.
const PIECE: usize = 16 * 1024;
/// Pieces that may be in a pipe when its program ends, and one to find its end.
const LAST_PIECES: usize = spawn::PIPE_LEN / PIECE + 1;

/// A hook that was started.
#[derive(Debug)]
pub(super) struct Hook {
    name: String,
    program: Program,
    pid: i32,
    /// Tells why the program does not run, once the process has ended.
    report: OwnedFd,
    /// From standard output and error.
    pipes: [Option<OwnedFd>; 2],
    output: Tail,
    started: Instant,
    cut_at: Option<Instant>,
    end: Option<(ExitStatus, Instant)>,
}

impl Hook {
    /// Forks a child for the program; whether it could run is known at its end.
    pub(super) fn start(
        name: &str,
        request: &ExecRequest,
        surroundings: &Surroundings,
        now: Instant,
    ) -> Result<Self, GuestError> {
        let own_uid = rustix::process::geteuid().as_raw();
        let program = Program::new(request, Identity::resolve(None, own_uid)?)?;
        let child = spawn::spawn(&program, request, &surroundings.entry(false))
            .map_err(|error| spawn_failure(&program.name, &error))?;
        Ok(Self {
            name: name.to_owned(),
            program,
            pid: child.pid,
            report: child.report,
            pipes: [child.ends.stdout, child.ends.stderr],
            output: Tail::default(),
            started: now,
            cut_at: None,
            end: None,
        })
    }

    pub(super) fn runs_as(&self, pid: i32) -> bool {
        self.pid == pid && self.end.is_none()
    }

    pub(super) fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// When it was cut off, if it was.
    pub(super) fn cut_at(&self) -> Option<Instant> {
        self.cut_at
    }

    pub(super) fn wants<'a>(&'a self, mut add: impl FnMut(Pipe, BorrowedFd<'a>)) {
        for (name, pipe) in [Pipe::Stdout, Pipe::Stderr].into_iter().zip(&self.pipes) {
            if let Some(pipe) = pipe {
                add(name, pipe.as_fd());
            }
        }
    }

    /// Reads a piece of what the hook wrote; tells whether there may be more.
    pub(super) fn read(&mut self, pipe: Pipe) -> bool {
        let slot = match pipe {
            Pipe::Stdout => &mut self.pipes[0],
            _ => &mut self.pipes[1],
        };
        let Some(pipe) = slot else { return false };
        let mut piece = [0; PIECE];
        match rustix::io::read(pipe, &mut piece) {
            Ok(len) if len > 0 => {
                self.output.push(&piece[..len]);
                true
            }
            Err(Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Ok(_) | Err(_) => {
                *slot = None;
                false
            }
        }
    }

    pub(super) fn ended(&mut self, status: ExitStatus, now: Instant) {
        self.end = Some((status, now));
    }

    /// Kills the process group. The process itself is named too, because it may not have reached
    /// the group's making, or have left it.
    pub(super) fn kill(&self) {
        process::signal_group(self.pid, libc::SIGKILL);
        if self.end.is_none() {
            process::signal(self.pid, libc::SIGKILL);
        }
    }

    /// Ends a hook that has not ended by itself.
    pub(super) fn cut_off(&mut self, now: Instant) {
        if self.end.is_none() && self.cut_at.is_none() {
            self.cut_at = Some(now);
            self.kill();
        }
    }

    /// What is reported of it. Others may hold the pipes open: they are not waited for.
    pub(super) fn finish(mut self, now: Instant) -> HookRun {
        for pipe in [Pipe::Stdout, Pipe::Stderr] {
            let mut left = LAST_PIECES;
            while left > 0 && self.read(pipe) {
                left -= 1;
            }
        }
        let (mut status, ended) = self.end.unwrap_or((ExitStatus::TimedOut, now));
        let mut output = self.output.text();
        let mut report = [0; 5];
        if self.cut_at.is_some() {
            status = ExitStatus::TimedOut;
        } else if let Ok(5) = rustix::io::read(&self.report, &mut report) {
            let errno = i32::from_ne_bytes([report[1], report[2], report[3], report[4]]);
            let error = self.program.explain(ChildStep::from_byte(report[0]), errno);
            let code = if error.kind == ErrorKind::NotFound { 127 } else { 126 };
            status = ExitStatus::Exited { code };
            output = error.message;
        }
        let took = ended.saturating_duration_since(self.started).as_millis();
        let took_ms = u64::try_from(took).unwrap_or(u64::MAX);
        HookRun { name: self.name, status, took_ms, output }
    }
}

/// The last bytes of an output.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
    is_cut: bool,
}

impl Tail {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        let excess = self.bytes.len().saturating_sub(LONGEST_HOOK_OUTPUT);
        self.bytes.drain(..excess);
        self.is_cut |= excess > 0;
    }

    fn text(&self) -> String {
        HookRun::output_of(&self.bytes, !self.is_cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_output_the_end_is_kept() {
        let mut tail = Tail::default();
        for number in 0..100_000 {
            tail.push(format!("{number}é\n").as_bytes());
            assert!(tail.bytes.len() <= LONGEST_HOOK_OUTPUT);
        }
        let text = tail.text();
        assert!(text.ends_with("99998é\n99999é\n") && !text.starts_with('\u{fffd}'), "{text}");
        assert!(text.len() > LONGEST_HOOK_OUTPUT - 8);
    }
}
