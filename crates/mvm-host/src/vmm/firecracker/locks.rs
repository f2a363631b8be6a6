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
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::with_source;
use crate::unix_socket;

/// The socket's name, for the moment that it has one.
const SOCKET: &str = "locks.sock";
/// Descriptors in one message; the kernel takes up to 253.
const BATCH: usize = 64;

/// A descriptor that keeps these files open as long as it is open itself, in any process.
///
/// # Errors
/// The directory cannot be written.
pub(super) async fn carrier(dir: &Path, files: &[impl AsFd]) -> io::Result<OwnedFd> {
    let failed = |error: unix_socket::SocketError| io::Error::other(with_source(&error));
    let path = dir.join(SOCKET);
    let carrier = unix_socket::bind_fd(&path).map_err(failed)?;
    let connected = unix_socket::connect(&path).await.map_err(failed);
    // Nobody is to connect any more.
    std::fs::remove_file(&path)?;
    let sender = connected?;
    for batch in files.chunks(BATCH) {
        let descriptors: Vec<BorrowedFd<'_>> = batch.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // The space is made for a batch.
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        rustix::net::sendmsg(&sender, &[IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL)?;
    }
    Ok(carrier)
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
        let carrier = carrier(dir.path(), &locked).await.unwrap();
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
