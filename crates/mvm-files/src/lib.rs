//! Files and trees as tar streams.
//!
//! `mvm cp` has one side of a copy in the command and the other in the guest agent, which is there
//! in images without a `tar`: both call this. [`pack()`] writes what a path holds, [`unpack()`] makes
//! it again at a [`Target`]. It starts no process, and what it is given to unpack may be hostile:
//! nothing is written outside the target, whatever the names and links in the stream.

mod error;
mod pack;
mod place;
mod times;
mod unpack;
mod writer;

pub use error::FilesError;
pub use pack::{pack, pack_into_pipe, source_name};
pub use place::Target;
pub use unpack::{Links, Options, Owners, unpack};

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// What was left out, such as devices and sockets: the first few paths.
    pub skipped: Vec<String>,
}

impl Summary {
    /// Paths that are kept of what was left out.
    const MOST_SKIPPED: usize = 20;

    fn skip(&mut self, path: impl Into<String>) {
        if self.skipped.len() < Self::MOST_SKIPPED {
            self.skipped.push(path.into());
        }
    }
}
