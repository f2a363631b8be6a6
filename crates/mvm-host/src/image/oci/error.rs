//! Why an image cannot be read.

use std::path::PathBuf;

use super::tar::TarError;
use super::tree::MergeError;
use crate::image::digest::Digest;

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerProblem {
    /// It is not a sound tar archive, or its compression is damaged.
    #[error(transparent)]
    Tar(TarProblem),
    /// The blob is another one.
    #[error("its digest is sha256:{found} instead of sha256:{expected}")]
    WrongDigest {
        /// What the image says.
        expected: Digest,
        /// What is there.
        found: Digest,
    },
    /// The archive inside the blob is another one.
    #[error("it unpacks to sha256:{found} instead of sha256:{expected}")]
    WrongDiffId {
        /// What the image says.
        expected: Digest,
        /// What is there.
        found: Digest,
    },
    /// It is made to exhaust the disk's inodes.
    #[error("it has more than {most} entries")]
    TooManyEntries {
        /// How many are accepted.
        most: u32,
    },
    /// It is made to exhaust the disk.
    #[error("entry `{entry}` is larger than any file of an image")]
    FileTooLarge {
        /// The entry.
        entry: String,
    },
}

/// A stream that is not a usable tar archive.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct TarProblem(TarError);

impl From<TarError> for LayerProblem {
    fn from(error: TarError) -> Self {
        Self::Tar(TarProblem(error))
    }
}

impl From<std::io::Error> for TarProblem {
    fn from(error: std::io::Error) -> Self {
        Self(error.into())
    }
}

/// Layers that do not make a tree.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct MergeProblem(#[from] pub(crate) MergeError);

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A layer is damaged, or hostile.
    #[error("layer sha256:{layer} of {path} is not usable: {problem}")]
    Layer {
        /// The layer's digest.
        layer: Digest,
        /// The file that it is in.
        path: PathBuf,
        /// Why.
        problem: Box<LayerProblem>,
    },
    /// The layers do not fit together, or one is hostile.
    #[error("layer {number} of {image} is not usable: {problem}")]
    Merge {
        /// Counted from 1, the bottom layer.
        number: usize,
        /// The image.
        image: String,
        /// Why.
        problem: MergeProblem,
    },
    /// A file of the image cannot be used.
    #[error("{image} is not a usable image: {problem}")]
    Image {
        /// The image.
        image: String,
        /// Why, with what is expected.
        problem: String,
    },
    /// There is no image of this name, or several without a name.
    #[error("{image} {problem}: {names}")]
    Choose {
        /// The archive or directory.
        image: String,
        /// What is wrong.
        problem: String,
        /// What there is.
        names: String,
    },
    /// The image is for other machines.
    #[error("{image} has no image for {wanted}: it is for {found}")]
    Platform {
        /// The image.
        image: String,
        /// This machine's platform.
        wanted: String,
        /// What it has.
        found: String,
    },
    /// A registry does not give the image.
    #[error(transparent)]
    Registry(#[from] super::registry::RegistryError),
}
