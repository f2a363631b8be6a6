//! Frames over any byte stream: JSON messages and raw data.

use mvm_core::frame::{self, Decoder, Frame, FrameError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The frame tag of this contract's first version.
pub const TAG: u32 = 0x6d76_6d01;
/// Largest frame body in bytes.
pub const MAX_BODY: u32 = 32 * 1024 * 1024;
/// Largest piece of raw data per frame, in bytes.
pub const DATA_PIECE: usize = 64 * 1024;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// Reading or writing failed.
    #[error("the connection to the agent broke")]
    Io(#[from] std::io::Error),
    /// The other side does not speak this contract.
    #[error("the other side does not speak this version's protocol")]
    Frame(#[from] FrameError),
    /// A message is not what was expected.
    #[error("the other side sent a message that does not parse")]
    Message(#[from] serde_json::Error),
    /// Something else came in the middle of a list.
    #[error("the agent sent something else in the middle of a list")]
    OtherPiece,
    /// The other side hung up in the middle.
    #[error("the agent hung up before it answered")]
    HungUp,
}

/// What arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A JSON message.
    Message(Vec<u8>),
    /// Raw data of one of the `KIND_` kinds.
    Data {
        /// The frame kind.
        kind: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

impl Item {
    /// Parses a message.
    ///
    /// # Errors
    /// It is data, or not the expected message.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConnectionError> {
        match self {
            Self::Message(body) => Ok(serde_json::from_slice(body)?),
            Self::Data { .. } => Err(ConnectionError::HungUp),
        }
    }
}

/// Both directions of a connection.
pub struct Connection {
    /// What arrives.
    pub read: ReadHalf,
    /// What is sent.
    pub write: WriteHalf,
}

/// The receiving direction.
pub struct ReadHalf {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    decoder: Decoder,
    buffer: Vec<u8>,
}

/// The sending direction.
pub struct WriteHalf {
    stream: Box<dyn AsyncWrite + Send + Unpin>,
    buffer: Vec<u8>,
}

impl Connection {
    /// A connection over a byte stream.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self {
            read: ReadHalf {
                stream: Box::new(read),
                decoder: Decoder::new(TAG, MAX_BODY),
                buffer: vec![0; DATA_PIECE],
            },
            write: WriteHalf { stream: Box::new(write), buffer: Vec::new() },
        }
    }
}

impl ReadHalf {
    /// The next item, or `None` after the other side hung up between frames.
    ///
    /// # Errors
    /// The connection broke, or carries something else.
    pub async fn next(&mut self) -> Result<Option<Item>, ConnectionError> {
        loop {
            if let Some(Frame { kind, body, .. }) = self.decoder.next_frame()? {
                return Ok(Some(match kind {
                    frame::KIND_MESSAGE => Item::Message(body),
                    kind => Item::Data { kind, bytes: body },
                }));
            }
            match self.stream.read(&mut self.buffer).await? {
                0 => return Ok(None),
                n => self.decoder.push(&self.buffer[..n]),
            }
        }
    }

    /// The next message, parsed.
    ///
    /// # Errors
    /// The connection broke, hung up, or carries something else.
    pub async fn message<T: DeserializeOwned>(&mut self) -> Result<T, ConnectionError> {
        self.next().await?.ok_or(ConnectionError::HungUp)?.parse()
    }
}

impl WriteHalf {
    /// Sends a message.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn message<T: Serialize>(&mut self, message: &T) -> Result<(), ConnectionError> {
        self.buffer.clear();
        frame::encode_with(TAG, 0, frame::KIND_MESSAGE, &mut self.buffer, |out| {
            serde_json::to_writer(out, message)
        })?;
        self.send().await
    }

    /// Sends raw data; an empty piece means that no more will come.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn data(&mut self, kind: u8, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.buffer.clear();
        frame::encode(TAG, 0, kind, bytes, &mut self.buffer);
        self.send().await
    }

    async fn send(&mut self) -> Result<(), ConnectionError> {
        self.stream.write_all(&self.buffer).await?;
        self.stream.flush().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Call, Reply};

    #[tokio::test]
    async fn messages_and_data_cross_an_in_memory_pipe() {
        let (a, b) = tokio::io::duplex(100);
        let (mut a, mut b) = (Connection::new(a), Connection::new(b));
        let bytes: Vec<u8> = (0..5000).map(|i| i as u8).collect();
        let sending = async {
            a.write.message(&Call::Node).await.unwrap();
            a.write.data(frame::KIND_STDIN, &bytes).await.unwrap();
        };
        let receiving = async {
            assert_eq!(b.read.message::<Call>().await.unwrap(), Call::Node);
            b.read.next().await.unwrap()
        };
        let ((), item) = tokio::join!(sending, receiving);
        assert_eq!(item, Some(Item::Data { kind: frame::KIND_STDIN, bytes }));
        drop(a);
        assert_eq!(b.read.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn something_else_on_the_socket_is_an_error() {
        let (mut a, b) = tokio::io::duplex(100);
        let mut b = Connection::new(b);
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let error = b.read.message::<Reply>().await.unwrap_err();
        assert!(matches!(error, ConnectionError::Frame(_)), "{error}");
    }
}
