//! The threads around the byte stream to the host.
//!
//! ```text
//!  port ── reader thread ──> Inbox ──> server (one thread owns all streams) ──> Outbox ── writer thread ──> port
//! ```
//!
//! Both boxes are bounded. The server stops taking requests while the outbox is full, the reader
//! stops reading while the inbox is full, and so a slow host slows itself down. Only the reader and
//! the writer ever block on the port.

mod inbox;
mod outbox;
mod port;

pub(crate) use inbox::{Event, Inbox};
pub(crate) use outbox::{Link, Outbox, PIECE};
pub(crate) use port::{Port, PortKind};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Wakes the server out of its `poll`.
#[derive(Debug)]
pub(crate) struct Waker {
    event: OwnedFd,
    /// Whether the descriptor is readable, or about to be: waking twice costs one system call.
    is_set: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, is_set: AtomicBool::new(false) })
    }

    /// Makes the descriptor readable. Many wakes before a [`Waker::clear`] are one.
    pub(crate) fn wake(&self) {
        if !self.is_set.swap(true, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Makes the descriptor unreadable again. What was done before a wake until now is there to be
    /// seen afterwards.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        // In this order: a wake in between is one that the caller is about to act upon.
        self.is_set.store(false, Ordering::SeqCst);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
