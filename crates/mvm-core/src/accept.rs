//! The guest's end of a byte stream: finds the host's preambles and decodes the sessions' frames.
//!
//! Sans-I/O, so that the guest agent and the simulated guest resynchronise in the same way.
//!
//! ```text
//!              preamble                    wrong tag, oversized frame
//!  Scanning ──────────────> Open ─────────────────────────────────────> Scanning
//! ```

use crate::frame::{Decoder, Frame, FrameError};
use crate::guest::{GUEST_MAGIC, HOST_MAGIC, MAX_BODY, MAX_VERSION, MIN_VERSION, Preamble};

/// What came out of the byte stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// A host opens a session: every stream of an earlier one has ended.
    Session(Preamble),
    /// A frame of the open session.
    Frame(Frame),
    /// The open session cannot be followed any further.
    Lost(FrameError),
}

/// Turns received bytes into sessions and frames.
#[derive(Debug)]
pub struct Acceptor {
    state: State,
}

#[derive(Debug)]
enum State {
    Scanning(Vec<u8>),
    Open(Decoder),
}

impl Default for Acceptor {
    fn default() -> Self {
        Self { state: State::Scanning(Vec::new()) }
    }
}

impl Acceptor {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::Scanning(buffer) => buffer.extend_from_slice(bytes),
            State::Open(decoder) => decoder.push(bytes),
        }
    }

    /// What comes next in the bytes so far, or `None` until more are pushed.
    pub fn next_item(&mut self) -> Option<Accepted> {
        match &mut self.state {
            State::Scanning(buffer) => loop {
                let preamble = Preamble::scan(buffer, HOST_MAGIC, None)?;
                // The bytes that flush a cut frame would decode as frames of session 0.
                if preamble.tag() == 0 {
                    continue;
                }
                let mut decoder = Decoder::new(preamble.tag(), MAX_BODY);
                decoder.push(buffer);
                self.state = State::Open(decoder);
                return Some(Accepted::Session(preamble));
            },
            State::Open(decoder) => match decoder.next_frame() {
                Ok(frame) => frame.map(Accepted::Frame),
                Err(error) => {
                    let decoder = std::mem::replace(decoder, Decoder::new(0, 0));
                    self.state = State::Scanning(decoder.into_rest());
                    Some(Accepted::Lost(error))
                }
            },
        }
    }
}

/// The guest's answer to a host's preamble. Its version is 0 if the two have none in common: then
/// the guest serves nothing in this session.
pub fn answer(host: &Preamble) -> Preamble {
    let version = host.max_version.min(MAX_VERSION);
    let is_common = version >= MIN_VERSION && version >= host.version;
    Preamble {
        magic: GUEST_MAGIC,
        nonce: host.nonce,
        version: if is_common { version } else { 0 },
        max_version: MAX_VERSION,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;
    use crate::guest::FLUSH_LEN;
    use proptest::prelude::*;

    fn host(first: u8) -> Preamble {
        Preamble { magic: HOST_MAGIC, nonce: [first; 16], version: 1, max_version: 1 }
    }

    fn items(acceptor: &mut Acceptor, bytes: &[u8]) -> Vec<Accepted> {
        acceptor.push(bytes);
        std::iter::from_fn(|| acceptor.next_item()).collect()
    }

    proptest! {
        #[test]
        fn a_session_cut_anywhere_is_followed_by_the_next(cut in 0usize..600, len in 0usize..400) {
            let mut bytes = host(7).encode().to_vec();
            frame::encode(host(7).tag(), 1, 1, &vec![1; len], &mut bytes);
            bytes.truncate(cut.max(32));
            bytes.extend(vec![0; FLUSH_LEN]);
            bytes.extend(host(9).encode());
            frame::encode(host(9).tag(), 4, 0, b"{}", &mut bytes);
            let found = items(&mut Acceptor::default(), &bytes);
            let last = Frame { stream: 4, kind: 0, body: b"{}".to_vec() };
            prop_assert_eq!(&found[found.len() - 2..],
                &[Accepted::Session(host(9)), Accepted::Frame(last)]);
        }

        #[test]
        fn arbitrary_bytes_never_panic_or_pile_up(pieces: Vec<Vec<u8>>) {
            let mut acceptor = Acceptor::default();
            for piece in pieces {
                items(&mut acceptor, &piece);
                if let State::Scanning(buffer) = &acceptor.state {
                    prop_assert!(buffer.len() < 32);
                }
            }
        }
    }

    #[test]
    fn a_preamble_whose_tag_is_zero_opens_nothing() {
        assert_eq!(items(&mut Acceptor::default(), &host(0).encode()), []);
    }

    #[test]
    fn an_oversized_frame_loses_the_session_and_not_the_stream() {
        let mut acceptor = Acceptor::default();
        items(&mut acceptor, &host(5).encode());
        let mut bytes = Vec::new();
        frame::encode(host(5).tag(), 1, 0, &vec![0; MAX_BODY as usize + 1], &mut bytes);
        bytes.extend(host(6).encode());
        let found = items(&mut acceptor, &bytes);
        assert!(matches!(found[0], Accepted::Lost(FrameError::TooLarge { .. })));
        assert_eq!(found[1], Accepted::Session(host(6)));
    }

    #[test]
    fn peers_without_a_common_version_say_so() {
        assert_eq!(answer(&host(1)).version, 1);
        let newer = Preamble { version: MAX_VERSION + 1, max_version: MAX_VERSION + 4, ..host(1) };
        assert_eq!(answer(&newer).version, 0);
        assert_eq!(answer(&newer).max_version, MAX_VERSION);
        let older = Preamble { version: 0, max_version: 0, ..host(1) };
        assert_eq!(answer(&older).version, 0);
    }
}
