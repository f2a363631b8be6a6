//! What the host sent and the server has not handled yet.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mvm_core::accept::Accepted;

use super::Waker;

/// Bytes of frames at which the reader stops reading.
const LIMIT: usize = 256 * 1024;
/// What an item costs besides its body.
const ITEM_COST: usize = 64;

/// What the server learns from the reader.
#[derive(Debug)]
pub(crate) enum Event {
    /// Something came out of the byte stream.
    Accepted(Accepted),
    /// No host is attached to the byte stream any more; one may come again.
    HostGone,
    /// The byte stream ended for good.
    Closed,
}

impl Event {
    fn cost(&self) -> usize {
        match self {
            Self::Accepted(Accepted::Frame(frame)) => ITEM_COST + frame.body.len(),
            _ => ITEM_COST,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<Event>,
    cost: usize,
    /// Whether the reader waits for room. Telling nobody costs a system call too.
    is_room_awaited: bool,
}

/// The bounded queue from the reader thread to the server.
#[derive(Debug)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    room: Condvar,
    waker: Arc<Waker>,
}

impl Inbox {
    pub(crate) fn new(waker: Arc<Waker>) -> Self {
        Self { state: Mutex::default(), room: Condvar::new(), waker }
    }

    /// Adds an event; waits while the inbox is full.
    pub(crate) fn push(&self, event: Event) {
        let mut state = self.state();
        while state.cost >= LIMIT {
            state.is_room_awaited = true;
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.cost += event.cost();
        state.events.push_back(event);
        drop(state);
        self.waker.wake();
    }

    /// Takes the oldest event.
    pub(crate) fn pop(&self) -> Option<Event> {
        let mut state = self.state();
        let event = state.events.pop_front()?;
        state.cost -= event.cost();
        if std::mem::take(&mut state.is_room_awaited) {
            self.room.notify_one();
        }
        Some(event)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
