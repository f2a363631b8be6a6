//! How records are written and read: versioned, so that a record whose meaning has changed is not
//! misread, and tolerant, so that one that merely has more in it is read by the release before.
//!
//! A record is written with the version of its format, `v`; one without is of version 1. Fields that are
//! not known are ignored, and lost when the record is next written; fields that are absent have their
//! defaults. So a new field needs no new version, unless a release that ignores it would do harm.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::lifecycle::InstanceStatus;
use crate::local::LocalIntent;
use crate::record::{
    Capture, DiskRecord, DiskStatus, ForkRecord, InstanceRecord, PoolRecord, PoolStatus,
    RequestRecord, TenantRecord,
};

/// What the store holds.
pub trait Stored: Serialize + DeserializeOwned {
    /// The version of the format that is written, and the newest that is read. It is raised with a
    /// change after which an earlier release must not touch the object.
    const VERSION: u32 = 1;
}

impl Stored for TenantRecord {}
impl Stored for PoolRecord {}
impl Stored for InstanceRecord {}
impl Stored for DiskRecord {}
impl Stored for PoolStatus {}
impl Stored for InstanceStatus {}
impl Stored for DiskStatus {}
impl Stored for LocalIntent {}
impl Stored for RequestRecord {}
impl Stored for ForkRecord {}
impl Stored for Capture {}

/// A record as it is written.
#[derive(Debug, Serialize)]
pub struct Versioned<'a, T> {
    v: u32,
    #[serde(flatten)]
    record: &'a T,
}

/// A record with its version, to be written.
pub fn versioned<T: Stored>(record: &T) -> Versioned<'_, T> {
    Versioned { v: T::VERSION, record }
}

/// Reads a record.
///
/// # Errors
/// Says why it does not parse, or that a newer release wrote it in a format that this one does not know.
pub fn decode<T: Stored>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default = "first")]
        v: u32,
    }
    fn first() -> u32 {
        1
    }
    let fail = |error: serde_json::Error| error.to_string();
    let Head { v } = serde_json::from_slice(bytes).map_err(fail)?;
    match v > T::VERSION {
        true => Err(format!(
            "it has format version {v}, and this mvm knows versions up to {}: run the mvm that wrote it, or a newer one",
            T::VERSION
        )),
        false => serde_json::from_slice(bytes).map_err(fail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_its_version_beside_its_fields() {
        let status = InstanceStatus { generation: 3, ..InstanceStatus::default() };
        let bytes = serde_json::to_vec(&versioned(&status)).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let (v, phase) = (&json["v"], &json["phase"]);
        assert_eq!((v, phase, &json["generation"]), (&1.into(), &"created".into(), &3.into()));
        assert_eq!(decode::<InstanceStatus>(&bytes).unwrap(), status);
    }

    #[test]
    fn a_record_without_a_version_is_of_the_first_and_one_with_more_in_it_is_read() {
        let read = |text: &str| decode::<DiskRecord>(text.as_bytes()).unwrap();
        let disk = read(r#"{"path":"demo/data","size_mib":64,"created_unix_ms":1}"#);
        assert_eq!(disk.size_mib, 64);
        let newer = r#"{"v":1,"path":"demo/data","size_mib":64,"created_unix_ms":1,"tier":"fast"}"#;
        assert_eq!(read(newer), disk);
    }

    #[test]
    fn a_newer_version_is_refused_with_both_versions_whatever_else_is_in_it() {
        for text in [r#"{"v":7}"#, r#"{"size":{"mib":1},"v":7}"#] {
            let error = decode::<DiskRecord>(text.as_bytes()).unwrap_err();
            let expected =
                "it has format version 7, and this mvm knows versions up to 1: run the mvm";
            assert!(error.starts_with(expected), "{error}");
        }
        for text in [r#"{"v":"x"}"#, r#"{"v":-1}"#, "[]", "", "{"] {
            assert!(decode::<DiskRecord>(text.as_bytes()).is_err(), "{text}");
        }
    }
}
