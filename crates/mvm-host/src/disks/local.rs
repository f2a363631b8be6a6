//! Data disks as sparse ext4 images in the state directory, mode 0600 and owned by the agent's
//! user: a VMM gets an open descriptor and never the right to the path.
//!
//! `mke2fs` writes the file system into the file itself, so nothing is mounted on the host and no
//! guest's file system is ever parsed by the host's kernel. A disk is made under another name and
//! renamed, so that a file under a disk's name is complete. It grows by a longer file alone: the
//! guest grows the file system when it mounts it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use mvm_core::name::DiskPath;

use super::{DiskError, Disks};
use crate::process::Tool;
use crate::state_dir::StateDir;

const MIB: u64 = 1024 * 1024;
/// Listed one by one, so that any kernel since 4.5 mounts it, whatever this host's `mke2fs.conf`
/// says. The resize inode lets a mounted file system grow a thousandfold.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,\
                        sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum,\
                        resize_inode";
/// Inode tables count as zeroed, because a new file reads as zeroes: the guest's kernel would fill
/// the holes else.
const EXTENDED: &str = "lazy_itable_init=0,lazy_journal_init=1,nodiscard";

/// The data disks of one state directory.
#[derive(Debug, Clone)]
pub struct LocalDisks {
    state: StateDir,
}

impl LocalDisks {
    /// For this state directory; nothing is made yet.
    pub fn new(state: impl Into<StateDir>) -> Self {
        Self { state: state.into() }
    }

    async fn make(&self, disk: &DiskPath, size_mib: u64) -> Result<(), DiskError> {
        // What an interrupted attempt left goes with the next one.
        let (file, new) = (self.file(disk), self.state.unfinished_disk(disk));
        let dir = &self.state.disks_of(&disk.tenant);
        named("create directory", dir, make_private_dirs(dir))?;
        named("create", &new, make_sparse(&new, size_mib))?;
        let formatted = Tool::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0"])
            .args(["-O", FEATURES, "-E", EXTENDED])
            .arg(&new)
            .arg(format!("{size_mib}M"))
            .run()
            .await;
        formatted.map_err(|source| match source.is_no_space() {
            true => DiskError::NoSpace { path: self.state.disks() },
            false => DiskError::Format { path: new.clone(), source },
        })?;
        named("sync", &new, File::open(&new).and_then(|file| file.sync_all()))?;
        named("create", &file, fs::rename(&new, &file))?;
        named("sync", dir, File::open(dir).and_then(|dir| dir.sync_all()))
    }
}

#[async_trait]
impl Disks for LocalDisks {
    fn file(&self, disk: &DiskPath) -> PathBuf {
        self.state.disk(disk)
    }

    async fn ensure(&self, disk: &DiskPath, size_mib: u64) -> Result<u64, DiskError> {
        let file = self.file(disk);
        let has = match fs::metadata(&file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make(disk, size_mib).await?;
                return Ok(size_mib);
            }
            Err(source) => return Err(failed("examine", &file, source)),
        };
        let wanted = size_mib.saturating_mul(MIB);
        if has < wanted {
            let grow = || {
                let file = OpenOptions::new().write(true).open(&file)?;
                file.set_len(wanted)?;
                file.sync_all()
            };
            named("grow", &file, grow())?;
        }
        Ok(has.max(wanted) / MIB)
    }

    async fn remove(&self, disk: &DiskPath) -> Result<(), DiskError> {
        for file in [self.file(disk), self.state.unfinished_disk(disk)] {
            named("remove", &file, tolerate(fs::remove_file(&file), io::ErrorKind::NotFound))?;
        }
        let dir = self.state.disks_of(&disk.tenant);
        // Other disks of the tenant keep its directory.
        let removed = tolerate(fs::remove_dir(&dir), io::ErrorKind::DirectoryNotEmpty);
        named("remove", &dir, tolerate(removed, io::ErrorKind::NotFound))
    }
}

fn make_private_dirs(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn make_sparse(path: &Path, size_mib: u64) -> io::Result<()> {
    tolerate(fs::remove_file(path), io::ErrorKind::NotFound)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // The mode above is subject to the umask.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.set_len(size_mib.saturating_mul(MIB))
}

fn tolerate(result: io::Result<()>, kind: io::ErrorKind) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == kind => Ok(()),
        result => result,
    }
}

fn named<T>(operation: &'static str, path: &Path, result: io::Result<T>) -> Result<T, DiskError> {
    result.map_err(|source| failed(operation, path, source))
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> DiskError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            DiskError::NoSpace { path: path.to_owned() }
        }
        _ => DiskError::File { operation, path: path.to_owned(), source },
    }
}
