//! What reads return.

use crate::{LeaseId, Version};

/// A key with its value and where it stands in the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value's bytes.
    pub value: Vec<u8>,
    /// The version that brought the key into being; a deletion ends that life.
    pub create_version: Version,
    /// The version of the latest put: what a compare-and-swap compares.
    pub mod_version: Version,
    /// The lease that the key goes away with.
    pub lease: Option<LeaseId>,
}

/// All entries below a prefix at one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The store's version when the entries were read.
    pub version: Version,
    /// The entries in the order of their keys.
    pub entries: Vec<Entry>,
}
