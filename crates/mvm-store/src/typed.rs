//! JSON records on top of a store.
//!
//! A value that does not parse is reported beside those that do: it is never skipped, because what
//! it stands for still exists, and it never hides the others.

use std::future::Future;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Entry, Op, Store, StoreError, Version};

/// A record with its place in the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Typed<T> {
    /// The record's key.
    pub key: String,
    /// The record.
    pub record: T,
    /// The version that brought the key into being.
    pub create_version: Version,
    /// The version of the latest put: what a compare-and-swap compares.
    pub mod_version: Version,
}

/// A value that is not the record that its reader expects. How it is mended is the reader's to say:
/// deleting the key at `mod_version` is safe against a change in between.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the record of `{key}` does not parse: {reason}")]
pub struct BadRecord {
    /// The record's key.
    pub key: String,
    /// The version of the put that wrote it.
    pub mod_version: Version,
    /// What the parser says.
    pub reason: String,
}

/// All records below a prefix at one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypedListing<T> {
    /// The store's version when the records were read.
    pub version: Version,
    /// The records in the order of their keys.
    pub records: Vec<Typed<T>>,
    /// The values that do not parse, in the order of their keys.
    pub bad: Vec<BadRecord>,
}

/// Reads an entry as a record.
///
/// # Errors
/// The value is not such a record.
pub fn decode<T: DeserializeOwned>(entry: &Entry) -> Result<Typed<T>, BadRecord> {
    match serde_json::from_slice(&entry.value) {
        Ok(record) => Ok(Typed {
            key: entry.key.clone(),
            record,
            create_version: entry.create_version,
            mod_version: entry.mod_version,
        }),
        Err(error) => Err(BadRecord {
            key: entry.key.clone(),
            mod_version: entry.mod_version,
            reason: error.to_string(),
        }),
    }
}

/// The operation that puts a record.
///
/// # Errors
/// The record has no JSON form, such as a map with keys that are not strings.
pub fn encode<T: Serialize + ?Sized>(key: impl Into<String>, record: &T) -> Result<Op, StoreError> {
    let key = key.into();
    match serde_json::to_vec(record) {
        Ok(value) => Ok(Op::put(key, value)),
        Err(source) => Err(StoreError::Encode { key, source: source.into() }),
    }
}

/// Reads records from any store.
pub trait TypedStore: Store {
    /// The record of `key`, or `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::BadRecord`] if the value does not parse; otherwise those of [`Store::get`].
    fn get_typed<T: DeserializeOwned>(
        &self,
        key: &str,
    ) -> impl Future<Output = Result<Option<Typed<T>>, StoreError>> + Send {
        async move { Ok(self.get(key).await?.map(|entry| decode(&entry)).transpose()?) }
    }

    /// All records below `prefix`, and beside them the values that do not parse.
    ///
    /// # Errors
    /// Those of [`Store::list`].
    fn list_typed<T: DeserializeOwned + Send>(
        &self,
        prefix: &str,
    ) -> impl Future<Output = Result<TypedListing<T>, StoreError>> + Send {
        async move {
            let listing = self.list(prefix).await?;
            let mut records = Vec::with_capacity(listing.entries.len());
            let mut bad = Vec::new();
            for entry in &listing.entries {
                match decode(entry) {
                    Ok(record) => records.push(record),
                    Err(record) => bad.push(record),
                }
            }
            Ok(TypedListing { version: listing.version, records, bad })
        }
    }
}

impl<S: Store + ?Sized> TypedStore for S {}
