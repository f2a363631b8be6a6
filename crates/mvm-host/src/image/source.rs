//! The seam between images and what they are made from.

use std::path::Path;

use async_trait::async_trait;
use mvm_core::image::ImageConfig;

use super::ImageError;
use super::digest::Digest;
use super::progress::OnProgress;

/// Who owns the files of a root filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Root owns all of them, whoever wrote the tree.
    AllRoot,
    /// As in the tree.
    AsWritten,
}

/// Which times the files of a root filesystem have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// All the same, as the tree's are those of the build.
    Fixed,
    /// As in the tree.
    AsWritten,
}

/// Something that a root filesystem is made from.
#[async_trait]
pub trait ImageSource: Send + Sync {
    /// A phrase for people, such as `built-in (busybox-static 1:1.35.0-4)`.
    fn describe(&self) -> String;

    /// How the image wants to be run; called after [`Self::write_root`]. It follows from what the
    /// fingerprint covers.
    fn config(&self) -> ImageConfig {
        ImageConfig::default()
    }

    /// The cached layers that the tree is made of.
    fn layers(&self) -> Vec<Digest> {
        Vec::new()
    }

    /// Who owns the files.
    fn ownership(&self) -> Ownership;

    /// Which times the files have.
    fn times(&self) -> Times {
        Times::Fixed
    }

    /// A digest of everything that decides the root filesystem's content: equal digests mean
    /// equal trees, names, modes, owners and links included.
    ///
    /// # Errors
    /// The inputs cannot be read.
    async fn fingerprint(&self) -> Result<Digest, ImageError>;

    /// Writes the root filesystem's tree into an empty directory.
    ///
    /// # Errors
    /// Whatever is in the directory then is of no use.
    async fn write_root(&self, dest: &Path, progress: OnProgress<'_>) -> Result<(), ImageError>;

    /// Called when the revision is complete and durable.
    async fn written(&self) {}
}
