//! Data disks as asked for: where one is mounted in a guest, and whether it may be written.
//!
//! A disk belongs to a tenant and lives until it is removed by name; instances come and go on it.
//! Specs and documents hold [`DiskMount`]s, admission checks them, and the agent hands them to the
//! VMM and the guest. Which instance may have a disk when is decided in [`crate::admit`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::name::{DiskName, DiskPath, NameError, TenantName};

/// Smallest data disk in MiB: a journal and some room.
pub const DATA_DISK_MIB_MIN: u64 = 16;
/// Largest data disk in MiB, below 16 TiB: the largest file of an ext4 host.
pub const DATA_DISK_MIB_MAX: u64 = 16 * 1024 * 1024 - 1;
/// Most data disks of one instance: what a `microvm` machine has transports for, and some spare.
pub const DISKS_MAX: usize = 8;
/// Longest path of a mount, in bytes.
const PATH_MAX: usize = 255;

/// Directories that the guest cannot do without: they are not mounted over.
const RESERVED: [&str; 9] =
    ["/", "/run", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/boot"];
/// Directories of the kernel: nothing is mounted on or below them.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Why a disk cannot be mounted as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// The text is not `NAME:/PATH[:ro]`.
    #[error("`{text}` is not valid: expected NAME:/PATH or NAME:/PATH:ro")]
    Grammar {
        /// As given.
        text: String,
    },
    /// A directory of the host stands where a disk is named.
    #[error(
        "`{path}` is a directory of this machine, and those cannot be mounted: make a data disk (`mvm disk create NAME --size 1G`) and attach it as NAME:/PATH, or copy files with `mvm cp`"
    )]
    HostDirectory {
        /// As given.
        path: String,
    },
    /// The disk's name is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The path is not a directory that a disk can be mounted on.
    #[error("a disk cannot be mounted on `{path}`: {reason}")]
    Path {
        /// As given.
        path: String,
        /// Why not.
        reason: &'static str,
    },
    /// One disk is named twice.
    #[error("disk {name} is named twice")]
    SameDisk {
        /// The disk.
        name: DiskName,
    },
    /// Two disks have one path.
    #[error("disks {first} and {second} are both to be mounted on {path}")]
    SamePath {
        /// A disk.
        first: DiskName,
        /// Another disk.
        second: DiskName,
        /// The path.
        path: MountPath,
    },
    /// There are more disks than an instance can have.
    #[error("{count} disks are too many: an instance has at most {DISKS_MAX}")]
    TooMany {
        /// How many.
        count: usize,
    },
}

/// Where in a guest a disk is mounted: an absolute path without detours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountPath(String);

impl MountPath {
    /// The path's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MountPath {
    type Err = MountError;
    fn from_str(text: &str) -> Result<Self, MountError> {
        let refuse = |reason| Err(MountError::Path { path: text.to_owned(), reason });
        if !text.starts_with('/') {
            return refuse("the path must be absolute");
        }
        if text.len() > PATH_MAX {
            return refuse("the path is longer than 255 bytes");
        }
        if text.contains(|c: char| c.is_control() || c.is_whitespace() || ":\\,".contains(c)) {
            return refuse("the path has a blank, `:`, `,`, `\\` or a control character");
        }
        let trimmed = match text.trim_end_matches('/') {
            "" => "/",
            trimmed => trimmed,
        };
        if trimmed.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")) && trimmed != "/"
        {
            return refuse("the path has an empty part, `.` or `..`");
        }
        let is_kernels = |dir: &str| {
            trimmed.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if RESERVED.contains(&trimmed) || KERNEL.iter().any(|dir| is_kernels(dir)) {
            return refuse("the guest itself needs that directory");
        }
        Ok(Self(trimmed.to_owned()))
    }
}

crate::serde_as_text!(MountPath);

impl fmt::Display for MountPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A data disk of the instance's tenant, and where the guest mounts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMount {
    /// The disk's name within the tenant.
    pub name: DiskName,
    /// The directory in the guest; made if it is not there.
    pub path: MountPath,
    /// Whether the guest may only read it, as others may at the same time.
    #[serde(default)]
    pub read_only: bool,
}

impl DiskMount {
    /// The disk's own path.
    pub fn disk(&self, tenant: &TenantName) -> DiskPath {
        DiskPath { tenant: tenant.clone(), disk: self.name.clone() }
    }
}

/// As commands spell it: `NAME:/PATH`, with `:ro` (or `:rw`) at the end.
impl FromStr for DiskMount {
    type Err = MountError;
    fn from_str(text: &str) -> Result<Self, MountError> {
        let grammar = || MountError::Grammar { text: text.to_owned() };
        let mut parts = text.split(':');
        let (name, path) = (parts.next(), parts.next());
        if let Some(path) = name.filter(|name| name.starts_with(['/', '.', '~'])) {
            return Err(MountError::HostDirectory { path: path.to_owned() });
        }
        let (Some(name), Some(path)) = (name, path) else { return Err(grammar()) };
        let read_only = match (parts.next(), parts.next()) {
            (None | Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(grammar()),
        };
        Ok(Self { name: name.parse()?, path: path.parse()?, read_only })
    }
}

impl fmt::Display for DiskMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, path, read_only } = self;
        write!(f, "{name}:{path}{}", if *read_only { ":ro" } else { "" })
    }
}

/// Checks that disks can be mounted beside each other.
///
/// # Errors
/// Names the first two that cannot, or the count if there are too many.
pub fn check_mounts(mounts: &[DiskMount]) -> Result<(), MountError> {
    if mounts.len() > DISKS_MAX {
        return Err(MountError::TooMany { count: mounts.len() });
    }
    for (index, mount) in mounts.iter().enumerate() {
        for other in &mounts[..index] {
            if mount.name == other.name {
                return Err(MountError::SameDisk { name: mount.name.clone() });
            }
            if mount.path == other.path {
                let (first, second) = (other.name.clone(), mount.name.clone());
                return Err(MountError::SamePath { first, second, path: mount.path.clone() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> DiskMount {
        text.parse().unwrap()
    }

    #[test]
    fn mounts_are_typed_as_they_are_shown() {
        for text in ["data:/data", "a-1:/srv/www:ro", "x:/run/x"] {
            assert_eq!(mount(text).to_string(), text);
        }
        assert_eq!(mount("data:/data:rw"), mount("data:/data/"));
    }

    #[test]
    fn what_is_no_mount_is_refused_with_the_reason() {
        for (text, reason) in [
            ("data", "expected NAME:/PATH"),
            ("data:/data:no", "expected NAME:/PATH"),
            ("data:/data:ro:ro", "expected NAME:/PATH"),
            ("Data:/data", "disk name `Data`"),
            ("data:data", "must be absolute"),
            ("data:/", "needs that directory"),
            ("data://", "needs that directory"),
            ("data:/etc/", "needs that directory"),
            ("data:/proc/x", "needs that directory"),
            ("data:/a/../etc", "`..`"),
            ("data:/a//b", "empty part"),
            ("data:/a b", "blank"),
        ] {
            let error = text.parse::<DiskMount>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(mount("data:/procession").path.as_str() == "/procession");
    }

    #[test]
    fn a_document_names_the_fields() {
        let text = r#"{"name":"data","path":"/data"}"#;
        assert_eq!(serde_json::from_str::<DiskMount>(text).unwrap(), mount("data:/data"));
        assert!(serde_json::from_str::<DiskMount>(r#"{"name":"d","path":"x"}"#).is_err());
    }

    #[test]
    fn disks_that_are_in_each_others_way_are_refused() {
        let check = |texts: &[&str]| {
            let mounts: Vec<DiskMount> = texts.iter().map(|text| mount(text)).collect();
            check_mounts(&mounts).map_err(|error| error.to_string())
        };
        assert_eq!(check(&["a:/a", "b:/a/b"]), Ok(()));
        assert_eq!(check(&["a:/a", "a:/b:ro"]), Err("disk a is named twice".to_owned()));
        assert!(check(&["a:/a", "b:/a"]).unwrap_err().contains("both to be mounted on /a"));
        let many: Vec<String> = (0..9).map(|n| format!("d{n}:/d{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(check(&many).unwrap_err().contains("at most 8"));
    }
}
