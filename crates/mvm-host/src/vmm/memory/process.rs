//! The guest's memory in its VMM's process, seen from the agent: which pages were written, reading
//! them, and writing them before the guest runs.
//!
//! A booted guest's memory is anonymous memory that the VMM maps shared: what was ever written holds
//! data, the rest are holes. A restored guest's memory is a private mapping of an image: what was
//! written is the process's own, and `/proc/PID/pagemap` tells these pages from the image's. Where the
//! guest gave memory back, the mapping has gaps that Firecracker fills with anonymous memory: what was
//! written there since is changed, and what was not is free in the guest, whatever it holds.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::MemoryPart;
use super::image::is_zero;
use super::{PAGE, Run, data_of, runs_of};

/// Entries of a page map that are read at once.
const ENTRIES: usize = 64 * 1024;
/// In an entry of a page map: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// In an entry of a page map: the page belongs to a file, or to shared memory.
const OF_A_FILE: u64 = 1 << 61;

/// One part of the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    /// Where it begins in the process.
    address: u64,
    /// Where it begins in the guest's memory.
    offset: u64,
    bytes: u64,
}

/// A guest's memory in a QEMU process that does not run the guest at the moment.
#[derive(Debug)]
pub(in crate::vmm) struct GuestMemory {
    pid: u32,
    bytes: u64,
    part: MemoryPart,
    regions: Vec<Region>,
    memory: File,
}

impl GuestMemory {
    /// Finds the one mapping of this size. The caller knows that the process is the right one.
    ///
    /// # Errors
    /// There is no such mapping, or the process is gone.
    pub(in crate::vmm) fn of(pid: u32, bytes: u64) -> io::Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let (part, regions) = find(&maps, bytes)
            .ok_or_else(|| io::Error::other("the guest's memory is not mapped as expected"))?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { pid, bytes, part, regions, memory })
    }

    /// Its size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The part that has to be saved.
    pub(in crate::vmm) fn part(&self) -> MemoryPart {
        self.part
    }

    /// The pages that differ from the image.
    pub(in crate::vmm) fn changed(&self) -> io::Result<Vec<Run>> {
        let map = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut pages = Vec::new();
        let mut buffer = vec![0; ENTRIES * 8];
        for region in &self.regions {
            let (mut page, end) = (0, region.bytes / PAGE as u64);
            while page < end {
                let count = usize::try_from(end - page).unwrap_or(ENTRIES).min(ENTRIES);
                let at = (region.address / PAGE as u64 + page) * 8;
                map.read_exact_at(&mut buffer[..count * 8], at)?;
                let entries = buffer[..count * 8].chunks_exact(8);
                let first = region.offset / PAGE as u64 + page;
                pages.extend((first..).zip(entries).filter_map(|(page, entry)| {
                    let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                    (entry & PRESENT_OR_SWAPPED != 0 && entry & OF_A_FILE == 0).then_some(page)
                }));
                page += count as u64;
            }
        }
        Ok(runs_of(pages))
    }

    /// Copies the memory's data into a file of the same size. What is zero stays a hole: a guest
    /// that only read a page has made it none the less. Returns the bytes that were written.
    pub(in crate::vmm) fn copy_to(&self, file: &File) -> io::Result<u64> {
        let region = self.regions.first().ok_or(io::ErrorKind::NotFound)?;
        let (from, to) = (region.address, region.address + region.bytes);
        let memory = File::open(format!("/proc/{}/map_files/{from:x}-{to:x}", self.pid))?;
        file.set_len(self.bytes)?;
        let mut batch = vec![0; 256 * PAGE];
        let mut copied = 0;
        for (mut at, end) in data_of(&memory)? {
            while at < end {
                let left = usize::try_from(end - at).unwrap_or(batch.len()).min(batch.len());
                memory.read_exact_at(&mut batch[..left], at)?;
                copied += write_data(file, at, &batch[..left])?;
                at += left as u64;
            }
        }
        Ok(copied)
    }

    /// Reads from an offset of the guest's memory.
    pub(in crate::vmm) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.each_piece(offset, into.len(), |address, range| {
            self.memory.read_exact_at(&mut into[range], address)
        })
    }

    /// Writes to an offset of the guest's memory.
    pub(in crate::vmm) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.each_piece(offset, bytes.len(), |address, range| {
            self.memory.write_all_at(&bytes[range], address)
        })
    }

    /// Cuts a part of the memory at the borders of regions.
    fn each_piece(
        &self,
        offset: u64,
        len: usize,
        mut work: impl FnMut(u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        for region in &self.regions {
            let at = offset + done as u64;
            if done == len || at < region.offset || at >= region.offset + region.bytes {
                continue;
            }
            let inside = at - region.offset;
            let here = usize::try_from(region.bytes - inside).unwrap_or(len).min(len - done);
            work(region.address + inside, done..done + here)?;
            done += here;
        }
        if done == len { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// Writes the pages that are not all zero; returns the bytes that were written.
fn write_data(file: &File, at: u64, bytes: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let mut offset = 0;
    for run in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
        let length = run.iter().map(|page| page.len()).sum::<usize>();
        if !is_zero(run[0]) {
            file.write_all_at(&bytes[offset..offset + length], at + offset as u64)?;
            written += length as u64;
        }
        offset += length;
    }
    Ok(written)
}

/// The mapping of one file, in the making.
struct Mapping<'a> {
    inode: &'a str,
    part: MemoryPart,
    regions: Vec<Region>,
    /// Bytes that it covers, from its beginning on.
    bytes: u64,
    /// Whether its last region is a gap.
    ends_in_gap: bool,
}

impl Mapping<'_> {
    /// Takes a region that goes on where the last one ends, in the process and in the memory.
    fn take(&mut self, next: Region) -> bool {
        let goes_on = self.regions.last().is_some_and(|last| {
            last.address + last.bytes == next.address && last.offset + last.bytes == next.offset
        });
        if goes_on {
            self.regions.push(next);
            self.bytes += next.bytes;
            self.ends_in_gap = false;
        }
        goes_on
    }

    /// Takes anonymous memory as a gap of a private mapping, as far as the memory reaches: the kernel
    /// makes one region of neighbours.
    fn take_gap(&mut self, region: Region, all_bytes: u64) {
        if self.part == MemoryPart::Changes && self.bytes < all_bytes {
            let bytes = region.bytes.min(all_bytes - self.bytes);
            self.ends_in_gap = self.take(Region { offset: self.bytes, bytes, ..region });
        }
    }
}

/// Finds the mapping of one file that covers it from its beginning and has exactly this size.
fn find(maps: &str, bytes: u64) -> Option<(MemoryPart, Vec<Region>)> {
    let mut mappings: Vec<Mapping<'_>> = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, modes, offset) = (words.next()?, words.next()?, words.next()?);
        let (_device, inode) = (words.next()?, words.next()?);
        if !modes.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-')?;
        let [from, to, offset] = [from, to, offset].map(|hex| u64::from_str_radix(hex, 16).ok());
        let region = Region { address: from?, offset: offset?, bytes: to? - from? };
        let last = mappings.last_mut();
        if inode == "0" {
            last.into_iter().for_each(|last| last.take_gap(region, bytes));
            continue;
        }
        let is_taken = last.is_some_and(|last| last.inode == inode && last.take(region));
        if !is_taken && region.offset == 0 {
            let part = match modes.ends_with('s') {
                true => MemoryPart::Whole,
                false => MemoryPart::Changes,
            };
            let (regions, bytes) = (vec![region], region.bytes);
            mappings.push(Mapping { inode, part, regions, bytes, ends_in_gap: false });
        }
    }
    mappings.retain(|mapping| mapping.bytes == bytes);
    // Something else may have the size by what anonymous memory happens to follow it.
    if mappings.iter().any(|mapping| !mapping.ends_in_gap) {
        mappings.retain(|mapping| !mapping.ends_in_gap);
    }
    match <[_; 1]>::try_from(mappings) {
        Ok([mapping]) => Some((mapping.part, mapping.regions)),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0100000 r--p 00000000 fe:00 11 /usr/bin/qemu-system-x86_64
55d0c0100000-55d0c0200000 rw-p 00100000 fe:00 11 /usr/bin/qemu-system-x86_64
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f8000000000-7f8000600000 rw-p 00000000 00:01 42 /memfd:mvm-memory-image (deleted)
7f8000600000-7f8000800000 rw-p 00600000 00:01 42 /memfd:mvm-memory-image (deleted)
7f9000000000-7f9000300000 rw-s 00000000 00:01 43 /memfd:other (deleted)
7fff00000000-7fff00021000 rw-p 00000000 00:00 0 [stack]
";

    #[test]
    fn the_mapping_of_the_right_size_is_found_whole_or_in_parts() {
        let (part, regions) = find(MAPS, 8 << 20).unwrap();
        assert_eq!(part, MemoryPart::Changes);
        let parts: Vec<_> = regions.iter().map(|region| (region.offset, region.bytes)).collect();
        assert_eq!(parts, [(0, 6 << 20), (6 << 20, 2 << 20)]);
        assert_eq!(find(MAPS, 3 << 20).unwrap().0, MemoryPart::Whole);
        assert_eq!(find(MAPS, 1 << 20), None, "a part of a program is not a guest's memory");
        assert_eq!(find(MAPS, 5 << 20), None);
    }

    #[test]
    fn memory_that_was_given_back_is_a_gap_of_the_mapping() {
        // The last gap is one region with what happens to follow it.
        let maps = "\
7f7000000000-7f7000100000 rw-p 00000000 fe:00 7 /some/data
7f7000100000-7f7009000000 rw-p 00000000 00:00 0
7f8000000000-7f8000200000 rw-p 00000000 00:01 42 /memfd:mvm-memory-image (deleted)
7f8000200000-7f8000400000 rw-p 00000000 00:00 0
7f8000400000-7f8000700000 rw-p 00400000 00:01 42 /memfd:mvm-memory-image (deleted)
7f8000700000-7f8000900000 rw-p 00000000 00:00 0
";
        let offsets = |bytes: u64| {
            let (_, regions) = find(maps, bytes)?;
            Some(regions.iter().map(|it| (it.offset >> 20, it.bytes >> 20)).collect::<Vec<_>>())
        };
        assert_eq!(offsets(7 << 20), Some(vec![(0, 2), (2, 2), (4, 3)]));
        assert_eq!(offsets(8 << 20), None, "the file of the size cannot be told");
        let without = maps.lines().skip(2).collect::<Vec<_>>().join("\n");
        let (_, regions) = find(&without, 8 << 20).unwrap();
        assert_eq!(regions.last().map(|it| (it.offset >> 20, it.bytes >> 20)), Some((7, 1)));
        let shared = without.replace("rw-p 00000000 00:01", "rw-s 00000000 00:01");
        assert!(find(&shared, 8 << 20).is_none(), "a shared mapping has no gaps");
    }

    #[test]
    fn pages_of_nothing_but_zeroes_stay_holes() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 5 * PAGE];
        file.set_len(bytes.len() as u64).unwrap();
        bytes[PAGE] = 1;
        bytes[2 * PAGE - 1] = 2;
        bytes[4 * PAGE + 7] = 3;
        assert_eq!(write_data(&file, 0, &bytes).unwrap(), 2 * PAGE as u64);
        let mut read = vec![9; bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == bytes);
        assert_eq!(data_of(&file).unwrap().len(), 2);
    }

    #[test]
    fn the_changed_pages_of_a_private_mapping_are_told_and_read() {
        // This test's own process stands for QEMU.
        let image = tempfile::tempfile().unwrap();
        let bytes = 777 * PAGE as u64;
        image.set_len(bytes).unwrap();
        image.write_all_at(b"image", 5 * PAGE as u64).unwrap();
        let mapping = Mapped::new(&image, bytes as usize);
        let memory = GuestMemory::of(std::process::id(), bytes).unwrap();
        assert_eq!(memory.part(), MemoryPart::Changes);
        let mut page = [0; 5];
        memory.read(5 * PAGE as u64, &mut page).unwrap();
        assert_eq!(&page, b"image");
        assert_eq!(memory.changed().unwrap(), []);
        memory.write(5 * PAGE as u64 - 2, b"private").unwrap();
        memory.write(bytes - 1, b"x").unwrap();
        let runs = [Run { first: 4, count: 2 }, Run { first: 776, count: 1 }];
        assert_eq!(memory.changed().unwrap(), runs);
        assert_eq!(mapping.byte(5 * PAGE - 2), b'p');
        assert!(memory.write(bytes - 1, b"xy").is_err(), "beyond the end");
        image.read_exact_at(&mut page, 5 * PAGE as u64).unwrap();
        assert_eq!(&page, b"image");
    }

    /// A private mapping.
    struct Mapped(*mut std::ffi::c_void, usize);

    #[allow(unsafe_code)]
    impl Mapped {
        fn new(file: &File, bytes: usize) -> Self {
            use rustix::mm::{MapFlags, ProtFlags, mmap};
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let at =
                unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE, file, 0) };
            Self(at.unwrap(), bytes)
        }

        fn byte(&self, offset: usize) -> u8 {
            assert!(offset < self.1);
            // SAFETY: inside the mapping, which lives as long as `self`; others write to it only
            // through the kernel.
            unsafe { self.0.cast::<u8>().add(offset).read_volatile() }
        }
    }

    #[allow(unsafe_code)]
    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`, and nothing borrows from it.
            unsafe { rustix::mm::munmap(self.0, self.1) }.unwrap();
        }
    }
}
