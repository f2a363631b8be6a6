//! SHA-256 digests of files and of named inputs.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// A SHA-256 digest; its text is 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest and the size in bytes of a file's content.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of_file(path: &Path) -> io::Result<(Self, u64)> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 256 * 1024];
        let mut size = 0;
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Ok((Self(hasher.finalize().into()), size));
            }
            hasher.update(&buffer[..read]);
            size += read as u64;
        }
    }

    /// The first eight bytes, which ids are made of.
    pub fn prefix(&self) -> [u8; 8] {
        let mut prefix = [0; 8];
        prefix.copy_from_slice(&self.0[..8]);
        prefix
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a SHA-256 digest: expected 64 hexadecimal digits");
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(bad()) };
        let nibble = |digit: u8| char::from(digit).to_digit(16).ok_or_else(bad);
        let bytes = pairs
            .iter()
            .map(|[high, low]| Ok((nibble(*high)? * 16 + nibble(*low)?) as u8))
            .collect::<Result<Vec<u8>, String>>()?;
        bytes.try_into().map(Self).map_err(|_| bad())
    }
}

mvm_core::serde_as_text!(Digest);

/// The digest of bytes that come in pieces.
#[derive(Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    /// Adds the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub(crate) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// A digest over several named inputs, so that no two different sets of inputs collide by
/// concatenation.
#[derive(Default)]
pub struct InputDigest(Sha256);

impl InputDigest {
    /// Starts a digest for one purpose.
    pub fn new(purpose: &str) -> Self {
        let mut digest = Self::default();
        digest.add("purpose", purpose.as_bytes());
        digest
    }

    /// Adds one input.
    pub fn add(&mut self, name: &str, value: &[u8]) -> &mut Self {
        for part in [name.as_bytes(), value] {
            self.0.update((part.len() as u64).to_be_bytes());
            self.0.update(part);
        }
        self
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_round_trip_through_text() {
        let digest = Digest::of(b"abc");
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
        for bad in ["", "ab", &text[1..], &text.replace('b', "x"), &format!("{text}00")] {
            assert!(bad.parse::<Digest>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn moving_a_byte_from_one_input_to_the_next_changes_the_digest() {
        let of = |pairs: &[(&str, &str)]| {
            let mut digest = InputDigest::new("test");
            for (name, value) in pairs {
                digest.add(name, value.as_bytes());
            }
            digest.finish()
        };
        assert_ne!(of(&[("a", "bc"), ("d", "e")]), of(&[("a", "b"), ("cd", "e")]));
        assert_ne!(of(&[("a", "b")]), of(&[("a", "b"), ("", "")]));
        assert_eq!(of(&[("a", "b")]), of(&[("a", "b")]));
    }
}
