//! The image seam: what the agent needs of images and writable layers, real and simulated.
//!
//! The agent's builder and its instance actors call it. It never decides when to build.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use mvm_core::name::RevisionId;
use mvm_core::spec::ImageSpec;

/// The files that a microVM boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionFiles {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initial RAM filesystem with the guest agent.
    pub initrd: PathBuf,
    /// The read-only root filesystem.
    pub root: PathBuf,
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

    /// Makes an instance's writable layer unless it is there.
    ///
    /// # Errors
    /// No half-made layer is left behind.
    async fn ensure_layer(&self, path: &Path, size_mib: u32, uid: u32) -> Result<(), ImagesError>;
}

/// Images that exist by name only; layers are empty files.
#[derive(Debug, Clone, Default)]
pub struct SimImages {
    built: Arc<Mutex<BTreeSet<RevisionId>>>,
    failure: Arc<Mutex<Option<String>>>,
}

impl SimImages {
    /// Makes builds fail with this message, or succeed again.
    pub fn fail_builds(&self, message: Option<&str>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = message.map(str::to_owned);
    }
}

#[async_trait]
impl Images for SimImages {
    async fn build(
        &self,
        spec: &ImageSpec,
        on_step: OnStep<'_>,
    ) -> Result<BuiltImage, ImagesError> {
        on_step(format!("simulating a build of {spec}"));
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(message) = failure {
            return Err(ImagesError { message });
        }
        let revision = RevisionId::from_digest(*b"simulate");
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let already_there = !built.insert(revision.clone());
        Ok(BuiltImage { revision, already_there })
    }

    async fn files(&self, revision: &RevisionId) -> Result<RevisionFiles, ImagesError> {
        let dir = PathBuf::from("/nonexistent").join(revision.as_str());
        Ok(RevisionFiles {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd"),
            root: dir.join("root.erofs"),
        })
    }

    async fn ensure_layer(
        &self,
        path: &Path,
        _size_mib: u32,
        _uid: u32,
    ) -> Result<(), ImagesError> {
        std::fs::File::create(path).map(drop).map_err(|error| ImagesError {
            message: format!("cannot create {}: {error}", path.display()),
        })
    }
}
