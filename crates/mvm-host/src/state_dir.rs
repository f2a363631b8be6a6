//! State directories: [what is where](StateDir) in one, and whether it is what it was, has moved, or is a
//! copy of another one.
//!
//! A state directory has a record of its own, [`StateDir::identity`], with an id that no other has and the path
//! that it was last served at. A copy has the same record; what gives it away is that a directory with this id
//! is still there at the recorded path, or at the one where the machine's claims have it. Inodes tell
//! nothing: they are others after a restore, and on some filesystems after a reboot.
//!
//! The agent calls [`settle`] once it has the directory's lock, and a command that is about to start
//! an agent calls [`examine`], which changes nothing.

mod layout;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mvm_core::net::StateDirId;
use serde::{Deserialize, Serialize};

use crate::net::{Registry, digest_of};

pub use layout::{
    DEVICE_STATE, INITRD, InstanceDir, KernelDir, LAYER, MEMORY_IMAGE, MODULES, ROOT, RevisionDir,
    SnapshotDir, StateDir, VMLINUZ,
};

/// Why a state directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It is a copy of another one that is still there.
    #[error(
        "{} is a copy of the state directory {}, whose microVMs and networks it would take for its own",
        dir.display(),
        of.display()
    )]
    Copy {
        /// The copy.
        dir: PathBuf,
        /// What it was made from.
        of: PathBuf,
    },
    /// A file cannot be used.
    #[error("cannot use {}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a state directory's record says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Drawn once; 32 hexadecimal digits.
    id: String,
    /// Where it was served last.
    path: PathBuf,
    /// What marks its links and names its firewall tables.
    mark: StateDirId,
}

/// A state directory that may be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// By its canonical path. Where the directory is reached by several, it is the one that it had before.
    pub dir: StateDir,
    /// What marks its links and names its firewall tables.
    pub mark: StateDirId,
    /// Where it was before it was moved here.
    pub moved_from: Option<PathBuf>,
}

/// What there is to say of a directory.
enum Standing {
    /// Nobody has served it with this version yet.
    New,
    Known(Settled, Record),
    Copy {
        of: PathBuf,
    },
}

/// Refuses a copy; changes nothing, and takes what is not there for fine.
///
/// # Errors
/// It is a copy, or cannot be examined.
pub fn examine(dir: &Path, registry: &Registry) -> Result<(), StateDirError> {
    if !StateDir::from(dir).identity().exists() {
        return Ok(());
    }
    match standing(dir, registry)? {
        Standing::Copy { of } => Err(StateDirError::Copy { dir: dir.to_owned(), of }),
        Standing::New | Standing::Known(..) => Ok(()),
    }
}

/// Finds out which state directory this is and writes down where it is. Its lock must be held.
///
/// # Errors
/// It is a copy, or its record cannot be read or written.
pub fn settle(dir: &Path, registry: &Registry) -> Result<Settled, StateDirError> {
    match standing(dir, registry)? {
        Standing::Copy { of } => Err(StateDirError::Copy { dir: dir.to_owned(), of }),
        Standing::New => make_own(dir, registry),
        Standing::Known(found, record) => {
            if *found.dir != *record.path {
                write(&Record { path: found.dir.to_path_buf(), ..record })?;
            }
            Ok(found)
        }
    }
}

/// Makes a directory one of its own, whatever it was: it gets another id and another mark.
///
/// # Errors
/// Its record cannot be written.
pub fn make_own(dir: &Path, registry: &Registry) -> Result<Settled, StateDirError> {
    let path = canonical(dir)?;
    let drawn = || getrandom::u64().map_err(|error| failed(&path)(io::Error::other(error)));
    let id = format!("{:016x}{:016x}", drawn()?, drawn()?);
    // The one that goes with its path, unless a directory that is elsewhere by now has it.
    let usual = digest_of(&path);
    let holder = registry.path_of(usual).map_err(failed(&path))?;
    let is_taken = holder.is_some_and(|holder| holder != path && holder.exists());
    let mark = match is_taken {
        true => StateDirId::from_digest((drawn()? as u32).to_be_bytes()),
        false => usual,
    };
    write(&Record { id, path: path.clone(), mark })?;
    Ok(Settled { dir: path.into(), mark, moved_from: None })
}

fn standing(dir: &Path, registry: &Registry) -> Result<Standing, StateDirError> {
    let path = canonical(dir)?;
    let Some(record) = read(&path)? else { return Ok(Standing::New) };
    let registered = registry.path_of(record.mark).map_err(failed(&path))?;
    let mut served_at = path.clone();
    for other in [Some(record.path.clone()), registered].into_iter().flatten() {
        if other == path || !is_same_record(&other, &record)? {
            continue;
        }
        match is_same_directory(&path, &other)? {
            // Reached by a bind mount: its links and claims go by the path that it had before.
            true => served_at = other,
            false => return Ok(Standing::Copy { of: other }),
        }
    }
    let moved_from = (served_at != record.path).then(|| record.path.clone());
    Ok(Standing::Known(Settled { dir: served_at.into(), mark: record.mark, moved_from }, record))
}

/// Whether the directory there says that it is the same one. One that cannot be looked into may be.
fn is_same_record(other: &Path, record: &Record) -> Result<bool, StateDirError> {
    match other.metadata() {
        Err(error) if is_absent(&error) => Ok(false),
        _ => Ok(read(other)?.is_some_and(|there| there.id == record.id)),
    }
}

fn is_same_directory(one: &Path, other: &Path) -> Result<bool, StateDirError> {
    let id = |path: &Path| {
        path.metadata().map(|metadata| (metadata.dev(), metadata.ino())).map_err(failed(path))
    };
    Ok(id(one)? == id(other)?)
}

/// The mark of the state directory at a path, if there is one.
pub(crate) fn mark_at(path: &Path) -> io::Result<Option<StateDirId>> {
    match read(path) {
        Ok(record) => Ok(record.map(|record| record.mark)),
        Err(StateDirError::File { source, .. }) => Err(source),
        Err(error @ StateDirError::Copy { .. }) => Err(io::Error::other(error)),
    }
}

fn read(dir: &Path) -> Result<Option<Record>, StateDirError> {
    let file = StateDir::from(dir).identity();
    match fs::read(&file) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(&file)(error.into()))
        }
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(failed(&file)(error)),
    }
}

/// Replaces the record as a whole: a directory never has half of one.
fn write(record: &Record) -> Result<(), StateDirError> {
    let file = StateDir::from(&record.path).identity();
    let write = || {
        let mut fresh = tempfile::NamedTempFile::new_in(&record.path)?;
        serde_json::to_writer_pretty(&mut fresh, record)?;
        fresh.as_file().sync_all()?;
        fresh.persist(&file)?;
        fs::File::open(&record.path)?.sync_all()
    };
    write().map_err(failed(&file))
}

fn canonical(dir: &Path) -> Result<PathBuf, StateDirError> {
    dir.canonicalize().map_err(failed(dir))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> StateDirError {
    let path = path.to_owned();
    move |source| StateDirError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        root: tempfile::TempDir,
        registry: Registry,
    }

    impl Machine {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let registry = Registry::at(root.path().join("claims"));
            Self { root, registry }
        }

        fn dir(&self, name: &str) -> PathBuf {
            self.root.path().canonicalize().unwrap().join(name)
        }

        fn identity(&self, name: &str) -> PathBuf {
            StateDir::from(&self.dir(name)).identity()
        }

        fn made(&self, name: &str) -> Settled {
            fs::create_dir(self.dir(name)).unwrap();
            self.serve(name).unwrap()
        }

        /// What an agent does that begins to serve it.
        fn serve(&self, name: &str) -> Result<Settled, StateDirError> {
            let settled = settle(&self.dir(name), &self.registry)?;
            self.registry.register(settled.mark, &settled.dir).unwrap();
            Ok(settled)
        }

        fn copy(&self, from: &str, to: &str) {
            fs::create_dir(self.dir(to)).unwrap();
            fs::copy(self.identity(from), self.identity(to)).unwrap();
        }

        fn rename(&self, from: &str, to: &str) {
            fs::rename(self.dir(from), self.dir(to)).unwrap();
        }
    }

    #[test]
    fn a_copy_is_refused_until_it_is_made_one_of_its_own() {
        let machine = Machine::new();
        let original = machine.made("a");
        machine.copy("a", "b");
        for _ in 0..2 {
            let refused = machine.serve("b").unwrap_err();
            assert!(matches!(&refused, StateDirError::Copy { of, .. } if *of == machine.dir("a")));
            assert!(examine(&machine.dir("b"), &machine.registry).is_err());
        }
        let own = make_own(&machine.dir("b"), &machine.registry).unwrap();
        assert_ne!(own.mark, original.mark);
        assert_eq!(machine.serve("b").unwrap(), own);
        assert_eq!(machine.serve("a").unwrap(), original);
    }

    #[test]
    fn a_directory_that_was_moved_stays_the_same() {
        let machine = Machine::new();
        let before = machine.made("a");
        machine.rename("a", "b");
        let after = machine.serve("b").unwrap();
        assert_eq!((after.mark, after.moved_from), (before.mark, Some(machine.dir("a"))));
        assert_eq!(machine.serve("b").unwrap().moved_from, None);
        // A new one in its place is another one.
        let new = machine.made("a");
        assert_ne!(new.mark, before.mark);
        assert_eq!(machine.serve("b").unwrap().mark, before.mark);
    }

    #[test]
    fn a_backup_takes_the_place_of_what_is_lost() {
        let machine = Machine::new();
        let before = machine.made("a");
        machine.copy("a", "backup");
        crate::removal::remove_tree(&machine.dir("a")).unwrap();
        machine.copy("backup", "a");
        assert_eq!(machine.serve("a").unwrap(), before);
        crate::removal::remove_tree(&machine.dir("a")).unwrap();
        assert_eq!(machine.serve("backup").unwrap().mark, before.mark);
    }

    #[test]
    fn of_a_copy_and_what_it_was_made_from_one_is_served_wherever_they_were_moved() {
        let machine = Machine::new();
        machine.made("a");
        machine.copy("a", "b");
        machine.rename("a", "c");
        machine.serve("b").unwrap();
        assert!(matches!(machine.serve("c"), Err(StateDirError::Copy { .. })));
        machine.rename("c", "a");
        assert!(matches!(machine.serve("a"), Err(StateDirError::Copy { .. })));
    }

    #[test]
    fn a_record_that_does_not_parse_is_an_error_and_stays() {
        let machine = Machine::new();
        machine.made("a");
        fs::write(machine.identity("a"), "{").unwrap();
        assert!(matches!(machine.serve("a"), Err(StateDirError::File { .. })));
        assert_eq!(fs::read(machine.identity("a")).unwrap(), b"{");
    }
}
