//! Files and directories that appear whole or not at all, and locks that die with their holder.
//!
//! A directory is built under a temporary name, synced, and renamed. Whoever holds the lock of a
//! name is the only one that may make or remove its temporary directory, so a temporary directory
//! whose lock is free belongs to a builder that was interrupted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::removal::remove_tree;

const LOCK: &str = ".lock-";
const TEMP: &str = ".tmp-";

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}")]
pub struct FileError {
    /// What was being done, as a verb.
    pub operation: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self { operation, path: path.to_owned(), source: source.into() }
    }

    /// Whether the filesystem or the quota was exhausted.
    pub(crate) fn is_no_space(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Whether an error says that a file itself is gone or bad. Every other one, such as too many open
/// files, says nothing about the file, which must not be replaced for it.
pub(crate) fn says_damage(error: &io::Error) -> bool {
    use io::ErrorKind as E;
    let is_medium = matches!(error.raw_os_error(), Some(libc::EIO | libc::EUCLEAN | libc::EBADMSG));
    let is_file = matches!(
        error.kind(),
        E::NotFound | E::IsADirectory | E::NotADirectory | E::InvalidData | E::UnexpectedEof
    );
    is_medium || is_file
}

/// Names the operation and the path of an I/O error.
pub(crate) trait Named<T> {
    fn named(self, operation: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> Named<T> for Result<T, E> {
    fn named(self, operation: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|source| FileError::new(operation, path, source))
    }
}

/// Makes a directory and its parents, unless it exists.
pub(crate) fn ensure_dir(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).named("create directory", path)
}

/// Writes a small file so that a reader sees the old content or the new one, also after a crash.
pub(crate) fn replace_file(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut temp = tempfile::NamedTempFile::new_in(dir).named("create a file in", dir)?;
    temp.write_all(content).named("write", path)?;
    let file = temp.as_file();
    file.set_permissions(fs::Permissions::from_mode(mode)).named("set the mode of", path)?;
    file.sync_all().named("sync", path)?;
    temp.persist(path).map_err(|error| error.error).named("create", path)?;
    sync(dir)
}

/// Writes a new file; the caller syncs it with its tree.
pub(crate) fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let mut options = OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(mode).open(path).named("create", path)?;
    file.write_all(content).named("write", path)?;
    // The mode above is subject to the umask.
    file.set_permissions(fs::Permissions::from_mode(mode)).named("set the mode of", path)
}

/// Moves a complete temporary directory to its final name, durably.
fn publish_dir(temp: &Path, dest: &Path) -> Result<(), FileError> {
    fs::set_permissions(temp, fs::Permissions::from_mode(0o755)).named("set the mode of", temp)?;
    sync_tree(temp)?;
    fs::rename(temp, dest).named("create", dest)?;
    sync(dest.parent().unwrap_or(Path::new(".")))
}

fn sync_tree(dir: &Path) -> Result<(), FileError> {
    for entry in fs::read_dir(dir).named("read directory", dir)? {
        let entry = entry.named("read directory", dir)?;
        let kind = entry.file_type().named("read", &entry.path())?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(dir)
}

/// Makes a file's content, or a directory's entries, durable.
pub(crate) fn sync(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|file| file.sync_all()).named("sync", path)
}

/// Removes a directory tree; one that is not there is fine.
pub(crate) fn remove_dir(path: &Path) -> Result<(), FileError> {
    remove_tree(path).named("remove", path)
}

/// A directory that is removed with everything in it, unless it was published. It holds its
/// name's lock until it is gone.
pub(crate) struct TempTree {
    path: PathBuf,
    _lock: NameLock,
}

impl TempTree {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the directory to its final name, without waiting for the disk: for what can be made
    /// again and says itself whether it is whole.
    pub(crate) fn rename(self, dest: &Path) -> Result<(), FileError> {
        fs::rename(&self.path, dest).named("create", dest)
    }

    /// Moves the directory to its final name, durably.
    pub(crate) fn publish(self, dest: &Path) -> Result<(), FileError> {
        publish_dir(&self.path, dest)
    }
}

impl Drop for TempTree {
    fn drop(&mut self) {
        // After a rename there is nothing here. What cannot be removed now is found again by name.
        let _ = remove_tree(&self.path);
    }
}

/// The exclusive right to one name in a directory, until dropped or until the process dies.
pub(crate) struct NameLock {
    dir: PathBuf,
    name: String,
    _file: File,
}

impl NameLock {
    /// Makes the directory if needed and waits until no one else holds the name. Blocks its thread.
    pub(crate) fn acquire(dir: &Path, name: &str) -> Result<Self, FileError> {
        ensure_dir(dir)?;
        let path = lock_path(dir, name);
        loop {
            let file = open_lock(&path)?;
            file.lock().named("lock", &path)?;
            if is_current(&path, &file)? {
                return Ok(Self { dir: dir.to_owned(), name: name.to_owned(), _file: file });
            }
        }
    }

    /// [`Self::acquire`] on a thread that may block.
    pub(crate) async fn wait(dir: &Path, name: &str) -> Result<Self, FileError> {
        let (dir_owned, name) = (dir.to_owned(), name.to_owned());
        let lock = tokio::task::spawn_blocking(move || Self::acquire(&dir_owned, &name)).await;
        lock.map_err(io::Error::other).named("lock a name in", dir)?
    }

    /// Takes the name, or `None` if someone holds it.
    pub(crate) fn try_acquire(dir: &Path, name: &str) -> Result<Option<Self>, FileError> {
        let path = lock_path(dir, name);
        loop {
            let file = open_lock(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Ok(None),
                Err(fs::TryLockError::Error(error)) => {
                    return Err(FileError::new("lock", &path, error));
                }
            }
            if is_current(&path, &file)? {
                return Ok(Some(Self { dir: dir.to_owned(), name: name.to_owned(), _file: file }));
            }
        }
    }

    /// Makes the name's temporary directory, in place of what an interrupted holder left behind.
    pub(crate) fn temp_tree(self) -> Result<TempTree, FileError> {
        let path = self.dir.join(format!("{TEMP}{}", self.name));
        remove_dir(&path)?;
        fs::create_dir(&path).named("create directory", &path)?;
        Ok(TempTree { path, _lock: self })
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // A lock file that stays is harmless: the next holder removes it.
        let _ = fs::remove_file(lock_path(&self.dir, &self.name));
    }
}

/// Removes the temporary directories whose holders were interrupted, and returns how many.
pub(crate) fn remove_abandoned(dir: &Path) -> Result<usize, FileError> {
    let mut removed = 0;
    for file in names(dir)? {
        let Some(name) = file.strip_prefix(TEMP) else { continue };
        let lock = NameLock::try_acquire(dir, name)?;
        if lock.is_some() {
            remove_dir(&dir.join(&file))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The temporary directories whose holders were interrupted.
pub(crate) fn abandoned(dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut found = Vec::new();
    for file in names(dir)? {
        let Some(name) = file.strip_prefix(TEMP) else { continue };
        if NameLock::try_acquire(dir, name)?.is_some() {
            found.push(dir.join(&file));
        }
    }
    Ok(found)
}

/// The names in a directory; none if it does not exist.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.named("read directory", dir)?,
    };
    let name = |entry: io::Result<fs::DirEntry>| {
        Ok(entry.named("read directory", dir)?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

fn lock_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{LOCK}{name}"))
}

fn open_lock(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).named("open lock file", path)
}

/// The holder removes the file when it is done, so a waiter may have locked a removed file.
fn is_current(path: &Path, held: &File) -> Result<bool, FileError> {
    let held = held.metadata().named("read", path)?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(FileError::new("read", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_lock_admits_one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".lock-x");
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = NameLock::acquire(dir.path(), "x").unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!path.exists(), "the last holder leaves no lock file");
    }

    #[test]
    fn only_what_is_about_the_file_is_its_damage() {
        let errno = io::Error::from_raw_os_error;
        for code in [libc::ENOENT, libc::EISDIR, libc::EIO, libc::EUCLEAN, libc::ENOTDIR] {
            assert!(says_damage(&errno(code)), "{}", errno(code));
        }
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EINTR] {
            assert!(!says_damage(&errno(code)), "{}", errno(code));
        }
    }

    #[test]
    fn a_held_lock_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let held = NameLock::acquire(dir.path(), "x").unwrap();
        assert!(NameLock::try_acquire(dir.path(), "x").unwrap().is_none());
        drop(held);
        assert!(NameLock::try_acquire(dir.path(), "x").unwrap().is_some());
    }

    #[test]
    fn an_unpublished_tree_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let temp = NameLock::acquire(dir.path(), "x").unwrap().temp_tree().unwrap();
        fs::write(temp.path().join("file"), "content").unwrap();
        assert!(NameLock::try_acquire(dir.path(), "x").unwrap().is_none());
        drop(temp);
        assert!(names(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_published_tree_is_all_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let temp = NameLock::acquire(dir.path(), "x").unwrap().temp_tree().unwrap();
        fs::write(temp.path().join("file"), "content").unwrap();
        temp.publish(&dir.path().join("x")).unwrap();
        assert_eq!(names(dir.path()).unwrap(), ["x"]);
    }

    #[test]
    fn what_an_interrupted_holder_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        for abandoned in [".tmp-a", ".tmp-b"] {
            fs::create_dir(dir.path().join(abandoned)).unwrap();
            fs::write(dir.path().join(abandoned).join("half"), "").unwrap();
        }
        let a = NameLock::acquire(dir.path(), "a").unwrap().temp_tree().unwrap();
        assert!(names(a.path()).unwrap().is_empty());
        assert_eq!(remove_abandoned(dir.path()).unwrap(), 1);
        assert!(a.path().exists(), "its holder is at work");
    }
}
