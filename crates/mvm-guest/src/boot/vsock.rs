//! The socket on which the host's VMM reaches a guest that has vsock.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// Connections that wait for the one before to end: the host has one at a time.
const BACKLOG: libc::c_int = 4;

/// Listens on a port for connections of the host.
#[allow(unsafe_code)]
pub(super) fn listen(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system calls; the descriptor is fresh and owned from here on, and the address
    // outlives the call that reads it.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        check(fd)?;
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size))?;
        check(libc::listen(socket.as_raw_fd(), BACKLOG))?;
        Ok(socket)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
