//! The entries of a layer, as they are kept in the layer's index.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A name as the kernel has it: any bytes. As text, `%`, control characters and what is not UTF-8 are
/// `%XX`, so that a name in a message stays on its line.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    c if c == '%' || c.is_control() => {
                        let mut bytes = [0; 4];
                        let bytes = c.encode_utf8(&mut bytes).bytes();
                        bytes.into_iter().try_for_each(|byte| write!(f, "%{byte:02X}"))?;
                    }
                    c => write!(f, "{c}")?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "%{byte:02X}"))?;
        }
        Ok(())
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        bytes.to_string()
    }
}

impl From<String> for Bytes {
    fn from(text: String) -> Self {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((first, more)) = rest.split_first() {
            let escaped = (*first == b'%')
                .then(|| more.get(..2))
                .flatten()
                .and_then(|hex| std::str::from_utf8(hex).ok())
                .and_then(|hex| u8::from_str_radix(hex, 16).ok());
            bytes.push(escaped.unwrap_or(*first));
            rest = if escaped.is_some() { &more[2..] } else { more };
        }
        Self(bytes)
    }
}

/// Owner, mode, time and extended attributes of an inode.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) xattrs: BTreeMap<Bytes, Bytes>,
}

impl Meta {
    /// A directory that no layer describes.
    pub(crate) fn implied_dir(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// What an entry puts into the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Content {
    Directory,
    /// The number of the file with the content, among the layer's data files.
    File {
        data: u32,
        size: u64,
    },
    Symlink(Bytes),
    /// One more name for what an earlier entry, of this layer or below, put at this path.
    HardLink(Bytes),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// The path below the root, without a leading slash; empty for the root itself.
    pub(crate) path: Bytes,
    pub(crate) content: Content,
    pub(crate) meta: Meta,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_survive_as_text() {
        for bytes in [
            &b"plain/na\xc3\xafve"[..],
            b"100%",
            b"%41",
            b"\xff\x00 \xc3",
            b"%",
            b"%4",
            b"\x1b[2J\n\xc2\x9b",
        ] {
            let text = String::from(Bytes(bytes.to_vec()));
            assert_eq!(Bytes::from(text.clone()).0, bytes, "{text}");
        }
        assert_eq!(Bytes(b"a\xffb".to_vec()).to_string(), "a%FFb");
        assert_eq!(Bytes(b"\x1b[2J\n\xc2\x9b".to_vec()).to_string(), "%1B[2J%0A%C2%9B");
    }
}
