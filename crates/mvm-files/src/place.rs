//! Where a stream goes: what `cp` means by its two paths.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::FilesError;

/// Where to unpack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Everything into this directory, which exists, as `tar -x` does.
    Into(PathBuf),
    /// One source to this path, as `cp -r` does: into it if it is a directory, else under its name.
    As {
        /// The path.
        path: PathBuf,
        /// The source's own name; `.` if what it holds is meant ([`crate::source_name`]).
        name: OsString,
    },
}

/// Where the names of an archive lead.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The directory, which exists, below which everything is made.
    pub(crate) dir: PathBuf,
    /// What becomes of the first part of each name.
    pub(crate) root: Root,
}

/// What becomes of the first part of each name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// It stays.
    Kept,
    /// It is dropped: what the source holds goes into the directory itself.
    Dropped,
    /// It is replaced by this name.
    Named(OsString),
    /// The names are those of what the source holds, and go below this one.
    Under(OsString),
}

impl Target {
    /// Looks at what is there, once it is known whether the source is a directory.
    pub(crate) fn place(&self, is_source_dir: bool) -> Result<Place, FilesError> {
        let (path, name) = match self {
            Self::Into(dir) if dir.is_dir() => {
                return Ok(Place { dir: dir.clone(), root: Root::Kept });
            }
            Self::Into(dir) => return Err(wrong(dir, "it is not an existing directory")),
            Self::As { path, name } => (path, name),
        };
        let has_slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
        match path.metadata() {
            Ok(found) if found.is_dir() => {
                let root = match name == "." {
                    true if !is_source_dir => {
                        return Err(wrong(path, "the source is not a directory"));
                    }
                    true => Root::Dropped,
                    false => Root::Named(name.clone()),
                };
                Ok(Place { dir: path.clone(), root })
            }
            Ok(_) if is_source_dir => Err(wrong(path, "it is a file, and the source a directory")),
            Ok(_) if has_slash => Err(wrong(path, "it is not a directory")),
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                Err(wrong(path, "what leads to it is not a directory"))
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(FilesError::at("look at", path)(error))
            }
            Err(_) if has_slash && !is_source_dir => Err(wrong(path, "there is no such directory")),
            Ok(_) | Err(_) => {
                let Some(own) = path.file_name() else {
                    return Err(wrong(path, "there is no such directory"));
                };
                let dir = match path.parent() {
                    Some(parent) if parent != Path::new("") => parent.to_owned(),
                    _ => PathBuf::from("."),
                };
                if !dir.is_dir() {
                    return Err(wrong(&dir, "there is no such directory"));
                }
                let root = match name == "." {
                    true => Root::Under(own.to_owned()),
                    false => Root::Named(own.to_owned()),
                };
                Ok(Place { dir, root })
            }
        }
    }
}

fn wrong(path: &Path, problem: &'static str) -> FilesError {
    FilesError::Target { path: path.to_owned(), problem }
}
