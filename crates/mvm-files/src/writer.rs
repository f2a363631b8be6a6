//! Writing a file that has holes where its content has zeros.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};

/// Bytes that are read at once.
const BUFFER: usize = 256 * 1024;
/// Zeros that become a hole: a page, below which no filesystem makes one.
const HOLE: usize = 4096;

/// Writes everything that comes into an empty file; tells how many bytes it has.
///
/// # Errors
/// In this order: what comes cannot be read, or the file not be written.
pub(crate) fn fill(
    file: &mut File,
    from: &mut impl Read,
    buffer: &mut Vec<u8>,
) -> Result<u64, Broken> {
    buffer.resize(BUFFER, 0);
    let mut len = 0;
    let mut is_at_hole = false;
    loop {
        let count = match from.read(buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Broken::Source(error)),
        };
        len += count as u64;
        // Pieces of a stream rarely begin where pages do; what is all zeros is left out anyway.
        is_at_hole = count >= HOLE && is_zero(&buffer[..count]);
        let written = match is_at_hole {
            true => file.seek(SeekFrom::Start(len)).map(drop),
            false => file.write_all(&buffer[..count]),
        };
        written.map_err(Broken::File)?;
    }
    if is_at_hole {
        file.set_len(len).map_err(Broken::File)?;
    }
    Ok(len)
}

/// Compares by pages, which the C library does faster than a loop over bytes.
fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; HOLE] = [0; HOLE];
    bytes.chunks(HOLE).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Which side failed.
#[derive(Debug)]
pub(crate) enum Broken {
    /// What was to be written could not be read.
    Source(io::Error),
    /// The file.
    File(io::Error),
}
