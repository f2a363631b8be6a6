//! The byte stream itself: a virtio-serial port, an inherited socket, or one connection after the
//! other of a socket that listens.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use mvm_core::accept::Acceptor;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

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
    /// A socket that listens for stream sockets.
    Listener,
}

/// The byte stream to the host, in blocking mode.
#[derive(Debug)]
pub(crate) struct Port {
    file: File,
    kind: PortKind,
}

/// The connection that is served, if there is one.
type Connection = Arc<Mutex<Option<Arc<File>>>>;

impl Port {
    pub(crate) fn new(fd: OwnedFd, kind: PortKind) -> Self {
        Self { file: fd.into(), kind }
    }

    /// A socket that listens: the host is attached as long as it keeps a connection, and the next
    /// connection is served once that one has ended.
    pub(crate) fn listening(fd: OwnedFd) -> Self {
        Self::new(fd, PortKind::Listener)
    }

    /// Starts the reader and the writer thread, which live as long as the process.
    pub(crate) fn start(self, inbox: Arc<Inbox>, outbox: Arc<Outbox>) -> io::Result<()> {
        let thread = |name: &str| thread::Builder::new().name(name.into()).stack_size(THREAD_STACK);
        if self.kind == PortKind::Listener {
            let served = Connection::default();
            let current = Arc::clone(&served);
            thread("port-reader").spawn(move || self.serve_each(&inbox, &served))?;
            thread("port-writer").spawn(move || write_to_current(&outbox, &current))?;
            return Ok(());
        }
        let writer = Self { file: self.file.try_clone()?, kind: self.kind };
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

    /// Reads one connection after the other.
    fn serve_each(self, inbox: &Inbox, served: &Connection) {
        loop {
            let Ok(socket) = accept_with(&self.file, SocketFlags::CLOEXEC) else {
                thread::sleep(HOST_ABSENT);
                continue;
            };
            let socket = Arc::new(File::from(socket));
            *locked(served) = Some(Arc::clone(&socket));
            let mut acceptor = Acceptor::default();
            let mut buffer = vec![0; 32 * 1024];
            // An error is the connection's end too: a restored machine's are reset.
            loop {
                match (&*socket).read(&mut buffer) {
                    Ok(0) => break,
                    Ok(len) => {
                        acceptor.push(&buffer[..len]);
                        while let Some(item) = acceptor.next_item() {
                            inbox.push(Event::Accepted(item));
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            *locked(served) = None;
            // The writer may wait for room that nobody will make.
            let _ = shutdown(&*socket, Shutdown::Both);
            inbox.push(Event::HostGone);
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

/// Writes to whatever connection is served; what is for a host that has gone is lost, and the next
/// session begins anew.
fn write_to_current(outbox: &Outbox, current: &Connection) {
    let mut chunk = Vec::new();
    loop {
        outbox.exchange(&mut chunk);
        let socket = locked(current).clone();
        if let Some(socket) = socket {
            let _ = (&*socket).write_all(&chunk);
        }
    }
}

fn locked(connection: &Connection) -> MutexGuard<'_, Option<Arc<File>>> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Waker;
    use mvm_core::guest::{HOST_MAGIC, Preamble};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Waits until the server would learn something.
    fn next(inbox: &Inbox) -> Event {
        loop {
            match inbox.pop() {
                Some(event) => return event,
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn a_listening_port_serves_one_host_after_the_other() {
        let path = std::env::temp_dir().join(format!("mvm-guest-port-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let waker = Arc::new(Waker::new().unwrap());
        let (inbox, outbox) =
            (Arc::new(Inbox::new(Arc::clone(&waker))), Arc::new(Outbox::new(waker)));
        Port::listening(listener.into()).start(Arc::clone(&inbox), Arc::clone(&outbox)).unwrap();
        let preamble = |nonce: u8| Preamble {
            magic: HOST_MAGIC,
            nonce: [nonce; 16],
            version: 1,
            max_version: 1,
        };
        let mut before: Option<UnixStream> = None;
        for nonce in [1, 2] {
            let mut host = UnixStream::connect(&path).unwrap();
            host.write_all(&preamble(nonce).encode()).unwrap();
            if let Some(before) = before.take() {
                // The second host waits until the first has gone.
                drop(before);
                assert!(matches!(next(&inbox), Event::HostGone));
            }
            assert!(matches!(next(&inbox), Event::Accepted(_)), "session {nonce}");
            outbox.open_session(&preamble(nonce));
            let mut answer = vec![0; preamble(nonce).encode().len()];
            host.read_exact(&mut answer).unwrap();
            assert_eq!(answer, preamble(nonce).encode());
            // Nothing of a frame that is cut is left to the next one.
            host.write_all(&[nonce; 3]).unwrap();
            before = Some(host);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
