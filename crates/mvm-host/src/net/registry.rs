//! Which state directory a mark is of, for all agents of a machine: a symbolic link
//! `owners/<mark> -> <state directory>` beside their claims.
//!
//! It outlives the directory, so that what a removed one has left behind can be told from what is somebody's.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mvm_core::net::StateDirId;

use super::claims::CLAIMS_DIR;

/// Directory of the registry in that of the claims.
const OWNERS: &str = "owners";

/// The registry, as it is on disk.
#[derive(Debug, Clone)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The one beside the claims in this directory.
    pub fn at(claims_dir: impl AsRef<Path>) -> Self {
        Self { dir: claims_dir.as_ref().join(OWNERS) }
    }

    /// The machine's.
    pub fn of_machine() -> Self {
        Self::at(CLAIMS_DIR)
    }

    /// Where the state directory with this mark was served last.
    ///
    /// # Errors
    /// The registry cannot be read.
    pub fn path_of(&self, mark: StateDirId) -> io::Result<Option<PathBuf>> {
        match fs::read_link(self.dir.join(mark.to_string())) {
            Ok(path) => Ok(Some(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down where the state directory with this mark is served.
    ///
    /// # Errors
    /// The registry cannot be written.
    pub fn register(&self, mark: StateDirId, state_dir: &Path) -> io::Result<()> {
        if self.path_of(mark)?.is_some_and(|known| known == state_dir) {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        // A link cannot be changed: the new one takes its place, so that there always is one.
        let fresh = self.dir.join(format!(".{mark}-{}", std::process::id()));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(state_dir, &fresh)?;
        fs::rename(&fresh, self.dir.join(mark.to_string()))
    }

    /// Forgets a mark; it may be forgotten already.
    ///
    /// # Errors
    /// The registry cannot be written.
    pub(super) fn forget(&self, mark: StateDirId) -> io::Result<()> {
        match fs::remove_file(self.dir.join(mark.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All marks with where their state directories were served last.
    pub(super) fn all(&self) -> io::Result<BTreeMap<StateDirId, PathBuf>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(error),
        };
        let mut all = BTreeMap::new();
        for entry in entries {
            let name = entry?.file_name();
            let Some(mark) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Some(path) = self.path_of(mark)? {
                all.insert(mark, path);
            }
        }
        Ok(all)
    }
}
