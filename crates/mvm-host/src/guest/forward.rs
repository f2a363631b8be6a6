//! A connection to a socket in a guest, as its consumer holds it.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::GuestMessage;
use tokio::time::{Instant, timeout_at};

use super::error::SessionError;
use super::exec::ExecInput;
use super::session::Channel;
use super::streams::Item;

/// What happens to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardEvent {
    /// The socket in the guest accepted.
    Connected,
    /// It sent data.
    Data(Vec<u8>),
    /// It sends no more; it may still take some.
    Eof,
    /// Both directions have ended; the last event.
    Closed,
}

/// A connection to a socket in a guest. Dropping it closes the socket.
#[derive(Debug)]
pub struct Forward {
    events: ForwardEvents,
    input: ExecInput,
}

/// The half of a [`Forward`] that tells what comes. Dropping it closes the socket.
#[derive(Debug)]
pub struct ForwardEvents {
    channel: Arc<Channel>,
    is_over: bool,
    /// Until when the socket must have accepted.
    start: Option<(Instant, Duration)>,
}

impl Forward {
    pub(super) fn new(channel: Channel, limit: Duration) -> Self {
        let channel = Arc::new(channel);
        let input = ExecInput::of(channel.clone());
        let start = Some((Instant::now() + limit, limit));
        Self { events: ForwardEvents { channel, is_over: false, start }, input }
    }

    /// Splits it, so that one task can write while another reads. Closing or dropping the input
    /// closes the socket in that direction.
    pub fn split(self) -> (ForwardEvents, ExecInput) {
        (self.events, self.input)
    }
}

impl ForwardEvents {
    /// The next event; waits for it. The last one is [`ForwardEvent::Closed`] or an error, and then
    /// `None`. May be dropped while it waits, without losing an event.
    pub async fn next(&mut self) -> Option<Result<ForwardEvent, SessionError>> {
        if self.is_over {
            return None;
        }
        let item = match self.start {
            None => self.channel.next().await,
            Some((deadline, limit)) => match timeout_at(deadline, self.channel.next()).await {
                Ok(item) => item,
                Err(_) => Err(SessionError::Timeout { request: "forward", limit }),
            },
        };
        let event = item.and_then(|item| match item {
            Item::Data(_, data) => Ok(ForwardEvent::Data(data)),
            Item::Message(GuestMessage::Connected) => Ok(ForwardEvent::Connected),
            Item::Message(GuestMessage::Eof { .. }) => Ok(ForwardEvent::Eof),
            Item::Message(GuestMessage::Done) => Ok(ForwardEvent::Closed),
            Item::Message(GuestMessage::Error(error)) => {
                Err(SessionError::Guest { request: "forward", error })
            }
            Item::Message(other) => {
                Err(SessionError::protocol(format!("`forward` was answered by {other:?}")))
            }
        });
        self.start = None;
        if matches!(event, Ok(ForwardEvent::Closed) | Err(_)) {
            self.is_over = true;
            self.channel.close();
        }
        Some(event)
    }
}

impl Drop for ForwardEvents {
    fn drop(&mut self) {
        self.channel.close();
    }
}
