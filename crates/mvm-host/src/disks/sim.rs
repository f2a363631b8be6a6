//! Data disks that are sparse files without a file system.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use mvm_core::name::DiskPath;

use crate::held::Held;

use super::{DiskError, Disks};
use crate::state_dir::StateDir;

const MIB: u64 = 1024 * 1024;

/// Data disks of a simulated machine; clones are the same disks.
#[derive(Debug, Clone)]
pub struct SimDisks {
    state: StateDir,
    is_full: Arc<Mutex<bool>>,
    held: Held<DiskPath>,
}

impl SimDisks {
    /// Disks that keep their files in this state directory.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { state: state.into(), is_full: Arc::default(), held: Held::default() }
    }

    /// Holds up everything that is done to a disk from now on, or lets it go.
    pub fn hold(&self, disk: DiskPath, is_held: bool) {
        self.held.hold(disk, is_held);
    }

    /// Makes the simulated filesystem full, or gives it room again.
    pub fn set_full(&self, is_full: bool) {
        *self.is_full.lock().unwrap_or_else(PoisonError::into_inner) = is_full;
    }

    fn try_ensure(file: &Path, size_mib: u64) -> std::io::Result<u64> {
        fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(file)?;
        let size = file.metadata()?.len().max(size_mib * MIB);
        file.set_len(size)?;
        Ok(size / MIB)
    }
}

#[async_trait]
impl Disks for SimDisks {
    fn file(&self, disk: &DiskPath) -> PathBuf {
        self.state.disk(disk)
    }

    async fn ensure(&self, disk: &DiskPath, size_mib: u64) -> Result<u64, DiskError> {
        self.held.pass(disk).await;
        if *self.is_full.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(DiskError::NoSpace { path: self.state.disks() });
        }
        let path = self.file(disk);
        Self::try_ensure(&path, size_mib).map_err(|source| DiskError::File {
            operation: "make",
            path,
            source,
        })
    }

    async fn remove(&self, disk: &DiskPath) -> Result<(), DiskError> {
        self.held.pass(disk).await;
        let path = self.file(disk);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(DiskError::File { operation: "remove", path, source })
            }
            _ => {
                // Other disks of the tenant keep its directory.
                path.parent().map(fs::remove_dir);
                Ok(())
            }
        }
    }
}
