//! Names, ids and paths, parsed once at the edge into types with private fields.
//!
//! Grammar: a name is 1 to 32 characters of `a-z`, `0-9` and `-`, starting with a letter and not
//! ending with `-`. An instance id is `i-` and 8 hexadecimal digits. Paths are `tenant`,
//! `tenant/pool` and `tenant/pool/i-xxxxxxxx`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest tenant or pool name, in bytes.
pub const NAME_MAX: usize = 32;

/// The tenant of what is named without one.
pub const DEFAULT_TENANT: &str = "default";

/// Why a name, id or path was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("a {what} is empty")]
    Empty {
        /// What was being parsed.
        what: &'static str,
    },
    /// The text is longer than allowed.
    #[error("{what} `{text}` is longer than {max} characters")]
    TooLong {
        /// What was being parsed.
        what: &'static str,
        /// The text as given.
        text: String,
        /// The limit in bytes.
        max: usize,
    },
    /// The text does not follow the grammar.
    #[error("{what} `{text}` is not valid: expected {expected}")]
    Grammar {
        /// What was being parsed.
        what: &'static str,
        /// The text as given.
        text: String,
        /// The grammar in words.
        expected: &'static str,
    },
}

const NAME_RULE: &str =
    "lower-case letters, digits and `-`, starting with a letter and not ending with `-`";

fn check_name(what: &'static str, text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > NAME_MAX {
        return Err(NameError::TooLong { what, text: text.to_owned(), max: NAME_MAX });
    }
    let ok_chars = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let ok_ends = text.starts_with(|c: char| c.is_ascii_lowercase()) && !text.ends_with('-');
    if ok_chars && ok_ends {
        Ok(())
    } else {
        Err(NameError::Grammar { what, text: text.to_owned(), expected: NAME_RULE })
    }
}

/// An id: a prefix and so many hexadecimal digits.
fn check_id(
    what: &'static str,
    text: &str,
    prefix: &str,
    digits: usize,
    expected: &'static str,
) -> Result<(), NameError> {
    let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match text.strip_prefix(prefix) {
        Some(hex) if hex.len() == digits && hex.bytes().all(is_hex) => Ok(()),
        _ => Err(NameError::Grammar { what, text: text.to_owned(), expected }),
    }
}

macro_rules! text_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The text of the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let check: fn(&'static str, &str) -> Result<(), NameError> = $check;
                check($what, text)?;
                Ok(Self(text.to_owned()))
            }
        }

        $crate::serde_as_text!($name);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

text_type!(
    /// The name of a tenant: the security, quota, network and audit boundary.
    TenantName,
    "tenant name",
    check_name
);
text_type!(
    /// The name of a pool, unique within its tenant.
    PoolName,
    "pool name",
    check_name
);
text_type!(
    /// The name of a data disk, unique within its tenant.
    DiskName,
    "disk name",
    check_name
);
text_type!(
    /// The id of an instance, unique on its node: `i-` and 8 hexadecimal digits.
    InstanceId,
    "instance id",
    |what, text| check_id(what, text, "i-", 8, "`i-` and 8 hexadecimal digits")
);
text_type!(
    /// The id of a built image: `r-` and 16 hexadecimal digits of the digest of its inputs.
    RevisionId,
    "revision id",
    |what, text| check_id(what, text, "r-", 16, "`r-` and 16 hexadecimal digits")
);
text_type!(
    /// The id of a snapshot that instances begin with, unique on its node: `s-` and 8 hexadecimal
    /// digits.
    SnapshotId,
    "snapshot id",
    |what, text| check_id(what, text, "s-", 8, "`s-` and 8 hexadecimal digits")
);

text_type!(
    /// The id of a request, drawn by who makes it: `q-` and 32 hexadecimal digits.
    RequestId,
    "request id",
    |what, text| check_id(what, text, "q-", 32, "`q-` and 32 hexadecimal digits")
);

impl RequestId {
    /// The id with these 128 bits.
    pub fn from_bits(bits: u128) -> Self {
        Self(format!("q-{bits:032x}"))
    }
}

impl InstanceId {
    /// The id with these 32 bits.
    pub fn from_bits(bits: u32) -> Self {
        Self(format!("i-{bits:08x}"))
    }
}

impl SnapshotId {
    /// The id with these 32 bits.
    pub fn from_bits(bits: u32) -> Self {
        Self(format!("s-{bits:08x}"))
    }
}

impl RevisionId {
    /// The id with the first 8 bytes of an input digest.
    pub fn from_digest(digest: [u8; 8]) -> Self {
        Self(format!("r-{:016x}", u64::from_be_bytes(digest)))
    }
}

/// `tenant/pool`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolPath {
    /// The owning tenant.
    pub tenant: TenantName,
    /// The pool's name within the tenant.
    pub pool: PoolName,
}

/// `tenant/disk`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskPath {
    /// The owning tenant.
    pub tenant: TenantName,
    /// The disk's name within the tenant.
    pub disk: DiskName,
}

/// `tenant/pool/i-xxxxxxxx`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstancePath {
    /// The pool that the instance belongs to.
    pub pool: PoolPath,
    /// The instance's id.
    pub id: InstanceId,
}

impl PoolPath {
    /// The path of an instance of this pool.
    pub fn instance(&self, id: InstanceId) -> InstancePath {
        InstancePath { pool: self.clone(), id }
    }
}

// Where what belongs together begins among all paths in their order.
impl TenantName {
    pub(crate) fn before_pools(&self) -> PoolPath {
        PoolPath { tenant: self.clone(), pool: PoolName(String::new()) }
    }

    pub(crate) fn before_disks(&self) -> DiskPath {
        DiskPath { tenant: self.clone(), disk: DiskName(String::new()) }
    }
}

impl PoolPath {
    pub(crate) fn before_instances(&self) -> InstancePath {
        self.instance(InstanceId(String::new()))
    }
}

impl PoolPath {
    /// Parses what a person types: a pool named without a tenant is in [`DEFAULT_TENANT`].
    ///
    /// # Errors
    /// The text is neither a name nor a path.
    pub fn typed(text: &str) -> Result<Self, NameError> {
        in_default_tenant(text).parse()
    }
}

impl DiskPath {
    /// Parses what a person types: a disk named without a tenant is in [`DEFAULT_TENANT`].
    ///
    /// # Errors
    /// The text is neither a name nor a path.
    pub fn typed(text: &str) -> Result<Self, NameError> {
        in_default_tenant(text).parse()
    }
}

fn in_default_tenant(text: &str) -> String {
    match text.contains('/') {
        true => text.to_owned(),
        false => format!("{DEFAULT_TENANT}/{text}"),
    }
}

impl FromStr for PoolPath {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((tenant, pool)) = text.split_once('/') else {
            return Err(NameError::Grammar {
                what: "pool path",
                text: text.to_owned(),
                expected: "TENANT/POOL",
            });
        };
        Ok(Self { tenant: tenant.parse()?, pool: pool.parse()? })
    }
}

impl FromStr for DiskPath {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((tenant, disk)) = text.split_once('/') else {
            return Err(NameError::Grammar {
                what: "disk path",
                text: text.to_owned(),
                expected: "TENANT/NAME",
            });
        };
        Ok(Self { tenant: tenant.parse()?, disk: disk.parse()? })
    }
}

impl FromStr for InstancePath {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((pool, id)) = text.rsplit_once('/') else {
            return Err(NameError::Grammar {
                what: "instance path",
                text: text.to_owned(),
                expected: "TENANT/POOL/INSTANCE",
            });
        };
        Ok(Self { pool: pool.parse()?, id: id.parse()? })
    }
}

macro_rules! path_text {
    ($name:ident, $format:literal, $($field:ident).+, $($last:ident).+) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if f.width().is_some() {
                    return f.pad(&format!($format, self.$($field).+, self.$($last).+));
                }
                write!(f, $format, self.$($field).+, self.$($last).+)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "\"{self}\"")
            }
        }
        $crate::serde_as_text!($name);
    };
}
path_text!(PoolPath, "{}/{}", tenant, pool);
path_text!(DiskPath, "{}/{}", tenant, disk);
path_text!(InstancePath, "{}/{}", pool, id);

/// What a person may type where an instance (or several) is meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// Every instance of the node.
    All,
    /// Every instance of a tenant, or of the pool of that name in [`DEFAULT_TENANT`]; which of the
    /// two, [`Desired::meant`](crate::record::Desired::meant) knows.
    Tenant(TenantName),
    /// Every instance of a pool, or any one of them where one will do.
    Pool(PoolPath),
    /// One instance, by a unique prefix of its id, anywhere or within a pool.
    Id {
        /// The pool that the id must be in, if given.
        pool: Option<PoolPath>,
        /// `i-` and up to 8 hexadecimal digits.
        prefix: String,
    },
}

impl From<&InstancePath> for Selector {
    fn from(path: &InstancePath) -> Self {
        Self::Id { pool: Some(path.pool.clone()), prefix: path.id.as_str().to_owned() }
    }
}

impl FromStr for Selector {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let id_prefix = |text: &str| {
            text.strip_prefix("i-").is_some_and(|hex| {
                hex.len() <= 8
                    && hex.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
            })
        };
        let bare_hex = |text: &str| {
            (1..=8).contains(&text.len())
                && text.starts_with(|c: char| c.is_ascii_digit())
                && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        match text.matches('/').count() {
            0 if id_prefix(text) => Ok(Self::Id { pool: None, prefix: text.to_owned() }),
            0 if bare_hex(text) => Ok(Self::Id { pool: None, prefix: format!("i-{text}") }),
            0 => Ok(Self::Tenant(text.parse()?)),
            1 => Ok(Self::Pool(text.parse()?)),
            _ => {
                let (pool, id) = text.rsplit_once('/').unwrap_or((text, ""));
                let id = if bare_hex(id) { format!("i-{id}") } else { id.to_owned() };
                if !id_prefix(&id) {
                    return Err(NameError::Grammar {
                        what: "instance id",
                        text: id,
                        expected: "`i-` and up to 8 hexadecimal digits",
                    });
                }
                Ok(Self::Id { pool: Some(pool.parse()?), prefix: id })
            }
        }
    }
}

impl Selector {
    /// Whether the selector covers this instance.
    pub fn matches(&self, path: &InstancePath) -> bool {
        match self {
            Self::All => true,
            Self::Tenant(tenant) => path.pool.tenant == *tenant,
            Self::Pool(pool) => path.pool == *pool,
            Self::Id { pool, prefix } => {
                pool.as_ref().is_none_or(|pool| path.pool == *pool)
                    && path.id.as_str().starts_with(prefix.as_str())
            }
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => write!(f, "all instances"),
            Self::Tenant(tenant) => write!(f, "{tenant}"),
            Self::Pool(pool) => write!(f, "{pool}"),
            Self::Id { pool: Some(pool), prefix } => write!(f, "{pool}/{prefix}"),
            Self::Id { pool: None, prefix } => write!(f, "{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar() {
        for good in ["a", "demo", "a-1", "web2", &"x".repeat(32)] {
            assert_eq!(good.parse::<TenantName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "1a", "A", "a_b", "a/b", "a b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<TenantName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn paths_round_trip_through_text_and_json() {
        let path: InstancePath = "demo/hello/i-0123abcd".parse().unwrap();
        assert_eq!(path.to_string(), "demo/hello/i-0123abcd");
        let json = serde_json::to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<InstancePath>(&json).unwrap(), path);
        assert!("demo/i-0123abcd".parse::<InstancePath>().is_err());
        assert!(serde_json::from_str::<InstancePath>("\"demo/hello/i-xyz\"").is_err());
    }

    #[test]
    fn a_pool_or_disk_without_a_tenant_is_the_default_tenants() {
        assert_eq!(PoolPath::typed("web").unwrap().to_string(), "default/web");
        assert_eq!(PoolPath::typed("demo/web").unwrap().to_string(), "demo/web");
        assert_eq!(DiskPath::typed("data").unwrap().to_string(), "default/data");
        for bad in ["", "/", "Web", "demo/web/x"] {
            assert!(PoolPath::typed(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn selectors_take_what_people_type() {
        let path: InstancePath = "demo/hello/i-0123abcd".parse().unwrap();
        for text in [
            "demo",
            "demo/hello",
            "i-0123",
            "i-0123abcd",
            "0123",
            "demo/hello/i-01",
            "demo/hello/01",
        ] {
            assert!(text.parse::<Selector>().unwrap().matches(&path), "{text}");
        }
        for text in ["other", "demo/other", "i-0124", "demo/other/i-0123abcd"] {
            assert!(!text.parse::<Selector>().unwrap().matches(&path), "{text}");
        }
        for text in ["", "demo/", "/hello", "demo/hello/", "demo/hello/x", "a/b/c/i-00"] {
            assert!(text.parse::<Selector>().is_err(), "{text:?} was accepted");
        }
    }
}
