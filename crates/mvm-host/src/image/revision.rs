//! A built image: an immutable directory `images/<revision>/` of the state directory.
//!
//! ```text
//! vmlinuz        the guest kernel
//! initrd         the guest agent and the modules of that kernel
//! root.erofs     the read-only root filesystem, shared by all instances
//! modules.erofs  all modules of the kernel, a hard link to the stored kernel's, if it has them
//! manifest.json  what it was made from, sizes and digests
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mvm_core::image::ImageConfig;
use mvm_core::name::RevisionId;
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::digest::Digest;
use super::durable::{FileError, says_damage};
use crate::bootstrap::kernel::{KernelId, StoredFile};
use crate::state_dir::{INITRD, MODULES, ROOT, RevisionDir, VMLINUZ};

/// The version of the directory's layout; part of every revision's id.
pub const SCHEMA: u32 = 2;

/// What the root filesystem was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// For people.
    pub description: String,
    /// The digest of the inputs.
    pub fingerprint: Digest,
    /// The cached layers that it was made of, from the bottom.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Digest>,
}

/// The kernel of a revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// The stored kernel that it was taken from.
    pub id: KernelId,
    /// Its release, as `uname -r` says.
    pub release: String,
}

/// The guest agent of a revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    /// Its version.
    pub version: String,
    /// The program's digest.
    pub sha256: Digest,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The layout's version.
    pub schema: u32,
    /// The revision's id.
    pub revision: RevisionId,
    /// What the root filesystem was made from.
    pub source: SourceRecord,
    /// How the image wants to be run.
    pub config: ImageConfig,
    /// The kernel.
    pub kernel: KernelRecord,
    /// The guest agent.
    pub guest_agent: AgentRecord,
    /// The program that made the root filesystem, with its version.
    pub root_maker: String,
    /// The version of mvm that built the revision.
    pub created_by: String,
    /// Each file of the directory except this manifest.
    pub files: BTreeMap<String, StoredFile>,
}

/// A complete revision on this machine.
#[derive(Debug, Clone)]
pub struct Revision {
    dir: RevisionDir,
    manifest: Manifest,
}

impl Revision {
    /// Loads the manifest of a revision's directory, and checks that each file is there with its
    /// size. This is cheap: it is done before each use.
    ///
    /// # Errors
    /// There is no such directory, or the error names the file that is damaged and the fix.
    pub fn open(dir: &RevisionDir) -> Result<Self, ImageError> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let damaged = |path: &Path, problem: String| ImageError::Damaged {
            revision: name.clone(),
            path: path.to_owned(),
            problem,
            dir: dir.to_path_buf(),
        };
        let unreadable = |path: &Path, error: io::Error| match says_damage(&error) {
            true => damaged(path, format!("cannot be read: {error}")),
            false => FileError::new("read", path, error).into(),
        };
        let path = dir.manifest();
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(ImageError::NoSuchRevision { revision: name });
            }
            Err(error) => return Err(unreadable(&path, error)),
            Ok(text) => text,
        };
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(&path, format!("does not parse: {error}")))?;
        if manifest.schema != SCHEMA || manifest.revision.as_str() != name {
            let found = format!("is of {} with schema {}", manifest.revision, manifest.schema);
            return Err(damaged(&path, found));
        }
        for file in [VMLINUZ, INITRD, ROOT] {
            if !manifest.files.contains_key(file) {
                return Err(damaged(&path, format!("does not list {file}")));
            }
        }
        for (file, stored) in &manifest.files {
            let path = dir.join(file);
            match fs::metadata(&path) {
                Ok(found) if found.len() == stored.size => {}
                Ok(found) => {
                    let problem = format!("has {} bytes instead of {}", found.len(), stored.size);
                    return Err(damaged(&path, problem));
                }
                Err(error) => return Err(unreadable(&path, error)),
            }
        }
        Ok(Self { dir: dir.clone(), manifest })
    }

    /// Reads every file and compares the digests.
    ///
    /// # Errors
    /// Names the first file whose content is not what was built.
    pub fn verify(&self) -> Result<(), ImageError> {
        for (file, stored) in &self.manifest.files {
            let path = self.dir.join(file);
            let problem = match Digest::of_file(&path) {
                Ok((digest, _)) if digest == stored.sha256 => continue,
                Ok(_) => "does not have the content that was built".to_owned(),
                Err(error) if says_damage(&error) => format!("cannot be read: {error}"),
                Err(error) => return Err(FileError::new("read", &path, error).into()),
            };
            return Err(ImageError::Damaged {
                revision: self.id().to_string(),
                path,
                problem,
                dir: self.dir.to_path_buf(),
            });
        }
        Ok(())
    }

    /// The revision's id.
    pub fn id(&self) -> &RevisionId {
        &self.manifest.revision
    }

    /// The revision's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `manifest.json` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The guest kernel.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.vmlinuz()
    }

    /// The initial RAM filesystem.
    pub fn initrd(&self) -> PathBuf {
        self.dir.initrd()
    }

    /// The read-only root filesystem.
    pub fn root(&self) -> PathBuf {
        self.dir.root()
    }

    /// The filesystem with all modules of the kernel; a revision of an earlier mvm has none.
    pub fn modules(&self) -> Option<PathBuf> {
        self.manifest.files.contains_key(MODULES).then(|| self.dir.modules())
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;

    /// In a process of its own, as the limit is a whole process's.
    #[test]
    #[ignore = "it is run by another test"]
    fn with_few_descriptors() {
        let dir = std::env::var_os("MVM_TEST_DIR").unwrap();
        let few = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Nofile, few).unwrap();
        let error = Revision::open(&RevisionDir::from(&dir)).unwrap_err();
        assert!(matches!(error, ImageError::File(_)), "{error:?}");
    }

    #[test]
    #[allow(clippy::disallowed_methods)] // a process with a limit of its own
    fn too_many_open_files_are_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let revision = RevisionDir::from(dir.path());
        let damaged = Revision::open(&revision).unwrap_err();
        assert!(matches!(damaged, ImageError::Damaged { .. }), "{damaged:?}");
        fs::write(revision.manifest(), "{}").unwrap();
        let limited = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "image::revision::tests::with_few_descriptors"])
            .env("MVM_TEST_DIR", dir.path())
            .output()
            .unwrap();
        assert!(limited.status.success(), "{}", String::from_utf8_lossy(&limited.stdout));
        assert!(String::from_utf8_lossy(&limited.stdout).contains("1 passed"));
    }
}
