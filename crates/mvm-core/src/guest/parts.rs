//! Messages of the host that are longer than a frame, put together from their parts.

use std::collections::BTreeMap;

use super::{ErrorKind, GuestError, LONGEST_MESSAGE};

/// The parts of messages whose last one has not come, by stream.
#[derive(Debug, Default)]
pub struct Parts {
    waiting: BTreeMap<u32, Vec<u8>>,
}

impl Parts {
    /// Keeps a part.
    ///
    /// # Errors
    /// More would be kept than the longest message has; what the stream had is dropped.
    pub fn push(&mut self, stream: u32, part: &[u8]) -> Result<(), GuestError> {
        let kept: usize = self.waiting.values().map(Vec::len).sum();
        if kept + part.len() > LONGEST_MESSAGE {
            self.waiting.remove(&stream);
            let message = format!("a message is longer than {LONGEST_MESSAGE} bytes");
            return Err(GuestError { kind: ErrorKind::Limit, message });
        }
        self.waiting.entry(stream).or_default().extend_from_slice(part);
        Ok(())
    }

    /// The whole message, once its last part has come.
    ///
    /// # Errors
    /// It is longer than a message can be.
    pub fn complete(&mut self, stream: u32, last: &[u8]) -> Result<Vec<u8>, GuestError> {
        self.push(stream, last)?;
        Ok(self.waiting.remove(&stream).unwrap_or_default())
    }

    /// Drops what a stream has: its host has given it up.
    pub fn forget(&mut self, stream: u32) {
        self.waiting.remove(&stream);
    }

    /// Drops everything: a session has ended.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_several_streams_are_joined_in_their_order() {
        let mut parts = Parts::default();
        parts.push(1, b"ab").unwrap();
        parts.push(2, b"12").unwrap();
        parts.push(1, b"c").unwrap();
        assert_eq!(parts.complete(1, b"d").unwrap(), b"abcd");
        assert_eq!(parts.complete(1, b"new").unwrap(), b"new");
        parts.forget(2);
        assert_eq!(parts.complete(2, b"3").unwrap(), b"3");
    }

    #[test]
    fn no_more_is_kept_than_one_message_has() {
        let mut parts = Parts::default();
        let half = vec![b'x'; LONGEST_MESSAGE / 2];
        parts.push(1, &half).unwrap();
        parts.push(2, &half).unwrap();
        let error = parts.push(2, b"y").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Limit);
        assert_eq!(parts.complete(1, &half).unwrap().len(), LONGEST_MESSAGE);
    }
}
