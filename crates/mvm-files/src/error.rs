//! Why a copy failed.

use std::io;
use std::path::{Path, PathBuf};

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The system refused something.
    #[error("cannot {action} {}", .path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it was refused.
        #[source]
        source: io::Error,
    },
    /// A file is not what it says that it is, or did not stay so while it was read.
    #[error("cannot copy {}: {problem}", .path.display())]
    Unsteady {
        /// The file.
        path: PathBuf,
        /// What happened.
        problem: &'static str,
    },
    /// The stream ended or broke.
    #[error("the copy was cut short")]
    Stream(#[source] io::Error),
    /// The stream is no archive, or not of the expected kind.
    #[error("the archive makes no sense: {problem}")]
    Archive {
        /// What is wrong with it.
        problem: String,
    },
    /// The target is not what the source can be copied to.
    #[error("cannot copy to {}: {problem}", .path.display())]
    Target {
        /// The target.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A name in the archive leads out of the target.
    #[error("`{name}` in the archive leads out of the target")]
    Escape {
        /// The name.
        name: String,
    },
}

impl FilesError {
    /// For `map_err`: the system refused an action on a path.
    pub(crate) fn at<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| Self::Path { action, path, source: source.into() }
    }
}
