//! A session with one guest agent.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::frame::{Decoder, KIND_STDIN};
use mvm_core::guest::{
    Configuration, ExecRequest, FLUSH_LEN, Feature, ForwardTarget, GUEST_MAGIC, GuestMessage,
    HOST_MAGIC, Health, Hello, HostMessage, INITIAL_CREDIT, LogSource, MAX_BODY, MAX_VERSION,
    MIN_VERSION, MainRequest, MainState, Preamble,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::error::SessionError;
use super::exec::{Exec, KernelLog};
use super::forward::Forward;
use super::main_process::{self, MainEvents, MainInput};
use super::outgoing::{Outgoing, Step};
use super::streams::{Item, Share, Stream, Streams};
use crate::vmm::GuestStream;

/// Bytes taken from the byte stream at once.
const READ: usize = 64 * 1024;

/// What is known of the byte stream's past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionMode {
    /// Nobody has written to it: the microVM has just been started, or it is a connection of its
    /// own.
    Fresh,
    /// Some session, perhaps of another process or before a sleep, may have left a frame cut in
    /// the middle. Costs 64 KiB more than [`SessionMode::Fresh`], and is always correct.
    Existing,
}

/// A session with the guest agent of one microVM. Clones share it; when the last one and the last
/// [`Exec`] and [`KernelLog`] of it are dropped, the byte stream is closed. What runs in the guest
/// goes on until the next session opens.
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    hello: Hello,
    closed: watch::Receiver<Option<SessionError>>,
    task: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Shared {
    outgoing: Outgoing,
    streams: Streams,
}

impl Session {
    /// Opens a session on a byte stream: what an earlier session left in it is skipped, and ended
    /// in the guest.
    ///
    /// # Errors
    /// The guest agent did not say hello within the deadline, the stream ended or failed, or the
    /// two have no protocol version in common.
    pub async fn open(
        stream: Box<dyn GuestStream>,
        mode: SessionMode,
        deadline: Duration,
    ) -> Result<Self, SessionError> {
        let (mut reader, mut writer) = split(stream);
        let greet = greet(&mut reader, &mut writer, mode);
        let (tag, decoder, hello) = timeout(deadline, greet)
            .await
            .map_err(|_| SessionError::Timeout { request: "hello", limit: deadline })??;
        let shared = Arc::new(Shared { outgoing: Outgoing::new(tag), streams: Streams::default() });
        let (report, closed) = watch::channel(None);
        let task = tokio::spawn(drive(shared.clone(), reader, writer, decoder, report));
        Ok(Self { inner: Arc::new(Inner { shared, hello, closed, task }) })
    }

    /// Whether both are the same session.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// How the guest agent introduced itself.
    pub fn hello(&self) -> &Hello {
        &self.inner.hello
    }

    /// Whether the session has ended.
    pub fn is_over(&self) -> bool {
        self.inner.closed.borrow().is_some()
    }

    /// Waits for the end of the session, and tells why it ended. May be called by many.
    pub async fn closed(&self) -> SessionError {
        let mut closed = self.inner.closed.clone();
        match closed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or(SessionError::Closed),
            Err(_) => SessionError::Closed,
        }
    }

    /// Gives the guest its identity.
    ///
    /// # Errors
    /// The guest refused, did not answer in time, or the session is over.
    pub async fn configure(
        &self,
        configuration: Configuration,
        limit: Duration,
    ) -> Result<(), SessionError> {
        if !configuration.disks.is_empty() {
            self.need(Feature::Disks)?;
        }
        let message = HostMessage::Configure(configuration);
        self.request_done("configure", message, limit).await
    }

    /// Asks for the guest's health.
    ///
    /// # Errors
    /// The guest refused, did not answer in time, or the session is over.
    pub async fn health(&self, limit: Duration) -> Result<Health, SessionError> {
        match self.request("health", HostMessage::Health, limit).await? {
            GuestMessage::Health(health) => Ok(health),
            other => Err(unexpected("health", &other)),
        }
    }

    /// Powers the microVM off in an orderly way. On return the guest has begun: the end of the VMM
    /// is the end of it. `grace` is the time that programs have between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// The guest refused, did not answer in time, or the session is over.
    pub async fn shutdown(&self, grace: Duration, limit: Duration) -> Result<(), SessionError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.request_done("shutdown", HostMessage::Shutdown { grace_ms }, limit).await
    }

    /// Runs a program. It returns when the request is on its way; the first event tells whether
    /// the program runs, and comes within `start_limit`.
    ///
    /// # Errors
    /// The request is too large or asks for what the guest does not have, too many streams are
    /// open, the guest does not read, or the session is over.
    pub async fn exec(
        &self,
        request: ExecRequest,
        start_limit: Duration,
    ) -> Result<Exec, SessionError> {
        let needed = [
            (request.terminal.is_some(), Feature::Terminal),
            (request.detach, Feature::Detach),
            (request.builtin, Feature::Builtins),
        ];
        for (_, feature) in needed.into_iter().filter(|(is_needed, _)| *is_needed) {
            self.need(feature)?;
        }
        let has_stdin = request.stdin;
        let request = HostMessage::Exec(request);
        let channel = self.open_stream("exec", &request, Share::Operator, start_limit).await?;
        Ok(Exec::new(channel, has_stdin, start_limit))
    }

    /// Starts the guest's main process unless this boot has started it, and listens to it.
    ///
    /// # Errors
    /// It cannot be started (the same answer comes for the rest of the boot), the guest does not
    /// answer within `limit`, or the session is over.
    pub async fn main_process(
        &self,
        request: MainRequest,
        limit: Duration,
    ) -> Result<(MainState, MainEvents, MainInput), SessionError> {
        self.need(Feature::Main)?;
        let request = HostMessage::Main(request);
        let channel = self.open_stream("main", &request, Share::Agent, limit).await?;
        main_process::attach(channel, limit).await
    }

    /// Connects to a socket in the guest. It returns when the request is on its way; the first
    /// event tells whether the socket accepts, and comes within `limit`.
    ///
    /// # Errors
    /// The guest cannot do it, too many streams are open, the guest does not read, or the session
    /// is over.
    pub async fn forward(
        &self,
        target: ForwardTarget,
        limit: Duration,
    ) -> Result<Forward, SessionError> {
        self.need(Feature::Forward)?;
        let request = HostMessage::Forward(target);
        let channel = self.open_stream("forward", &request, Share::Operator, limit).await?;
        Ok(Forward::new(channel, limit))
    }

    /// Connects somebody from outside to a port of the guest, by the address `at` if the guest agent
    /// is too old to find the program by itself. Otherwise as [`Session::forward`], but there may be
    /// only as many as leave room for everything else.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub async fn publish(
        &self,
        port: u16,
        at: IpAddr,
        limit: Duration,
    ) -> Result<Forward, SessionError> {
        self.need(Feature::Forward)?;
        let target = match self.need(Feature::Published) {
            Ok(()) => ForwardTarget::Published { port },
            Err(_) => ForwardTarget::Tcp { address: at, port },
        };
        let request = HostMessage::Forward(target);
        let channel = self.open_stream("forward", &request, Share::Published, limit).await?;
        Ok(Forward::new(channel, limit))
    }

    /// Checks that the guest has an ability.
    ///
    /// # Errors
    /// It has not.
    pub fn need(&self, feature: Feature) -> Result<(), SessionError> {
        let hello = self.hello();
        if hello.features.iter().any(|name| name == feature.name()) {
            return Ok(());
        }
        Err(SessionError::Missing { feature, version: hello.agent_version.clone() })
    }

    /// Reads the guest kernel's log as text lines: what it holds and, if following, what comes.
    ///
    /// # Errors
    /// Too many streams are open, the guest does not read within `limit`, or the session is over.
    pub async fn kernel_log(
        &self,
        follow: bool,
        limit: Duration,
    ) -> Result<KernelLog, SessionError> {
        let request = HostMessage::Logs { source: LogSource::Kernel, follow };
        Ok(KernelLog::new(self.open_stream("logs", &request, Share::Operator, limit).await?))
    }

    pub(super) async fn request_done(
        &self,
        name: &'static str,
        message: HostMessage,
        limit: Duration,
    ) -> Result<(), SessionError> {
        match self.request(name, message, limit).await? {
            GuestMessage::Done => Ok(()),
            other => Err(unexpected(name, &other)),
        }
    }

    /// Sends a request and waits for its one answer.
    pub(super) async fn request(
        &self,
        name: &'static str,
        message: HostMessage,
        limit: Duration,
    ) -> Result<GuestMessage, SessionError> {
        let answer = async {
            let channel = self.open_stream(name, &message, Share::Agent, limit).await?;
            match channel.next().await? {
                Item::Message(GuestMessage::Error(error)) => {
                    Err(SessionError::Guest { request: name, error })
                }
                Item::Message(message) => Ok(message),
                Item::Data(..) => Err(SessionError::protocol(format!("data answers `{name}`"))),
            }
        };
        let elapsed = |_| SessionError::Timeout { request: name, limit };
        timeout(limit, answer).await.map_err(elapsed)?
    }

    async fn open_stream(
        &self,
        name: &'static str,
        request: &HostMessage,
        share: Share,
        limit: Duration,
    ) -> Result<Channel, SessionError> {
        let shared = &self.inner.shared;
        let credit = match request {
            HostMessage::Forward(target) => target.credit(),
            _ => INITIAL_CREDIT,
        };
        let (id, stream) = shared.streams.open(share, credit, &shared.outgoing)?;
        let channel = Channel { session: self.clone(), id, stream };
        let takes_parts = self.need(Feature::LongMessages).is_ok();
        let sent = shared.outgoing.message(id, Step::Open, name, request, takes_parts);
        let elapsed = |_| SessionError::Timeout { request: name, limit };
        timeout(limit, sent).await.map_err(elapsed)??;
        Ok(channel)
    }
}

pub(super) fn unexpected(request: &str, answer: &GuestMessage) -> SessionError {
    SessionError::protocol(format!("`{request}` was answered by {answer:?}"))
}

/// One open stream; dropping it cancels what the guest has not ended.
#[derive(Debug)]
pub(super) struct Channel {
    session: Session,
    id: u32,
    stream: Arc<Stream>,
}

impl Channel {
    pub(super) async fn next(&self) -> Result<Item, SessionError> {
        self.stream.next(self.id, self.outgoing()).await
    }

    /// Sends data for standard input as far as there is credit; tells how much.
    pub(super) async fn send_stdin(&self, data: &[u8]) -> Result<usize, SessionError> {
        let credit = self.stream.take_stdin_credit(data.len().min(MAX_BODY as usize)).await?;
        let len = credit.len;
        self.outgoing().frame(self.id, Step::Continue, KIND_STDIN, &data[..len]).await?;
        credit.spend();
        Ok(len)
    }

    pub(super) async fn send(
        &self,
        name: &'static str,
        message: &HostMessage,
    ) -> Result<(), SessionError> {
        // What follows a request is small.
        self.outgoing().message(self.id, Step::Continue, name, message, false).await
    }

    /// Queues a message behind all data, without waiting; at most once per stream.
    pub(super) fn send_last(&self, message: &HostMessage) {
        self.outgoing().last_message(self.id, message);
    }

    /// Whether the guest has not ended the stream, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        self.session.inner.shared.streams.holds(self.id)
    }

    /// Ends the stream for everyone who waits on it, and in the guest if it has not ended there.
    pub(super) fn close(&self) {
        self.stream.end(None);
        if self.session.inner.shared.streams.forget(self.id) {
            self.outgoing().cancel(self.id);
        }
    }

    fn outgoing(&self) -> &Outgoing {
        &self.session.inner.shared.outgoing
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.close();
    }
}

/// Exchanges preambles and waits for the guest's hello.
async fn greet(
    reader: &mut ReadHalf<Box<dyn GuestStream>>,
    writer: &mut WriteHalf<Box<dyn GuestStream>>,
    mode: SessionMode,
) -> Result<(u32, Decoder, Hello), SessionError> {
    let ours = Preamble {
        magic: HOST_MAGIC,
        nonce: draw_nonce()?,
        version: MIN_VERSION,
        max_version: MAX_VERSION,
    };
    let mut opening = match mode {
        SessionMode::Fresh => Vec::new(),
        SessionMode::Existing => vec![0; FLUSH_LEN],
    };
    opening.extend_from_slice(&ours.encode());
    let write = async {
        writer.write_all(&opening).await?;
        writer.flush().await?;
        Ok::<_, SessionError>(())
    };
    // The guest may have to write what it had begun before it can read: both at once.
    let mut buffer = Vec::new();
    let find = async {
        loop {
            read_more(reader, &mut buffer).await?;
            if let Some(theirs) = Preamble::scan(&mut buffer, GUEST_MAGIC, Some(ours.nonce)) {
                return Ok::<_, SessionError>(theirs);
            }
        }
    };
    let ((), theirs) = tokio::try_join!(write, find)?;
    if !(MIN_VERSION..=MAX_VERSION).contains(&theirs.version) {
        return Err(SessionError::Version { guest_max: theirs.max_version });
    }
    let mut decoder = Decoder::new(ours.tag(), MAX_BODY);
    decoder.push(&buffer);
    let frame = loop {
        if let Some(frame) = decoder.next_frame()? {
            break frame;
        }
        let mut more = Vec::new();
        read_more(reader, &mut more).await?;
        decoder.push(&more);
    };
    match serde_json::from_slice(&frame.body) {
        Ok(GuestMessage::Hello(hello)) if frame.stream == 0 => Ok((ours.tag(), decoder, hello)),
        _ => Err(SessionError::protocol("the first frame is no hello")),
    }
}

/// A nonce whose tag can be told from the bytes that may stand before a session.
fn draw_nonce() -> Result<[u8; 16], SessionError> {
    let mut nonce = [0; 16];
    loop {
        getrandom::fill(&mut nonce).map_err(|error| std::io::Error::other(error.to_string()))?;
        if nonce[..4] != [0; 4] && nonce[..4] != HOST_MAGIC[..4] {
            return Ok(nonce);
        }
    }
}

async fn read_more(
    reader: &mut ReadHalf<Box<dyn GuestStream>>,
    buffer: &mut Vec<u8>,
) -> Result<(), SessionError> {
    let mut bytes = vec![0; READ];
    match reader.read(&mut bytes).await? {
        0 => Err(SessionError::Closed),
        len => {
            buffer.extend_from_slice(&bytes[..len]);
            Ok(())
        }
    }
}

/// Reads and writes until the stream ends or the guest breaks the protocol. Reading never waits
/// for anything but the guest.
async fn drive(
    shared: Arc<Shared>,
    mut reader: ReadHalf<Box<dyn GuestStream>>,
    mut writer: WriteHalf<Box<dyn GuestStream>>,
    mut decoder: Decoder,
    report: watch::Sender<Option<SessionError>>,
) {
    let read = async {
        let mut bytes = vec![0; READ];
        loop {
            while let Some(frame) = decoder.next_frame()? {
                shared.streams.dispatch(frame)?;
            }
            match reader.read(&mut bytes).await? {
                0 => return Err(SessionError::Closed),
                len => decoder.push(&bytes[..len]),
            }
        }
    };
    let write = async {
        loop {
            writer.write_all(&shared.outgoing.next_chunk().await).await?;
            writer.flush().await?;
        }
    };
    let ended: Result<(), SessionError> = tokio::select! { end = read => end, end = write => end };
    let error = ended.err().unwrap_or(SessionError::Closed);
    tracing::debug!(%error, "guest session ended");
    shared.streams.end(&error);
    shared.outgoing.close();
    report.send_replace(Some(error));
}
