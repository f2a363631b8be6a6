//! What the guest will send.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_core::frame::{self, KIND_MESSAGE, TRAILER_LEN};
use mvm_core::guest::{GuestMessage, MAX_BODY, Preamble};

use rustix::io::Errno;

use super::Waker;

/// Bytes at which the server stops producing data and taking requests.
const LIMIT: usize = 256 * 1024;

/// Largest piece of data in one frame: each frame costs system calls here and wakes at the host.
pub(crate) const PIECE: usize = MAX_BODY as usize;

#[derive(Debug, Default)]
struct State {
    tag: u32,
    pending: Vec<u8>,
    /// Bytes that the writer has taken and not written yet.
    in_flight: usize,
    /// Whether somebody waits for `changed`. Telling nobody costs a system call too.
    is_awaited: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.pending.len() + self.in_flight >= LIMIT
    }
}

/// The queue from the server to the writer thread. Pushing never blocks: the server asks
/// [`Outbox::has_room`] before it does something that may be answered.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
    waker: Arc<Waker>,
}

impl Outbox {
    pub(crate) fn new(waker: Arc<Waker>) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), waker }
    }

    /// Drops everything of the earlier session and opens a new one.
    pub(crate) fn open_session(&self, preamble: &Preamble) {
        let mut state = self.state();
        state.tag = preamble.tag();
        state.pending.clear();
        state.pending.extend_from_slice(&preamble.encode());
        self.tell(&mut state);
    }

    /// Whether there is room for more.
    pub(crate) fn has_room(&self) -> bool {
        !self.state().is_full()
    }

    /// Waits until everything was written, or the time is over.
    pub(crate) fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while state.pending.len() + state.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state.is_awaited = true;
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes that what was taken is written, and takes what is pending; waits while there is none.
    pub(super) fn exchange(&self, chunk: &mut Vec<u8>) {
        chunk.clear();
        let mut state = self.state();
        let was_full = state.is_full();
        state.in_flight = 0;
        if was_full && !state.is_full() {
            self.waker.wake();
        }
        self.tell(&mut state);
        while state.pending.is_empty() {
            state.is_awaited = true;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(chunk, &mut state.pending);
        state.in_flight = chunk.len();
    }

    fn push(&self, stream: u32, kind: u8, body: &[u8]) {
        let mut state = self.state();
        let tag = state.tag;
        frame::encode(tag, stream, kind, body, &mut state.pending);
        self.tell(&mut state);
    }

    fn tell(&self, state: &mut State) {
        if std::mem::take(&mut state.is_awaited) {
            self.changed.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream's way into the outbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link<'a> {
    pub(crate) outbox: &'a Outbox,
    pub(crate) stream: u32,
}

impl Link<'_> {
    /// Queues a message.
    pub(crate) fn message(&self, message: &GuestMessage) {
        // The messages' types hold nothing that JSON cannot express.
        if let Ok(body) = serde_json::to_vec(message) {
            self.outbox.push(self.stream, KIND_MESSAGE, &body);
        }
    }

    /// Queues data; the caller has credit for it.
    pub(crate) fn data(&self, kind: u8, body: &[u8]) {
        self.outbox.push(self.stream, kind, body);
    }

    /// Queues what a descriptor that does not block has to say, at most `max` bytes, which are read
    /// to where they are sent from. Tells how many came; none are the descriptor's end.
    pub(crate) fn data_from(&self, kind: u8, fd: &OwnedFd, max: usize) -> Result<usize, Errno> {
        let mut state = self.outbox.state();
        let state = &mut *state;
        let mut read = Ok(0);
        let queued =
            frame::encode_with(state.tag, self.stream, kind, &mut state.pending, |pending| {
                read = append(fd, pending, max);
                // A frame without data means nothing.
                if matches!(read, Ok(1..)) { Ok(()) } else { Err(()) }
            });
        if queued.is_ok() {
            self.outbox.tell(state);
        }
        read
    }
}

/// Reads at most `max` bytes behind what a buffer holds.
#[allow(unsafe_code)]
fn append(fd: &OwnedFd, buffer: &mut Vec<u8>, max: usize) -> Result<usize, Errno> {
    buffer.reserve(max + TRAILER_LEN);
    let (read, _) = rustix::io::read(fd, &mut buffer.spare_capacity_mut()[..max])?;
    let len = read.len();
    // SAFETY: the kernel has written these bytes, which are within the capacity.
    unsafe { buffer.set_len(buffer.len() + len) };
    Ok(len)
}
