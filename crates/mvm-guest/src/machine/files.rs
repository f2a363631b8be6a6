//! Files that hold what the host says, whatever the disk has room for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use rustix::mount::{UnmountFlags, mount_bind, unmount};

/// Where files lie that stand for others.
const STAND_INS: &str = "/run/mvm/instead";

/// Makes a file hold this text. What stands at the path is replaced, not followed: images like to
/// leave links there to what their own init would have made. On a full disk, or one that cannot be
/// written, an older file is written over, or another one stands in its place until the next boot.
pub(super) fn ensure(path: &Path, text: &str) -> io::Result<()> {
    ensure_with(path, text, Path::new(STAND_INS))
}

/// Puts a file with this text over another one, which stays as it is below.
pub(super) fn put_over(path: &Path, text: &str) -> io::Result<()> {
    // An earlier one, of which there may be none.
    let _ = unmount(path, UnmountFlags::DETACH);
    stand_in(path, text, Path::new(STAND_INS))
}

fn ensure_with(path: &Path, text: &str, stand_ins: &Path) -> io::Result<()> {
    if is_file(path) && fs::read(path).is_ok_and(|present| present == text.as_bytes()) {
        return Ok(());
    }
    let replaced = replace(path, text);
    if replaced.is_ok() || write_over(path, text).is_ok() {
        return Ok(());
    }
    stand_in(path, text, stand_ins).or(replaced)
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file())
}

/// Whole or not at all.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let fresh = path.with_extension("mvm-new");
    let placed = fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, path));
    if placed.is_err() {
        // What there was no room for takes none.
        let _ = fs::remove_file(&fresh);
    }
    placed
}

/// In the blocks that the file has.
fn write_over(path: &Path, text: &str) -> io::Result<()> {
    if !is_file(path) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)?;
    file.sync_data()
}

fn stand_in(path: &Path, text: &str, stand_ins: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(stand_ins)?;
    let stand_in = stand_ins.join(name);
    fs::write(&stand_in, text)?;
    if !is_file(path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::create_new(path)?;
    }
    Ok(mount_bind(&stand_in, path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    #[test]
    fn a_dangling_link_is_replaced_by_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/resolv.conf");
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        symlink("/nowhere/at/all", &path).unwrap();
        for _ in 0..2 {
            ensure(&path, "nameserver 10.240.0.1\n").unwrap();
            assert!(is_file(&path));
            assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.240.0.1\n");
        }
        assert_eq!(fs::read_dir(dir.path().join("etc")).unwrap().count(), 1);
    }

    /// Mounts of this thread alone; `None` where the tests may not mount.
    #[allow(unsafe_code)]
    fn small_filesystem(dir: &Path) -> Option<()> {
        // SAFETY: no other thread shares what is unshared, and no descriptor is among it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.ok()?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).ok()?;
        mount("none", dir, "tmpfs", MountFlags::empty(), Some(c"size=16k")).ok()
    }

    #[test]
    fn a_full_disk_does_not_keep_a_guest_from_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, stand_ins) = (dir.path().join("disk"), dir.path().join("run"));
        fs::create_dir(&disk).unwrap();
        // Mounting needs root.
        let Some(()) = small_filesystem(&disk) else { return };
        let (written, linked) = (disk.join("hostname"), disk.join("resolv.conf"));
        fs::write(&written, "the one before\n").unwrap();
        symlink("/nowhere/at/all", &linked).unwrap();
        assert!(fs::write(disk.join("filler"), [1; 64 * 1024]).is_err());

        for (path, text) in [(&written, "web-1\n"), (&linked, "nameserver 10.240.0.1\n")] {
            ensure_with(path, text, &stand_ins).unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), text);
        }
        assert!(stand_ins.join("resolv.conf").exists() && !stand_ins.join("hostname").exists());
        // Another name, with the stand-in there and room again.
        fs::remove_file(disk.join("filler")).unwrap();
        for path in [&written, &linked] {
            ensure_with(path, "another\n", &stand_ins).unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), "another\n");
        }
        assert_eq!(fs::read_dir(&disk).unwrap().count(), 2, "no draft is left");
        for path in [&linked, &disk] {
            unmount(path, UnmountFlags::empty()).unwrap();
        }
    }
}
