//! A guest's main process, as its consumer holds it.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame::{KIND_STDERR, KIND_STDIN};
use mvm_core::guest::{ExitStatus, GuestMessage, HostMessage, MainState, TerminalSize};
use tokio::time::timeout;

use super::error::SessionError;
use super::session::Channel;
use super::streams::Item;

/// What happens to a main process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MainEvent {
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended; the last event.
    Exit(ExitStatus),
}

/// What a guest's main process writes, and how it ends. Dropping it only ends the listening.
#[derive(Debug)]
pub struct MainEvents {
    channel: Arc<Channel>,
    is_over: bool,
}

/// The way to a guest's main process. Clones are the same way.
#[derive(Debug, Clone)]
pub struct MainInput {
    channel: Arc<Channel>,
}

/// Waits until the guest tells where its main process stands.
pub(super) async fn attach(
    channel: Channel,
    limit: Duration,
) -> Result<(MainState, MainEvents, MainInput), SessionError> {
    let answer = timeout(limit, channel.next());
    let answer = answer.await.map_err(|_| SessionError::Timeout { request: "main", limit })?;
    let state = match answer? {
        Item::Message(GuestMessage::Main(state)) => state,
        Item::Message(GuestMessage::Error(error)) => {
            return Err(SessionError::Guest { request: "main", error });
        }
        other => return Err(unexpected(&other)),
    };
    let channel = Arc::new(channel);
    let events = MainEvents { channel: channel.clone(), is_over: false };
    Ok((state, events, MainInput { channel }))
}

fn unexpected(item: &Item) -> SessionError {
    match item {
        Item::Data(..) => SessionError::protocol("data answers `main`"),
        Item::Message(other) => SessionError::protocol(format!("`main` was answered by {other:?}")),
    }
}

impl MainEvents {
    /// The next event; waits for it. The last one is [`MainEvent::Exit`] or an error, and then
    /// `None`. A process whose events are not taken has to wait when it has written enough. May be
    /// dropped while it waits, without losing an event.
    pub async fn next(&mut self) -> Option<Result<MainEvent, SessionError>> {
        if self.is_over {
            return None;
        }
        let event = match self.channel.next().await {
            Ok(Item::Data(KIND_STDERR, data)) => Ok(MainEvent::Stderr(data)),
            Ok(Item::Data(_, data)) => Ok(MainEvent::Stdout(data)),
            Ok(Item::Message(GuestMessage::Exit(status))) => Ok(MainEvent::Exit(status)),
            Ok(Item::Message(GuestMessage::Error(error))) => {
                Err(SessionError::Guest { request: "main", error })
            }
            Ok(other) => Err(unexpected(&other)),
            Err(error) => Err(error),
        };
        self.is_over = matches!(event, Ok(MainEvent::Exit(_)) | Err(_));
        Some(event)
    }
}

impl Drop for MainEvents {
    fn drop(&mut self) {
        self.channel.close();
    }
}

impl MainInput {
    /// Writes to the process's standard input; waits until the guest has taken enough to let all
    /// of it go.
    ///
    /// # Errors
    /// The process has ended, or the session has.
    pub async fn write_stdin(&self, mut data: &[u8]) -> Result<(), SessionError> {
        while !data.is_empty() {
            let sent = self.channel.send_stdin(data).await?;
            data = &data[sent..];
        }
        Ok(())
    }

    /// Closes the process's standard input behind what was written.
    ///
    /// # Errors
    /// The session is over.
    pub async fn close_stdin(&self) -> Result<(), SessionError> {
        self.tell("eof", &HostMessage::Eof { kind: KIND_STDIN }).await
    }

    /// Sends a signal, by its Linux number, to the process. One that has ended gets none.
    ///
    /// # Errors
    /// The session is over.
    pub async fn signal(&self, signal: i32) -> Result<(), SessionError> {
        self.tell("signal", &HostMessage::Signal { signal }).await
    }

    /// Gives the process's terminal another size.
    ///
    /// # Errors
    /// The session is over.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), SessionError> {
        self.tell("resize", &HostMessage::Resize(size)).await
    }

    async fn tell(&self, name: &'static str, message: &HostMessage) -> Result<(), SessionError> {
        match self.channel.is_open() {
            true => self.channel.send(name, message).await,
            false => Ok(()),
        }
    }
}
