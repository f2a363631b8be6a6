//! Blobs on this machine: files, or pieces of archives, that are checked while they are read.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;

use super::limits::{BOMB_RATIO, BOMB_SIZE, MAX_LAYER_SIZE};
use crate::image::digest::{Digest, Hasher};

const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const XZ: &[u8] = b"\xfd7zXZ\0";
/// What is known by its first bytes and not read.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"BZh", "bzip2"),
    (b"LZIP", "lzip"),
    (b"\x04\x22\x4d\x18", "LZ4"),
    (b"\x89LZO\0", "lzop"),
    (b"\x5d\0\0", "lzma"),
    (b"\x1f\x9d", "compress"),
    (b"PK\x03\x04", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
];
/// Most memory that decompressing xz may take, in KiB: `xz -9` needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 256 * 1024;
const BUFFER: usize = 256 * 1024;

/// A blob that can be read now.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    /// The file that it is in, for errors.
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    /// Where it begins in the file.
    pub(crate) offset: u64,
    /// Its length in bytes.
    pub(crate) length: u64,
    /// What it has to hash to, if its source says so.
    pub(crate) digest: Option<Digest>,
}

impl Blob {
    /// A whole file.
    pub(crate) fn open(path: &Path, digest: Option<Digest>) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file: Arc::new(file), offset: 0, length, digest })
    }

    /// Its bytes as they are.
    pub(crate) fn reader(&self) -> Slice {
        let (file, at) = (self.file.clone(), self.offset);
        Slice { file, start: at, at, end: at.saturating_add(self.length) }
    }
}

/// A piece of a file; several may be read at once.
#[derive(Debug, Clone)]
pub(crate) struct Slice {
    file: Arc<File>,
    start: u64,
    at: u64,
    end: u64,
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => self.start.checked_add(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        match at {
            Some(at) if at >= self.start => {
                self.at = at;
                Ok(at - self.start)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Hashes what is read through it.
pub(crate) struct Hashing<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hasher: Hasher::default() }
    }

    /// Reads what is left, and gives the digest of everything and the reader inside.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, R)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.hasher.finish(), self.inner))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// A blob as it was before it was compressed. What it expands to is bounded.
pub(crate) enum Decompressed<R: Read> {
    Plain(BufReader<R>),
    Gzip(Box<MultiGzDecoder<BufReader<R>>>),
    Zstd(Box<Zstd<R>>),
    Xz(Box<lzma_rust2::XzReader<BufReader<R>>>),
}

/// Zstandard frames, one after the other; some tools put frames of their own between them.
pub(crate) struct Zstd<R: Read> {
    frame: Option<ruzstd::decoding::StreamingDecoder<BufReader<R>, ruzstd::decoding::FrameDecoder>>,
    between: Option<BufReader<R>>,
}

impl<R: Read> Decompressed<R> {
    /// Tells the compression by the first bytes: media types are not always right.
    pub(crate) fn new(inner: R) -> io::Result<Self> {
        let mut inner = BufReader::with_capacity(BUFFER, inner);
        let start = io::BufRead::fill_buf(&mut inner)?;
        if start.starts_with(GZIP) {
            return Ok(Self::Gzip(Box::new(MultiGzDecoder::new(inner))));
        }
        if start.starts_with(ZSTD) || is_skippable_zstd(start) {
            return Ok(Self::Zstd(Box::new(Zstd { frame: None, between: Some(inner) })));
        }
        if start.starts_with(XZ) {
            let decoder = lzma_rust2::XzReader::new_mem_limit(inner, true, XZ_MEMORY_KIB);
            return Ok(Self::Xz(Box::new(decoder)));
        }
        if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic)) {
            let problem = format!(
                "it is compressed with {name}, which mvm does not read: expected a tar archive, plain or with gzip, zstd or xz"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        }
        Ok(Self::Plain(inner))
    }

    /// The reader of the compressed bytes.
    pub(crate) fn into_inner(self) -> Option<R> {
        match self {
            Self::Plain(inner) => Some(inner.into_inner()),
            Self::Gzip(decoder) => Some(decoder.into_inner().into_inner()),
            Self::Xz(decoder) => Some(decoder.into_inner().into_inner()),
            Self::Zstd(zstd) => {
                let frame = zstd.frame.map(ruzstd::decoding::StreamingDecoder::into_inner);
                zstd.between.or(frame).map(BufReader::into_inner)
            }
        }
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(inner) => inner.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(zstd) => zstd.read(buffer),
            Self::Xz(decoder) => decoder.read(buffer),
        }
    }
}

fn is_skippable_zstd(start: &[u8]) -> bool {
    matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

impl<R: Read> Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                let read = frame.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    return Ok(read);
                }
                self.between = self.frame.take().map(|frame| frame.into_inner());
            }
            let Some(mut inner) = self.between.take() else { return Ok(0) };
            let start = io::BufRead::fill_buf(&mut inner)?;
            if start.is_empty() {
                self.between = Some(inner);
                return Ok(0);
            }
            if is_skippable_zstd(start) {
                let mut header = [0; 8];
                inner.read_exact(&mut header)?;
                let [_, _, _, _, a, b, c, d] = header;
                let length = u64::from(u32::from_le_bytes([a, b, c, d]));
                let skipped = io::copy(&mut (&mut inner).take(length), &mut io::sink())?;
                self.between = Some(inner);
                if skipped < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            let frame = ruzstd::decoding::StreamingDecoder::new(inner).map_err(io::Error::other)?;
            self.frame = Some(frame);
        }
    }
}

/// Zeroes are compared with in pieces of this size, in bytes.
const PIECE: usize = 4096;

/// Whether there is nothing but zeroes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PIECE).all(|piece| *piece == [0; PIECE][..piece.len()])
}

/// Refuses to give more than a sound layer of this compressed size has. Zeroes become holes and take no
/// space, so they count only for the size of a whole layer: `lastlog` of a large user id is a file of
/// gigabytes without a single entry.
pub(crate) struct Bounded<R> {
    inner: R,
    /// Bytes that are not zeroes.
    left: u64,
    /// All bytes.
    left_in_all: u64,
}

impl<R> Bounded<R> {
    pub(crate) fn new(inner: R, compressed: u64) -> Self {
        let most = compressed.saturating_mul(BOMB_RATIO).clamp(BOMB_SIZE, MAX_LAYER_SIZE);
        Self { inner, left: most, left_in_all: MAX_LAYER_SIZE }
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let pieces = buffer[..read].chunks(PIECE).filter(|piece| !is_zero(piece));
        let content: usize = pieces.map(<[u8]>::len).sum();
        let left = self.left.checked_sub(content as u64);
        match left.zip(self.left_in_all.checked_sub(read as u64)) {
            Some((left, in_all)) => (self.left, self.left_in_all) = (left, in_all),
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    "it expands to more than any sound layer of its size",
                ));
            }
        }
        Ok(read)
    }
}
