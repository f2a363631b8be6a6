//! Why talking to a guest failed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::credit::CreditError;
use mvm_core::frame::FrameError;
use mvm_core::guest::{Feature, GuestError};

/// Why a session, or one request in it, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionError {
    /// The guest did not answer in time. Only the request is over, the session is not.
    #[error("the guest did not answer `{request}` within {limit:?}")]
    Timeout {
        /// What was asked.
        request: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The guest refused or failed the request. Only the request is over.
    #[error("the guest failed `{request}`")]
    Guest {
        /// What was asked.
        request: &'static str,
        /// What the guest says.
        #[source]
        error: GuestError,
    },
    /// The request is larger than a frame. It was not sent.
    #[error("the request `{request}` of {len} bytes is over the limit of {max}")]
    TooLarge {
        /// What was to be asked.
        request: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// Too many streams are open. The request was not sent.
    #[error("{max} streams to the guest are open already")]
    Limit {
        /// As many as there may be of the kind.
        max: usize,
    },
    /// The guest agent is older than what is asked for. The request was not sent.
    #[error("its guest agent is of an earlier version ({version}) without `{feature}`")]
    Missing {
        /// What it does not have.
        feature: Feature,
        /// Its version.
        version: String,
    },
    /// The program runs on without the host, and so its output and end are not known.
    #[error("the program was detached")]
    Detached,
    /// More output came than the caller wants to hold.
    #[error("the program's output is over {max} bytes")]
    TooMuchOutput {
        /// The caller's limit in bytes.
        max: usize,
    },
    /// Data for a standard input that was not asked for, or is closed.
    #[error("the program's standard input is not open")]
    InputClosed,
    /// The byte stream ended.
    #[error("the byte stream to the guest ended")]
    Closed,
    /// The byte stream failed.
    #[error("the byte stream to the guest failed")]
    Io(#[source] Arc<io::Error>),
    /// Host and guest have no protocol version in common.
    #[error("the guest agent speaks protocol versions up to {guest_max}, this host none of them")]
    Version {
        /// The guest's newest version.
        guest_max: u16,
    },
    /// The guest sent something that is no frame of this session.
    #[error("the guest broke the framing")]
    Frame(#[from] FrameError),
    /// The guest sent data without credit, or returned credit that was not spent.
    #[error("the guest broke the flow control of stream {stream}")]
    Credit {
        /// The stream.
        stream: u32,
        /// How.
        #[source]
        error: CreditError,
    },
    /// The guest sent a message that makes no sense where it came.
    #[error("the guest broke the protocol: {problem}")]
    Protocol {
        /// What came.
        problem: String,
    },
}

impl SessionError {
    pub(super) fn protocol(problem: impl Into<String>) -> Self {
        Self::Protocol { problem: problem.into() }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(Arc::new(error)),
        }
    }
}
