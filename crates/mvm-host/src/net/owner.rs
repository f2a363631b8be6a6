//! Which agent a network object belongs to.

use std::io;
use std::path::{Path, PathBuf};

use mvm_core::net::{StateDirId, TableName};
use sha2::{Digest, Sha256};

use super::NetworkError;
use crate::state_dir::Settled;

/// The state directory of the machine's main agent.
const DEFAULT_STATE_DIR: &str = "/var/lib/mvm";

/// An agent, as the machine's network sees it: its state directory and what is derived from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    state_dir: PathBuf,
    id: StateDirId,
    table: TableName,
    former_table: Option<TableName>,
}

impl Owner {
    /// The owner with this state directory, which exists, and the mark that goes with its path.
    ///
    /// # Errors
    /// The directory cannot be resolved to its one canonical path.
    pub fn of(state_dir: &Path) -> Result<Self, NetworkError> {
        let operation = format!("resolve the state directory {}", state_dir.display());
        let path = state_dir.canonicalize().map_err(NetworkError::system(operation))?;
        let mark = digest_of(&path);
        Ok(Self::settled(&Settled { dir: path.into(), mark, moved_from: None }))
    }

    /// The owner with this state directory.
    pub fn settled(state_dir: &Settled) -> Self {
        let Settled { dir: path, mark, moved_from } = state_dir;
        let table = table_of(path, *mark);
        // A new directory in its place may have tables of that name.
        let former = moved_from.as_ref().filter(|path| !state_dir_exists(path));
        let former_table = former.map(|path| table_of(path, *mark));
        Self {
            state_dir: path.to_path_buf(),
            id: *mark,
            former_table: former_table.filter(|former| *former != table),
            table,
        }
    }

    /// What marks the owner's links.
    pub fn mark(&self) -> StateDirId {
        self.id
    }

    /// The name that the owner's firewall tables had before its state directory was moved, if it was another
    /// one.
    pub(super) fn former_table(&self) -> Option<&TableName> {
        self.former_table.as_ref()
    }

    /// The canonical path of the state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The name of the owner's firewall tables.
    pub fn table(&self) -> &TableName {
        &self.table
    }

    /// The alias that marks the owner's links.
    pub fn link_alias(&self) -> String {
        self.id.link_alias()
    }
}

/// The mark that goes with a state directory's path.
pub(crate) fn digest_of(state_dir: &Path) -> StateDirId {
    let digest = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
    let [a, b, c, d, ..] = <[u8; 32]>::from(digest);
    StateDirId::from_digest([a, b, c, d])
}

/// The name of the firewall tables of the state directory that has, or had, this path and mark.
pub(super) fn table_of(state_dir: &Path, mark: StateDirId) -> TableName {
    match state_dir == Path::new(DEFAULT_STATE_DIR) {
        true => TableName::of_default_state_dir(),
        false => TableName::of_state_dir(mark),
    }
}

/// Whether a state directory is still there; one that cannot be looked at is.
pub(super) fn state_dir_exists(state_dir: &Path) -> bool {
    !matches!(state_dir.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
}
