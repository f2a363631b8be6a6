//! The whole memory of a saved microVM, which others may begin with.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, SealFlags, SeekFrom};

use super::PAGE;
use crate::hole::make_hole;

/// The name of anonymous memory in `/proc/PID/maps`.
const NAME: &str = "mvm-memory-image";
/// Bytes that are copied at once.
const BATCH: usize = 1 << 20;
/// A page of zeroes.
const ZEROES: &[u8] = &[0; PAGE];

/// A memory image that microVMs map privately: what one of them writes, no other sees.
#[derive(Debug)]
pub struct MemoryImage {
    path: PathBuf,
    content: OwnedFd,
    bytes: u64,
}

impl MemoryImage {
    /// Reads an image file into memory that nobody can change any more, so that VMMs of different
    /// users may share it. It takes as much of the host's memory as the file has data, until the
    /// last microVM that was restored from it has ended and this value is dropped.
    ///
    /// # Errors
    /// The file cannot be read, or there is no memory.
    pub fn share(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let content = File::from(rustix::fs::memfd_create(NAME, flags)?);
        content.set_len(bytes)?;
        let mut batch = vec![0; BATCH];
        for (mut at, end) in data_of(&file)? {
            while at < end {
                let left = usize::try_from(end - at).unwrap_or(BATCH).min(BATCH);
                file.read_exact_at(&mut batch[..left], at)?;
                content.write_all_at(&batch[..left], at)?;
                at += left as u64;
            }
        }
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&content, seals)?;
        Ok(Self { path: path.to_owned(), content: content.into(), bytes })
    }

    /// Takes an image file as it is, for the microVM of one user alone, which becomes its owner.
    /// The file must not change as long as a microVM that was restored from it runs.
    ///
    /// # Errors
    /// The file cannot be opened or given away.
    pub fn own(path: &Path, uid: u32) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        fchown(&file, Some(uid), Some(uid))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600))?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), content: file.into(), bytes })
    }

    /// The file that it was made from, for VMMs that take a path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl AsFd for MemoryImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.content.as_fd()
    }
}

/// The parts of a sparse file that hold data: beginnings and ends in bytes.
pub(crate) fn data_of(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let end = file.metadata()?.len();
    let mut parts = Vec::new();
    let mut at = 0;
    while at < end {
        let first = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(first) => first,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(first))?;
        parts.push((first, at));
    }
    Ok(parts)
}

/// Makes holes of the pages of a file that hold nothing but zeroes, where the filesystem has holes;
/// returns the bytes of the others.
pub(crate) fn make_sparse(file: &File) -> io::Result<u64> {
    let mut batch = vec![0; BATCH];
    let mut data = 0;
    for (mut at, end) in data_of(file)? {
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(BATCH).min(BATCH);
            file.read_exact_at(&mut batch[..left], at)?;
            for run in batch[..left].chunks(PAGE).collect::<Vec<_>>().chunk_by(same_kind) {
                let bytes = run.iter().map(|page| page.len() as u64).sum();
                if !is_zero(run[0]) || !make_hole(file, at, bytes)? {
                    data += bytes;
                }
                at += bytes;
            }
        }
    }
    Ok(data)
}

fn same_kind(one: &&[u8], other: &&[u8]) -> bool {
    is_zero(one) == is_zero(other)
}

/// Whether a page, or a part of one, holds nothing but zeroes. All of a guest's memory is looked at
/// while it stands still: comparing is many times as fast as looking at each byte.
pub(super) fn is_zero(page: &[u8]) -> bool {
    ZEROES.starts_with(page)
}

/// The same of any number of pages.
pub(crate) fn are_zero(pages: &[u8]) -> bool {
    pages.chunks(PAGE).all(is_zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_zero_becomes_a_hole_and_the_rest_stays() {
        let file = tempfile::tempfile().unwrap();
        let mut content = vec![0; 3 * BATCH];
        file.write_all_at(&content, 0).unwrap();
        for at in [5 * PAGE, BATCH - 1, 2 * BATCH + PAGE] {
            content[at] = 7;
            file.write_all_at(&[7], at as u64).unwrap();
        }
        assert_eq!(make_sparse(&file).unwrap(), 3 * PAGE as u64);
        let data: u64 = data_of(&file).unwrap().iter().map(|(from, to)| to - from).sum();
        assert_eq!(data, 3 * PAGE as u64);
        let mut read = vec![1; content.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == content);
        assert_eq!(make_sparse(&file).unwrap(), 3 * PAGE as u64, "again, from holes");
    }

    #[test]
    fn a_shared_image_has_the_files_content_and_holes_and_cannot_be_changed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 << 20).unwrap();
        file.as_file().write_all_at(b"guest", 2 << 20).unwrap();
        let image = MemoryImage::share(file.path()).unwrap();
        assert_eq!(image.bytes(), 3 << 20);
        let mut copy = File::from(image.content);
        let mut text = [0; 5];
        copy.read_exact_at(&mut text, 2 << 20).unwrap();
        assert_eq!(&text, b"guest");
        assert_eq!(data_of(&copy).unwrap().len(), 1);
        assert!(copy.write_all(b"x").is_err());
    }
}
