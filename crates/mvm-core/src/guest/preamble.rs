//! What opens a session: the first bytes of either side, found in a byte stream with a past.

use super::PREAMBLE_LEN;

/// A preamble of either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// [`HOST_MAGIC`](super::HOST_MAGIC) or [`GUEST_MAGIC`](super::GUEST_MAGIC).
    pub magic: [u8; 8],
    /// Drawn by the host for this session.
    pub nonce: [u8; 16],
    /// The host's oldest version, or the version that the guest chose.
    pub version: u16,
    /// The sender's newest version.
    pub max_version: u16,
}

impl Preamble {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&self.magic);
        out[8..24].copy_from_slice(&self.nonce);
        out[24..26].copy_from_slice(&self.version.to_be_bytes());
        out[26..28].copy_from_slice(&self.max_version.to_be_bytes());
        out
    }

    /// The frame tag of the session that this preamble opens.
    pub fn tag(&self) -> u32 {
        u32::from_be_bytes([self.nonce[0], self.nonce[1], self.nonce[2], self.nonce[3]])
    }

    /// Finds the first whole preamble with this magic (and nonce, if given) in a buffer, drains the
    /// buffer through it, and drops bytes that cannot begin one.
    pub fn scan(buffer: &mut Vec<u8>, magic: [u8; 8], nonce: Option<[u8; 16]>) -> Option<Self> {
        let mut at = 0;
        while buffer.len() - at >= PREAMBLE_LEN {
            let bytes = &buffer[at..at + PREAMBLE_LEN];
            let found_nonce: [u8; 16] = bytes[8..24].try_into().unwrap_or_default();
            if bytes[..8] == magic && nonce.is_none_or(|nonce| nonce == found_nonce) {
                let preamble = Self {
                    magic,
                    nonce: found_nonce,
                    version: u16::from_be_bytes([bytes[24], bytes[25]]),
                    max_version: u16::from_be_bytes([bytes[26], bytes[27]]),
                };
                buffer.drain(..at + PREAMBLE_LEN);
                return Some(preamble);
            }
            at += 1;
        }
        buffer.drain(..at);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GUEST_MAGIC, HOST_MAGIC};

    #[test]
    fn a_preamble_is_found_behind_and_between_garbage() {
        let preamble = Preamble { magic: GUEST_MAGIC, nonce: [9; 16], version: 1, max_version: 3 };
        let other = Preamble { nonce: [8; 16], ..preamble };
        let mut buffer = vec![0, 77, 86];
        buffer.extend(other.encode());
        buffer.extend([0; 100]);
        buffer.extend(preamble.encode());
        buffer.extend(b"after");
        assert_eq!(Preamble::scan(&mut buffer, GUEST_MAGIC, Some([9; 16])), Some(preamble));
        assert_eq!(buffer, b"after");
    }

    #[test]
    fn a_preamble_in_pieces_is_found_and_garbage_does_not_pile_up() {
        let preamble = Preamble { magic: HOST_MAGIC, nonce: [3; 16], version: 1, max_version: 1 };
        let mut bytes = vec![0; 1000];
        bytes.extend(preamble.encode());
        let mut buffer = Vec::new();
        let mut found = None;
        for piece in bytes.chunks(7) {
            buffer.extend(piece);
            found = found.or(Preamble::scan(&mut buffer, HOST_MAGIC, None));
            assert!(buffer.len() < PREAMBLE_LEN + 7);
        }
        assert_eq!(found, Some(preamble));
    }
}
