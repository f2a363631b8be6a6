//! What an instance's main process wrote, kept on the host with the time at which it came.
//!
//! ```text
//!  instances/i-…/main.log     the newest records
//!  instances/i-…/main.log.1   those before, once the first file was full
//!
//!  record:  length (4)  source (1)  zero (3)  milliseconds since the Unix epoch (8)  bytes
//! ```
//!
//! The agent writes, one writer per instance, and reads for people, also when the microVM has long
//! ended. Bytes are kept as they came. A record that an agent's death cut off is dropped by the
//! next writer and not shown by a reader. Each boot and each file begins with a mark, which tells
//! how much of the guest's output is kept, so that a new session goes on exactly there. Only the
//! newest part of a flood is kept.

mod reader;
mod render;
mod writer;

use serde::{Deserialize, Serialize};

pub use reader::{LogReader, last_words};
pub use render::{Piece, Render, tail};
pub use writer::LogWriter;

/// Size at which a file is put aside, in bytes; twice that is kept at most.
pub const FILE_MAX: u64 = 4 * 1024 * 1024;

const HEADER_LEN: usize = 16;
/// Longest record in bytes: more than the protocol brings at once.
const RECORD_MAX: usize = 1024 * 1024;

/// Where a record is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// The main process's standard output.
    Stdout,
    /// The main process's standard error.
    Stderr,
    /// What mvm has to say about the process.
    Agent,
    /// A [`Mark`], for mvm itself.
    Mark,
}

impl LogSource {
    fn byte(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Agent => 3,
            Self::Mark => 4,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Stdout, Self::Stderr, Self::Agent, Self::Mark]
            .into_iter()
            .find(|source| source.byte() == byte)
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it is from.
    pub source: LogSource,
    /// When it came, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// What came.
    pub bytes: Vec<u8>,
}

/// How much of a boot's output is kept before this point, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    boot_id: String,
    stdout: u64,
    stderr: u64,
}

fn encode(source: LogSource, at_unix_ms: u64, bytes: &[u8], out: &mut Vec<u8>) {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.extend(len.to_le_bytes());
    out.extend([source.byte(), 0, 0, 0]);
    out.extend(at_unix_ms.to_le_bytes());
    out.extend_from_slice(bytes);
}

/// The record at the beginning of a buffer and its length there; `None` if it is not whole, or
/// none at all.
fn decode(buffer: &[u8]) -> Option<(Record, usize)> {
    let header = buffer.first_chunk::<HEADER_LEN>()?;
    let [l0, l1, l2, l3, source, _, _, _, at @ ..] = *header;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let source = LogSource::from_byte(source).filter(|_| len <= RECORD_MAX)?;
    let bytes = buffer.get(HEADER_LEN..HEADER_LEN + len)?.to_vec();
    let at_unix_ms = u64::from_le_bytes(at);
    Some((Record { source, at_unix_ms, bytes }, HEADER_LEN + len))
}

#[cfg(test)]
mod tests;
