//! Guest kernels: immutable directories `kernels/<id>/` of the state directory.
//!
//! ```text
//! kernels/k-…/vmlinuz           the kernel
//! kernels/k-…/config            how it was configured, if known
//! kernels/k-…/modules/NAME.ko   what a microVM loads before its root filesystem, uncompressed
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

use super::apt::{self, Candidate};
use super::kernel_build::{self, Parts};
use super::{BootstrapError, Outcome};
use crate::image::digest::Digest;
use crate::image::durable::{
    FileError, NameLock, Named, TempTree, ensure_dir, remove_dir, replace_file,
};
use crate::image::progress::{OnProgress, step};

/// The version of the layout of a kernel's directory.
pub(super) const SCHEMA: u32 = 1;
/// The kernel itself.
pub(super) const VMLINUZ: &str = "vmlinuz";
/// What describes the directory.
pub(super) const MANIFEST: &str = "kernel.json";
const DEFAULT: &str = "default";

/// Metapackages whose dependency is the current kernel for microVMs, best first.
#[cfg(target_arch = "x86_64")]
const METAPACKAGES: &[&str] =
    &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];
#[cfg(target_arch = "aarch64")]
const METAPACKAGES: &[&str] =
    &["linux-image-cloud-arm64", "linux-image-virtual", "linux-image-arm64"];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const METAPACKAGES: &[&str] = &["linux-image-virtual"];

/// The id of a stored kernel: `k-` and 16 hexadecimal digits of the digest of its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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

impl TryFrom<String> for KernelId {
    type Error = BootstrapError;
    fn try_from(text: String) -> Result<Self, BootstrapError> {
        text.parse()
    }
}

impl From<KernelId> for String {
    fn from(id: KernelId) -> Self {
        id.0
    }
}

impl fmt::Display for KernelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

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
    dir: PathBuf,
    manifest: KernelManifest,
}

impl Kernel {
    fn open(dir: PathBuf, id: &KernelId) -> Result<Self, BootstrapError> {
        let path = dir.join(MANIFEST);
        let damaged = |path: &Path, problem: String| BootstrapError::DamagedKernel {
            path: path.to_owned(),
            problem,
            dir: dir.clone(),
        };
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(BootstrapError::NoSuchKernel { id: id.to_string() });
            }
            Err(error) => return Err(damaged(&path, format!("cannot be read: {error}"))),
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
                Err(error) => return Err(damaged(&path, format!("cannot be read: {error}"))),
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
        self.dir.join(VMLINUZ)
    }

    /// Names and files of the modules to load, in this order.
    pub fn modules(&self) -> Vec<(String, PathBuf)> {
        let file = |name: &String| (name.clone(), self.dir.join(module_file(name)));
        self.manifest.load.iter().map(file).collect()
    }

    /// Reads a file of the directory and checks its digest.
    pub(crate) fn read_checked(&self, path: &Path) -> Result<Vec<u8>, BootstrapError> {
        let damaged = |problem: String| BootstrapError::DamagedKernel {
            path: path.to_owned(),
            problem,
            dir: self.dir.clone(),
        };
        let content = fs::read(path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
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

/// The kernels of one state directory.
#[derive(Debug, Clone)]
pub struct KernelStore {
    dir: PathBuf,
    cache: PathBuf,
}

impl KernelStore {
    /// For this state directory; nothing is made yet.
    pub fn new(state: &Path) -> Self {
        Self { dir: state.join("kernels"), cache: state.join("cache/packages") }
    }

    /// Keeps downloaded packages elsewhere than in the state directory.
    pub fn with_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.cache = cache.into();
        self
    }

    /// A stored kernel; its files' presence and sizes are checked.
    ///
    /// # Errors
    /// There is none of this id, or it is damaged.
    pub fn open(&self, id: &KernelId) -> Result<Kernel, BootstrapError> {
        Kernel::open(self.dir.join(id.as_str()), id)
    }

    /// The kernel that new images use, or `None` if none was fetched or imported yet.
    ///
    /// # Errors
    /// It is damaged, or the pointer to it is.
    pub fn default_kernel(&self) -> Result<Option<Kernel>, BootstrapError> {
        let path = self.dir.join(DEFAULT);
        match fs::read_to_string(&path) {
            Ok(id) => self.open(&id.trim().parse()?).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FileError::new("read", &path, error).into()),
        }
    }

    /// Makes a stored kernel the one that new images use.
    ///
    /// # Errors
    /// The pointer cannot be written.
    pub fn set_default(&self, kernel: &Kernel) -> Result<(), BootstrapError> {
        let text = format!("{}\n", kernel.id());
        Ok(replace_file(&self.dir.join(DEFAULT), text.as_bytes(), 0o644)?)
    }

    /// The default kernel, fetched if there is none or if the stored one is damaged.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub async fn ensure_default(
        &self,
        progress: OnProgress<'_>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        match self.default_kernel() {
            Ok(Some(kernel)) => return Ok((kernel, Outcome::AlreadyThere)),
            Ok(None)
            | Err(BootstrapError::DamagedKernel { .. } | BootstrapError::NoSuchKernel { .. }) => {}
            Err(error) => return Err(error),
        }
        let (kernel, _) = self.fetch(progress).await?;
        self.set_default(&kernel)?;
        Ok((kernel, Outcome::Made))
    }

    /// Fetches the distribution's current kernel for virtual machines, without installing it.
    ///
    /// # Errors
    /// The machine has no `apt`, the packages cannot be fetched, or the kernel lacks what a
    /// microVM needs.
    pub async fn fetch(
        &self,
        progress: OnProgress<'_>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        if !apt::is_available() {
            return Err(BootstrapError::NoApt {
                needed: "a guest kernel",
                instead: "give a kernel of your own with `--kernel PATH [--modules DIR]`",
            });
        }
        let packages = resolve(progress).await?;
        let origin = KernelOrigin::Package {
            name: packages[0].package.clone(),
            version: packages[0].version.clone(),
        };
        let mut files = Vec::new();
        for package in &packages {
            files.push(apt::download(package, &self.cache, progress).await?);
        }
        let text = format!("unpacking {}", packages[0].package);
        match step(progress, text.clone(), self.store_packages(&files, &origin)).await {
            Err(BootstrapError::MissingModule { module, place }) => {
                // Some distributions keep filesystems in a package of their own.
                let Some(extra) = extra_modules(&packages[0]).await? else {
                    return Err(BootstrapError::MissingModule { module, place });
                };
                files.push(apt::download(&extra, &self.cache, progress).await?);
                step(progress, text, self.store_packages(&files, &origin)).await
            }
            result => result,
        }
    }

    async fn store_packages(
        &self,
        files: &[PathBuf],
        origin: &KernelOrigin,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let (files, origin) = (files.to_owned(), origin.clone());
        self.store(move || kernel_build::from_packages(&files, origin)).await
    }

    /// Stores a kernel of the user's own. Without a directory of modules (such as
    /// `/lib/modules/RELEASE`) the kernel must have all that a microVM needs built in.
    ///
    /// # Errors
    /// The file is no bootable kernel or is truncated; a needed module is missing.
    pub async fn import(
        &self,
        vmlinuz: &Path,
        modules: Option<&Path>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let (vmlinuz, modules) = (vmlinuz.to_owned(), modules.map(Path::to_owned));
        self.store(move || kernel_build::from_files(&vmlinuz, modules.as_deref())).await
    }

    /// Writes what `parts` gives, unless a sound kernel of the same content is there.
    async fn store(
        &self,
        parts: impl FnOnce() -> Result<Parts, BootstrapError> + Send + 'static,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let store = self.clone();
        let work = move || {
            let parts = parts()?;
            let id = parts.id();
            ensure_dir(&store.dir)?;
            let lock = NameLock::acquire(&store.dir.join(format!(".lock-{id}")))?;
            let dest = store.dir.join(id.as_str());
            if let Ok(kernel) = store.open(&id)
                && kernel.verify().is_ok()
            {
                return Ok((kernel, Outcome::AlreadyThere));
            }
            // What is at its place is damaged: the name is a digest of the content.
            remove_dir(&dest)?;
            let temp = TempTree::create(store.dir.join(format!(".tmp-{id}")), &lock)?;
            parts.write(&id, temp.path())?;
            temp.publish(&dest)?;
            Ok((store.open(&id)?, Outcome::Made))
        };
        let result = tokio::task::spawn_blocking(work).await;
        result.map_err(io::Error::other).named("store a kernel in", &self.dir)?
    }
}

/// The packages that make up the kernel; the first one holds the kernel itself.
async fn resolve(progress: OnProgress<'_>) -> Result<Vec<Candidate>, BootstrapError> {
    let meta = apt::first_candidate(METAPACKAGES, progress).await?;
    let unknown = |name: &str| BootstrapError::UnknownPackage { names: name.to_owned() };
    let image = image_of(&meta).ok_or_else(|| unknown(&format!("{}'s kernel", meta.package)))?;
    let image = apt::first_candidate(&[image], progress).await?;
    let parts: Vec<String> = parts_of(&image).map(str::to_owned).collect();
    let mut packages = vec![image];
    for part in parts {
        packages.push(apt::first_candidate(&[&part], progress).await?);
    }
    Ok(packages)
}

/// The versioned kernel package that a metapackage depends on.
fn image_of(meta: &Candidate) -> Option<&str> {
    let mut names = meta.depends.iter().map(String::as_str);
    names.find(|name| name.strip_prefix("linux-image-").is_some_and(is_versioned))
}

/// Distributions that split their kernel keep the modules in a package of their own.
fn parts_of(image: &Candidate) -> impl Iterator<Item = &str> {
    let names = image.depends.iter().map(String::as_str);
    names.filter(|name| {
        let rest = ["linux-modules-", "linux-binary-"].iter().find_map(|p| name.strip_prefix(p));
        rest.is_some_and(is_versioned)
    })
}

/// The package with the less common modules of a kernel, if the distribution has one.
async fn extra_modules(image: &Candidate) -> Result<Option<Candidate>, BootstrapError> {
    match image.package.strip_prefix("linux-image-") {
        Some(release) => apt::candidate(&format!("linux-modules-extra-{release}")).await,
        None => Ok(None),
    }
}

fn is_versioned(rest: &str) -> bool {
    rest.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, depends: &[&str]) -> Candidate {
        Candidate {
            package: name.to_owned(),
            version: "1".to_owned(),
            architecture: "amd64".to_owned(),
            size: 1,
            sha256: Digest::of(b""),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn the_kernel_behind_a_metapackage_is_found() {
        let debian = package("linux-image-cloud-amd64", &["linux-image-6.1.0-56-cloud-amd64"]);
        assert_eq!(image_of(&debian), Some("linux-image-6.1.0-56-cloud-amd64"));
        let ubuntu = package(
            "linux-image-virtual",
            &["linux-image-6.8.0-31-generic", "linux-modules-extra-6.8.0-31-generic"],
        );
        assert_eq!(image_of(&ubuntu), Some("linux-image-6.8.0-31-generic"));
        assert_eq!(image_of(&package("x", &["kmod", "linux-image-generic"])), None);
    }

    #[test]
    fn modules_in_a_package_of_their_own_are_found() {
        let ubuntu = package("i", &["kmod", "linux-base", "linux-modules-6.8.0-31-generic"]);
        assert_eq!(parts_of(&ubuntu).collect::<Vec<_>>(), ["linux-modules-6.8.0-31-generic"]);
        assert_eq!(parts_of(&package("i", &["kmod", "initramfs-tools"])).count(), 0);
    }

    #[test]
    fn kernel_ids_do_not_leave_their_directory() {
        assert!("k-0123456789abcdef".parse::<KernelId>().is_ok());
        for bad in ["", "k-", "../x", "k-0123456789ABCDEF", "k-0123456789abcdef/"] {
            assert!(bad.parse::<KernelId>().is_err(), "{bad} was accepted");
        }
    }
}
