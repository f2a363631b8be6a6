//! Locks on a microVM's disks that last exactly as long as its Firecracker, whatever becomes of the
//! agent.
//!
//! A lock belongs to an open file, and the jailer closes every file that it inherits but the three
//! standard ones. So the open files travel with a connection that nobody accepts, to a listening
//! socket that is Firecracker's standard input. Firecracker tries to read that once, which is an
//! error that takes nothing away. The kernel closes what waits at a socket together with it: at the
//! process's end.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::net::UnixStream;

use super::with_source;
use crate::state_dir::InstanceDir;
use crate::unix_socket;

/// Descriptors in one message; the kernel takes up to 253.
const BATCH: usize = 64;

/// What gives open files to whoever has the other end, for as long as that is open in any process.
#[derive(Debug)]
pub(super) struct Carrier(UnixStream);

impl Carrier {
    /// One that gives to this descriptor.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub(super) async fn new(dir: &InstanceDir) -> io::Result<(Self, OwnedFd)> {
        let failed = |error: unix_socket::SocketError| io::Error::other(with_source(&error));
        let path = dir.locks_socket();
        let carried = unix_socket::bind_fd(&path).map_err(failed)?;
        let connected = unix_socket::connect(&path).await.map_err(failed);
        // Nobody is to connect any more.
        std::fs::remove_file(&path)?;
        Ok((Self(connected?), carried))
    }

    /// Gives these files.
    ///
    /// # Errors
    /// The other end is closed, or there are far too many files.
    pub(super) fn give(&self, files: &[impl AsFd]) -> io::Result<()> {
        for batch in files.chunks(BATCH) {
            let descriptors: Vec<BorrowedFd<'_>> = batch.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // The space is made for a batch.
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            let bytes = [IoSlice::new(b"x")];
            rustix::net::sendmsg(&self.0, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FlockOperation, flock};
    use std::fs::File;
    use std::io::Read;

    #[tokio::test]
    async fn locks_last_as_long_as_their_carrier_even_if_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<_> =
            (0..BATCH + 3).map(|_| tempfile::NamedTempFile::new().unwrap()).collect();
        let lock = |file: &tempfile::NamedTempFile| {
            let file = File::open(file.path()).unwrap();
            flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
            file
        };
        let locked: Vec<File> = files.iter().map(lock).collect();
        let (sender, carrier) = Carrier::new(&dir.path().into()).await.unwrap();
        sender.give(&locked).unwrap();
        drop(sender);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        drop(locked);
        let is_free = |file: &tempfile::NamedTempFile| {
            let file = File::open(file.path()).unwrap();
            flock(&file, FlockOperation::NonBlockingLockShared).is_ok()
        };
        assert!(!files.iter().any(is_free));
        let mut copy = File::from(carrier.try_clone().unwrap());
        drop(carrier);
        let read = copy.read(&mut [0; 9]).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::InvalidInput);
        assert!(!files.iter().any(is_free));
        drop(copy);
        assert!(files.iter().all(is_free));
    }
}
