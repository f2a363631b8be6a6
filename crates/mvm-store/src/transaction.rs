//! What a commit asks for: compares that must hold, and operations that then happen at once.

use std::collections::BTreeSet;

use crate::key::{Prefix, check_key};
use crate::{Revision, StoreError};

/// The largest value, in bytes: 1 MiB.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

/// The most compares and the most operations of one transaction. The largest admissions write about
/// a thousand instances, each with a few records, in one transaction; SQLite takes 4096 small puts
/// in a fraction of a second, during which other callers wait.
pub const MAX_TRANSACTION_ITEMS: usize = 4096;

/// The most bytes of keys and values in one transaction: 16 MiB. A watcher holds one whole revision
/// in memory at a time, so this bounds its memory too.
pub const MAX_TRANSACTION_BYTES: usize = 16 << 20;

/// A condition on the store before a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key's latest put is of exactly this revision.
    ModRevision {
        /// The key.
        key: String,
        /// The `mod_revision` that was read.
        revision: Revision,
    },
    /// The key has no entry.
    Absent {
        /// The key.
        key: String,
    },
    /// No key below the prefix was put or deleted after the revision: guards a decision made from a
    /// whole listing. If the history since then is compacted it does not hold, as nobody can tell.
    PrefixUnchanged {
        /// The prefix, with its final `/`, or empty for the whole store.
        prefix: String,
        /// The revision of the listing.
        since: Revision,
    },
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces the key's value.
    Put {
        /// The key.
        key: String,
        /// The new value.
        value: Vec<u8>,
    },
    /// Removes the key; an absent key stays absent.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// The key that the operation changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// Operations that happen all together or not at all, if every compare holds.
///
/// No key may occur in two operations: the operations of a transaction have no order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a transaction does nothing until it is committed"]
pub struct Transaction {
    /// What must hold.
    pub compares: Vec<Compare>,
    /// What happens then.
    pub ops: Vec<Op>,
}

/// A transaction took place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// The revision of the transaction, or the current one if it changed nothing.
    pub revision: Revision,
}

impl Transaction {
    /// A transaction without compares and operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a compare.
    pub fn require(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Requires that the key's latest put is of this revision.
    pub fn require_revision(self, key: impl Into<String>, revision: Revision) -> Self {
        self.require(Compare::ModRevision { key: key.into(), revision })
    }

    /// Requires that the key has no entry.
    pub fn require_absent(self, key: impl Into<String>) -> Self {
        self.require(Compare::Absent { key: key.into() })
    }

    /// Requires that nothing below the prefix changed after the revision.
    pub fn require_unchanged(self, prefix: impl Into<String>, since: Revision) -> Self {
        self.require(Compare::PrefixUnchanged { prefix: prefix.into(), since })
    }

    /// Adds an operation.
    pub fn with(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }

    /// Puts a value.
    pub fn put(self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.with(Op::Put { key: key.into(), value: value.into() })
    }

    /// Deletes a key.
    pub fn delete(self, key: impl Into<String>) -> Self {
        self.with(Op::Delete { key: key.into() })
    }

    /// Checks grammar and limits; every backend does this first.
    pub(crate) fn validate(&self) -> Result<(), StoreError> {
        for (what, count) in [("compares", self.compares.len()), ("operations", self.ops.len())] {
            if count > MAX_TRANSACTION_ITEMS {
                return Err(StoreError::TransactionTooLong { what, count });
            }
        }
        for compare in &self.compares {
            match compare {
                Compare::ModRevision { key, .. } | Compare::Absent { key } => check_key(key)?,
                Compare::PrefixUnchanged { prefix, .. } => drop(Prefix::parse(prefix)?),
            }
        }
        let mut keys = BTreeSet::new();
        let mut bytes = 0;
        for op in &self.ops {
            check_key(op.key())?;
            if let Op::Put { key, value } = op
                && value.len() > MAX_VALUE_BYTES
            {
                return Err(StoreError::ValueTooLarge { key: key.clone(), bytes: value.len() });
            }
            if !keys.insert(op.key()) {
                return Err(StoreError::DuplicateKey { key: op.key().to_owned() });
            }
            bytes += op.bytes();
        }
        if bytes > MAX_TRANSACTION_BYTES {
            return Err(StoreError::TransactionTooLarge { bytes });
        }
        Ok(())
    }
}
