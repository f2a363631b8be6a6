//! Data disks that are written to are frozen while the guest is saved, so that the file system on each
//! is whole without the guest's memory: a reader can mount one whose writer is never woken again.
//!
//! Whatever the guest hears next of its host (a session, its configuration, a wake) thaws them, and if
//! that is nothing, time does.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use super::data_disks;
use crate::console::complain;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of `<linux/fs.h>`.
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// Freezes every data disk that may be written: what is held back is on it when this returns.
pub(crate) fn freeze_all() {
    set(FIFREEZE, "freeze", libc::EBUSY);
}

/// Lets them be written again; those that are not frozen stay as they are.
pub(crate) fn thaw_all() {
    set(FITHAW, "thaw", libc::EINVAL);
}

fn set(operation: libc::c_ulong, verb: &str, is_so_already: i32) {
    // A disk within another is frozen first and thawed last.
    let disks = data_disks().into_iter().rev();
    for disk in disks.filter(|disk| disk.is_whole && disk.is_writable) {
        match set_one(&disk.place, operation) {
            Err(error) if error.raw_os_error() != Some(is_so_already) => {
                complain(&format!("cannot {verb} {}: {error}", disk.place.display()));
            }
            _ => {}
        }
    }
}

fn set_one(place: &Path, operation: libc::c_ulong) -> io::Result<()> {
    let dir = File::open(place)?;
    // SAFETY: neither operation reads or writes its argument.
    match unsafe { libc::ioctl(dir.as_raw_fd(), operation as _, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
