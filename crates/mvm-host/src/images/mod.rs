//! The image seam: what the agent needs of images and writable layers, real and simulated.
//!
//! The agent's builder and its instance actors call it. It never decides when to build.

mod local;
mod sim;
mod stored;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use mvm_core::image::{ImageConfig, ImageSpec};
use mvm_core::name::RevisionId;

pub use local::LocalImages;
pub use sim::SimImages;
pub use stored::{Collected, CollectedKind, InUse, StoredImage};

/// What a microVM boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionFiles {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initial RAM filesystem with the guest agent.
    pub initrd: PathBuf,
    /// The read-only root filesystem.
    pub root: PathBuf,
    /// The read-only filesystem with the modules of the kernel, if there is one.
    pub modules: Option<PathBuf>,
    /// How the image wants to be run.
    pub config: ImageConfig,
}

/// A finished build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    /// The revision.
    pub revision: RevisionId,
    /// Whether it had been built before.
    pub already_there: bool,
}

/// Why an image or layer cannot be had, with all sources and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ImagesError {
    /// The whole chain of causes.
    pub message: String,
}

/// Called with what a build is doing, in words.
pub type OnStep<'a> = &'a (dyn Fn(String) + Send + Sync);

/// Builds images and makes writable layers.
#[async_trait]
pub trait Images: Send + Sync {
    /// Builds an image, or finds that it is built.
    ///
    /// # Errors
    /// Nothing half-built is left behind.
    async fn build(&self, spec: &ImageSpec, on_step: OnStep<'_>)
    -> Result<BuiltImage, ImagesError>;

    /// The files of a revision.
    ///
    /// # Errors
    /// The revision is not there, or is damaged.
    async fn files(&self, revision: &RevisionId) -> Result<RevisionFiles, ImagesError>;

    /// The revisions that are kept, sorted.
    ///
    /// # Errors
    /// The directory of images cannot be read.
    async fn list(&self) -> Result<Vec<StoredImage>, ImagesError>;

    /// Removes a revision that nothing uses, and returns the disk space that it took, in bytes.
    ///
    /// # Errors
    /// It is not there or cannot be removed.
    async fn remove(&self, revision: &RevisionId) -> Result<u64, ImagesError>;

    /// Removes everything of images that is not in use; with `dry_run`, says only what that is. The
    /// caller sees to it that no build runs.
    ///
    /// # Errors
    /// Something cannot be read or removed; what was removed before stays removed.
    async fn collect(&self, in_use: &InUse, dry_run: bool) -> Result<Vec<Collected>, ImagesError>;

    /// Makes an instance's writable layer unless it is there.
    ///
    /// # Errors
    /// No half-made layer is left behind.
    async fn ensure_layer(&self, path: &Path, size_mib: u32, uid: u32) -> Result<(), ImagesError>;

    /// Makes a writable layer that is a copy of another one, which nobody writes to meanwhile, in
    /// place of what is there.
    ///
    /// # Errors
    /// It cannot be copied, or there is no space.
    async fn copy_layer(&self, from: &Path, to: &Path, uid: u32) -> Result<(), ImagesError>;
}

/// Disk space that the files of a directory take, in KiB; 0 if it is not there.
pub fn allocated_kib(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let blocks: u64 = entries.filter_map(|entry| entry.metadata().ok()).map(|m| m.blocks()).sum();
    blocks / 2
}
