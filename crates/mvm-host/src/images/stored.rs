//! What a state directory keeps of images: listed, removed, and collected when nothing uses it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use mvm_core::image::ImageConfig;
use mvm_core::name::RevisionId;

use crate::image::build::ImageStore;
use crate::image::durable::{names, remove_dir};
use crate::image::{ImageError, LayerCache};
use crate::state_dir::{RevisionDir, StateDir};

/// How old an archive is before it counts as forgotten.
const UPLOAD_GRACE: Duration = Duration::from_secs(60 * 60);

/// A revision that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// The revision.
    pub revision: RevisionId,
    /// What it was made from, in words; empty if that cannot be told.
    pub source: String,
    /// The disk space that it takes, in bytes.
    pub bytes: u64,
    /// When it was built, in milliseconds since the Unix epoch.
    pub built_unix_ms: u64,
    /// The release of its kernel.
    pub kernel: String,
    /// How it wants to be run.
    pub config: ImageConfig,
    /// The layers that it was made of, as `sha256:…`, from the bottom.
    pub layers: Vec<String>,
    /// What is wrong with it.
    pub damage: Option<String>,
}

/// What must stay when images are collected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InUse {
    /// Revisions of pools and instances.
    pub revisions: BTreeSet<RevisionId>,
    /// Files that pools are built from.
    pub paths: BTreeSet<PathBuf>,
}

/// What kind of thing was collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CollectedKind {
    /// A built image.
    Revision,
    /// An unpacked layer.
    Layer,
    /// A layer that was not downloaded to its end, or not unpacked.
    Download,
    /// An archive that came over a command's standard input.
    Upload,
    /// What an interrupted operation left behind.
    Leftover,
}

impl CollectedKind {
    /// The kind in one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Revision => "revision",
            Self::Layer => "layer",
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Leftover => "leftover",
        }
    }
}

/// One thing that was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// Its kind.
    pub kind: CollectedKind,
    /// Its name.
    pub name: String,
    /// The disk space that it took, in bytes.
    pub bytes: u64,
}

/// The images of one state directory, as far as they are kept.
pub(super) struct Kept<'a> {
    pub(super) state: &'a StateDir,
    pub(super) store: &'a ImageStore,
    pub(super) layers: &'a LayerCache,
}

impl Kept<'_> {
    pub(super) fn list(&self) -> Result<Vec<StoredImage>, ImageError> {
        Ok(self.store.list()?.into_iter().map(|id| self.describe(id)).collect())
    }

    fn describe(&self, id: RevisionId) -> StoredImage {
        let dir = self.store.dir_of(&id);
        let modified = dir.manifest().metadata().and_then(|meta| meta.modified()).ok();
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let mut image = StoredImage {
            bytes: revision_bytes(&dir),
            built_unix_ms: since.map_or(0, |since| since.as_millis() as u64),
            revision: id.clone(),
            source: String::new(),
            kernel: String::new(),
            config: ImageConfig::default(),
            layers: Vec::new(),
            damage: None,
        };
        match self.store.open(&id) {
            Ok(revision) => {
                let manifest = revision.manifest();
                image.source.clone_from(&manifest.source.description);
                image.kernel.clone_from(&manifest.kernel.release);
                image.config.clone_from(&manifest.config);
                let layers = manifest.source.layers.iter();
                image.layers = layers.map(|layer| format!("sha256:{layer}")).collect();
            }
            Err(error) => image.damage = Some(error.to_string()),
        }
        image
    }

    /// Removes a revision, and returns the disk space that it took, in bytes.
    pub(super) fn remove(&self, id: &RevisionId) -> Result<u64, ImageError> {
        let dir = self.store.dir_of(id);
        if !dir.exists() {
            return Err(ImageError::NoSuchRevision { revision: id.to_string() });
        }
        let bytes = revision_bytes(&dir);
        self.store.remove(id)?;
        Ok(bytes)
    }

    /// Removes what nothing uses; with `dry_run`, says only what that is. No build may run.
    pub(super) fn collect(
        &self,
        in_use: &InUse,
        dry_run: bool,
    ) -> Result<Vec<Collected>, ImageError> {
        let mut collected = Vec::new();
        let mut add = |kind, name: String, path: &Path| {
            let bytes = match kind {
                CollectedKind::Revision => revision_bytes(&path.into()),
                _ => disk_bytes(path),
            };
            collected.push(Collected { kind, name, bytes });
        };
        let mut layers_in_use = BTreeSet::new();
        for id in self.store.list()? {
            if in_use.revisions.contains(&id) {
                if let Ok(revision) = self.store.open(&id) {
                    layers_in_use.extend(revision.manifest().source.layers.clone());
                }
                continue;
            }
            add(CollectedKind::Revision, id.to_string(), &self.store.dir_of(&id));
            if !dry_run {
                self.store.remove(&id)?;
            }
        }
        for layer in self.layers.list()? {
            if !layers_in_use.contains(&layer.diff_id) {
                add(CollectedKind::Layer, format!("sha256:{}", layer.diff_id), &layer.dir);
                if !dry_run {
                    self.layers.remove(&layer.diff_id)?;
                }
            }
        }
        if !dry_run {
            self.layers.detach_mounts()?;
        }
        let downloads = self.layers.downloads()?;
        let uploads = self.uploads(in_use)?;
        let left = self.layers.leftovers()?.into_iter().chain(self.store.leftovers()?);
        let files = downloads.into_iter().map(|path| (CollectedKind::Download, path));
        let files = files.chain(uploads.into_iter().map(|path| (CollectedKind::Upload, path)));
        for (kind, path) in files.chain(left.map(|path| (CollectedKind::Leftover, path))) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            add(kind, name, &path);
            if !dry_run {
                remove_dir(&path)?;
            }
        }
        Ok(collected)
    }

    /// Removes what builds that were interrupted left behind, and says what that was. No build may run.
    pub(super) fn sweep(&self) -> Result<Vec<PathBuf>, ImageError> {
        for point in self.layers.detach_mounts()? {
            tracing::warn!(path = %point.display(), "a mount of an interrupted build is detached");
        }
        let left = self.layers.leftovers()?.into_iter().chain(self.store.leftovers()?);
        let left: Vec<PathBuf> = left.collect();
        // One that cannot be removed keeps no other one.
        let removed: Vec<_> = left.iter().map(|path| remove_dir(path)).collect();
        removed.into_iter().collect::<Result<(), _>>()?;
        Ok(left)
    }

    /// Archives that came over standard input and that no pool is built from; a fresh one may be on
    /// its way into a pool.
    fn uploads(&self, in_use: &InUse) -> Result<Vec<PathBuf>, ImageError> {
        let dir = self.state.uploads();
        let paths = names(&dir)?.into_iter().map(|name| dir.join(name));
        let is_fresh = |path: &PathBuf| {
            let written = path.metadata().and_then(|meta| meta.modified()).ok();
            written.and_then(|time| time.elapsed().ok()).is_none_or(|age| age < UPLOAD_GRACE)
        };
        // A command may know the state directory by another name.
        let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        let used: BTreeSet<PathBuf> = in_use.paths.iter().map(real).collect();
        Ok(paths.filter(|path| !used.contains(&real(path)) && !is_fresh(path)).collect())
    }
}

/// Disk space that is a revision's alone, in bytes: the modules of its kernel are others', too.
fn revision_bytes(dir: &RevisionDir) -> u64 {
    let modules = dir.modules().symlink_metadata().ok().filter(|meta| meta.nlink() > 1);
    disk_bytes(dir).saturating_sub(modules.map_or(0, |meta| meta.blocks() * 512))
}

/// Disk space that a file or a whole directory takes, in bytes; 0 if it is not there.
fn disk_bytes(path: &Path) -> u64 {
    let Ok(meta) = path.symlink_metadata() else { return 0 };
    let below = if meta.is_dir() { fs::read_dir(path).ok() } else { None };
    let below = below.into_iter().flatten().flatten();
    meta.blocks() * 512 + below.map(|entry| disk_bytes(&entry.path())).sum::<u64>()
}
