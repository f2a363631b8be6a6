//! One stream of files into or out of a guest: a program there, a thread here, and a connection
//! between them.

use std::future::pending;
use std::io::{self, Read, Write};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use mvm_core::frame::{KIND_STDERR, KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{ExecRequest, ExitStatus};
use mvm_core::name::{InstancePath, Selector};
use mvm_files::{FilesError, Summary};
use mvm_wire::{
    ApiError, Call, Connection, ConnectionError, ErrorCode, Item, ReadHalf, Reply, WriteHalf,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use crate::cli::Context;
use crate::client::unexpected;
use crate::error::{Error, Result};
use crate::output::{Spinner, printable, raw};

/// Pieces between the connection and the thread.
pub(crate) const PIECES: usize = 16;
/// Most of the guest's complaints that is kept, in bytes.
const COMPLAINTS: usize = 16 * 1024;
/// How long the guest has to clear away an unfinished file.
const CLEAR: Duration = Duration::from_secs(5);
/// How often progress is shown.
const PROGRESS: Duration = Duration::from_millis(200);

/// Takes what a program in the guest writes, and gives it to a thread that unpacks it.
///
/// # Errors
/// Either side failed, or the person interrupted: nothing is left half-written here.
pub(crate) async fn receive(
    context: &Context,
    selector: Selector,
    request: ExecRequest,
    pieces: mpsc::Sender<Vec<u8>>,
    write: impl FnOnce() -> Result<Summary> + Send + 'static,
) -> Result<Summary> {
    let connection = context.client.start(&Call::Exec { selector, request }).await?;
    let mut guest = Guest::new(connection.read);
    let mut progress = Progress::new(context);
    let mut written = on_thread(write);
    let mut pieces = Some(pieces);
    let ended = loop {
        let next = tokio::select! {
            next = guest.next() => next,
            _ = tokio::signal::ctrl_c() => break Err(Error::HungUp),
        };
        match next {
            Ok(Step::Output(bytes)) => {
                progress.add(bytes.len());
                let sent = match &pieces {
                    Some(pieces) => pieces.send(bytes).await,
                    None => break Ok(()),
                };
                if sent.is_err() {
                    // The thread has ended, and says why.
                    break Ok(());
                }
            }
            Ok(Step::Ended) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    pieces = None;
    drop((pieces, connection.write));
    let written = finish(&mut written).await;
    drop(progress);
    guest.tell_complaints(context);
    // What went wrong in the guest explains a stream that was cut short; nothing else does.
    ended?;
    match written {
        Err(Error::Files(FilesError::Stream(_) | FilesError::Archive { .. })) => {
            guest.verdict().and(written)
        }
        Err(error) => Err(error),
        Ok(summary) => guest.verdict().map(|()| summary),
    }
}

/// Gives what a thread packs to a program in the guest.
///
/// # Errors
/// Either side failed, or the person interrupted: nothing is left half-written there.
pub(crate) async fn send(
    context: &Context,
    selector: Selector,
    request: ExecRequest,
    pieces: mpsc::Receiver<Vec<u8>>,
    read: impl FnOnce() -> Result<Summary> + Send + 'static,
) -> Result<Summary> {
    let connection = context.client.start(&Call::Exec { selector, request }).await?;
    let Connection { read: receiving, write } = connection;
    let mut guest = Guest::new(receiving);
    let mut progress = Progress::new(context);
    let mut packed = on_thread(read);
    let sent = |bytes| progress.add(bytes);
    let ended = feed(&mut guest, write, pieces, sent, tokio::signal::ctrl_c()).await;
    drop(progress);
    ended?;
    guest.tell_complaints(context);
    match finish(&mut packed).await {
        // The guest hung up first.
        Err(Error::Files(FilesError::Stream(error)))
            if error.kind() == io::ErrorKind::BrokenPipe =>
        {
            guest.verdict().and(Err(Error::Files(FilesError::Stream(error))))
        }
        Err(error) => Err(error),
        Ok(summary) => guest.verdict().map(|()| summary),
    }
}

/// Gives the program in the guest all pieces as its standard input, and waits for its end. When the
/// person interrupts, the input ends there.
async fn feed<T>(
    guest: &mut Guest,
    mut write: WriteHalf,
    mut pieces: mpsc::Receiver<Vec<u8>>,
    mut sent: impl FnMut(usize),
    interrupted: impl Future<Output = T>,
) -> Result<()> {
    let no_more = Notify::new();
    let sending = async {
        loop {
            // A piece that is being sent is always sent whole: the agent could not tell what comes
            // after half of one.
            let piece = tokio::select! {
                biased;
                () = no_more.notified() => None,
                piece = pieces.recv() => piece,
            };
            let Some(piece) = piece else { break };
            sent(piece.len());
            if write.data(KIND_STDIN, &piece).await.is_err() {
                break;
            }
        }
        // An archive that ends in the middle makes the guest remove what is unfinished.
        let _ = write.data(KIND_STDIN, &[]).await;
        pending::<()>().await;
    };
    let exchange = async {
        tokio::select! {
            // It may end before it has everything.
            ended = guest.end() => ended,
            () = sending => Ok(()),
        }
    };
    let mut exchange = pin!(exchange);
    tokio::select! {
        ended = &mut exchange => ended,
        _ = interrupted => {
            no_more.notify_one();
            timeout(CLEAR, exchange).await.unwrap_or(Ok(())).and(Err(Error::HungUp))
        }
    }
}

fn on_thread(
    work: impl FnOnce() -> Result<Summary> + Send + 'static,
) -> oneshot::Receiver<Result<Summary>> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || drop(sender.send(work())));
    receiver
}

async fn finish(thread: &mut oneshot::Receiver<Result<Summary>>) -> Result<Summary> {
    match thread.await {
        Ok(result) => result,
        Err(_) => Err(Error::Files(FilesError::Stream(io::ErrorKind::BrokenPipe.into()))),
    }
}

/// What the program in the guest does.
enum Step {
    Output(Vec<u8>),
    Ended,
}

/// The program in the guest.
struct Guest {
    read: ReadHalf,
    instance: Option<InstancePath>,
    complaints: Vec<u8>,
    status: Option<ExitStatus>,
}

impl Guest {
    fn new(read: ReadHalf) -> Self {
        Self { read, instance: None, complaints: Vec::new(), status: None }
    }

    async fn next(&mut self) -> Result<Step> {
        if self.status.is_some() {
            return Ok(Step::Ended);
        }
        loop {
            match self.read.next().await?.ok_or(ConnectionError::HungUp)? {
                Item::Data { kind: KIND_STDOUT, bytes } => return Ok(Step::Output(bytes)),
                Item::Data { kind: KIND_STDERR, bytes } => {
                    let room = COMPLAINTS - self.complaints.len();
                    self.complaints.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Item::Data { .. } => {}
                message @ Item::Message(_) => match message.parse()? {
                    Reply::ExecStarted { instance, .. } => self.instance = Some(instance),
                    Reply::ExecExit(status) => {
                        self.status = Some(status);
                        return Ok(Step::Ended);
                    }
                    Reply::Error(error) => return Err(error.into()),
                    other => return Err(unexpected(&other)),
                },
            }
        }
    }

    /// Waits for its end, whatever it writes until then.
    async fn end(&mut self) -> Result<()> {
        loop {
            match self.next().await? {
                Step::Output(_) => {}
                Step::Ended => return Ok(()),
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.complaints).trim_end().to_owned()
    }

    /// Whether it succeeded.
    fn verdict(&self) -> Result<()> {
        let reason = match self.status {
            None | Some(ExitStatus::Exited { code: 0 }) => return Ok(()),
            Some(ExitStatus::Exited { .. }) => {
                self.text().lines().map(printable).collect::<Vec<_>>().join("; ")
            }
            Some(status) => format!("the copying program ended with {}", status.shell_code()),
        };
        let place = self.instance.as_ref().map(|path| format!("{path}: ")).unwrap_or_default();
        Err(ApiError::new(ErrorCode::Guest, format!("{place}{reason}")).into())
    }

    /// Shows what a program that succeeded had to say.
    fn tell_complaints(&self, context: &Context) {
        if matches!(self.status, Some(ExitStatus::Exited { code: 0 })) {
            for line in self.text().lines() {
                context.ui.say(&printable(line));
            }
        }
    }
}

/// How much was copied, on a terminal.
struct Progress<'a> {
    spinner: Option<Spinner<'a>>,
    bytes: u64,
    shown: Instant,
}

impl<'a> Progress<'a> {
    fn new(context: &'a Context) -> Self {
        let spinner = raw::is_stderr_terminal().then(|| context.ui.spinner());
        Self { spinner, bytes: 0, shown: Instant::now() }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if let Some(spinner) = &mut self.spinner
            && self.shown.elapsed() >= PROGRESS
        {
            self.shown = Instant::now();
            spinner.show(&format!("copied {} MiB", self.bytes >> 20));
        }
    }
}

/// Reads, on a thread, what arrives.
pub(crate) struct ChannelReader {
    pieces: mpsc::Receiver<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

impl ChannelReader {
    pub(crate) fn new(pieces: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { pieces, piece: Vec::new(), at: 0 }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.pieces.blocking_recv() {
                Some(piece) => (self.piece, self.at) = (piece, 0),
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.piece.len() - self.at);
        buffer[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

/// Writes, on a thread, what is to be sent.
pub(crate) struct ChannelWriter {
    pieces: mpsc::Sender<Vec<u8>>,
}

impl ChannelWriter {
    pub(crate) fn new(pieces: mpsc::Sender<Vec<u8>>) -> Self {
        Self { pieces }
    }
}

impl Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.pieces.blocking_send(bytes.to_vec());
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn an_interruption_in_the_middle_of_a_piece_still_ends_the_guests_input_in_order() {
        const PIECE: usize = 10_000;
        // Less than a piece: one is always under way.
        let (ours, theirs) = duplex(1024);
        let (pieces, receiver) = mpsc::channel(PIECES);
        for _ in 0..PIECES {
            pieces.send(vec![7; PIECE]).await.unwrap();
        }
        let (interrupt, interrupted) = oneshot::channel::<()>();
        let command = tokio::spawn(async move {
            let Connection { read, write } = Connection::new(ours);
            feed(&mut Guest::new(read), write, receiver, |_| {}, interrupted).await
        });
        let mut agent = Connection::new(theirs);
        let is_piece =
            |item: &Item| matches!(item, Item::Data { bytes, .. } if bytes.len() == PIECE);
        assert!(agent.read.next().await.unwrap().is_some_and(|item| is_piece(&item)));
        interrupt.send(()).unwrap();
        let mut more = 0;
        loop {
            let item = agent.read.next().await.unwrap().unwrap();
            match item {
                Item::Data { kind: KIND_STDIN, bytes } if bytes.is_empty() => break,
                item => assert!(is_piece(&item)),
            }
            more += 1;
        }
        assert!(more < PIECES - 1, "the rest is not sent");
        let exit = Reply::ExecExit(ExitStatus::Exited { code: 1 });
        agent.write.message(&exit).await.unwrap();
        assert!(matches!(command.await.unwrap(), Err(Error::HungUp)));
    }
}
