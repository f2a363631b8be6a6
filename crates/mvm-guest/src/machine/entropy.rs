//! The random numbers of a guest that was restored from memory that others were restored from, too.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd as _;

/// `_IO('R', 0x07)` of `<linux/random.h>`: use what was mixed in from the next number on.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Length of a session's nonce in bytes.
const NONCE: usize = 16;

/// `_IOW('R', 0x03, int[2])` of `<linux/random.h>`: mix in bytes that count as random.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;

/// `struct rand_pool_info` of `<linux/random.h>`.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    len: libc::c_int,
    bytes: [u8; NONCE],
}

/// Mixes what the host drew at random into the kernel's random numbers, which differ from then on
/// from those of any other guest that was restored from the same memory.
pub(super) fn stir(nonce: &[u8; NONCE]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open("/dev/urandom")?;
    let len = NONCE as libc::c_int;
    let pool = Pool { entropy_bits: len * 8, len, bytes: *nonce };
    // SAFETY: the requests are on an open descriptor; the first reads a live structure whose length
    // it holds, the second has no argument.
    let results = unsafe {
        let added = libc::ioctl(file.as_raw_fd(), RNDADDENTROPY as _, &pool);
        let is_added = if added == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        let reseeded = libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG as _);
        is_added.and(if reseeded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
    };
    match results {
        // The kernel has not begun to give numbers out; when it does, it takes all of the above.
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(()),
        results => results,
    }
}
