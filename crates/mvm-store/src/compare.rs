//! Whether a transaction's compares hold: the same decision for every backend.

use std::fmt;

use crate::{CommitError, Compare, Revision, StoreError};

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
    /// The key's latest put is of this revision.
    ChangedAt(Revision),
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compare {
            Compare::ModRevision { key, revision } => {
                write!(f, "`{key}` was expected at revision {revision}")?;
            }
            Compare::Absent { key } => write!(f, "`{key}` was expected to be absent")?,
        }
        match self.found {
            Found::Absent => write!(f, ", but is absent"),
            Found::ChangedAt(revision) => write!(f, ", but changed in revision {revision}"),
        }
    }
}

/// Succeeds if every compare holds, else names the first that does not. `mod_revision` is that of a
/// key, if it has an entry.
pub(crate) fn check_all(
    compares: &[Compare],
    mod_revision: impl Fn(&str) -> Result<Option<Revision>, StoreError>,
) -> Result<(), CommitError> {
    for compare in compares {
        let present = mod_revision(compare.key())?;
        let found = match compare {
            Compare::ModRevision { revision, .. } if present == Some(*revision) => None,
            Compare::ModRevision { .. } => Some(present.map_or(Found::Absent, Found::ChangedAt)),
            Compare::Absent { .. } => present.map(Found::ChangedAt),
        };
        if let Some(found) = found {
            let compare = compare.clone();
            return Err(CommitError::Conflict(Conflict { compare, found }));
        }
    }
    Ok(())
}
