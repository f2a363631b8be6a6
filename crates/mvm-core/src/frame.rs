//! One framing for every byte stream: host to guest agent, and command line to node agent.
//!
//! A frame is
//!
//! ```text
//!  0        4        8      9      12       16            16+len   20+len
//!  | tag    | stream | kind | zero | len    | body …      | tag    |
//! ```
//!
//! with big-endian integers. The tag is drawn anew for each session and stands at both ends of a
//! frame: a byte pipe that never closes (QEMU's virtio-serial port) may cut a frame in the middle
//! when one end dies, and whatever is glued onto the rest must not be delivered as a frame. A
//! decoder that meets a wrong tag reports [`FrameError::OutOfSync`]; the session above it resyncs.
//!
//! Sans-I/O: bytes are pushed in and frames pulled out. Memory is bounded by `max_body`.

/// Bytes before the body.
pub const HEADER_LEN: usize = 16;
/// Bytes after the body.
pub const TRAILER_LEN: usize = 4;

/// The body of a frame of this kind is a JSON message.
pub const KIND_MESSAGE: u8 = 0;
/// The body is raw bytes for the peer's standard input.
pub const KIND_STDIN: u8 = 1;
/// The body is raw bytes of standard output, or of a log.
pub const KIND_STDOUT: u8 = 2;
/// The body is raw bytes of standard error.
pub const KIND_STDERR: u8 = 3;
/// The body is a part of a JSON message that is longer than a frame, and more of it follows.
pub const KIND_PART: u8 = 4;
/// The body is the last part of such a message.
pub const KIND_LAST_PART: u8 = 5;

/// One frame, without its session tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The stream that the frame belongs to; 0 is the session itself.
    pub stream: u32,
    /// One of the `KIND_` constants; a receiver ignores kinds that it does not know.
    pub kind: u8,
    /// The content.
    pub body: Vec<u8>,
}

/// Why a byte stream is not a sequence of frames of this session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A header or trailer does not carry the session's tag.
    #[error("out of sync: expected session tag {expected:08x}, found {found:08x}")]
    OutOfSync {
        /// The session's tag.
        expected: u32,
        /// What stood there.
        found: u32,
    },
    /// A header announces a body over the limit.
    #[error("a frame of {len} bytes is over the limit of {max}")]
    TooLarge {
        /// The announced length in bytes.
        len: u32,
        /// The limit in bytes.
        max: u32,
    },
}

/// Appends the encoding of a frame to `out`.
///
/// # Panics
/// If the body is over 4 GiB, which no caller's limit allows.
pub fn encode(tag: u32, stream: u32, kind: u8, body: &[u8], out: &mut Vec<u8>) {
    out.reserve(HEADER_LEN + body.len() + TRAILER_LEN);
    let Ok(()) = encode_with(tag, stream, kind, out, |out| {
        out.extend_from_slice(body);
        Ok::<_, std::convert::Infallible>(())
    });
}

/// Appends a frame whose body is appended by `write`, so that a large body is never copied.
///
/// # Errors
/// Those of `write`; `out` is then as it was.
///
/// # Panics
/// If the body is over 4 GiB, which no caller's limit allows.
pub fn encode_with<E>(
    tag: u32,
    stream: u32,
    kind: u8,
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let start = out.len();
    out.extend_from_slice(&tag.to_be_bytes());
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[kind, 0, 0, 0]);
    out.extend_from_slice(&[0; 4]);
    let body = out.len();
    write(out).inspect_err(|_| out.truncate(start))?;
    let len = u32::try_from(out.len() - body).expect("callers keep bodies under 4 GiB");
    out[body - 4..body].copy_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&tag.to_be_bytes());
    Ok(())
}

/// Turns pushed bytes into frames.
#[derive(Debug)]
pub struct Decoder {
    tag: u32,
    max_body: u32,
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder for the session with this tag; bodies over `max_body` bytes are refused.
    pub fn new(tag: u32, max_body: u32) -> Self {
        Self { tag, max_body, buffer: Vec::new(), start: 0 }
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// The stream is not (or no longer) this session's; the decoder must be thrown away, and
    /// [`Decoder::into_rest`] gives the bytes in which to look for a new session.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let bytes = &self.buffer[self.start..];
        if bytes.len() < 4 {
            return Ok(None);
        }
        let word = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if word(0) != self.tag {
            return Err(FrameError::OutOfSync { expected: self.tag, found: word(0) });
        }
        if bytes.len() < HEADER_LEN {
            return Ok(None);
        }
        let len = word(12);
        if len > self.max_body {
            return Err(FrameError::TooLarge { len, max: self.max_body });
        }
        let body_end = HEADER_LEN + len as usize;
        let end = body_end + TRAILER_LEN;
        if bytes.len() < end {
            self.buffer.reserve(end - (self.buffer.len() - self.start));
            return Ok(None);
        }
        if word(body_end) != self.tag {
            return Err(FrameError::OutOfSync { expected: self.tag, found: word(body_end) });
        }
        let (stream, kind) = (word(4), bytes[8]);
        let body = if self.buffer.len() == end {
            // Nothing else is there: the frame keeps the buffer, and a large body is not copied.
            let mut body = std::mem::take(&mut self.buffer);
            body.truncate(body_end);
            body.drain(..HEADER_LEN);
            body
        } else {
            let body = bytes[HEADER_LEN..body_end].to_vec();
            self.start += end;
            body
        };
        Ok(Some(Frame { stream, kind, body }))
    }

    /// The bytes that were pushed and not returned as frames.
    pub fn into_rest(self) -> Vec<u8> {
        let mut rest = self.buffer;
        rest.drain(..self.start);
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
        let mut found = Vec::new();
        while let Some(frame) = decoder.next_frame()? {
            found.push(frame);
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8),
            cut in 1usize..64,
            tag: u32,
        ) {
            let mut bytes = Vec::new();
            for (i, body) in bodies.iter().enumerate() {
                encode(tag, i as u32, 2, body, &mut bytes);
            }
            let mut decoder = Decoder::new(tag, 300);
            let mut found = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                found.extend(frames(&mut decoder).unwrap());
            }
            prop_assert_eq!(found.len(), bodies.len());
            for (i, (frame, body)) in found.iter().zip(&bodies).enumerate() {
                prop_assert_eq!(frame.stream, i as u32);
                prop_assert_eq!(&frame.body, body);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic_or_grow_the_buffer(bytes: Vec<u8>, tag: u32) {
            let mut decoder = Decoder::new(tag, 64);
            decoder.push(&bytes);
            let _ = frames(&mut decoder);
            prop_assert!(decoder.into_rest().len() <= bytes.len());
        }

        #[test]
        fn a_cut_frame_is_never_completed_by_foreign_bytes(
            body in proptest::collection::vec(any::<u8>(), 1..200),
            keep in 1usize..200,
        ) {
            let mut bytes = Vec::new();
            encode(7, 1, 1, &body, &mut bytes);
            bytes.truncate(keep.min(bytes.len() - 1));
            bytes.resize(1024, 0);
            let mut decoder = Decoder::new(7, 200);
            decoder.push(&bytes);
            prop_assert!(frames(&mut decoder).is_err());
        }
    }

    #[test]
    fn an_oversized_body_is_refused_from_its_header_alone() {
        let mut bytes = Vec::new();
        encode(1, 0, 0, &[0; 100], &mut bytes);
        let mut decoder = Decoder::new(1, 99);
        decoder.push(&bytes[..HEADER_LEN]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLarge { len: 100, max: 99 }));
    }
}
