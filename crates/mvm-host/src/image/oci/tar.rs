//! Reads a layer's tar stream, which nobody vouches for: every length is bounded before it is
//! believed.
//!
//! It understands ustar, GNU long names, pax records (names, sizes, times, owners, extended
//! attributes) and the sparse formats of GNU tar (old, 0.1 and 1.0). It never writes anything.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::limits::{MAX_HEADER, MAX_PATH, MAX_SPARSE_PARTS};

const BLOCK: usize = 512;
/// Attributes that describe the machine that made the layer, not the image.
const FOREIGN_XATTRS: [&[u8]; 3] = [b"security.selinux", b"system.nfs4_acl", b"trusted.overlay."];

/// Why a stream is not a usable tar archive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// It cannot be read or decompressed, or ends too early.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// A header makes no sense.
    #[error("entry `{entry}` {problem}")]
    Malformed {
        /// The entry's name, as far as it is known.
        entry: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry, without its content.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Target of a symbolic or hard link.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The file's size, holes included.
    pub(crate) size: u64,
    /// Where the content's parts go, as offset and length; `None` if the content is all there.
    pub(crate) parts: Option<Vec<(u64, u64)>>,
}

impl Header {
    pub(crate) fn name(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// Reads entries one after the other; the content of each is read before the next.
pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes of the current entry's content that were not read.
    content: u64,
    /// Zero bytes that fill the last block of the content.
    padding: u64,
    global: Records,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, content: 0, padding: 0, global: Records::new() }
    }

    /// The stream itself.
    pub(crate) fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The stream behind the last entry that was read.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// Reads some of the current entry's content; 0 at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(truncated());
        }
        self.content -= read as u64;
        Ok(read)
    }

    /// The next entry, or `None` at the archive's end.
    pub(crate) fn next(&mut self) -> Result<Option<Header>, TarError> {
        let mut records = Records::new();
        let (mut long_path, mut long_link) = (None, None);
        loop {
            self.skip_content()?;
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? {
                return Ok(None);
            }
            let header = tar::Header::from_byte_slice(&block);
            let malformed = |problem| TarError::Malformed {
                entry: String::from_utf8_lossy(&header.path_bytes()).into_owned(),
                problem,
            };
            if header.cksum().ok() != Some(checksum(&block)) {
                return Err(malformed("has a wrong checksum"));
            }
            let mut size = header.entry_size().map_err(|_| malformed("has no valid size"))?;
            let flag = block[156];
            if matches!(flag, b'x' | b'g' | b'L' | b'K') {
                self.start_content(size);
                let text = self.small_content(size).map_err(|error| match error {
                    None => malformed("has a longer header than any image needs"),
                    Some(error) => error.into(),
                })?;
                let parsed = match flag {
                    b'x' => parse_records(&text, &mut records),
                    b'g' => parse_records(&text, &mut self.global),
                    _ => {
                        let long = if flag == b'L' { &mut long_path } else { &mut long_link };
                        *long = Some(until_nul(&text));
                        Some(())
                    }
                };
                parsed.ok_or_else(|| malformed("has a malformed extended header"))?;
                continue;
            }
            for (name, value) in &self.global {
                records.entry(name.clone()).or_insert_with(|| value.clone());
            }
            if let Some(value) = records.get(&b"size"[..]) {
                size = number(value).ok_or_else(|| malformed("has no valid size"))?;
            }
            let mut entry = Header {
                path: long_path.unwrap_or_else(|| header.path_bytes().into_owned()),
                kind: Kind::File,
                link: long_link.unwrap_or_else(|| {
                    header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default()
                }),
                mode: header.mode().map_err(|_| malformed("has no valid mode"))? & 0o7777,
                uid: id(header.uid()).ok_or_else(|| malformed("has no valid owner"))?,
                gid: id(header.gid()).ok_or_else(|| malformed("has no valid group"))?,
                mtime_s: header.mtime().unwrap_or(0).try_into().unwrap_or(0),
                mtime_ns: 0,
                device: (0, 0),
                xattrs: BTreeMap::new(),
                size,
                parts: None,
            };
            apply_records(&records, &mut entry).map_err(malformed)?;
            entry.kind = match flag {
                b'0' | 0 | b'7' if entry.path.ends_with(b"/") => Kind::Directory,
                b'0' | 0 | b'7' | b'S' => Kind::File,
                b'1' => Kind::HardLink,
                b'2' => Kind::Symlink,
                b'3' => Kind::CharDevice,
                b'4' => Kind::BlockDevice,
                b'5' => Kind::Directory,
                b'6' => Kind::Fifo,
                _ => return Err(malformed("is of an unknown type")),
            };
            if entry.path.len() > MAX_PATH || entry.link.len() > MAX_PATH {
                return Err(malformed("has a longer name than a file can have"));
            }
            // Only files have content, whatever else the header claims.
            self.start_content(if entry.kind == Kind::File { size } else { 0 });
            if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
                let part = |part: io::Result<Option<u32>>| part.ok().flatten();
                let device = part(header.device_major()).zip(part(header.device_minor()));
                entry.device = device.ok_or_else(|| malformed("has no device number"))?;
            }
            if entry.kind == Kind::File {
                let sparse = self.sparse(flag, &block, &records, &mut entry)?;
                sparse.ok_or_else(|| malformed("has a malformed map of holes"))?;
            }
            return Ok(Some(entry));
        }
    }

    fn start_content(&mut self, size: u64) {
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    fn skip_content(&mut self) -> io::Result<()> {
        let content = std::mem::take(&mut self.content);
        let padding = std::mem::take(&mut self.padding);
        let skipped = io::copy(
            &mut (&mut self.inner).take(content.saturating_add(padding)),
            &mut io::sink(),
        )?;
        // Some writers leave out what follows the last entry's content.
        if skipped < content { Err(truncated()) } else { Ok(()) }
    }

    /// One header; `false` at the archive's end, which is a block of zeroes or the stream's end.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(truncated()),
                read => filled += read,
            }
        }
        Ok(block.iter().any(|byte| *byte != 0))
    }

    /// The whole content of an entry that describes another one; `Err(None)` if it is too large.
    fn small_content(&mut self, size: u64) -> Result<Vec<u8>, Option<io::Error>> {
        if size > MAX_HEADER {
            return Err(None);
        }
        let mut content = vec![0; size as usize];
        self.inner.read_exact(&mut content).map_err(Some)?;
        self.content = 0;
        Ok(content)
    }

    /// Fills in where the parts of a sparse file go; `None` if that makes no sense.
    fn sparse(
        &mut self,
        flag: u8,
        block: &[u8; BLOCK],
        records: &Records,
        entry: &mut Header,
    ) -> Result<Option<()>, TarError> {
        let record = |name: &str| records.get(name.as_bytes()).map(Vec::as_slice);
        let parts = if flag == b'S' {
            let Some(real_size) = tar_number(&block[483..495]) else { return Ok(None) };
            entry.size = real_size;
            self.old_gnu_parts(block)?
        } else if let Some(map) = record("GNU.sparse.map") {
            let Some(size) = record("GNU.sparse.size").and_then(number) else { return Ok(None) };
            entry.size = size;
            let numbers: Option<Vec<u64>> = map.split(|byte| *byte == b',').map(number).collect();
            numbers.and_then(|numbers| pairs(&numbers))
        } else if record("GNU.sparse.major") == Some(b"1") {
            let Some(size) = record("GNU.sparse.realsize").and_then(number) else {
                return Ok(None);
            };
            entry.size = size;
            self.pax_parts()?
        } else if records.keys().any(|name| name.starts_with(b"GNU.sparse.")) {
            None
        } else {
            return Ok(Some(()));
        };
        let Some(parts) = parts else { return Ok(None) };
        if let Some(name) = record("GNU.sparse.name") {
            entry.path = name.to_vec();
        }
        let mut end = 0;
        let mut data: u64 = 0;
        for (offset, length) in &parts {
            let Some(next) = offset.checked_add(*length) else { return Ok(None) };
            if *offset < end || next > entry.size {
                return Ok(None);
            }
            end = next;
            data += length;
        }
        entry.parts = Some(parts);
        Ok((data == self.content).then_some(()))
    }

    /// The map of the old GNU format: in the header, and in blocks behind it.
    fn old_gnu_parts(&mut self, block: &[u8; BLOCK]) -> Result<Option<Vec<(u64, u64)>>, TarError> {
        let mut parts = Vec::new();
        let mut add = |pairs: &[u8]| {
            for pair in pairs.chunks_exact(24) {
                if pair[0] == 0 {
                    return Some(());
                }
                parts.push((tar_number(&pair[..12])?, tar_number(&pair[12..])?));
            }
            Some(())
        };
        let mut sound = add(&block[386..482]);
        let mut more = block[482] != 0;
        let mut blocks = 0;
        while more && sound.is_some() && blocks < MAX_SPARSE_PARTS / 21 {
            let mut block = [0; BLOCK];
            self.inner.read_exact(&mut block)?;
            sound = add(&block[..504]);
            more = block[504] != 0;
            blocks += 1;
        }
        Ok(sound.filter(|()| !more).map(|()| parts))
    }

    /// The map of the pax format 1.0: decimal lines at the beginning of the content.
    fn pax_parts(&mut self) -> Result<Option<Vec<(u64, u64)>>, TarError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut line = Vec::new();
        loop {
            let mut block = [0; BLOCK];
            if self.content < BLOCK as u64 {
                return Ok(None);
            }
            self.inner.read_exact(&mut block)?;
            self.content -= BLOCK as u64;
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Ok(None);
                    }
                    continue;
                }
                let Some(value) = number(&line) else { return Ok(None) };
                line.clear();
                numbers.push(value);
                let count = numbers[0];
                if count > MAX_SPARSE_PARTS as u64 {
                    return Ok(None);
                }
                if numbers.len() as u64 == 1 + 2 * count {
                    return Ok(pairs(&numbers[1..]));
                }
            }
        }
    }
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early")
}

/// The sum of a header's bytes, with its own field taken as spaces.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..])
}

fn until_nul(text: &[u8]) -> Vec<u8> {
    text.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

fn id(field: io::Result<u64>) -> Option<u32> {
    field.ok().and_then(|id| u32::try_from(id).ok())
}

/// A decimal number in text.
fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// An octal or base-256 field of a header.
fn tar_number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len() - 8);
        let is_small = high[0] == 0x80 && high[1..].iter().all(|byte| *byte == 0);
        return is_small.then(|| u64::from_be_bytes(*low.first_chunk().unwrap_or(&[0; 8])));
    }
    let text = std::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches(|c| c == ' ' || c == '\0'), 8).ok()
}

fn pairs(numbers: &[u64]) -> Option<Vec<(u64, u64)>> {
    let (pairs, []) = numbers.as_chunks::<2>() else { return None };
    (pairs.len() <= MAX_SPARSE_PARTS)
        .then(|| pairs.iter().map(|[offset, length]| (*offset, *length)).collect())
}

/// `LENGTH NAME=VALUE\n` records.
fn parse_records(mut text: &[u8], records: &mut Records) -> Option<()> {
    while !text.is_empty() {
        let space = text.iter().position(|byte| *byte == b' ')?;
        let length = usize::try_from(number(&text[..space])?).ok()?;
        let record = text.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.insert(record[..equals].to_vec(), record[equals + 1..].to_vec());
        text = &text[length..];
    }
    Some(())
}

fn apply_records(records: &Records, entry: &mut Header) -> Result<(), &'static str> {
    for (name, value) in records {
        match name.as_slice() {
            b"path" => entry.path = value.clone(),
            b"linkpath" => entry.link = value.clone(),
            b"uid" => {
                entry.uid = id(number(value).ok_or_else(truncated)).ok_or("has no valid owner")?;
            }
            b"gid" => {
                entry.gid = id(number(value).ok_or_else(truncated)).ok_or("has no valid group")?;
            }
            b"mtime" => {
                (entry.mtime_s, entry.mtime_ns) = time(value).ok_or("has no valid time")?;
            }
            name => {
                let Some(xattr) = name.strip_prefix(b"SCHILY.xattr.") else { continue };
                if !FOREIGN_XATTRS.iter().any(|foreign| xattr.starts_with(foreign)) {
                    entry.xattrs.insert(xattr.to_vec(), value.clone());
                }
            }
        }
    }
    Ok(())
}

/// Seconds since 1970 with an optional fraction.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // A fraction goes away from zero, and the kernel counts it upwards.
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests;
