//! What the guest will send.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_core::frame::{self, KIND_MESSAGE};
use mvm_core::guest::{GuestMessage, Preamble};

use super::Waker;

/// Bytes at which the server stops producing data and taking requests.
const LIMIT: usize = 256 * 1024;

#[derive(Debug, Default)]
struct State {
    tag: u32,
    pending: Vec<u8>,
    /// Bytes that the writer has taken and not written yet.
    in_flight: usize,
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
        self.changed.notify_all();
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
        self.changed.notify_all();
        while state.pending.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(chunk, &mut state.pending);
        state.in_flight = chunk.len();
    }

    fn push(&self, stream: u32, kind: u8, body: &[u8]) {
        let mut state = self.state();
        let tag = state.tag;
        frame::encode(tag, stream, kind, body, &mut state.pending);
        self.changed.notify_all();
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
}
