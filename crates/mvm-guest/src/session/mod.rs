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
pub(crate) use outbox::{Link, Outbox};
pub(crate) use port::{Port, PortKind};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// Wakes the server out of its `poll`.
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes the descriptor readable. Many wakes before a [`Waker::clear`] are one.
    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the descriptor unreadable again.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
