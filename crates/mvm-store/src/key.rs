//! The grammar of keys and prefixes, checked once at the door of every backend.

use crate::StoreError;

/// The longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 512;

/// What is wrong with a key or a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A key has no characters.
    #[error("it is empty")]
    Empty,
    /// A key exceeds [`MAX_KEY_BYTES`].
    #[error("it is longer than {MAX_KEY_BYTES} bytes")]
    TooLong,
    /// A leading, trailing or doubled `/`.
    #[error("it has an empty segment")]
    EmptySegment,
    /// A byte other than printable ASCII.
    #[error("it has a character other than printable ASCII without spaces")]
    Character,
    /// A prefix that could end within a segment.
    #[error("a prefix is empty or ends in `/`")]
    PrefixWithoutSlash,
}

/// Checks a key.
pub(crate) fn check_key(key: &str) -> Result<(), StoreError> {
    grammar(key).map_err(|reason| StoreError::InvalidKey { key: key.to_owned(), reason })
}

/// A prefix that follows the grammar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prefix(String);

impl Prefix {
    /// Checks a prefix.
    pub(crate) fn parse(prefix: &str) -> Result<Self, StoreError> {
        let checked = match prefix.strip_suffix('/') {
            None if prefix.is_empty() => Ok(()),
            None => Err(KeyError::PrefixWithoutSlash),
            Some(path) => grammar(path),
        };
        match checked {
            Ok(()) => Ok(Self(prefix.to_owned())),
            Err(reason) => Err(StoreError::InvalidKey { key: prefix.to_owned(), reason }),
        }
    }

    /// Whether `key` is below the prefix.
    pub(crate) fn covers(&self, key: &str) -> bool {
        key.starts_with(&self.0)
    }

    /// The first key that could be below the prefix.
    pub(crate) fn start(&self) -> &str {
        &self.0
    }

    /// The least string that is greater than every key below the prefix.
    pub(crate) fn end(&self) -> String {
        match self.0.strip_suffix('/') {
            // `0` is the character after `/`.
            Some(path) => format!("{path}0"),
            // Keys are printable ASCII, and 0x7f comes after all of that.
            None => "\u{7f}".to_owned(),
        }
    }
}

fn grammar(key: &str) -> Result<(), KeyError> {
    if key.is_empty() {
        return Err(KeyError::Empty);
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(KeyError::TooLong);
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(KeyError::Character);
    }
    if key.split('/').any(str::is_empty) {
        return Err(KeyError::EmptySegment);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_the_grammar() {
        for good in ["a", "a/b", "instances/demo/i-01", "x.y:z@1_2", &"k".repeat(512)] {
            assert!(check_key(good).is_ok(), "{good:?} was refused");
        }
        for (bad, why) in [
            ("", KeyError::Empty),
            ("/a", KeyError::EmptySegment),
            ("a/", KeyError::EmptySegment),
            ("a//b", KeyError::EmptySegment),
            ("a b", KeyError::Character),
            ("ä", KeyError::Character),
            ("a\u{7f}", KeyError::Character),
            (&"k".repeat(513), KeyError::TooLong),
        ] {
            assert_eq!(grammar(bad), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn a_prefix_covers_whole_segments_only() {
        let prefix = Prefix::parse("tenants/a/").unwrap();
        assert!(prefix.covers("tenants/a/b"));
        assert!(!prefix.covers("tenants/a"));
        assert!(!prefix.covers("tenants/ab"));
        assert!(Prefix::parse("tenants/a").is_err());
        assert!(Prefix::parse("/").is_err());
    }

    #[test]
    fn the_range_of_a_prefix_is_what_it_covers() {
        let keys = ["!", "a", "a!", "a/!", "a/b", "a/b/c", "a/~", "a0", "a~", "b", "~", "~/~"];
        for text in ["", "a/", "a/b/", "~/"] {
            let prefix = Prefix::parse(text).unwrap();
            let end = prefix.end();
            for key in keys {
                let in_range = prefix.start() <= key && key < end.as_str();
                assert_eq!(in_range, prefix.covers(key), "{text:?} and {key:?}");
            }
        }
    }
}
