//! A client of QEMU's control protocol, QMP: one JSON object per line, answers matched by id,
//! events in between.
//!
//! The QEMU driver uses it. It is tolerant: fields that it does not know are ignored, and answers
//! stay JSON until the caller asks for the few fields it needs, so that one client serves QEMU 7.2
//! to the newest. It never trusts the peer with its memory: lines are bounded.

mod message;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use message::{Greeting, QmpEvent, Version};
use message::{Incoming, Reply};

/// Longest line that is accepted, in bytes.
pub const MAX_LINE: usize = 4 * 1024 * 1024;
/// Events that a slow subscriber may lag behind before it misses some.
const EVENT_BACKLOG: usize = 64;

/// Why a QMP command failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's error text.
        description: String,
    },
    /// No answer came in time.
    #[error("QEMU did not answer `{command}` within {} ms", limit.as_millis())]
    TimedOut {
        /// The command, or `greeting`.
        command: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The connection ended before the answer.
    #[error("the QMP connection ended before the answer to `{command}`: {reason}")]
    Closed {
        /// The command, or `greeting`.
        command: String,
        /// How the connection ended.
        reason: String,
    },
    /// The answer is not what the command should give.
    #[error("unexpected answer to `{command}`: {message}")]
    Unexpected {
        /// The command, or `greeting`.
        command: String,
        /// What is wrong with it.
        message: String,
    },
}

/// A connection to QEMU. Dropping it closes the connection and leaves QEMU alone.
#[derive(Debug)]
pub struct QmpClient {
    shared: Arc<Shared>,
    lines: mpsc::UnboundedSender<Vec<u8>>,
    greeting: Greeting,
    /// Reads and writes; aborted with the client.
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    events: broadcast::Sender<QmpEvent>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    pending: HashMap<u64, oneshot::Sender<Reply>>,
    /// Why the connection ended, once it has.
    closed: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, reason: String) {
        let mut state = self.state();
        state.closed.get_or_insert(reason);
        state.pending.clear();
    }

    fn deliver(&self, incoming: Incoming) {
        match incoming {
            Incoming::Event(event) => {
                tracing::trace!(event = event.name, "QMP event");
                let _nobody_listens = self.events.send(event);
            }
            Incoming::Reply { id, reply } => {
                let waiting = id.and_then(|id| self.state().pending.remove(&id));
                match waiting {
                    Some(sender) => {
                        let _gave_up = sender.send(reply);
                    }
                    None => tracing::debug!(?reply, "QMP answer that nobody waits for"),
                }
            }
        }
    }
}

impl QmpClient {
    /// Takes over a fresh connection: reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// The peer does not speak QMP, or not within `limit`.
    pub async fn connect<S>(stream: S, limit: Duration) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let command = || "greeting".to_owned();
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = BufReader::new(reader);
        let line = timeout(limit, read_line(&mut reader))
            .await
            .map_err(|_| QmpError::TimedOut { command: command(), limit })?
            .map_err(|reason| QmpError::Closed { command: command(), reason })?;
        let greeting = Greeting::parse(&line)
            .map_err(|message| QmpError::Unexpected { command: command(), message })?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            events: broadcast::channel(EVENT_BACKLOG).0,
        });
        let (lines, queue) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(write_lines(writer, queue, Arc::clone(&shared)));
        tasks.spawn(read_messages(reader, Arc::clone(&shared)));
        let client = Self { shared, lines, greeting, _tasks: tasks };
        client.execute("qmp_capabilities", json!({}), limit).await?;
        Ok(client)
    }

    /// What QEMU said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.shared.events.subscribe()
    }

    /// Runs a command; `arguments` is a JSON object.
    ///
    /// # Errors
    /// QEMU refused, or did not answer within `limit`, or is gone.
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut state = self.shared.state();
            if let Some(reason) = &state.closed {
                return Err(QmpError::Closed { command: command.into(), reason: reason.clone() });
            }
            state.next_id += 1;
            let id = state.next_id;
            state.pending.insert(id, sender);
            id
        };
        let _forget = Forget { shared: &self.shared, id };
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        // If the writer is gone, it has closed the state, which drops the sender.
        let _closed = self.lines.send(format!("{message}\n").into_bytes());
        match timeout(limit, receiver).await {
            Ok(Ok(Reply::Return(value))) => Ok(value),
            Ok(Ok(Reply::Error { class, description })) => {
                Err(QmpError::Refused { command: command.into(), class, description })
            }
            Ok(Err(_)) => {
                let reason = self.shared.state().closed.clone().unwrap_or_default();
                Err(QmpError::Closed { command: command.into(), reason })
            }
            Err(_) => Err(QmpError::TimedOut { command: command.into(), limit }),
        }
    }

    /// Runs a command without arguments and takes what is needed out of its answer.
    ///
    /// # Errors
    /// As [`Self::execute`], or the answer lacks what is needed.
    pub async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        limit: Duration,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, json!({}), limit).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Unexpected {
            command: command.into(),
            message: error.to_string(),
        })
    }
}

/// Forgets a command whose caller has its answer or gave up.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.state().pending.remove(&self.id);
    }
}

async fn write_lines(
    mut writer: impl AsyncWrite + Unpin,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    while let Some(line) = queue.recv().await {
        if let Err(error) = writer.write_all(&line).await {
            shared.close(error.to_string());
            return;
        }
    }
}

async fn read_messages(mut reader: BufReader<impl AsyncRead + Unpin>, shared: Arc<Shared>) {
    let reason = loop {
        let line = match read_line(&mut reader).await {
            Ok(line) => line,
            Err(reason) => break reason,
        };
        match Incoming::parse(&line) {
            Ok(incoming) => shared.deliver(incoming),
            Err(reason) => break reason,
        }
    };
    shared.close(reason);
}

/// Reads one line; a failure is told in words, because it ends the connection for all who wait.
async fn read_line(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Result<Vec<u8>, String> {
    let mut line = Vec::new();
    let limit = MAX_LINE as u64 + 1;
    reader.take(limit).read_until(b'\n', &mut line).await.map_err(|error| error.to_string())?;
    match line.last() {
        Some(b'\n') => Ok(line),
        Some(_) if line.len() > MAX_LINE => Err(format!("a line is longer than {MAX_LINE} bytes")),
        _ => Err("QEMU closed it".to_owned()),
    }
}

#[cfg(test)]
mod tests;
