//! The guest's memory: anonymous, or a private mapping of a saved one, of which the driver reads the
//! changes from outside.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

/// The unit in which it is saved, in bytes.
const PAGE: usize = 4096;

/// Memory that lasts as long as the process.
pub(crate) struct Memory {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: it is reached through one owner at a time, which a lock sees to.
#[allow(unsafe_code)]
unsafe impl Send for Memory {}

#[allow(unsafe_code)]
impl Memory {
    /// Memory that is all zero.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }?;
        Ok(Self { address: address.cast(), bytes })
    }

    /// What was saved; the file is not changed.
    pub(crate) fn map(file: &File, bytes: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, at an address that the kernel chooses, of a file of that size.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, access, flags, file, 0) }?;
        Ok(Self { address: address.cast(), bytes })
    }

    /// Writes all of it that is not zero into a file of the same size.
    pub(crate) fn save(&self, file: &mut File) -> io::Result<()> {
        file.set_len(self.bytes as u64)?;
        for (number, page) in self.content().chunks(PAGE).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, (number * PAGE) as u64)?;
            }
        }
        file.flush()
    }

    /// The line that is kept at its beginning.
    pub(crate) fn line(&self) -> String {
        let first = &self.content()[..PAGE];
        let end = first.iter().position(|byte| *byte == 0).unwrap_or(PAGE);
        String::from_utf8_lossy(&first[..end]).into_owned()
    }

    /// Keeps a line at its beginning.
    pub(crate) fn keep(&mut self, line: &str) {
        let len = line.len().min(PAGE - 1);
        // SAFETY: the mapping is larger than a page, and nobody else refers to it now.
        let first = unsafe { std::slice::from_raw_parts_mut(self.address, PAGE) };
        first.fill(0);
        first[..len].copy_from_slice(&line.as_bytes()[..len]);
    }

    fn content(&self) -> &[u8] {
        // SAFETY: the mapping has this size and is never unmapped.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }
}
