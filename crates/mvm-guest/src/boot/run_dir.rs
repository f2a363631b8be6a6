//! What an image has below `/run`, in the fresh one of each boot.
//!
//! Packages make directories for their sockets there when an image is built (such as
//! `/run/postgresql`), and the program of the image counts on them: nobody else makes them. An
//! image's own init does, and wants an empty `/run`.

use std::fs::{self, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, lchown, symlink};
use std::path::{Path, PathBuf};

/// Bytes of files that are carried over: they take memory from now on.
const FILES_MAX: u64 = 16 * 1024 * 1024;

/// Copies directories, links and small files with their owners and modes; what is there stays.
/// Sockets and the like are nobody's any more. Returns how many files were too large.
pub(super) fn carry_over(from: &Path, to: &Path) -> io::Result<usize> {
    let (mut left, mut too_large) = (FILES_MAX, 0);
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(from.join(&dir))? {
            let entry = entry?;
            let (name, kind) = (dir.join(entry.file_name()), entry.file_type()?);
            let metadata = entry.metadata()?;
            let target = to.join(&name);
            if fs::symlink_metadata(&target).is_ok() || is_of_a_process(kind) {
                continue;
            }
            if kind.is_dir() {
                fs::create_dir(&target)?;
                dirs.push(name);
            } else if kind.is_symlink() {
                symlink(fs::read_link(entry.path())?, &target)?;
            } else if metadata.len() <= left {
                left -= metadata.len();
                fs::copy(entry.path(), &target)?;
            } else {
                too_large += 1;
                continue;
            }
            lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
            if !kind.is_symlink() {
                fs::set_permissions(&target, metadata.permissions())?;
            }
        }
    }
    Ok(too_large)
}

fn is_of_a_process(kind: FileType) -> bool {
    kind.is_socket() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn directories_links_and_files_are_carried_over_as_they_are_and_sockets_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("db/deep")).unwrap();
        fs::create_dir_all(to.join("lock")).unwrap();
        fs::set_permissions(from.join("db"), fs::Permissions::from_mode(0o3777)).unwrap();
        fs::write(from.join("db/deep/file"), "content").unwrap();
        fs::set_permissions(from.join("db/deep/file"), fs::Permissions::from_mode(0o4640)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        fs::write(from.join("lock"), "not over what is there").unwrap();
        let large = fs::File::create(from.join("large")).unwrap();
        large.set_len(FILES_MAX + 1).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        let owner = fs::metadata(from.join("db")).unwrap().uid();
        assert_eq!(carry_over(&from, &to).unwrap(), 1);
        let mode = |path: &str| fs::metadata(to.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("db"), mode("db/deep/file")), (0o3777, 0o4640));
        assert_eq!(fs::metadata(to.join("db")).unwrap().uid(), owner);
        assert_eq!(fs::read(to.join("db/deep/file")).unwrap(), b"content");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(to.join("lock").is_dir() && !to.join("large").exists());
        assert!(!to.join("socket").exists());
    }
}
