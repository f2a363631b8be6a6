//! A program that runs in a guest, and the guest kernel's log, as their consumer holds them.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame::{KIND_STDERR, KIND_STDIN};
use mvm_core::guest::{ExitStatus, GuestMessage, HostMessage, TerminalSize};
use tokio::time::{Instant, timeout_at};

use super::error::SessionError;
use super::session::Channel;
use super::streams::Item;

/// What happens to a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended; the last event.
    Exit(ExitStatus),
    /// It runs on without the host, as was asked for; the last event.
    Detached,
}

/// What a program wrote and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub status: ExitStatus,
}

/// A program in a guest. Dropping it kills the program's process group.
#[derive(Debug)]
pub struct Exec {
    events: ExecEvents,
    input: ExecInput,
}

/// The half of an [`Exec`] that tells what happens. Dropping it kills the program's process group.
#[derive(Debug)]
pub struct ExecEvents {
    channel: Arc<Channel>,
    is_over: bool,
    /// Until when the program must have started.
    start: Option<(Instant, Duration)>,
}

/// The half of an [`Exec`] that feeds it. Dropping it closes the program's standard input.
#[derive(Debug)]
pub struct ExecInput {
    channel: Arc<Channel>,
    is_open: bool,
}

impl ExecInput {
    pub(super) fn of(channel: Arc<Channel>) -> Self {
        Self { channel, is_open: true }
    }
}

impl Exec {
    pub(super) fn new(channel: Channel, has_stdin: bool, start_limit: Duration) -> Self {
        let channel = Arc::new(channel);
        let input = ExecInput { channel: channel.clone(), is_open: has_stdin };
        let start = Some((Instant::now() + start_limit, start_limit));
        Self { events: ExecEvents { channel, is_over: false, start }, input }
    }

    /// The next event; see [`ExecEvents::next`].
    pub async fn next(&mut self) -> Option<Result<ExecEvent, SessionError>> {
        self.events.next().await
    }

    /// The half that feeds the program; see [`ExecInput`].
    pub fn input(&mut self) -> &mut ExecInput {
        &mut self.input
    }

    /// Splits it, so that one task can feed the program while another takes its events.
    pub fn split(self) -> (ExecEvents, ExecInput) {
        (self.events, self.input)
    }

    /// Closes standard input and takes all events, up to this many bytes of output.
    ///
    /// # Errors
    /// The program could not run, wrote more, or the session ended.
    pub async fn output(self, max: usize) -> Result<ExecOutput, SessionError> {
        let (mut events, input) = self.split();
        drop(input);
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = events.next().await {
            match event? {
                ExecEvent::Started { .. } => {}
                ExecEvent::Stdout(data) => stdout.extend(data),
                ExecEvent::Stderr(data) => stderr.extend(data),
                ExecEvent::Exit(status) => return Ok(ExecOutput { stdout, stderr, status }),
                ExecEvent::Detached => return Err(SessionError::Detached),
            }
            if stdout.len() + stderr.len() > max {
                return Err(SessionError::TooMuchOutput { max });
            }
        }
        Err(SessionError::Closed)
    }
}

impl ExecEvents {
    /// The next event; waits for it. The last one is [`ExecEvent::Exit`],
    /// [`ExecEvent::Detached`] or an error, and then `None`. A program whose events are not taken is stopped by its full pipe. May be dropped
    /// while it waits, without losing an event.
    pub async fn next(&mut self) -> Option<Result<ExecEvent, SessionError>> {
        if self.is_over {
            return None;
        }
        let channel = &self.channel;
        let next = async {
            loop {
                match channel.next().await {
                    // The program's end, which follows, says more.
                    Ok(Item::Message(GuestMessage::Eof { .. })) => {}
                    item => return item,
                }
            }
        };
        let item = match self.start {
            None => next.await,
            Some((deadline, limit)) => match timeout_at(deadline, next).await {
                Ok(item) => item,
                Err(_) => Err(SessionError::Timeout { request: "exec", limit }),
            },
        };
        let event = item.and_then(|item| match item {
            Item::Data(KIND_STDERR, data) => Ok(ExecEvent::Stderr(data)),
            Item::Data(_, data) => Ok(ExecEvent::Stdout(data)),
            Item::Message(GuestMessage::Started { pid }) => Ok(ExecEvent::Started { pid }),
            Item::Message(GuestMessage::Exit(status)) => Ok(ExecEvent::Exit(status)),
            Item::Message(GuestMessage::Done) => Ok(ExecEvent::Detached),
            Item::Message(GuestMessage::Error(error)) => {
                Err(SessionError::Guest { request: "exec", error })
            }
            Item::Message(other) => {
                Err(SessionError::protocol(format!("`exec` was answered by {other:?}")))
            }
        });
        self.start = None;
        if matches!(event, Ok(ExecEvent::Exit(_) | ExecEvent::Detached) | Err(_)) {
            self.is_over = true;
            self.channel.close();
        }
        Some(event)
    }
}

impl Drop for ExecEvents {
    fn drop(&mut self) {
        self.channel.close();
    }
}

impl ExecInput {
    /// Writes to the program's standard input; waits until the guest has taken enough to let all
    /// of it go. It may be dropped while it waits, and then some of it was written.
    ///
    /// # Errors
    /// Standard input was not asked for or is closed, the program has ended, or the session has.
    pub async fn write_stdin(&mut self, mut data: &[u8]) -> Result<(), SessionError> {
        if !self.is_open {
            return Err(SessionError::InputClosed);
        }
        while !data.is_empty() {
            let sent = self.channel.send_stdin(data).await?;
            data = &data[sent..];
        }
        Ok(())
    }

    /// Closes the program's standard input behind what was written.
    pub fn close_stdin(&mut self) {
        if std::mem::take(&mut self.is_open) && self.channel.is_open() {
            self.channel.send_last(&HostMessage::Eof { kind: KIND_STDIN });
        }
    }

    /// Sends a signal, by its Linux number, to the program's process. One that has ended gets none.
    ///
    /// # Errors
    /// The session is over.
    pub async fn signal(&self, signal: i32) -> Result<(), SessionError> {
        self.tell("signal", &HostMessage::Signal { signal }).await
    }

    /// Gives the program's terminal another size; a program without one takes no notice.
    ///
    /// # Errors
    /// The session is over.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), SessionError> {
        self.tell("resize", &HostMessage::Resize(size)).await
    }

    /// Lets the program run on without the host; [`ExecEvent::Detached`] tells that it does. The
    /// guest must have [`Feature::Detach`](mvm_core::guest::Feature::Detach).
    ///
    /// # Errors
    /// The session is over.
    pub async fn detach(&self) -> Result<(), SessionError> {
        self.tell("detach", &HostMessage::Detach).await
    }

    /// Says something to a program that runs; one that has ended is not told.
    async fn tell(&self, name: &'static str, message: &HostMessage) -> Result<(), SessionError> {
        match self.channel.is_open() {
            true => self.channel.send(name, message).await,
            false => Ok(()),
        }
    }
}

impl Drop for ExecInput {
    fn drop(&mut self) {
        self.close_stdin();
    }
}

/// The guest kernel's log, in pieces of text. Dropping it ends the request.
#[derive(Debug)]
pub struct KernelLog {
    channel: Option<Channel>,
}

impl KernelLog {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel: Some(channel) }
    }

    /// The next piece, which need not end with a line; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>, SessionError>> {
        let piece = match self.channel.as_ref()?.next().await {
            Ok(Item::Data(_, data)) => return Some(Ok(data)),
            Ok(Item::Message(GuestMessage::Done)) => None,
            Ok(Item::Message(GuestMessage::Error(error))) => {
                Some(Err(SessionError::Guest { request: "logs", error }))
            }
            Ok(Item::Message(other)) => {
                let problem = format!("`logs` was answered by {other:?}");
                Some(Err(SessionError::protocol(problem)))
            }
            Err(error) => Some(Err(error)),
        };
        self.channel = None;
        piece
    }
}
