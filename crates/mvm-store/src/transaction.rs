//! What a commit asks for: compares that must hold, and operations that then happen at once.

use std::collections::BTreeSet;

use crate::key::check_key;
use crate::{LeaseId, Limits, StoreError, Version};

/// A condition on the store before a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key's latest put is of exactly this version.
    ModVersion {
        /// The key.
        key: String,
        /// The `mod_version` that was read.
        version: Version,
    },
    /// The key has no entry.
    Absent {
        /// The key.
        key: String,
    },
}

impl Compare {
    /// The key that is compared.
    pub fn key(&self) -> &str {
        match self {
            Self::ModVersion { key, .. } | Self::Absent { key } => key,
        }
    }
}

/// The key that stands for a scope: what belongs together and is decided on as a whole, such as a
/// tenant's records.
///
/// No compare sees that something below a prefix was deleted. So every transaction that changes
/// something of a scope also [bumps](Transaction::bump) it, and one that was decided from a listing
/// [requires](Transaction::require_scope) that nobody did since: read the key's `mod_version`
/// first, and list then.
pub fn scope_key(scope: &str) -> String {
    format!("scope/{scope}")
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
        /// The lease that the key goes away with.
        lease: Option<LeaseId>,
    },
    /// Removes the key; an absent key stays absent.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// Creates or replaces the key's value; the key stays until it is deleted.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// The key that the operation changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
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
    /// The version of the transaction, or the current one if it changed nothing.
    pub version: Version,
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

    /// Requires that the key's latest put is of this version.
    pub fn require_version(self, key: impl Into<String>, version: Version) -> Self {
        self.require(Compare::ModVersion { key: key.into(), version })
    }

    /// Requires that the key has no entry.
    pub fn require_absent(self, key: impl Into<String>) -> Self {
        self.require(Compare::Absent { key: key.into() })
    }

    /// Requires that the scope was not bumped since its key was read at this `mod_version`, or was
    /// absent.
    pub fn require_scope(self, scope: &str, seen: Option<Version>) -> Self {
        match seen {
            Some(version) => self.require_version(scope_key(scope), version),
            None => self.require_absent(scope_key(scope)),
        }
    }

    /// Notes that something of the scope changes. The value says who did it, or is empty.
    pub fn bump(self, scope: &str, value: impl Into<Vec<u8>>) -> Self {
        self.put(scope_key(scope), value)
    }

    /// Adds an operation.
    pub fn with(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }

    /// Puts a value.
    pub fn put(self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.with(Op::put(key, value))
    }

    /// Puts a value that goes away with the lease.
    pub fn put_leased(
        self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Self {
        self.with(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) })
    }

    /// The leases of its puts.
    pub(crate) fn leases(&self) -> impl Iterator<Item = LeaseId> {
        self.ops.iter().filter_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        })
    }

    /// Deletes a key.
    pub fn delete(self, key: impl Into<String>) -> Self {
        self.with(Op::Delete { key: key.into() })
    }

    /// Checks grammar and limits; every backend does this first.
    pub(crate) fn validate(&self, limits: &Limits) -> Result<(), StoreError> {
        limits.check(self)?;
        self.compares.iter().try_for_each(|compare| check_key(compare.key()))?;
        let mut keys = BTreeSet::new();
        for op in &self.ops {
            check_key(op.key())?;
            if !keys.insert(op.key()) {
                return Err(StoreError::DuplicateKey { key: op.key().to_owned() });
            }
        }
        Ok(())
    }
}
