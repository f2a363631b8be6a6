//! The seam of data disks: their files, real and simulated.
//!
//! The agent's loop calls it to make, grow and remove them; an instance's actor asks where one is.
//! Which instance may have which disk is not decided here, and a file is never opened for a guest:
//! the VMM's driver does that, with a lock.

mod local;
mod sim;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use mvm_core::name::DiskPath;

pub use local::LocalDisks;
pub use sim::SimDisks;

/// Why a data disk's file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The filesystem of the state directory is full.
    #[error("no space left on the filesystem of {path}; free some space there")]
    NoSpace {
        /// A path on the full filesystem.
        path: PathBuf,
    },
    /// `mke2fs` failed.
    #[error("cannot make a file system in {path}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: crate::process::ToolError,
    },
    /// A file operation failed.
    #[error("cannot {operation} {path}")]
    File {
        /// What was being done, as a verb.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The files of data disks.
#[async_trait]
pub trait Disks: Send + Sync {
    /// Where a disk's file is, or would be.
    fn file(&self, disk: &DiskPath) -> PathBuf;

    /// Makes the disk with an empty file system unless it is there, and makes its file at least
    /// this large. Nothing may be running with it. Returns the file's size in MiB.
    ///
    /// # Errors
    /// No half-made disk is left under its name, and what was on it is untouched.
    async fn ensure(&self, disk: &DiskPath, size_mib: u64) -> Result<u64, DiskError>;

    /// Removes the disk; one that is not there is fine.
    ///
    /// # Errors
    /// The operating system refused.
    async fn remove(&self, disk: &DiskPath) -> Result<(), DiskError>;
}

/// Space that a file takes on the host, in KiB; 0 if it is not there.
pub fn allocated_kib(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).map_or(0, |metadata| metadata.blocks() / 2)
}
