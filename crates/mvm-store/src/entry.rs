//! What reads return.

use crate::{LeaseId, Revision};

/// A key with its value and where it stands in the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value's bytes.
    pub value: Vec<u8>,
    /// The revision that brought the key into being; a deletion ends that life.
    pub create_revision: Revision,
    /// The revision of the latest put: what a compare-and-swap compares.
    pub mod_revision: Revision,
    /// The lease that the key goes away with.
    pub lease: Option<LeaseId>,
}

/// All entries below a prefix at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The store's revision when the entries were read.
    pub revision: Revision,
    /// The entries in the order of their keys.
    pub entries: Vec<Entry>,
}
