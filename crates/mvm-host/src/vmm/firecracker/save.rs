//! Saving a paused Firecracker, and putting changed memory back into a restored one.
//!
//! Firecracker maps the image of a restored microVM privately, so what was changed of it can be
//! told from outside, just as with QEMU. Firecracker's own record of changes knows neither what was put
//! into the memory when it was restored, nor, in later snapshots, what was in earlier ones. So it is not
//! relied on: what it writes into the image is completed, and what it writes beside it is dropped.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use mvm_core::firecracker::{Change, CreateSnapshot, SnapshotType};

use super::super::memory::{self, GuestMemory};
use super::super::{MemoryPart, SaveChanges, Saved, VmmError, file_error};
use super::api::Api;
use super::jail::SAVE_DIR;
use crate::state_dir::SnapshotDir;

/// The name of what Firecracker writes of the devices.
const STATE: &str = "device.state";
/// The name of what Firecracker writes of the memory.
const MEMORY: &str = "memory";

/// A paused microVM.
pub(super) struct Paused<'a> {
    pub(super) api: Api,
    /// The root of its jail.
    pub(super) root: &'a Path,
    pub(super) uid: u32,
    pub(super) pid: u32,
    pub(super) memory_bytes: u64,
}

impl Paused<'_> {
    /// Writes its files, durably, into `dest`.
    pub(super) async fn save(
        &self,
        dest: &SnapshotDir,
        changes: SaveChanges,
    ) -> Result<Saved, VmmError> {
        let dir = self.root.join(SAVE_DIR);
        clear(&dir).map_err(file_error(&dir))?;
        chown(&dir, Some(self.uid), Some(self.uid)).map_err(file_error(&dir))?;
        let memory = self.changed_memory().await?;
        if let (Some(_), SaveChanges::IntoImage(image)) = (&memory, &changes) {
            self.lend(image, &dir.join(MEMORY)).map_err(file_error(image))?;
        }
        let create = Change::Save(CreateSnapshot {
            snapshot_type: if memory.is_some() { SnapshotType::Diff } else { SnapshotType::Full },
            snapshot_path: format!("/{SAVE_DIR}/{STATE}"),
            mem_file_path: format!("/{SAVE_DIR}/{MEMORY}"),
        });
        let created = self.api.make(&create).await;
        let dest = dest.clone();
        let work = {
            let dir = dir.clone();
            move || {
                created?;
                keep(&dir.join(STATE), &dest.device_state())?;
                match memory {
                    None => keep_memory(&dir.join(MEMORY), &dest.memory_image()),
                    Some(memory) => memory::save_changes(&memory, changes, &dest),
                }
            }
        };
        let saved = blocking("save memory", work).await;
        // Whatever came of it, nothing of the guest's memory stays in its own reach.
        clear(&dir).map_err(file_error(&dir))?;
        saved
    }

    /// Has Firecracker write what changed into the image, rather than into a file of its own, which it
    /// would make durable for nothing. On another filesystem it has to.
    fn lend(&self, image: &Path, to: &Path) -> io::Result<()> {
        match fs::hard_link(image, to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Ok(()),
            linked => {
                linked?;
                chown(to, Some(self.uid), Some(self.uid))?;
                fs::set_permissions(to, fs::Permissions::from_mode(0o600))
            }
        }
    }

    /// The memory of a microVM that was restored: a booted one's is no mapping of a file.
    async fn changed_memory(&self) -> Result<Option<GuestMemory>, VmmError> {
        let (pid, bytes) = (self.pid, self.memory_bytes);
        let look = move || Ok(GuestMemory::of(pid, bytes).ok());
        let memory = blocking("find the memory", look).await?;
        Ok(memory.filter(|memory| memory.part() == MemoryPart::Changes))
    }
}

/// Takes what Firecracker wrote, which becomes root's.
fn keep(from: &Path, to: &Path) -> Result<(), VmmError> {
    let take = || {
        let file = File::open(from)?;
        file.sync_all()?;
        chown(from, Some(0), Some(0))?;
        fs::set_permissions(from, fs::Permissions::from_mode(0o600))?;
        match fs::rename(from, to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                fs::copy(from, to)?;
                File::open(to)?.sync_all()?;
            }
            result => result?,
        }
        Ok(())
    };
    take().map_err(file_error(to))
}

/// Takes the whole memory, of which what is zero takes no space.
fn keep_memory(from: &Path, to: &Path) -> Result<Saved, VmmError> {
    let data = File::options()
        .read(true)
        .write(true)
        .open(from)
        .and_then(|file| memory::make_sparse(&file));
    let bytes = data.map_err(file_error(from))?;
    keep(from, to)?;
    Ok(Saved { part: MemoryPart::Whole, bytes, written: Vec::new() })
}

/// Empties a directory, which only holds files.
fn clear(dir: &Path) -> io::Result<()> {
    let files: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.into_iter().try_for_each(fs::remove_file)
}

async fn blocking<T: Send + 'static>(
    operation: &str,
    work: impl FnOnce() -> Result<T, VmmError> + Send + 'static,
) -> Result<T, VmmError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| system(operation)(io::Error::other(error)))?
}

fn system(operation: &str) -> impl FnOnce(io::Error) -> VmmError {
    let operation = operation.to_owned();
    move |source| VmmError::System { operation, source }
}
