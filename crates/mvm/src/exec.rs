//! One program in a guest, attached: output, input and signals over one connection.
//!
//! The terminal is not touched here: the caller brings the streams, so that tests bring their own.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mvm_core::frame::{KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::ExitStatus;
use mvm_wire::{Call, Connection, ConnectionError, Item, ReadHalf, Reply, WriteHalf};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::client::unexpected;
use crate::error::{Error, Result};

/// The Linux number of SIGINT, which Ctrl-C sends.
pub(crate) const SIGINT: i32 = 2;
/// The Linux number of SIGTERM.
pub(crate) const SIGTERM: i32 = 15;
/// A second SIGINT within this time hangs up.
const HANG_UP_WITHIN: Duration = Duration::from_secs(2);

/// What the caller brings.
pub(crate) struct Streams<O, E> {
    /// Pieces of standard input; its end is the guest's end of file. Absent if not attached.
    pub(crate) stdin: Option<mpsc::Receiver<Vec<u8>>>,
    /// Signals to forward, by number.
    pub(crate) signals: mpsc::Receiver<i32>,
    /// Takes the program's standard output.
    pub(crate) stdout: O,
    /// Takes the program's standard error.
    pub(crate) stderr: E,
}

/// Attaches to the program that the connection's call runs, until it ends.
///
/// # Errors
/// The program could not be run, the agent went away, the output cannot be written, or the person
/// hung up.
pub(crate) async fn attach<O, E>(
    connection: Connection,
    streams: Streams<O, E>,
) -> Result<ExitStatus>
where
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    let Connection { read, write } = connection;
    let Streams { stdin, signals, stdout, stderr } = streams;
    let (forward, forwarded) = mpsc::channel(8);
    let has_started = AtomicBool::new(false);
    tokio::select! {
        status = receive(read, stdout, stderr, &has_started) => status,
        () = send(write, stdin, forwarded) => Err(ConnectionError::HungUp.into()),
        () = hang_up(signals, forward, &has_started) => Err(Error::HungUp),
    }
}

async fn receive<O, E>(
    mut read: ReadHalf,
    mut stdout: O,
    mut stderr: E,
    has_started: &AtomicBool,
) -> Result<ExitStatus>
where
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    loop {
        match read.next().await?.ok_or(ConnectionError::HungUp)? {
            Item::Data { kind: KIND_STDOUT, bytes } => {
                put(&mut stdout, &bytes).await.map_err(Error::output)?;
            }
            // A program whose complaints nobody reads goes on.
            Item::Data { kind: KIND_STDERR, bytes } => drop(put(&mut stderr, &bytes).await),
            Item::Data { .. } => {}
            message @ Item::Message(_) => match message.parse()? {
                Reply::ExecStarted { .. } => has_started.store(true, Ordering::Relaxed),
                Reply::ExecExit(status) => return Ok(status),
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

/// Sends input and signals. It does not end: a connection that takes no more may still bring the
/// program's end.
async fn send(
    mut write: WriteHalf,
    mut stdin: Option<mpsc::Receiver<Vec<u8>>>,
    mut signals: mpsc::Receiver<i32>,
) {
    loop {
        let sent = tokio::select! {
            piece = next_piece(&mut stdin) => {
                if piece.is_none() {
                    stdin = None;
                }
                // An empty piece is the end.
                write.data(KIND_STDIN, &piece.unwrap_or_default()).await
            }
            Some(signal) = signals.recv() => write.message(&Call::Signal { signal }).await,
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

/// Forwards signals, and ends when the person has had enough: at the second Ctrl-C, or at once as
/// long as there is no program that a signal could reach.
async fn hang_up(
    mut signals: mpsc::Receiver<i32>,
    forward: mpsc::Sender<i32>,
    has_started: &AtomicBool,
) {
    let mut interrupted: Option<Instant> = None;
    while let Some(signal) = signals.recv().await {
        if !has_started.load(Ordering::Relaxed) {
            return;
        }
        if signal == SIGINT {
            if interrupted.is_some_and(|at| at.elapsed() < HANG_UP_WITHIN) {
                return;
            }
            interrupted = Some(Instant::now());
        }
        // A full queue means that the agent takes nothing: only hanging up helps then.
        let _ = forward.try_send(signal);
    }
    pending().await
}

#[cfg(test)]
mod tests;
