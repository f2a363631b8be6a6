//! Guest kernels: immutable directories `kernels/<id>/` of the state directory.
//!
//! ```text
//! kernels/k-…/vmlinuz           the kernel
//! kernels/k-…/config            how it was configured, if known
//! kernels/k-…/modules/NAME.ko   what a microVM loads before its root filesystem, uncompressed
//! kernels/k-…/modules.erofs     all modules, for the guest's programs to load, as a filesystem
//! kernels/k-…/kernel.json       version, origin, digests, load order
//! kernels/default               the id of the kernel that new images use
//! ```
//!
//! The id is a digest of the content: the same kernel has the same id on each machine.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::BootstrapError;
use crate::image::digest::Digest;
use crate::image::durable::{FileError, says_damage};
use crate::state_dir::{KernelDir, MODULES};

/// The version of the layout of a kernel's directory.
pub(super) const SCHEMA: u32 = 1;

/// The id of a stored kernel: `k-` and 16 hexadecimal digits of the digest of its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelId(String);

impl KernelId {
    pub(super) fn from_digest(digest: Digest) -> Self {
        Self(format!("k-{:016x}", u64::from_be_bytes(digest.prefix())))
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KernelId {
    type Err = BootstrapError;

    fn from_str(text: &str) -> Result<Self, BootstrapError> {
        let ok = text.strip_prefix("k-").is_some_and(|hex| {
            hex.len() == 16 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        });
        let id = || text.chars().take(40).collect();
        if ok { Ok(Self(text.to_owned())) } else { Err(BootstrapError::NoSuchKernel { id: id() }) }
    }
}

impl fmt::Display for KernelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

mvm_core::serde_as_text!(KernelId);

/// Where a kernel came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum KernelOrigin {
    /// The distribution's packages.
    Package {
        /// The package that holds the kernel.
        name: String,
        /// Its version.
        version: String,
    },
    /// A file of the user's own.
    File {
        /// Where it was.
        path: PathBuf,
    },
}

/// The size and the digest of a stored file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the content.
    pub sha256: Digest,
}

/// `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// The layout's version.
    pub schema: u32,
    /// The kernel's id.
    pub id: KernelId,
    /// The kernel's release, as `uname -r` would say; the file's name if that is unknown.
    pub release: String,
    /// Where it came from.
    pub origin: KernelOrigin,
    /// Names of the modules to load, in this order.
    pub load: Vec<String>,
    /// Each file of the directory except this manifest, by its relative path.
    pub files: BTreeMap<String, StoredFile>,
}

/// A stored kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    dir: KernelDir,
    manifest: KernelManifest,
}

impl Kernel {
    pub(super) fn open(dir: KernelDir, id: &KernelId) -> Result<Self, BootstrapError> {
        let path = dir.manifest();
        let damaged = |path: &Path, problem: String| BootstrapError::DamagedKernel {
            path: path.to_owned(),
            problem,
            dir: dir.to_path_buf(),
        };
        let unreadable = |path: &Path, error: io::Error| match says_damage(&error) {
            true => damaged(path, format!("cannot be read: {error}")),
            false => FileError::new("read", path, error).into(),
        };
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(BootstrapError::NoSuchKernel { id: id.to_string() });
            }
            Err(error) => return Err(unreadable(&path, error)),
            Ok(text) => text,
        };
        let manifest: KernelManifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(&path, format!("does not parse: {error}")))?;
        if manifest.schema != SCHEMA || manifest.id != *id {
            let found = format!("is of {} with schema {}", manifest.id, manifest.schema);
            return Err(damaged(&path, found));
        }
        for (name, file) in &manifest.files {
            let path = dir.join(name);
            match fs::metadata(&path) {
                Ok(found) if found.len() == file.size => {}
                Ok(found) => {
                    let problem = format!("has {} bytes instead of {}", found.len(), file.size);
                    return Err(damaged(&path, problem));
                }
                Err(error) => return Err(unreadable(&path, error)),
            }
        }
        Ok(Self { dir, manifest })
    }

    /// The kernel's id.
    pub fn id(&self) -> &KernelId {
        &self.manifest.id
    }

    /// What `kernel.json` says.
    pub fn manifest(&self) -> &KernelManifest {
        &self.manifest
    }

    /// The kernel file.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.vmlinuz()
    }

    /// Names and files of the modules to load, in this order.
    pub fn modules(&self) -> Vec<(String, PathBuf)> {
        let file = |name: &String| (name.clone(), self.dir.join(module_file(name)));
        self.manifest.load.iter().map(file).collect()
    }

    /// The filesystem with all modules, and what the manifest says of it; a kernel that has
    /// everything built in, or that an earlier mvm stored, has none.
    pub fn module_image(&self) -> Option<(PathBuf, &StoredFile)> {
        let stored = self.manifest.files.get(MODULES)?;
        Some((self.dir.modules(), stored))
    }

    /// Whether modules are missing that the kernel's package has.
    pub fn lacks_modules(&self) -> bool {
        matches!(self.manifest.origin, KernelOrigin::Package { .. })
            && !self.manifest.load.is_empty()
            && self.module_image().is_none()
    }

    /// Reads a file of the directory and checks its digest.
    pub(crate) fn read_checked(&self, path: &Path) -> Result<Vec<u8>, BootstrapError> {
        let damaged = |problem: String| BootstrapError::DamagedKernel {
            path: path.to_owned(),
            problem,
            dir: self.dir.to_path_buf(),
        };
        let content = fs::read(path).map_err(|error| match says_damage(&error) {
            true => damaged(format!("cannot be read: {error}")),
            false => FileError::new("read", path, error).into(),
        })?;
        let name = path.strip_prefix(&self.dir).unwrap_or(path).to_string_lossy();
        match self.manifest.files.get(name.as_ref()) {
            Some(file) if file.sha256 == Digest::of(&content) => Ok(content),
            Some(_) => Err(damaged("does not have the content that was stored".to_owned())),
            None => Err(damaged("is not in the manifest".to_owned())),
        }
    }

    /// Reads everything and compares the digests.
    ///
    /// # Errors
    /// Names the first file whose content is not what was stored.
    pub fn verify(&self) -> Result<(), BootstrapError> {
        let mut files = self.manifest.files.keys();
        files.try_for_each(|name| self.read_checked(&self.dir.join(name)).map(drop))
    }
}

pub(super) fn module_file(name: &str) -> String {
    format!("modules/{name}.ko")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_ids_do_not_leave_their_directory() {
        assert!("k-0123456789abcdef".parse::<KernelId>().is_ok());
        for bad in ["", "k-", "../x", "k-0123456789ABCDEF", "k-0123456789abcdef/"] {
            assert!(bad.parse::<KernelId>().is_err(), "{bad} was accepted");
        }
    }
}
