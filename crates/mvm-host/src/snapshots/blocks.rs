//! The digests of an image's blocks: of an image of which a part was written, only that part has to be
//! read to know what all of it is.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::BLOCK;
use crate::image::digest::Digest;
use crate::image::durable::{self, FileError};
use crate::vmm::memory::{are_zero, data_of};

/// The digest of one block; of one with nothing but zeroes, which is as good as a hole, zeroes.
type BlockDigest = [u8; 32];
const EMPTY: BlockDigest = [0; 32];

/// The digests of the blocks of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// The file's length.
    bytes: u64,
    digests: Vec<BlockDigest>,
}

impl Blocks {
    /// Those of a sparse file, whose holes cost nothing.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let count = usize::try_from(bytes.div_ceil(BLOCK as u64)).map_err(io::Error::other)?;
        let mut blocks = Self { bytes, digests: vec![EMPTY; count] };
        blocks.read_again(file, data_of(file)?.into_iter().map(|(from, to)| from..to))?;
        Ok(blocks)
    }

    /// Reads the blocks that these parts of the file, in ascending order, touch.
    pub(super) fn read_again(
        &mut self,
        file: &File,
        parts: impl IntoIterator<Item = Range<u64>>,
    ) -> io::Result<()> {
        let mut block = vec![0; BLOCK];
        let mut next = 0;
        for part in parts {
            let first = usize::try_from(part.start / BLOCK as u64).map_err(io::Error::other)?;
            let end = usize::try_from(part.end.div_ceil(BLOCK as u64)).map_err(io::Error::other)?;
            for number in first.max(next)..end {
                let at = (number * BLOCK) as u64;
                let left = self.bytes.saturating_sub(at);
                let length = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
                file.read_exact_at(&mut block[..length], at)?;
                let digest = self.digests.get_mut(number).ok_or(io::ErrorKind::InvalidInput)?;
                *digest = match are_zero(&block[..length]) {
                    true => EMPTY,
                    false => Sha256::digest(&block[..length]).into(),
                };
                next = number + 1;
            }
        }
        Ok(())
    }

    /// The digest of all of the file.
    pub(super) fn digest(&self) -> Digest {
        let hasher = Sha256::new().chain_update(self.digests.as_flattened());
        Digest::from(<[u8; 32]>::from(hasher.chain_update(self.bytes.to_le_bytes()).finalize()))
    }

    /// The length of the file in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads what [`Blocks::write_new`] wrote for a file of this length; nothing if it is not that.
    pub(super) fn read(path: &Path, bytes: u64) -> Option<Self> {
        let text = fs::read(path).ok()?;
        let (digests, rest) = text.as_chunks();
        let is_whole = digests.len() as u64 == bytes.div_ceil(BLOCK as u64) && rest.is_empty();
        is_whole.then(|| Self { bytes, digests: digests.to_vec() })
    }

    /// Writes them, durably, into a file that is not there yet.
    pub(super) fn write_new(&self, path: &Path) -> Result<(), FileError> {
        durable::write_new(path, self.digests.as_flattened(), 0o600)
    }
}
