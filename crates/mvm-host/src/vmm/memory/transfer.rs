//! What a stopped microVM changed of its image, between its process and files.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use super::super::{MemoryPart, SaveChanges, Saved, VmmError, file_error};
use super::changes::{apply, write, write_into_image};
use super::{GuestMemory, PAGE, Run};
use crate::state_dir::SnapshotDir;

/// Saves, durably, what differs from the image that a stopped microVM was restored from.
pub(in crate::vmm) fn save_changes(
    memory: &GuestMemory,
    changes: SaveChanges,
    dest: &SnapshotDir,
) -> Result<Saved, VmmError> {
    let read = |offset, into: &mut [u8]| memory.read(offset, into);
    match changes {
        SaveChanges::Apart(packing) => {
            let path = dest.memory_changes();
            let save = || {
                let runs = memory.changed()?;
                let file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
                let bytes = write(&file, memory.bytes(), &runs, packing, read)?;
                file.sync_all()?;
                Ok(Saved { part: MemoryPart::Changes, bytes, written: Vec::new() })
            };
            save().map_err(file_error(&path))
        }
        SaveChanges::IntoImage(image) => {
            // The microVM has pages of its own wherever the image is written: it does not see it.
            let save = || {
                let runs = memory.changed()?;
                fs::hard_link(&image, dest.memory_image())?;
                let file = File::options().read(true).write(true).open(&image)?;
                write_into_image(&file, &runs, read)?;
                file.sync_all()?;
                let bytes = runs.iter().map(|run| run.count * PAGE as u64).sum();
                let written = runs.iter().map(Run::bytes).collect();
                Ok(Saved { part: MemoryPart::Whole, bytes, written })
            };
            save().map_err(file_error(&image))
        }
    }
}

/// Puts the changes that were saved apart from the image into the memory of a paused microVM that
/// maps it.
pub(in crate::vmm) async fn restore_changes(
    pid: u32,
    memory_bytes: u64,
    saved: &SnapshotDir,
) -> Result<(), VmmError> {
    let path = saved.memory_changes();
    let system = |source| VmmError::System { operation: "restore memory".to_owned(), source };
    let work = move || {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(VmmError::File { path, source }),
        };
        let memory = GuestMemory::of(pid, memory_bytes).map_err(system)?;
        apply(&file, memory_bytes, |offset, bytes| memory.write(offset, bytes))
            .map(drop)
            .map_err(file_error(&path))
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| system(io::Error::other(error)))?
}
