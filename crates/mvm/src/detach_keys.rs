//! The keys with which a person leaves a program in a guest without ending it.

use std::str::FromStr;

/// A sequence of keys; an empty one is never typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

impl Default for DetachKeys {
    fn default() -> Self {
        Self(vec![control(b'p'), control(b'q')])
    }
}

fn control(letter: u8) -> u8 {
    letter & 0x1f
}

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let key = |name: &str| match (name.strip_prefix("ctrl-"), name.as_bytes()) {
            (Some(key), _) => match key.to_ascii_lowercase().as_bytes() {
                [letter @ (b'a'..=b'z' | b'@' | b'[' | b'\\' | b']' | b'^' | b'_')] => {
                    Some(control(*letter))
                }
                _ => None,
            },
            (None, [byte @ 0x20..=0x7e]) => Some(*byte),
            _ => None,
        };
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.map(Self).ok_or_else(|| {
            "expected keys such as `ctrl-p,ctrl-q`, single characters, or `none`".to_owned()
        })
    }
}

/// What typed bytes come to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Typed {
    /// For the program.
    pub(crate) bytes: Vec<u8>,
    /// Whether the keys were typed behind them.
    pub(crate) is_detached: bool,
}

/// Looks for the keys in what is typed. The beginning of the sequence is held back until it is
/// known to be none.
#[derive(Debug)]
pub(crate) struct DetachFilter {
    keys: DetachKeys,
    held: usize,
}

impl DetachFilter {
    pub(crate) fn new(keys: DetachKeys) -> Self {
        Self { keys, held: 0 }
    }

    /// Takes typed bytes.
    pub(crate) fn take(&mut self, typed: &[u8]) -> Typed {
        let keys = &self.keys.0;
        let mut bytes = Vec::with_capacity(typed.len() + self.held);
        for &byte in typed {
            while self.held > 0 && keys.get(self.held) != Some(&byte) {
                // Of what is held, the first key is no beginning; perhaps a later one is.
                let held = self.held;
                self.held = (1..held)
                    .find(|&at| keys[at..held] == keys[..held - at])
                    .map_or(0, |at| held - at);
                bytes.extend_from_slice(&keys[..held - self.held]);
            }
            if keys.get(self.held) == Some(&byte) {
                self.held += 1;
                if self.held == keys.len() {
                    self.held = 0;
                    return Typed { bytes, is_detached: true };
                }
            } else {
                bytes.push(byte);
            }
        }
        Typed { bytes, is_detached: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(filter: &mut DetachFilter, bytes: &[u8]) -> (Vec<u8>, bool) {
        let Typed { bytes, is_detached } = filter.take(bytes);
        (bytes, is_detached)
    }

    #[test]
    fn the_keys_detach_in_one_piece_or_several() {
        let mut filter = DetachFilter::new(DetachKeys::default());
        assert_eq!(typed(&mut filter, b"ab\x10\x11c"), (b"ab".to_vec(), true));
        let mut filter = DetachFilter::new(DetachKeys::default());
        assert_eq!(typed(&mut filter, b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(typed(&mut filter, b"\x11"), (b"".to_vec(), true));
    }

    #[test]
    fn a_beginning_that_does_not_go_on_reaches_the_program() {
        let mut filter = DetachFilter::new(DetachKeys::default());
        assert_eq!(typed(&mut filter, b"\x10x\x11"), (b"\x10x\x11".to_vec(), false));
        assert_eq!(typed(&mut filter, b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(typed(&mut filter, b"\x11"), (b"".to_vec(), true));
        let mut filter = DetachFilter::new("a,a,b".parse().unwrap());
        assert_eq!(typed(&mut filter, b"aaab"), (b"a".to_vec(), true));
    }

    #[test]
    fn no_keys_never_detach() {
        let mut filter = DetachFilter::new("none".parse().unwrap());
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(typed(&mut filter, &all), (all, false));
    }

    #[test]
    fn keys_are_written_as_people_say_them() {
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys::default()));
        assert_eq!("ctrl-],x".parse(), Ok(DetachKeys(vec![0x1d, b'x'])));
        for bad in ["", "ctrl-", "ctrl-pp", "é", "pq", "ctrl-1"] {
            assert!(bad.parse::<DetachKeys>().is_err(), "{bad}");
        }
    }
}
