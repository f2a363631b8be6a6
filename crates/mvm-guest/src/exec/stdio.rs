//! The agent's ends of a program's pipes, terminal or socket, each with its credit.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm_core::credit::{CreditError, ReceiveWindow, SendWindow};
use mvm_core::frame::KIND_STDIN;
use mvm_core::guest::GuestMessage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::session::{Link, PIECE};

/// Pieces of output that are sent before the others get their turn: what a pipe holds.
const PIECES_AT_ONCE: usize = 4;
/// How long a pipe that others than the ended program keep open must be quiet to be given up.
pub(super) const QUIET: Duration = Duration::from_millis(200);
/// How long others may go on writing to it.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);

/// What a terminal takes for the end of its input.
const END_OF_TRANSMISSION: u8 = 4;

/// What the end of the input means to the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputEnd {
    /// The pipe is closed.
    Close,
    /// The terminal, which cannot be closed in one direction, is told with a character.
    Character,
    /// The socket is closed in this direction.
    Shutdown,
}

/// The way to a program's standard input, or into a socket.
#[derive(Debug)]
pub(crate) struct Input {
    pipe: Option<OwnedFd>,
    end: InputEnd,
    /// Pieces not yet written; of the first, `written` bytes are.
    queue: VecDeque<Vec<u8>>,
    written: usize,
    window: ReceiveWindow,
    is_ended: bool,
}

impl Input {
    pub(crate) fn new(pipe: Option<OwnedFd>, end: InputEnd) -> Self {
        let is_ended = pipe.is_none();
        Self {
            pipe,
            end,
            queue: VecDeque::new(),
            written: 0,
            window: ReceiveWindow::default(),
            is_ended,
        }
    }

    /// The same with a window of another size, before anything came.
    pub(crate) fn with_credit(self, size: u32) -> Self {
        Self { window: ReceiveWindow::of(size), ..self }
    }

    /// Another session writes from now on, with credit of its own.
    pub(crate) fn renew(&mut self) {
        self.window = ReceiveWindow::default();
    }

    /// Whether data may come: it was asked for and has not ended.
    pub(crate) fn is_open(&self) -> bool {
        !self.is_ended
    }

    /// Queues data and writes what the pipe takes.
    pub(crate) fn push(&mut self, data: Vec<u8>, link: Link<'_>) -> Result<(), CreditError> {
        self.hold(data)?;
        self.write(link);
        Ok(())
    }

    /// Queues data.
    pub(crate) fn hold(&mut self, data: Vec<u8>) -> Result<(), CreditError> {
        self.window.receive(data.len())?;
        if !data.is_empty() {
            self.queue.push_back(data);
        }
        Ok(())
    }

    /// No more data will come: ends the input behind what is queued.
    pub(crate) fn end(&mut self) {
        if !std::mem::replace(&mut self.is_ended, true) && self.end == InputEnd::Character {
            self.queue.push_back(vec![END_OF_TRANSMISSION]);
        }
        self.close_if_done();
    }

    /// Whether nothing can be passed on any more: the end was, or nobody takes it.
    pub(crate) fn is_over(&self) -> bool {
        self.pipe.is_none()
    }

    /// Puts another socket in the place of one that nothing was written to.
    pub(crate) fn replace(&mut self, socket: OwnedFd) {
        self.pipe = Some(socket);
    }

    /// Whether the socket has a peer.
    pub(crate) fn is_connected(&self) -> bool {
        self.pipe.as_ref().is_some_and(|socket| rustix::net::getpeername(socket).is_ok())
    }

    /// Gives up what is queued: nobody takes it.
    pub(crate) fn give_up(&mut self) {
        self.pipe = None;
    }

    fn close_if_done(&mut self) {
        if !self.is_ended || !self.queue.is_empty() {
            return;
        }
        if let Some(pipe) = self.pipe.take()
            && self.end == InputEnd::Shutdown
        {
            // A connection that is gone has ended in both directions.
            let _ = rustix::net::shutdown(&pipe, rustix::net::Shutdown::Write);
        }
    }

    /// The pipe, if there is something to write.
    pub(crate) fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.queue.is_empty()).map(|pipe| pipe.as_fd())
    }

    /// Writes what the pipe takes and returns credit for it. Data for a program that no longer
    /// reads is dropped: that is for the program's exit code to tell.
    pub(crate) fn write(&mut self, link: Link<'_>) {
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
        self.close_if_done();
        if let Some(bytes) = self.window.consume(consumed) {
            link.message(&GuestMessage::Credit { kind: KIND_STDIN, bytes });
        }
    }
}

/// The way from a program's standard output or error, or out of a socket.
#[derive(Debug)]
pub(crate) struct Output {
    kind: u8,
    pipe: Option<OwnedFd>,
    window: SendWindow,
    drain: Option<Drain>,
    is_dropped: bool,
}

/// A pipe that outlives its program, because others hold it open.
#[derive(Debug)]
struct Drain {
    since: Instant,
    /// When the pipe last held data.
    active: Instant,
    /// Bytes in the pipe that may be the ended program's own.
    owed: u64,
}

impl Output {
    pub(crate) fn new(kind: u8, pipe: Option<OwnedFd>) -> Self {
        let window = SendWindow::default();
        Self { kind, pipe, window, drain: None, is_dropped: false }
    }

    /// The same with a window of another size, before anything was sent.
    pub(crate) fn with_credit(self, size: u32) -> Self {
        Self { window: SendWindow::of(size), ..self }
    }

    /// Puts another socket in the place of one that nothing was read from.
    pub(crate) fn replace(&mut self, socket: OwnedFd) {
        self.pipe = Some(socket);
    }

    /// From now on nobody is sent what comes: it is read and dropped.
    pub(crate) fn discard(&mut self) {
        self.is_dropped = true;
    }

    /// Whether no more will come.
    pub(crate) fn is_over(&self) -> bool {
        self.pipe.is_none()
    }

    /// The descriptor itself.
    pub(crate) fn descriptor(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref()
    }

    /// The frame kind that the output is sent as.
    pub(crate) fn kind(&self) -> u8 {
        self.kind
    }

    pub(crate) fn grant(&mut self, bytes: u32) -> Result<(), CreditError> {
        self.window.grant(bytes)
    }

    /// The pipe, if there is credit for what comes out of it.
    pub(crate) fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| self.can_take()).map(|pipe| pipe.as_fd())
    }

    fn can_take(&self) -> bool {
        self.is_dropped || self.window.available() > 0
    }

    /// Sends what the pipe holds, as far as there is credit and room for it.
    pub(crate) fn read(&mut self, link: Link<'_>, now: Instant) {
        for _ in 0..PIECES_AT_ONCE {
            let Some(pipe) = self.pipe.as_ref().filter(|_| self.can_take()) else { return };
            let wanted = PIECE.min(self.window.available());
            let read = match self.is_dropped {
                true => rustix::io::read(pipe, &mut [0; PIECE]),
                false => link.data_from(self.kind, pipe, wanted),
            };
            let len = match read {
                Ok(len @ 1..) => len,
                Err(Errno::AGAIN | Errno::INTR) => return,
                Ok(0) | Err(_) => return self.pipe = None,
            };
            if !self.is_dropped {
                self.window.take(len);
            }
            if let Some(drain) = &mut self.drain {
                drain.active = now;
                drain.owed = drain.owed.saturating_sub(len as u64);
            }
            // What is short was all; the pipe's end is found in the next turn.
            if len < wanted || !link.outbox.has_room() {
                return;
            }
        }
    }

    /// Notes that the program has ended: from now on the pipe may be given up.
    pub(crate) fn begin_drain(&mut self, now: Instant) {
        let Some(pipe) = &self.pipe else { return };
        // Of a terminal's output the kernel tells only what it has processed.
        let owed = match rustix::io::ioctl_fionread(pipe) {
            Ok(owed) if !rustix::termios::isatty(pipe) => owed,
            _ => super::spawn::PIPE_LEN as u64,
        };
        self.drain.get_or_insert(Drain { since: now, active: now, owed });
    }

    /// Whether everything that is owed was sent.
    pub(crate) fn is_drained(&mut self, now: Instant) -> bool {
        let (Some(pipe), Some(drain)) = (&self.pipe, &mut self.drain) else {
            return self.pipe.is_none();
        };
        if drain.owed == 0 && now.duration_since(drain.since) >= LONGEST_DRAIN {
            return true;
        }
        // What waits for credit, for room or for a turn on a busy machine is not given up unread.
        if holds_data(pipe) {
            drain.active = now;
        }
        now.duration_since(drain.active) >= QUIET
    }
}

/// Whether there is something to read, or an end to be found.
fn holds_data(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
}
