//! One program in a guest, attached: output, input, signals and sizes over one connection.
//!
//! The terminal is not touched here: the caller brings the streams, so that tests bring their own.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mvm_core::frame::{KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{ExitStatus, TerminalSize};
use mvm_wire::{Call, Connection, ConnectionError, Item, ReadHalf, Reply, WriteHalf};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::client::unexpected;
use crate::detach_keys::DetachFilter;
use crate::error::{Error, Result};

/// The Linux number of SIGHUP, which a terminal that goes away sends.
pub(crate) const SIGHUP: i32 = 1;
/// The Linux number of SIGINT, which Ctrl-C sends.
pub(crate) const SIGINT: i32 = 2;
/// The Linux number of SIGQUIT.
pub(crate) const SIGQUIT: i32 = 3;
/// The Linux number of SIGTERM.
pub(crate) const SIGTERM: i32 = 15;
/// A second SIGINT within this time hangs up.
const HANG_UP_WITHIN: Duration = Duration::from_secs(2);

/// What happens to the command while it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// It got a signal, by number.
    Signal(i32),
    /// Its terminal has another size.
    Resize(TerminalSize),
}

/// What the caller brings.
pub(crate) struct Streams<O, E> {
    /// Pieces of standard input; its end is the guest's end of file. Absent if not attached.
    pub(crate) stdin: Option<mpsc::Receiver<Vec<u8>>>,
    /// Looks in the input for the keys that detach, if any do.
    pub(crate) detach: Option<DetachFilter>,
    /// Signals to forward, and sizes.
    pub(crate) events: mpsc::Receiver<Event>,
    /// Which signals are for the program.
    pub(crate) signals: Signals,
    /// Whether the program is known to run.
    pub(crate) has_started: AtomicBool,
    /// The signal at which the person hung up, if one did that.
    pub(crate) hung_up_by: Option<i32>,
    /// Takes the program's standard output.
    pub(crate) stdout: O,
    /// Takes the program's standard error.
    pub(crate) stderr: E,
}

/// Which of the signals that the command gets are for the program, once that runs; any other ends
/// the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signals {
    /// All: it is the command's own program, and ends with it.
    All,
    /// What the keys of a terminal send: the program goes on without the command.
    Keys,
    /// None: it has a terminal, which turns keys into signals.
    None,
}

impl Signals {
    fn are_for_program(self, signal: i32) -> bool {
        match self {
            Self::All => true,
            Self::Keys => matches!(signal, SIGINT | SIGQUIT),
            Self::None => false,
        }
    }
}

/// How attaching ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The program ended.
    Exited(ExitStatus),
    /// The program runs on.
    Detached,
}

/// Attaches to the program that the connection's call runs, until it ends or is left alone. The
/// streams may be used with another connection afterwards.
///
/// # Errors
/// The program could not be run, the agent went away, the output cannot be written, or the person
/// hung up.
pub(crate) async fn attach<O, E>(
    connection: Connection,
    streams: &mut Streams<O, E>,
) -> Result<Outcome>
where
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    let Connection { read, write } = connection;
    let Streams { stdin, detach, events, signals, has_started, hung_up_by, stdout, stderr } =
        streams;
    let (forward, forwarded) = mpsc::channel(8);
    let has_started = &*has_started;
    let may_forward =
        |signal| has_started.load(Ordering::Relaxed) && signals.are_for_program(signal);
    tokio::select! {
        outcome = receive(read, stdout, stderr, has_started) => outcome,
        () = send(write, stdin, detach, forwarded) => Err(ConnectionError::HungUp.into()),
        signal = hang_up(events, forward, may_forward) => {
            *hung_up_by = Some(signal);
            Err(Error::HungUp)
        }
    }
}

async fn receive<O, E>(
    mut read: ReadHalf,
    stdout: &mut O,
    stderr: &mut E,
    has_started: &AtomicBool,
) -> Result<Outcome>
where
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    loop {
        match read.next().await?.ok_or(ConnectionError::HungUp)? {
            Item::Data { kind: KIND_STDOUT, bytes } => {
                put(stdout, &bytes).await.map_err(Error::output)?;
            }
            // A program whose complaints nobody reads goes on.
            Item::Data { kind: KIND_STDERR, bytes } => drop(put(stderr, &bytes).await),
            Item::Data { .. } => {}
            message @ Item::Message(_) => match message.parse()? {
                Reply::ExecStarted { .. } => has_started.store(true, Ordering::Relaxed),
                Reply::ExecExit(status) => return Ok(Outcome::Exited(status)),
                Reply::ExecDetached => return Ok(Outcome::Detached),
                Reply::Error(error) => return Err(error.into()),
                other => return Err(unexpected(&other)),
            },
        }
    }
}

async fn put(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// Sends input, signals and sizes. It does not end: a connection that takes no more may still bring
/// the program's end.
async fn send(
    mut write: WriteHalf,
    stdin: &mut Option<mpsc::Receiver<Vec<u8>>>,
    detach: &mut Option<DetachFilter>,
    mut events: mpsc::Receiver<Event>,
) {
    loop {
        let sent = tokio::select! {
            piece = next_piece(stdin) => match (piece, detach.as_mut()) {
                (Some(piece), Some(filter)) => {
                    let typed = filter.take(&piece);
                    let sent = match typed.bytes.is_empty() {
                        true => Ok(()),
                        false => write.data(KIND_STDIN, &typed.bytes).await,
                    };
                    if typed.is_detached {
                        *stdin = None;
                        write.message(&Call::Detach).await
                    } else {
                        sent
                    }
                }
                (Some(piece), None) => write.data(KIND_STDIN, &piece).await,
                (None, _) => {
                    *stdin = None;
                    // An empty piece is the end.
                    write.data(KIND_STDIN, &[]).await
                }
            },
            Some(event) = events.recv() => match event {
                Event::Signal(signal) => write.message(&Call::Signal { signal }).await,
                Event::Resize(size) => write.message(&Call::Resize { size }).await,
            },
        };
        if sent.is_err() {
            pending::<()>().await;
        }
    }
}

async fn next_piece(stdin: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => pending().await,
    }
}

/// Forwards signals and sizes, and ends when the person has had enough: at the second Ctrl-C, or at
/// once at a signal that is not for the program, or as long as there is none that it could reach.
async fn hang_up(
    events: &mut mpsc::Receiver<Event>,
    forward: mpsc::Sender<Event>,
    may_forward: impl Fn(i32) -> bool,
) -> i32 {
    let mut interrupted: Option<Instant> = None;
    while let Some(event) = events.recv().await {
        if let Event::Signal(signal) = event {
            if !may_forward(signal) {
                return signal;
            }
            if signal == SIGINT {
                if interrupted.is_some_and(|at| at.elapsed() < HANG_UP_WITHIN) {
                    return signal;
                }
                interrupted = Some(Instant::now());
            }
        }
        // A full queue means that the agent takes nothing: only hanging up helps then.
        let _ = forward.try_send(event);
    }
    pending().await
}

#[cfg(test)]
mod tests;
