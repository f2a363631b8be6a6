//! Parts of files that are given back to the filesystem: they read as zeroes and take no space, and
//! the file keeps its length.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Makes a hole in a file, where the filesystem has holes; says whether it did.
pub(crate) fn make_hole(file: &File, at: u64, bytes: u64) -> io::Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, at, bytes) {
        Err(Errno::OPNOTSUPP) => Ok(false),
        made => Ok(made.map(|()| true)?),
    }
}
