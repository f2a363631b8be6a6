//! Whether a transaction's compares hold: the same decision for every backend.

use std::fmt;

use crate::{CommitError, Compare, StoreError, Version};

/// A compare that did not hold, and what was there instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// What the transaction required.
    pub compare: Compare,
    /// What the store had.
    pub found: Found,
}

/// What a failed compare met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The key has no entry.
    Absent,
    /// The key's latest put is of this version.
    ChangedAt(Version),
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compare {
            Compare::ModVersion { key, version } => {
                write!(f, "`{key}` was expected at version {version}")?;
            }
            Compare::Absent { key } => write!(f, "`{key}` was expected to be absent")?,
        }
        match self.found {
            Found::Absent => write!(f, ", but is absent"),
            Found::ChangedAt(version) => write!(f, ", but changed in version {version}"),
        }
    }
}

/// Succeeds if every compare holds, else names the first that does not. `mod_version` is that of a
/// key, if it has an entry.
pub(crate) fn check_all(
    compares: &[Compare],
    mod_version: impl Fn(&str) -> Result<Option<Version>, StoreError>,
) -> Result<(), CommitError> {
    for compare in compares {
        let present = mod_version(compare.key())?;
        let found = match compare {
            Compare::ModVersion { version, .. } if present == Some(*version) => None,
            Compare::ModVersion { .. } => Some(present.map_or(Found::Absent, Found::ChangedAt)),
            Compare::Absent { .. } => present.map(Found::ChangedAt),
        };
        if let Some(found) = found {
            let compare = compare.clone();
            return Err(CommitError::Conflict(Conflict { compare, found }));
        }
    }
    Ok(())
}
