//! Why a store refuses or fails.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{BadRecord, Conflict, KeyError, LeaseId, Version};

/// Why an operation on the store failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A key or prefix breaks the grammar.
    #[error("invalid key `{key}`: {reason}")]
    InvalidKey {
        /// The key or prefix.
        key: String,
        /// What is wrong with it.
        reason: KeyError,
    },
    /// A value exceeds the store's [`Limits`](crate::Limits).
    #[error("the value of `{key}` has {bytes} bytes, more than {most}")]
    ValueTooLarge {
        /// The value's key.
        key: String,
        /// The value's size.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// A transaction exceeds the store's [`Limits`](crate::Limits).
    #[error("a transaction has {count} {what}, more than {most}")]
    TransactionTooLong {
        /// `compares` or `operations`.
        what: &'static str,
        /// How many it has.
        count: usize,
        /// The limit.
        most: usize,
    },
    /// A transaction exceeds the store's [`Limits`](crate::Limits).
    #[error("a transaction has {bytes} bytes, more than {most}")]
    TransactionTooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// Two operations of one transaction change the same key.
    #[error("a transaction changes `{key}` twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The history that a watch needs is forgotten: list again, and watch from there.
    #[error("history after version {requested} is gone; it is known after version {oldest}")]
    Compacted {
        /// The version that the watch stands at.
        requested: Version,
        /// The oldest version that a watch can start after.
        oldest: Version,
    },
    /// A watch asks for what comes after a version that is yet to come: list again, and watch from
    /// there. A store that was restored from a backup meets its old clients with this.
    #[error("version {requested} is yet to come; the store is at version {current}")]
    AheadOfStore {
        /// The version that was asked for.
        requested: Version,
        /// The store's version.
        current: Version,
    },
    /// A lease was not granted, or has ended.
    #[error("there is no lease {lease}, or it has ended")]
    NoSuchLease {
        /// The lease.
        lease: LeaseId,
    },
    /// A value is not the record that its reader expects.
    #[error(transparent)]
    BadRecord(#[from] BadRecord),
    /// A record cannot be written as JSON.
    #[error("cannot encode the record of `{key}`")]
    Encode {
        /// The record's key.
        key: String,
        /// Why.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// The file system has no room; nothing was changed, and the store goes on once there is.
    #[error("no space left for the store `{path}`")]
    DiskFull {
        /// The store's file.
        path: PathBuf,
    },
    /// Another process holds the file's lock for too long; nothing was changed.
    #[error("the store `{path}` is locked by another process")]
    Busy {
        /// The store's file.
        path: PathBuf,
    },
    /// The file does not hold what it should.
    #[error(
        "the store `{path}` is damaged: {detail}; stop mvm, then restore it from a backup, or move \
         it and its `-wal` and `-shm` files aside to begin with an empty store"
    )]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The backend failed in another way.
    #[error("cannot {operation} in the store `{path}`")]
    Backend {
        /// What was being done.
        operation: &'static str,
        /// The store's file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The store was closed while it was used.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether a watcher goes on by listing again.
    pub fn calls_for_relist(&self) -> bool {
        matches!(self, Self::Compacted { .. } | Self::AheadOfStore { .. })
    }
}

/// Why a transaction did not take place.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// A compare does not hold: read again, decide again.
    #[error("{0}")]
    Conflict(Conflict),
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CommitError {
    /// Whether the transaction may have taken place nevertheless, or may yet: its outcome was not
    /// heard.
    pub fn may_have_happened(&self) -> bool {
        use StoreError::{Backend, Closed, Damaged};
        matches!(self, Self::Store(Backend { .. } | Closed | Damaged { .. }))
    }

    /// The compare that did not hold, if that was the reason.
    pub fn conflict(&self) -> Option<&Conflict> {
        match self {
            Self::Conflict(conflict) => Some(conflict),
            Self::Store(_) => None,
        }
    }
}
