//! The agent's ends of a program's three pipes, each with its credit.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm_core::credit::{CreditError, ReceiveWindow, SendWindow};
use mvm_core::frame::KIND_STDIN;
use mvm_core::guest::GuestMessage;
use rustix::io::Errno;

use crate::session::Link;

/// Largest piece of output in one frame: a pipe's own capacity is 64 KiB.
const PIECE: usize = 32 * 1024;
/// How long a pipe that others than the ended program keep open must be quiet to be given up.
pub(super) const QUIET: Duration = Duration::from_millis(200);
/// How long others may go on writing to it.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
/// Output after the program's end that may still be its own: what fits into a pipe.
const OWED: usize = 64 * 1024;

/// The pipe to a program's standard input.
#[derive(Debug)]
pub(super) struct Input {
    pipe: Option<OwnedFd>,
    /// Pieces not yet written; of the first, `written` bytes are.
    queue: VecDeque<Vec<u8>>,
    written: usize,
    window: ReceiveWindow,
    is_ended: bool,
}

impl Input {
    pub(super) fn new(pipe: Option<OwnedFd>) -> Self {
        let is_ended = pipe.is_none();
        Self {
            pipe,
            queue: VecDeque::new(),
            written: 0,
            window: ReceiveWindow::default(),
            is_ended,
        }
    }

    /// Another session writes from now on, with credit of its own.
    pub(super) fn renew(&mut self) {
        self.window = ReceiveWindow::default();
    }

    /// Whether data may come: it was asked for and has not ended.
    pub(super) fn is_open(&self) -> bool {
        !self.is_ended
    }

    /// Queues data and writes what the pipe takes.
    pub(super) fn push(&mut self, data: Vec<u8>, link: Link<'_>) -> Result<(), CreditError> {
        self.window.receive(data.len())?;
        if !data.is_empty() {
            self.queue.push_back(data);
        }
        self.write(link);
        Ok(())
    }

    /// No more data will come: closes the pipe behind what is queued.
    pub(super) fn end(&mut self) {
        self.is_ended = true;
        if self.queue.is_empty() {
            self.pipe = None;
        }
    }

    /// The pipe, if there is something to write.
    pub(super) fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.queue.is_empty()).map(|pipe| pipe.as_fd())
    }

    /// Writes what the pipe takes and returns credit for it. Data for a program that no longer
    /// reads is dropped: that is for the program's exit code to tell.
    pub(super) fn write(&mut self, link: Link<'_>) {
        let mut consumed = 0;
        while let Some(front) = self.queue.front() {
            let rest = &front[self.written..];
            let result = match &self.pipe {
                Some(pipe) => rustix::io::write(pipe, rest),
                None => Ok(rest.len()),
            };
            match result {
                Ok(len) => {
                    consumed += len;
                    self.written += len;
                    if self.written == front.len() {
                        self.queue.pop_front();
                        self.written = 0;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.pipe = None,
            }
        }
        if self.is_ended && self.queue.is_empty() {
            self.pipe = None;
        }
        if let Some(bytes) = self.window.consume(consumed) {
            link.message(&GuestMessage::Credit { kind: KIND_STDIN, bytes });
        }
    }
}

/// A pipe from a program's standard output or error.
#[derive(Debug)]
pub(super) struct Output {
    kind: u8,
    pipe: Option<OwnedFd>,
    window: SendWindow,
    drain: Option<Drain>,
}

/// A pipe that outlives its program, because others hold it open.
#[derive(Debug)]
struct Drain {
    since: Instant,
    /// When data last came, or could not have come.
    active: Instant,
    bytes: usize,
}

impl Output {
    pub(super) fn new(kind: u8, pipe: OwnedFd) -> Self {
        Self { kind, pipe: Some(pipe), window: SendWindow::default(), drain: None }
    }

    /// The frame kind that the output is sent as.
    pub(super) fn kind(&self) -> u8 {
        self.kind
    }

    pub(super) fn grant(&mut self, bytes: u32) -> Result<(), CreditError> {
        self.window.grant(bytes)
    }

    /// The pipe, if there is credit for what comes out of it.
    pub(super) fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| self.window.available() > 0).map(|pipe| pipe.as_fd())
    }

    /// Sends one piece of what the pipe holds.
    pub(super) fn read(&mut self, link: Link<'_>, now: Instant) {
        let mut piece = [0; PIECE];
        let wanted = PIECE.min(self.window.available());
        let Some(pipe) = self.pipe.as_ref().filter(|_| wanted > 0) else { return };
        match rustix::io::read(pipe, &mut piece[..wanted]) {
            Ok(0) => self.pipe = None,
            Ok(len) => {
                self.window.take(len);
                link.data(self.kind, &piece[..len]);
                if let Some(drain) = &mut self.drain {
                    drain.active = now;
                    drain.bytes += len;
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.pipe = None,
        }
    }

    /// Notes that the program has ended: from now on the pipe may be given up.
    pub(super) fn begin_drain(&mut self, now: Instant) {
        self.drain.get_or_insert(Drain { since: now, active: now, bytes: 0 });
    }

    /// Whether everything that is owed was sent. `could_read` tells whether the server was able to
    /// take data since it last asked.
    pub(super) fn is_drained(&mut self, could_read: bool, now: Instant) -> bool {
        if self.pipe.is_none() {
            return true;
        }
        let Some(drain) = &mut self.drain else { return false };
        if !could_read || self.window.available() == 0 {
            drain.active = now;
            return false;
        }
        let is_quiet = now.duration_since(drain.active) >= QUIET;
        let is_settled = drain.bytes >= OWED && now.duration_since(drain.since) >= LONGEST_DRAIN;
        is_quiet || is_settled
    }
}
