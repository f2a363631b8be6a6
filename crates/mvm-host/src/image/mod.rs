//! Images of microVMs: what they are made from, how they are built and stored, and the private
//! writable layer of each instance.
//!
//! The agent calls it before an instance's first start. A built image is a [`Revision`]: an
//! immutable directory with a kernel, an initrd and a read-only root filesystem, shared by all
//! instances of its pools; see [`build`]. Each instance writes to its own [`disk`] layer. This
//! module never starts a microVM.

use std::path::PathBuf;

pub mod build;
pub mod builtin;
pub(crate) mod cpio;
pub(crate) mod debian;
pub mod digest;
pub mod disk;
pub mod durable;
mod init_links;
pub mod initrd;
pub mod oci;
pub mod progress;
pub mod revision;
pub mod source;

pub use builtin::BuiltinSource;
pub use oci::{LayerCache, OciSource, RegistryConfig};
pub use revision::Revision;
pub use source::ImageSource;

use crate::bootstrap::BootstrapError;
use crate::process::ToolError;
use durable::FileError;
pub use oci::name_in_archive;

/// Why an image could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The filesystem that holds the state directory is full.
    #[error("no space left on the filesystem of {path}; free some space there and try again")]
    NoSpace {
        /// A path on the full filesystem.
        path: PathBuf,
    },
    /// A tool of the host failed.
    #[error(transparent)]
    Tool(ToolError),
    /// A file operation failed.
    #[error(transparent)]
    File(FileError),
    /// A package or the kernel cannot be had.
    #[error(transparent)]
    Bootstrap(BootstrapError),
    /// A container image cannot be had or used.
    #[error(transparent)]
    Oci(#[from] oci::OciError),
    /// A program for the image needs a dynamic loader, which the image does not have.
    #[error("{path} is not a statically linked 64-bit program")]
    NotStatic {
        /// Where the program came from.
        path: PathBuf,
    },
    /// A stored image is incomplete or was changed.
    #[error("revision {revision} is damaged: {path} {problem}; `mvm pool build` mends it")]
    Damaged {
        /// The revision's id.
        revision: String,
        /// The file that is damaged.
        path: PathBuf,
        /// How.
        problem: String,
        /// The revision's directory.
        dir: PathBuf,
    },
    /// There is no revision of this id.
    #[error("there is no revision {revision}")]
    NoSuchRevision {
        /// The revision's id.
        revision: String,
    },
    /// A writable layer is already there; it may be in use and is never replaced.
    #[error("there already is a writable layer at {path}")]
    LayerExists {
        /// The layer's file.
        path: PathBuf,
    },
    /// A size that no writable layer can have.
    #[error(
        "a writable layer of {size_mib} MiB is not possible: it has between {min} and {max} MiB"
    )]
    LayerSize {
        /// What was asked for.
        size_mib: u64,
        /// The smallest size in MiB.
        min: u64,
        /// The largest size in MiB.
        max: u64,
    },
}

impl From<FileError> for ImageError {
    fn from(error: FileError) -> Self {
        if error.is_no_space() { Self::NoSpace { path: error.path } } else { Self::File(error) }
    }
}

impl From<ToolError> for ImageError {
    fn from(error: ToolError) -> Self {
        Self::Tool(error)
    }
}

impl From<BootstrapError> for ImageError {
    fn from(error: BootstrapError) -> Self {
        match error {
            BootstrapError::File(error) => error.into(),
            error => Self::Bootstrap(error),
        }
    }
}

impl ImageError {
    /// A tool's failure for lack of space is about `path`.
    fn at(self, path: &std::path::Path) -> Self {
        match self {
            Self::Tool(error) if error.is_no_space() => Self::NoSpace { path: path.to_owned() },
            error => error,
        }
    }
}
