//! The byte stream itself: a virtio-serial port, or an inherited socket.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mvm_core::accept::Acceptor;
use rustix::event::{PollFd, PollFlags, poll};

use super::{Event, Inbox, Outbox};

/// How long to leave a port alone to which no host is attached.
const HOST_ABSENT: Duration = Duration::from_millis(20);
const THREAD_STACK: usize = 256 * 1024;

/// What kind of byte stream a port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortKind {
    /// A virtio-serial port. It has no connections: a read of 0 bytes means that no host is
    /// attached now, and `poll` then reports a hang-up at once, for as long as that lasts. While one
    /// is attached a read waits for bytes by itself; each gives at most a page of them.
    VirtioSerial,
    /// A stream socket: a read of 0 bytes is its end.
    Socket,
}

/// The byte stream to the host, in blocking mode.
#[derive(Debug)]
pub(crate) struct Port {
    file: File,
    kind: PortKind,
}

impl Port {
    pub(crate) fn new(fd: OwnedFd, kind: PortKind) -> Self {
        Self { file: fd.into(), kind }
    }

    /// Starts the reader and the writer thread, which live as long as the process.
    pub(crate) fn start(self, inbox: Arc<Inbox>, outbox: Arc<Outbox>) -> io::Result<()> {
        let writer = Self { file: self.file.try_clone()?, kind: self.kind };
        let thread = |name: &str| thread::Builder::new().name(name.into()).stack_size(THREAD_STACK);
        thread("port-reader").spawn(move || self.read_to(&inbox))?;
        thread("port-writer").spawn(move || writer.write_from(&outbox))?;
        Ok(())
    }

    fn read_to(mut self, inbox: &Inbox) {
        let mut acceptor = Acceptor::default();
        let mut buffer = vec![0; 32 * 1024];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) if self.kind == PortKind::Socket => break inbox.push(Event::Closed),
                Ok(0) => {
                    inbox.push(Event::HostGone);
                    self.wait_for_host();
                }
                Ok(len) => {
                    acceptor.push(&buffer[..len]);
                    while let Some(item) = acceptor.next_item() {
                        inbox.push(Event::Accepted(item));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if self.kind == PortKind::Socket => break inbox.push(Event::Closed),
                Err(_) => thread::sleep(HOST_ABSENT),
            }
        }
    }

    /// Waits until a host is attached again, or has left bytes.
    fn wait_for_host(&self) {
        loop {
            thread::sleep(HOST_ABSENT);
            let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
            let polled = poll(&mut fds, None).is_ok();
            let events = fds[0].revents();
            if polled && (events.contains(PollFlags::IN) || !events.contains(PollFlags::HUP)) {
                return;
            }
        }
    }

    fn write_from(mut self, outbox: &Outbox) {
        let mut chunk = Vec::new();
        loop {
            outbox.exchange(&mut chunk);
            // What cannot be written is lost: the host finds the cut and opens a new session. A
            // socket's end is for the reader to report.
            if self.file.write_all(&chunk).is_err() {
                thread::sleep(HOST_ABSENT);
            }
        }
    }
}
