//! Snapshot directories: completed as a whole or not at all, and verified before anything goes on
//! from them.
//!
//! A directory is written under another name, gets its manifest last, and is then renamed, so that
//! one that has its name is complete. What may go on from it is decided by
//! [`mvm_core::snapshot::verdict`]; here is only what files can tell.

mod blocks;
mod trust;

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use mvm_core::snapshot::{DiskStamp, FileEntry, Manifest};
use sha2::{Digest as _, Sha256};

use crate::image::digest::Digest;
use crate::image::durable::{self, FileError, Named as _};
use crate::state_dir::{MEMORY_IMAGE, SnapshotDir};
use crate::vmm::memory::{are_zero, data_of};

pub use blocks::Blocks;
pub use trust::Trust;

/// Largest manifest that is read, in bytes.
const MANIFEST_MAX: u64 = 1 << 20;
/// Bytes that are looked at together; blocks of nothing but zeroes are as good as holes.
const BLOCK: usize = 64 * 1024;

/// Why a snapshot cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The manifest is not one.
    #[error("{path} is not a snapshot's manifest")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is not what the manifest says.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// Makes an empty directory for a snapshot, in place of one that was not completed.
///
/// # Errors
/// The directory cannot be made.
pub fn begin(dir: &SnapshotDir) -> Result<(), SnapshotError> {
    remove(dir)?;
    Ok(durable::ensure_dir(dir)?)
}

/// Whether nobody else has the image of this snapshot, under a name of its own.
pub fn has_image_alone(dir: &SnapshotDir) -> bool {
    fs::metadata(dir.memory_image()).is_ok_and(|image| image.nlink() == 1)
}

/// Prepares for writing into the image of a snapshot that is used up: from now on nothing vouches for
/// the image. Returns what was known of it, for [`complete`].
///
/// # Errors
/// The manifest cannot be removed.
pub fn open_image(dir: &SnapshotDir) -> Result<Option<Blocks>, SnapshotError> {
    let Ok(manifest) = read(dir) else { return Ok(None) };
    let path = dir.manifest();
    fs::remove_file(&path).named("remove", &path)?;
    let image = manifest.files.iter().find(|file| file.name == MEMORY_IMAGE);
    let blocks = image.and_then(|image| Blocks::read(&dir.memory_blocks(), image.bytes));
    let is_right = |blocks: &Blocks| Some(&image_entry(MEMORY_IMAGE, blocks)) == image;
    Ok(blocks.filter(is_right))
}

/// Describes the durable files in `new` in the manifest, which is returned, and gives the directory
/// its name. Of an image that was [opened](open_image) and written since, only the parts are read
/// that were written.
///
/// # Errors
/// Something cannot be read or written; there is no directory of that name then.
pub fn complete(
    new: &SnapshotDir,
    dest: &SnapshotDir,
    mut manifest: Manifest,
    opened: Option<(Blocks, Vec<Range<u64>>)>,
) -> Result<Manifest, SnapshotError> {
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(new).named("read", new)? {
        let entry = entry.named("read", new)?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let others = names.iter().filter(|name| *name != MEMORY_IMAGE);
    manifest.files = others.map(|name| entry(new, name)).collect::<Result<_, _>>()?;
    if names.iter().any(|name| name == MEMORY_IMAGE) {
        let blocks = blocks_of(&new.memory_image(), opened)?;
        blocks.write_new(&new.memory_blocks())?;
        manifest.files.push(image_entry(MEMORY_IMAGE, &blocks));
    }
    let path = new.manifest();
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|source| SnapshotError::Manifest { path: path.clone(), source })?;
    fs::write(&path, text).named("write", &path)?;
    durable::sync(&path)?;
    durable::sync(new)?;
    fs::rename(new, dest).named("rename", new)?;
    durable::sync(dest.parent().unwrap_or(dest))?;
    Ok(manifest)
}

/// Whether there is a manifest.
pub fn is_complete(dir: &SnapshotDir) -> bool {
    dir.manifest().exists()
}

/// Reads a snapshot's manifest.
///
/// # Errors
/// There is none, or it does not parse.
pub fn read(dir: &SnapshotDir) -> Result<Manifest, SnapshotError> {
    let path = dir.manifest();
    let size = fs::metadata(&path).named("read", &path)?.len();
    if size > MANIFEST_MAX {
        return Err(SnapshotError::Damaged { path, what: format!("it has {size} bytes") });
    }
    let bytes = fs::read(&path).named("read", &path)?;
    serde_json::from_slice(&bytes).map_err(|source| SnapshotError::Manifest { path, source })
}

/// Gives a file of one snapshot a second name in another, as neither will change.
///
/// # Errors
/// The name is taken, or the directories are on different filesystems.
pub fn link(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    Ok(fs::hard_link(from, to).named("make a second name of", from)?)
}

/// Compares files with what the manifest says of them: those that `which` picks.
///
/// # Errors
/// The first file that is missing or differs.
pub fn verify(
    dir: &SnapshotDir,
    manifest: &Manifest,
    which: impl Fn(&str) -> bool,
) -> Result<(), SnapshotError> {
    let mut wanted = manifest.files.iter().filter(|file| which(&file.name));
    wanted.try_for_each(|wanted| verify_file(dir, wanted))
}

fn verify_file(dir: &SnapshotDir, wanted: &FileEntry) -> Result<(), SnapshotError> {
    let damaged = |what| Err(SnapshotError::Damaged { path: dir.join(&wanted.name), what });
    if wanted.name.contains('/') {
        return damaged("it is not a name of a file".to_owned());
    }
    let found = match wanted.by_blocks {
        false => entry(dir, &wanted.name)?,
        true => image_entry(&wanted.name, &blocks_of(&dir.join(&wanted.name), None)?),
    };
    match found {
        found if found == *wanted => Ok(()),
        found if found.bytes != wanted.bytes => {
            damaged(format!("it has {} bytes, and had {}", found.bytes, wanted.bytes))
        }
        _ => damaged("its content is not what was saved".to_owned()),
    }
}

/// Removes a snapshot, if it is there.
///
/// # Errors
/// The directory cannot be removed.
pub fn remove(dir: &SnapshotDir) -> Result<(), SnapshotError> {
    Ok(durable::remove_dir(dir)?)
}

/// What a disk's file looks like now.
///
/// # Errors
/// The file cannot be examined.
pub fn stamp(name: &str, path: &Path) -> Result<DiskStamp, SnapshotError> {
    let metadata = fs::metadata(path).named("examine", path)?;
    let seconds = u64::try_from(metadata.mtime()).unwrap_or_default();
    let nanoseconds = u64::try_from(metadata.mtime_nsec()).unwrap_or_default();
    Ok(DiskStamp {
        name: name.to_owned(),
        bytes: metadata.len(),
        inode: metadata.ino(),
        modified_unix_ns: seconds * 1_000_000_000 + nanoseconds,
    })
}

fn entry(dir: &SnapshotDir, name: &str) -> Result<FileEntry, SnapshotError> {
    let path = dir.join(name);
    let file = File::open(&path).named("read", &path)?;
    let (digest, bytes) = digest(&file).named("read", &path)?;
    Ok(FileEntry { name: name.to_owned(), bytes, digest: digest.to_string(), by_blocks: false })
}

/// What is in an image, of which some may be known.
fn blocks_of(
    path: &Path,
    opened: Option<(Blocks, Vec<Range<u64>>)>,
) -> Result<Blocks, SnapshotError> {
    let file = File::open(path).named("read", path)?;
    let read = || match opened {
        Some((mut blocks, written)) => blocks.read_again(&file, written).map(|()| blocks),
        None => Blocks::of(&file),
    };
    Ok(read().named("read", path)?)
}

fn image_entry(name: &str, blocks: &Blocks) -> FileEntry {
    let digest = blocks.digest().to_string();
    FileEntry { name: name.to_owned(), bytes: blocks.bytes(), digest, by_blocks: true }
}

/// The digest of a sparse file's content, whose holes cost nothing, and its length.
fn digest(file: &File) -> io::Result<(Digest, u64)> {
    let bytes = file.metadata()?.len();
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut next = 0;
    for (from, to) in data_of(file)? {
        for number in (from / BLOCK as u64).max(next)..to.div_ceil(BLOCK as u64) {
            let at = number * BLOCK as u64;
            let length = usize::try_from(bytes - at).unwrap_or(BLOCK).min(BLOCK);
            file.read_exact_at(&mut block[..length], at)?;
            if !are_zero(&block[..length]) {
                hasher.update(number.to_le_bytes());
                hasher.update(&block[..length]);
            }
            next = number + 1;
        }
    }
    hasher.update(bytes.to_le_bytes());
    Ok((Digest::from(<[u8; 32]>::from(hasher.finalize())), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::InstanceDir;
    use mvm_core::snapshot::{FORMAT, Shape, VmmBuild};
    use mvm_core::vmm::{Accel, VmmKind};

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            instance: "acme/web/i-00000001".parse().unwrap(),
            created_unix_ms: 1,
            build: VmmBuild {
                vmm: VmmKind::Sim,
                version: "1".into(),
                accel: Accel::Tcg,
                cpu: String::new(),
            },
            revision: "r-0101010101010101".parse().unwrap(),
            shape: Shape { vcpus: 1, mem_mib: 64, has_nic: false, kernel_args: String::new() },
            base: None,
            files: vec![],
            disks: vec![],
            read_disks: None,
        }
    }

    /// A complete snapshot with a sparse memory and a small file.
    pub(super) fn saved(root: &Path) -> (SnapshotDir, Manifest) {
        let dest = InstanceDir::from(root).sleep(1);
        let new = dest.unfinished();
        begin(&new).unwrap();
        fs::write(new.device_state(), b"devices").unwrap();
        let memory = File::create(new.memory_image()).unwrap();
        memory.set_len(8 << 20).unwrap();
        memory.write_all_at(b"guest", 3 << 20).unwrap();
        let manifest = complete(&new, &dest, manifest(), None).unwrap();
        assert!(!new.exists());
        (dest, manifest)
    }

    #[test]
    fn what_was_completed_is_found_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let (dest, manifest) = saved(root.path());
        let found = read(&dest).unwrap();
        assert_eq!(found, manifest);
        let names: Vec<_> = found.files.iter().map(|file| (&*file.name, file.bytes)).collect();
        assert_eq!(names, [("device.state", 7), ("memory.image", 8 << 20)]);
        verify(&dest, &found, |_| true).unwrap();
        // Zeroes that were written are as good as a hole.
        let memory = File::options().write(true).open(dest.memory_image()).unwrap();
        memory.write_all_at(&[0; 9000], 100).unwrap();
        verify(&dest, &found, |_| true).unwrap();
    }

    /// What is said of a damage, and what does it.
    type Damage = (&'static str, fn(&SnapshotDir));

    #[test]
    fn every_kind_of_damage_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let damages: [Damage; 5] = [
            ("is damaged: its content", |dir| {
                let file = File::options().write(true).open(dir.memory_image()).unwrap();
                file.write_all_at(b"G", 3 << 20).unwrap();
            }),
            ("is damaged: its content", |dir| {
                let file = File::options().write(true).open(dir.memory_image()).unwrap();
                // The same bytes in another place.
                file.write_all_at(&[0; 5], 3 << 20).unwrap();
                file.write_all_at(b"guest", 4 << 20).unwrap();
            }),
            ("it has 9 bytes, and had 8388608", |dir| {
                let file = File::options().write(true).open(dir.memory_image()).unwrap();
                file.set_len(9).unwrap();
            }),
            ("is damaged: its content", |dir| {
                fs::write(dir.device_state(), b"devicez").unwrap();
            }),
            ("cannot read", |dir| fs::remove_file(dir.device_state()).unwrap()),
        ];
        for (expected, damage) in damages {
            let (dest, _) = saved(root.path());
            let manifest = read(&dest).unwrap();
            damage(&dest);
            let error = verify(&dest, &manifest, |_| true).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            remove(&dest).unwrap();
        }
    }

    #[test]
    fn of_an_image_that_was_written_to_only_that_is_read() {
        let root = tempfile::tempdir().unwrap();
        let (dest, _) = saved(root.path());
        let path = dest.memory_image();
        let next = |number, written: &[Range<u64>]| {
            assert!(has_image_alone(&dest));
            let known = open_image(&dest).unwrap();
            let next = InstanceDir::from(root.path()).sleep(number);
            let new = next.unfinished();
            begin(&new).unwrap();
            link(&path, &new.memory_image()).unwrap();
            assert!(!has_image_alone(&dest));
            let opened = known.zip(Some(written.to_vec()));
            (complete(&new, &next, manifest(), opened).unwrap(), next)
        };
        let image = File::options().write(true).open(&path).unwrap();
        let parts = [(70_000, 300), (70_200, 9000), (3 << 20, 5), ((8 << 20) - 3, 3)];
        for (at, length) in parts {
            image.write_all_at(&vec![7; length], at).unwrap();
        }
        // What is said not to be written is not looked at: that is how it is known to be skipped.
        image.write_all_at(b"unseen", 5 << 20).unwrap();
        let written = parts.map(|(at, length)| at..at + length as u64);
        let (second, dir) = next(2, &written);
        verify(&dir, &second, |_| true).unwrap_err();
        image.write_all_at(&[0; 6], 5 << 20).unwrap();
        verify(&dir, &second, |_| true).unwrap();
        assert!(!is_complete(&dest), "nothing vouches for what was written to");
        // Without the manifest nothing is known, and all of it is read.
        fs::remove_file(dir.memory_image()).unwrap();
        image.write_all_at(b"seen", 5 << 20).unwrap();
        let (third, dir) = next(3, &written);
        verify(&dir, &third, |_| true).unwrap();
    }

    #[test]
    fn digests_of_blocks_that_are_not_the_images_are_not_believed() {
        let root = tempfile::tempdir().unwrap();
        for damage in [&b"short"[..], &[1; 32 * 128], &[0; 32 * 128]] {
            let (dest, manifest) = saved(root.path());
            fs::write(dest.memory_blocks(), damage).unwrap();
            verify(&dest, &manifest, |_| true).unwrap();
            assert_eq!(open_image(&dest).unwrap(), None);
            remove(&dest).unwrap();
        }
        let (dest, _) = saved(root.path());
        assert!(open_image(&dest).unwrap().is_some());
    }

    #[test]
    fn an_image_of_an_earlier_mvm_is_verified_as_it_was_described() {
        let root = tempfile::tempdir().unwrap();
        let (dest, mut manifest) = saved(root.path());
        let image = manifest.files.iter_mut().find(|file| file.name == MEMORY_IMAGE).unwrap();
        *image = entry(&dest, MEMORY_IMAGE).unwrap();
        verify(&dest, &manifest, |_| true).unwrap();
        let file = File::options().write(true).open(dest.memory_image()).unwrap();
        file.write_all_at(b"G", 3 << 20).unwrap();
        verify(&dest, &manifest, |_| true).unwrap_err();
    }

    #[test]
    fn a_manifest_that_is_cut_or_missing_is_named() {
        let root = tempfile::tempdir().unwrap();
        let (dest, _) = saved(root.path());
        let path = dest.manifest();
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(read(&dest), Err(SnapshotError::Manifest { .. })));
        fs::remove_file(&path).unwrap();
        assert!(matches!(read(&dest), Err(SnapshotError::File(_))));
        remove(&dest).unwrap();
        remove(&dest).unwrap();
    }

    #[test]
    fn a_disks_stamp_changes_when_it_is_written_or_replaced() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("layer.ext4");
        fs::write(&path, b"one").unwrap();
        let before = stamp("the writable layer", &path).unwrap();
        assert_eq!(stamp("the writable layer", &path).unwrap(), before);
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert_ne!(stamp("the writable layer", &path).unwrap(), before);
    }
}
