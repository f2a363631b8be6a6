//! Whether a transaction's compares hold: the same decision for every backend.

use std::fmt;

use crate::key::Prefix;
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
    /// The key's latest put, or the prefix's latest change, is of this revision.
    ChangedAt(Revision),
    /// The prefix's history is known only after this revision.
    CompactedAt(Revision),
    /// The revision to compare with is yet to come; the store is only at this one. A store that was
    /// restored from a backup meets its old clients with this.
    OnlyAt(Revision),
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compare {
            Compare::ModRevision { key, revision } => {
                write!(f, "`{key}` was expected at revision {revision}")?;
            }
            Compare::Absent { key } => write!(f, "`{key}` was expected to be absent")?,
            Compare::PrefixUnchanged { prefix, since } => {
                write!(f, "`{prefix}` was expected unchanged since revision {since}")?;
            }
        }
        match self.found {
            Found::Absent => write!(f, ", but is absent"),
            Found::ChangedAt(revision) => write!(f, ", but changed in revision {revision}"),
            Found::CompactedAt(revision) => {
                write!(f, ", but history is known only after revision {revision}")
            }
            Found::OnlyAt(revision) => write!(f, ", but the store is only at revision {revision}"),
        }
    }
}

/// What a backend tells about itself so that compares can be decided.
pub(crate) trait View {
    /// The store's current revision.
    fn current(&self) -> Revision;
    /// The revision up to which history is forgotten.
    fn compacted(&self) -> Revision;
    /// The `mod_revision` of a key.
    fn mod_revision(&self, key: &str) -> Result<Option<Revision>, StoreError>;
    /// The latest revision after `since` that changed something below the prefix.
    fn last_change(&self, prefix: &Prefix, since: Revision)
    -> Result<Option<Revision>, StoreError>;
}

/// Succeeds if every compare holds, else names the first that does not.
pub(crate) fn check_all(view: &impl View, compares: &[Compare]) -> Result<(), CommitError> {
    for compare in compares {
        if let Some(found) = contradiction(view, compare)? {
            let compare = compare.clone();
            return Err(CommitError::Conflict(Conflict { compare, found }));
        }
    }
    Ok(())
}

fn contradiction(view: &impl View, compare: &Compare) -> Result<Option<Found>, StoreError> {
    Ok(match compare {
        Compare::ModRevision { key, revision } => match view.mod_revision(key)? {
            Some(found) if found == *revision => None,
            Some(found) => Some(Found::ChangedAt(found)),
            None => Some(Found::Absent),
        },
        Compare::Absent { key } => view.mod_revision(key)?.map(Found::ChangedAt),
        Compare::PrefixUnchanged { since, .. } if *since > view.current() => {
            Some(Found::OnlyAt(view.current()))
        }
        Compare::PrefixUnchanged { prefix, since } => {
            match view.last_change(&Prefix::parse(prefix)?, *since)? {
                Some(found) => Some(Found::ChangedAt(found)),
                None if *since < view.compacted() => Some(Found::CompactedAt(view.compacted())),
                None => None,
            }
        }
    })
}
