//! Removes trees: the one way in which mvm deletes a directory with everything in it.
//!
//! It deletes names below one directory and never leaves that directory: symbolic links are removed and
//! not followed, and a place where something is mounted is an error, with everything below it untouched.
//! `clippy.toml` denies the standard library's functions, which go through mounts.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

/// Directories below this depth are moved up before they are removed: each level holds a descriptor.
const MAX_DEPTH: usize = 24;
/// How often a tree is looked through that somebody else still writes to.
const MAX_PASSES: usize = 1_000;

/// Removes a directory tree, or whatever else has this name. One that is not there is fine.
///
/// Everything that can be removed is, whatever fails.
///
/// # Errors
/// The first failure, with the path that it is about: something is mounted there, for instance.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it has no name of its own"));
    };
    let parent_path = if parent == Path::new("") { Path::new(".") } else { parent };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match rustix::fs::openat(CWD, parent_path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        parent => parent?,
    };
    let name = CString::new(name.as_bytes())?;
    let mut removal = Removal { top: None, moved: 0, failure: None };
    removal.entry(parent.as_fd(), &name, path, 0);
    match removal.failure {
        None => Ok(()),
        Some((at, error)) if at == path => Err(error),
        Some((at, error)) => {
            Err(io::Error::new(error.kind(), format!("{}: {error}", at.display())))
        }
    }
}

/// A directory that is removed with everything in it when this is dropped.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    /// Makes a directory with a new name.
    #[allow(clippy::disallowed_methods)] // its path is kept, and the removal is this type's own
    pub(crate) fn new_in(dir: &Path, prefix: &str) -> io::Result<Self> {
        let made = tempfile::Builder::new().prefix(prefix).tempdir_in(dir)?;
        // The library's own clean-up goes through mounts.
        Ok(Self(made.keep()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove a directory");
        }
    }
}

/// Detaches what is mounted below a directory in which nobody but mvm makes anything, innermost first.
/// Returns the mount points.
///
/// # Errors
/// The mounts cannot be listed, or one cannot be detached.
pub(crate) fn detach_mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let dir = match dir.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        dir => dir?,
    };
    let table = fs::read("/proc/self/mountinfo")?;
    let mut found: Vec<PathBuf> =
        mount_points(&table).filter(|point| *point != dir && point.starts_with(&dir)).collect();
    // A later mount may be on top of an earlier one.
    found.reverse();
    for point in &found {
        unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    }
    Ok(found)
}

/// The mount points of a `mountinfo` table (proc_pid_mountinfo(5)), in the order of mounting.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(|line| {
        let point = line.split(|byte| *byte == b' ').nth(4)?;
        Some(PathBuf::from(OsStr::from_bytes(&unescaped(point))))
    })
}

/// Blanks, line ends and backslashes are `\ooo` there.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let digits = more.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let octal = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal.filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    bytes
}

/// One removal under way.
struct Removal {
    /// The uppermost directory, where deep ones are moved to.
    top: Option<OwnedFd>,
    /// How many were moved.
    moved: usize,
    failure: Option<(PathBuf, io::Error)>,
}

impl Removal {
    /// Keeps the first failure; `false` stands for what is still there.
    fn failed(&mut self, path: &Path, error: impl Into<io::Error>) -> bool {
        self.failure.get_or_insert_with(|| (path.to_owned(), error.into()));
        false
    }

    /// Removes one name of a directory, and says whether it is gone.
    fn entry(
        &mut self,
        parent: impl AsFd + Copy,
        name: &CString,
        path: &Path,
        depth: usize,
    ) -> bool {
        // What is mounted on is busy, so this does not reach it either.
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return true,
            // A directory, by whatever error this filesystem has for it.
            Err(Errno::ISDIR | Errno::PERM) if is_dir(parent, name) => {}
            Err(Errno::BUSY) => return self.failed(path, mounted()),
            Err(error) => return self.failed(path, error),
        }
        for _ in 0..MAX_PASSES {
            if !self.children(parent, name, path, depth) {
                return false;
            }
            match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return true,
                // The uppermost directory, and one that somebody writes to, take another pass.
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(Errno::BUSY) => return self.failed(path, mounted()),
                Err(error) => return self.failed(path, error),
            }
        }
        self.failed(path, Errno::NOTEMPTY)
    }

    /// Removes what a directory has, as far as it can be removed, and says whether all of it is gone or
    /// moved up.
    fn children(
        &mut self,
        parent: impl AsFd + Copy,
        name: &CString,
        path: &Path,
        depth: usize,
    ) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Not across a mount, not through a link, not out of the parent.
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        let dir = match rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return true,
            Err(Errno::XDEV) => return self.failed(path, mounted()),
            Err(error) => return self.failed(path, error),
        };
        let names = match names(&dir) {
            Ok(names) => names,
            Err(error) => return self.failed(path, error),
        };
        let is_top = self.top.is_none();
        if is_top {
            match dir.try_clone() {
                Ok(top) => self.top = Some(top),
                Err(error) => return self.failed(path, error),
            }
        }
        let mut is_gone = true;
        for child in &names {
            let child_path = path.join(OsStr::from_bytes(child.to_bytes()));
            is_gone &= match depth < MAX_DEPTH || !is_dir(&dir, child) {
                true => self.entry(&dir, child, &child_path, depth + 1),
                false => self.move_up(&dir, child, &child_path),
            };
        }
        if is_top {
            self.top = None;
        }
        is_gone
    }

    /// Moves a deep directory to the uppermost one, whose next pass removes it.
    fn move_up(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> bool {
        let Some(top) = &self.top else { return self.failed(path, Errno::NOENT) };
        let moved = loop {
            self.moved += 1;
            let new = format!(".deep-{}", self.moved);
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(dir, name, top, new.as_str(), flags) {
                Err(Errno::EXIST) => {}
                moved => break moved,
            }
        };
        match moved {
            Ok(()) => true,
            Err(Errno::BUSY) => self.failed(path, mounted()),
            Err(error) => self.failed(path, error),
        }
    }
}

fn mounted() -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        "something is mounted there, and mvm removes nothing through a mount",
    )
}

fn is_dir(parent: impl AsFd, name: &CString) -> bool {
    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn names(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::mount::{mount_bind, unmount};

    use super::*;

    fn state() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_tree_goes_and_what_its_links_lead_to_stays() {
        let dir = state();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("canary"), "x").unwrap();
        fs::write(tree.join("a/b/c/file"), "x").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        symlink("nowhere", tree.join("dangling")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && outside.join("canary").exists());
        remove_tree(&tree).unwrap();
        remove_tree(&tree.join("not/there")).unwrap();

        symlink(&outside, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(tree.symlink_metadata().is_err() && outside.join("canary").exists());
        fs::write(&tree, "a file").unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn a_tree_that_is_deeper_than_there_are_descriptors_goes() {
        let dir = state();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut here = rustix::fs::open(&tree, OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&here, "deep", Mode::RWXU).unwrap();
            let file = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::openat(&here, "file", file, Mode::RUSR).unwrap();
            here = rustix::fs::openat(&here, "deep", OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn nothing_is_removed_through_a_mount_and_the_rest_is() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = state();
        let (tree, host) = (dir.path().join("tree"), dir.path().join("host"));
        let (on_dir, on_file) = (tree.join("a/shm"), tree.join("a/null"));
        fs::create_dir_all(&on_dir).unwrap();
        fs::create_dir_all(host.join("below")).unwrap();
        for file in [tree.join("a/file"), on_file.clone(), host.join("canary")] {
            fs::write(file, "x").unwrap();
        }
        // Of the same filesystem: the device says nothing.
        mount_bind(&host, &on_dir).unwrap();
        mount_bind(host.join("canary"), &on_file).unwrap();
        let error = remove_tree(&tree).unwrap_err().to_string();
        let canaries = host.join("canary").exists() && host.join("below").exists();
        let others = tree.join("a/file").exists();
        let itself = remove_tree(&on_dir).unwrap_err().to_string();
        let detached = detach_mounts_below(&tree);
        let _ = unmount(&on_dir, UnmountFlags::DETACH);
        assert!(canaries, "the host's files stay");
        assert!(!others, "what is not mounted goes");
        assert!(error.contains("tree/a/") && error.contains("is mounted there"), "{error}");
        assert!(itself.contains("is mounted there"), "{itself}");
        let root = dir.path().canonicalize().unwrap().join("tree/a");
        assert_eq!(detached.unwrap(), [root.join("null"), root.join("shm")]);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && host.join("canary").exists());
    }

    #[test]
    fn names_of_mount_points_are_read_as_they_are() {
        let table =
            b"36 35 98:0 /m /a\\040b\\134c rw - ext4 /dev/x rw\n37 35 0:1 / /d rw - x y z\n";
        let points: Vec<PathBuf> = mount_points(table).collect();
        assert_eq!(points, [Path::new("/a b\\c"), Path::new("/d")]);
    }

    #[test]
    fn a_directory_of_one_s_own_goes_with_its_value() {
        let dir = state();
        let own = TempDir::new_in(dir.path(), "x-").unwrap();
        fs::write(own.path().join("file"), "x").unwrap();
        drop(own);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
