//! Which files of snapshots need not be read again, because they were when nobody has written to
//! them since.
//!
//! Reading every byte of a memory takes longer than restoring it. What this agent has written or
//! verified is what it was as long as the file's number, length and time of its last write are the
//! same. Only the disk itself could change it, for which it is read again after a day, and the VMM of
//! the very guest whose memory it is, which can change that memory as well while it runs. An agent that
//! starts trusts nothing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use mvm_core::snapshot::{DiskStamp, FileEntry, Manifest};
use tokio::time::Instant;

use super::{SnapshotError, stamp, verify_file};
use crate::state_dir::SnapshotDir;

/// How long a file is trusted that was read.
const TRUSTED_FOR: Duration = Duration::from_secs(24 * 3600);
/// Files that are remembered before it is looked whether they are still there.
const SWEEP_AT: usize = 1024;

/// The files that were read.
#[derive(Debug, Default)]
pub struct Trust(Mutex<Files>);

#[derive(Debug, Default)]
struct Files {
    read: HashMap<PathBuf, Read>,
    /// How many there were after the last sweep.
    swept: usize,
}

/// What a file was like when it was read, and what was in it.
#[derive(Debug)]
struct Read {
    stamp: DiskStamp,
    digest: String,
    at: Instant,
}

impl Trust {
    /// Compares files with what the manifest says of them, as [`verify`](super::verify) does: those
    /// that `which` picks and that are not trusted. Those that are found to be right are, from then on.
    ///
    /// # Errors
    /// The first file that is missing or differs.
    pub fn verify(
        &self,
        dir: &SnapshotDir,
        manifest: &Manifest,
        which: impl Fn(&str) -> bool,
    ) -> Result<(), SnapshotError> {
        for wanted in manifest.files.iter().filter(|file| which(&file.name)) {
            let path = dir.join(&wanted.name);
            // Before it is read: what is written meanwhile is noticed the next time.
            let found = stamp(&wanted.name, &path);
            if !found.as_ref().is_ok_and(|found| self.is_trusted(&path, found, wanted)) {
                verify_file(dir, wanted)?;
                self.note(path, found?, wanted);
            }
        }
        Ok(())
    }

    /// Trusts all files of a snapshot that was completed just now.
    pub fn completed(&self, dir: &SnapshotDir, manifest: &Manifest) {
        for file in &manifest.files {
            let path = dir.join(&file.name);
            // One that cannot be examined is read when it is needed.
            if let Ok(found) = stamp(&file.name, &path) {
                self.note(path, found, file);
            }
        }
    }

    fn is_trusted(&self, path: &Path, found: &DiskStamp, wanted: &FileEntry) -> bool {
        let files = self.0.lock().unwrap_or_else(|broken| broken.into_inner());
        files.read.get(path).is_some_and(|read| {
            read.stamp == *found && read.digest == wanted.digest && read.at.elapsed() < TRUSTED_FOR
        })
    }

    fn note(&self, path: PathBuf, stamp: DiskStamp, wanted: &FileEntry) {
        let read = Read { stamp, digest: wanted.digest.clone(), at: Instant::now() };
        let mut files = self.0.lock().unwrap_or_else(|broken| broken.into_inner());
        files.read.insert(path, read);
        if files.read.len() >= (2 * files.swept).max(SWEEP_AT) {
            files.read.retain(|path, read| read.at.elapsed() < TRUSTED_FOR && path.exists());
            files.swept = files.read.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::saved;
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    /// Changes a byte of a file without its time of the last write, as a disk might.
    fn rot(path: &Path) {
        let file = File::options().write(true).open(path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"X", 1).unwrap();
        file.set_modified(modified).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_is_trusted_for_a_day() {
        let root = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(root.path());
        let trust = Trust::default();
        trust.verify(&dir, &manifest, |_| true).unwrap();
        rot(&dir.device_state());
        tokio::time::advance(TRUSTED_FOR - Duration::from_secs(1)).await;
        trust.verify(&dir, &manifest, |_| true).unwrap();
        tokio::time::advance(Duration::from_secs(2)).await;
        let error = trust.verify(&dir, &manifest, |_| true).unwrap_err();
        assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
        Trust::default().verify(&dir, &manifest, |_| true).unwrap_err();
    }

    #[test]
    fn what_was_written_to_gone_or_is_to_be_something_else_is_read() {
        let root = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(root.path());
        let trust = Trust::default();
        trust.completed(&dir, &manifest);
        rot(&dir.device_state());
        trust.verify(&dir, &manifest, |_| true).unwrap();
        let mut other = manifest.clone();
        other.files[0].digest.replace_range(..1, "x");
        trust.verify(&dir, &other, |_| true).unwrap_err();
        let state = File::options().write(true).open(dir.device_state()).unwrap();
        state.write_all_at(b"Y", 0).unwrap();
        trust.verify(&dir, &manifest, |_| true).unwrap_err();
        std::fs::remove_file(dir.device_state()).unwrap();
        trust.verify(&dir, &manifest, |_| true).unwrap_err();
        trust.verify(&dir, &manifest, |name| name != "device.state").unwrap();
    }

    #[test]
    fn files_that_are_gone_are_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(root.path());
        let trust = Trust::default();
        let found = stamp("device.state", &dir.device_state()).unwrap();
        for number in 0..SWEEP_AT {
            let gone = dir.join(number.to_string());
            trust.note(gone, found.clone(), &manifest.files[0]);
        }
        assert!(trust.0.lock().unwrap().read.is_empty());
    }
}
