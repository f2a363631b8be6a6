//! Which agent a network object belongs to.

use std::io;
use std::path::{Path, PathBuf};

use mvm_core::net::{StateDirId, TableName};
use sha2::{Digest, Sha256};

use super::NetworkError;

/// The state directory of the machine's main agent.
const DEFAULT_STATE_DIR: &str = "/var/lib/mvm";

/// An agent, as the machine's network sees it: its state directory and what is derived from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    state_dir: PathBuf,
    id: StateDirId,
    table: TableName,
}

impl Owner {
    /// The owner with this state directory, which exists.
    ///
    /// # Errors
    /// The directory cannot be resolved to its one canonical path.
    pub fn of(state_dir: &Path) -> Result<Self, NetworkError> {
        let operation = format!("resolve the state directory {}", state_dir.display());
        let state_dir = state_dir.canonicalize().map_err(NetworkError::system(operation))?;
        let digest = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
        let [a, b, c, d, ..] = <[u8; 32]>::from(digest);
        let id = StateDirId::from_digest([a, b, c, d]);
        let table = if state_dir == Path::new(DEFAULT_STATE_DIR) {
            TableName::of_default_state_dir()
        } else {
            TableName::of_state_dir(id)
        };
        Ok(Self { state_dir, id, table })
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

/// Whether a state directory is still there; one that cannot be looked at is.
pub(super) fn state_dir_exists(state_dir: &Path) -> bool {
    !matches!(state_dir.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
}
