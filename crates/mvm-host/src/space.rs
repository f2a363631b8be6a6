//! Space on the host's filesystems: how much is left, and a reserve that is given up when there is
//! none, so that what would free some can still be written down.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::state_dir::StateDir;
use rustix::fs::{FallocateFlags, fallocate};

/// The reserve's size in bytes: room for a hundred changes of state, and more.
const RESERVE_BYTES: u64 = 2 << 20;
/// Free bytes below which the filesystem is full: opening the state takes a few pages.
const FULL: u64 = 256 << 10;
/// Free bytes above which a reserve is made.
const ENOUGH: u64 = 16 << 20;

/// What a program without privileges may still write on the filesystem of a path, in bytes.
///
/// # Errors
/// The path does not exist.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Space that is set aside in a state directory.
#[derive(Debug, Clone)]
pub struct Reserve {
    file: PathBuf,
}

impl Reserve {
    /// That of a state directory; nothing is done yet.
    pub fn of(state_dir: &StateDir) -> Self {
        Self { file: state_dir.reserve() }
    }

    /// Sets the space aside, unless it is, or there is too little to set any aside.
    ///
    /// # Errors
    /// The filesystem refused.
    pub fn ensure(&self) -> io::Result<()> {
        let dir = self.file.parent().unwrap_or(Path::new("."));
        let is_there = |metadata: std::fs::Metadata| metadata.blocks() * 512 >= RESERVE_BYTES;
        if std::fs::symlink_metadata(&self.file).is_ok_and(is_there) || free_bytes(dir)? < ENOUGH {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&self.file)?;
        let set_aside = fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES);
        if set_aside.is_err() {
            self.give_up();
        }
        Ok(set_aside?)
    }

    /// Whether the filesystem is full.
    pub fn is_needed(&self) -> bool {
        let dir = self.file.parent().unwrap_or(Path::new("."));
        free_bytes(dir).is_ok_and(|free| free < FULL)
    }

    /// Gives the space back; says whether there was any.
    pub fn give_up(&self) -> bool {
        std::fs::remove_file(&self.file).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_takes_space_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::from(dir.path());
        let reserve = Reserve::of(&state);
        assert!(!reserve.give_up());
        reserve.ensure().unwrap();
        reserve.ensure().unwrap();
        let metadata = state.reserve().metadata().unwrap();
        assert!(metadata.blocks() * 512 >= RESERVE_BYTES);
        assert!(reserve.give_up());
        assert!(!reserve.give_up());
        assert!(free_bytes(&dir.path().join("gone")).is_err());
    }
}
