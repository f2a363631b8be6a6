//! A data disk that nobody has used becomes what the image has in its place: its owner, its mode and its
//! content, and nothing else. So a program finds the directory that its image's maker prepared for it.
//!
//! ```text
//!  lost+found alone  ──>  MARK  ──>  content, owner, mode, all written  ──>  no MARK
//! ```
//!
//! A new ext4 file system holds `lost+found` and nothing else. That directory is renamed to [`MARK`]
//! first and removed last, so that a fill that was interrupted begins anew.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use mvm_files::{FilesError, Links, Options, Owners, Target};

use crate::console::complain;

const LOST_AND_FOUND: &str = "lost+found";
/// There while a disk is being filled.
const MARK: &str = ".mvm-being-filled";

/// Fills a disk that is fresh with what the directory holds that it covers.
pub(super) fn fill(covered: &File, disk: &Path) -> io::Result<()> {
    let mark = disk.join(MARK);
    if is_unused(disk)? {
        fs::rename(disk.join(LOST_AND_FOUND), &mark)?;
    } else if !mark.is_dir() {
        return Ok(());
    }
    let from = format!("/proc/self/fd/{}/.", covered.as_raw_fd());
    copy(Path::new(&from), disk).map_err(io::Error::other)?;
    let root = File::open(disk)?;
    rustix::fs::syncfs(&root)?;
    // Removing the mark is a change of the directory, which is to look as old as the image's.
    let modified = covered.metadata()?.modified()?;
    fs::remove_dir(&mark)?;
    root.set_modified(modified)
}

/// Whether there is nothing on it but what a new file system has.
fn is_unused(disk: &Path) -> io::Result<bool> {
    let mut names = Vec::new();
    for entry in fs::read_dir(disk)?.take(2) {
        names.push(entry?.file_name());
    }
    Ok(names == [LOST_AND_FOUND])
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let chain = |error: FilesError| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let (reader, writer) = io::pipe().map_err(|error| error.to_string())?;
    let options = Options { links: Links::Refuse, owners: Owners::Kept };
    let target = Target::As { path: to.to_owned(), name: ".".into() };
    let (packed, unpacked) = std::thread::scope(|scope| {
        let pack = scope.spawn(move || mvm_files::pack(from, io::BufWriter::new(writer)));
        let unpacked = mvm_files::unpack(io::BufReader::new(reader), &target, options);
        (pack.join(), unpacked)
    });
    // A full disk is what unpacking says, and cuts the packing short.
    unpacked.map_err(chain)?;
    let summary = match packed {
        Ok(packed) => packed.map_err(chain)?,
        Err(_) => return Err("reading what the image has there was cut short".to_owned()),
    };
    for path in summary.skipped {
        complain(&format!("left out of a fresh disk: {path}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use std::path::PathBuf;

    /// The image's directory, and a directory that stands for a new disk.
    fn pair() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
        fs::create_dir_all(image.join("sub")).unwrap();
        fs::write(image.join("sub/file"), "content").unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o2750)).unwrap();
        fs::create_dir_all(disk.join(LOST_AND_FOUND)).unwrap();
        (dir, image, disk)
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn fill_from(image: &Path, disk: &Path) {
        fill(&File::open(image).unwrap(), disk).unwrap();
    }

    #[test]
    fn a_fresh_disk_becomes_the_image_s_directory() {
        let (_dir, image, disk) = pair();
        fill_from(&image, &disk);
        assert_eq!(names(&disk), ["sub"]);
        assert_eq!(fs::read_to_string(disk.join("sub/file")).unwrap(), "content");
        let (was, is) = (fs::metadata(&image).unwrap(), fs::metadata(&disk).unwrap());
        let facts = |it: &fs::Metadata| (it.mode(), it.uid(), it.gid(), it.mtime());
        assert_eq!(facts(&is), facts(&was));
    }

    #[test]
    fn a_disk_that_was_used_stays_as_it_is_also_once_it_is_empty() {
        let (_dir, image, disk) = pair();
        fs::write(disk.join("own"), "").unwrap();
        fill_from(&image, &disk);
        assert_eq!(names(&disk), [LOST_AND_FOUND, "own"]);
        fs::remove_file(disk.join("own")).unwrap();
        fs::remove_dir(disk.join(LOST_AND_FOUND)).unwrap();
        fill_from(&image, &disk);
        assert_eq!(names(&disk), [""; 0]);
    }

    #[test]
    fn a_fill_that_was_interrupted_begins_anew() {
        let (_dir, image, disk) = pair();
        fs::rename(disk.join(LOST_AND_FOUND), disk.join(MARK)).unwrap();
        fs::create_dir(disk.join("sub")).unwrap();
        fs::write(disk.join("sub/file"), "con").unwrap();
        fill_from(&image, &disk);
        assert_eq!(names(&disk), ["sub"]);
        assert_eq!(fs::read_to_string(disk.join("sub/file")).unwrap(), "content");
    }
}
