//! Making a persistent tap: the one thing about links that netlink cannot do.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

/// A tap that vanishes with this value unless it is made persistent.
pub(super) struct NewTap {
    file: File,
}

impl NewTap {
    /// Creates a tap that only `owner_uid` and root may open, with virtio-net headers.
    ///
    /// # Errors
    /// There is a link of that name, or the operating system refused.
    pub(super) fn create(name: &str, owner_uid: u32) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: an all-zero `ifreq` is valid: it is made of integers and a union of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "link name too long"));
        }
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
        // The kernel's field is 16 bits wide; IFF_TUN_EXCL is its top bit.
        request.ifr_ifru.ifru_flags = (flags as u16).cast_signed();
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        // SAFETY: TUNSETOWNER takes the user id by value.
        check(unsafe {
            libc::ioctl(file.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(owner_uid))
        })?;
        Ok(Self { file })
    }

    /// Lets the tap outlive this value.
    pub(super) fn persist(self) -> io::Result<()> {
        let on: libc::c_ulong = 1;
        // SAFETY: TUNSETPERSIST takes a flag by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETPERSIST, on) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
