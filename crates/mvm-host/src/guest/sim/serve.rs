//! One simulated guest on one byte stream.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::time::Duration;

use mvm_core::accept::{self, Accepted, Acceptor};
use mvm_core::credit::{CreditError, ReceiveWindow, SendWindow};
use mvm_core::frame::{
    self, Frame, KIND_LAST_PART, KIND_MESSAGE, KIND_PART, KIND_STDIN, KIND_STDOUT,
};
use mvm_core::guest::{
    ErrorKind, ExitStatus, GuestError, GuestMessage, HookReport, HostMessage, LogSource, MAX_BODY,
    MAX_STREAMS, Parts, Preamble,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::time::{Instant, sleep_until};

use super::SimGuest;
use super::main_process::{MainStream, SimMain};
use super::programs::{Program, find};

/// Unsent bytes at which nothing more is read.
const LIMIT: usize = 256 * 1024;
const READ: usize = 4 * 1024;

/// Serves until the stream ends, or a shutdown was asked for and answered.
///
/// # Errors
/// The stream failed.
pub async fn serve<S: AsyncRead + AsyncWrite>(stream: S, guest: SimGuest) -> io::Result<()> {
    let (mut reader, mut writer) = split(stream);
    let mut log = guest.shared.log.subscribe();
    let mut server = Server {
        acceptor: Acceptor::default(),
        session: None,
        out: VecDeque::new(),
        streams: BTreeMap::new(),
        parts: Parts::default(),
        stop_by: None,
        lingers_until: None,
        is_shut_down: false,
        guest,
    };
    let mut bytes = vec![0; READ];
    loop {
        let far = Instant::now() + Duration::from_secs(3600);
        let alarm = server.advance(Instant::now());
        if server.is_shut_down && server.out.is_empty() {
            writer.flush().await?;
            server.guest.shared.is_shut_down.send_replace(true);
            return Ok(());
        }
        let wants_more = server.out.len() < LIMIT && !server.is_shut_down;
        tokio::select! {
            written = writer.write(server.out.as_slices().0), if !server.out.is_empty() => {
                server.out.drain(..written?);
                writer.flush().await?;
            }
            read = reader.read(&mut bytes), if wants_more => match read? {
                0 => return Ok(()),
                len => server.receive(&bytes[..len]),
            },
            () = sleep_until(alarm.unwrap_or(far)) => {}
            // The guest that is served keeps the sender.
            _ = log.changed() => {}
        }
    }
}

/// What runs for a stream.
#[derive(Debug)]
enum Stream {
    Exec(Exec),
    Log {
        offset: usize,
        follow: bool,
        window: SendWindow,
    },
    Main(MainStream),
    /// Preparations for a sleep, until they are done.
    Hooks(Instant),
}

#[derive(Debug)]
struct Exec {
    program: Program,
    deadline: Option<Instant>,
    /// When a sleep is over.
    wakes: Option<Instant>,
    /// Output not yet sent.
    pending: VecDeque<u8>,
    stdin: ReceiveWindow,
    stdout: SendWindow,
    is_input_over: bool,
    status: Option<ExitStatus>,
    /// Whether it is no program, but a connection to one.
    is_connection: bool,
}

#[derive(Debug)]
struct Server {
    guest: SimGuest,
    acceptor: Acceptor,
    /// The open session's tag.
    session: Option<u32>,
    out: VecDeque<u8>,
    streams: BTreeMap<u32, Stream>,
    /// Of messages that are longer than a frame.
    parts: Parts,
    /// When a shutdown that was asked for is carried out, whatever the main process does.
    stop_by: Option<Instant>,
    /// Until when it lingers, once it is asked to shut down.
    lingers_until: Option<Instant>,
    is_shut_down: bool,
}

impl Server {
    fn receive(&mut self, bytes: &[u8]) {
        self.acceptor.push(bytes);
        while let Some(item) = self.acceptor.next_item() {
            match item {
                Accepted::Session(host) => self.open(&host),
                Accepted::Lost(error) => {
                    self.fail(0, invalid(error));
                    self.streams.clear();
                    self.session = None;
                }
                Accepted::Frame(frame) => {
                    let stream = frame.stream;
                    if let Err(error) = self.take_frame(frame) {
                        self.fail(stream, error);
                    }
                }
            }
        }
    }

    fn open(&mut self, host: &Preamble) {
        self.streams.clear();
        self.parts.clear();
        self.out.clear();
        let answer = accept::answer(host);
        self.out.extend(answer.encode());
        self.session = (answer.version != 0).then(|| host.tag());
        if self.session.is_some() {
            let hello = self.guest.hello();
            self.send(0, &GuestMessage::Hello(hello));
        }
    }

    fn take_frame(&mut self, frame: Frame) -> Result<(), GuestError> {
        match (frame.kind, self.streams.get_mut(&frame.stream)) {
            (KIND_MESSAGE, _) => {
                let message = serde_json::from_slice(&frame.body).map_err(invalid)?;
                self.take_message(frame.stream, message)
            }
            (KIND_PART, _) => self.parts.push(frame.stream, &frame.body),
            (KIND_LAST_PART, _) => {
                let whole = self.parts.complete(frame.stream, &frame.body)?;
                let message = serde_json::from_slice(&whole).map_err(invalid)?;
                self.take_message(frame.stream, message)
            }
            (KIND_STDIN, Some(Stream::Exec(exec))) => {
                exec.stdin.receive(frame.body.len()).map_err(invalid)?;
                // The others never read it: its credit does not come back.
                if exec.program == Program::Cat {
                    exec.pending.extend(frame.body);
                }
                Ok(())
            }
            (KIND_STDIN, Some(Stream::Main(main))) => {
                main.stdin.receive(frame.body.len()).map_err(invalid)?;
                let returned = main.stdin.consume(frame.body.len());
                self.guest.with_main(|main| main.input(&frame.body));
                if let Some(bytes) = returned {
                    let kind = KIND_STDIN;
                    self.send(frame.stream, &GuestMessage::Credit { kind, bytes });
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn take_message(&mut self, id: u32, message: HostMessage) -> Result<(), GuestError> {
        match (message, self.streams.get_mut(&id)) {
            (HostMessage::Unknown | HostMessage::Logs { source: LogSource::Unknown, .. }, _) => {
                let message = "the simulated guest does not know this message".into();
                return Err(GuestError { kind: ErrorKind::Unsupported, message });
            }
            (HostMessage::Cancel, _) => {
                self.parts.forget(id);
                self.streams.remove(&id);
            }
            (HostMessage::Credit { kind, bytes }, Some(stream)) => {
                stream.grant(kind, bytes).map_err(invalid)?;
            }
            (HostMessage::Signal { signal }, Some(Stream::Exec(exec)))
                if exec.status.is_none() && signal > 0 =>
            {
                exec.status = Some(ExitStatus::Signaled { signal, out_of_memory: false });
            }
            (HostMessage::Signal { signal }, Some(Stream::Main(_))) => {
                self.guest.with_main(|main| main.signal(signal));
            }
            (HostMessage::Eof { kind: KIND_STDIN }, Some(Stream::Main(_))) => {
                self.guest.with_main(|main| main.end_input());
            }
            (HostMessage::Eof { kind: KIND_STDIN }, Some(Stream::Exec(exec))) => {
                exec.is_input_over = true;
            }
            (
                HostMessage::Credit { .. } | HostMessage::Signal { .. } | HostMessage::Eof { .. },
                _,
            ) => {}
            (_, Some(_)) => return Err(invalid(format!("stream {id} is in use"))),
            (_, None) if id == 0 => return Err(invalid("stream 0 takes no requests")),
            (request, None) => self.take_request(id, request)?,
        }
        Ok(())
    }

    fn take_request(&mut self, id: u32, request: HostMessage) -> Result<(), GuestError> {
        if self.streams.len() >= MAX_STREAMS {
            let message = format!("{MAX_STREAMS} streams are open already");
            return Err(GuestError { kind: ErrorKind::Limit, message });
        }
        match request {
            HostMessage::Configure(configuration) => {
                self.guest.state().configuration = Some(configuration);
                self.send(id, &GuestMessage::Done);
            }
            HostMessage::Health if self.guest.state().load.is_silent => {}
            HostMessage::Health => {
                let count = |is_connection| {
                    let is = |stream: &&Stream| matches!(stream, Stream::Exec(it) if it.is_connection == is_connection);
                    self.streams.values().filter(is).count()
                };
                let health = self.guest.health(count(false), count(true));
                self.send(id, &GuestMessage::Health(health));
            }
            // Whoever listens there says the same again.
            HostMessage::Forward(target) => {
                self.send(id, &GuestMessage::Connected);
                let echo = Exec {
                    is_connection: true,
                    stdin: ReceiveWindow::of(target.credit()),
                    stdout: SendWindow::of(target.credit()),
                    ..Exec::new(Program::Cat, Instant::now())
                };
                self.guest.state().targets.push(target);
                self.streams.insert(id, Stream::Exec(echo));
            }
            HostMessage::Exec(request) => {
                let now = Instant::now();
                let mut exec = Exec::new(find(&request, &self.guest)?, now);
                exec.deadline =
                    request.timeout_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms)));
                self.send(id, &GuestMessage::Started { pid: self.guest.next_pid() });
                self.streams.insert(id, Stream::Exec(exec));
            }
            HostMessage::Main(request) => {
                let (state, stream) = self.guest.attach(&request, Instant::now())?;
                self.send(id, &GuestMessage::Main(state));
                self.streams.insert(id, Stream::Main(stream));
            }
            HostMessage::ReadClock => {
                self.send(id, &GuestMessage::Clock(self.guest.read_clock()));
            }
            HostMessage::SetClock { unix_ns } => {
                self.guest.set_clock(unix_ns);
                self.send(id, &GuestMessage::Done);
            }
            // What takes another guest a while is done at once.
            HostMessage::SlewClock { by_ns } => {
                self.guest.state().clock.ahead_ns += by_ns;
                self.send(id, &GuestMessage::Done);
            }
            HostMessage::PrepareSleep(_) => {
                let done = Instant::now() + self.guest.state().load.hooks;
                self.streams.insert(id, Stream::Hooks(done));
            }
            HostMessage::Woken(request) => {
                self.guest.state().wakes.push(request.reason);
                self.send(id, &GuestMessage::Hooks(HookReport::default()));
            }
            HostMessage::Logs { follow, .. } => {
                let window = SendWindow::default();
                self.streams.insert(id, Stream::Log { offset: 0, follow, window });
            }
            HostMessage::Shutdown { grace_ms } => {
                self.send(id, &GuestMessage::Done);
                self.guest.with_main(SimMain::ask_to_end);
                // What the main process has still to say comes first.
                self.streams.retain(|_, stream| matches!(stream, Stream::Main(_)));
                self.stop_by = Instant::now().checked_add(Duration::from_millis(grace_ms));
                self.lingers_until = Some(Instant::now() + self.guest.state().lingers);
            }
            _ => {}
        }
        Ok(())
    }

    /// Moves data and time on; tells when the next program has something to do.
    fn advance(&mut self, now: Instant) -> Option<Instant> {
        let mut alarm: Option<Instant> = None;
        for (id, mut stream) in std::mem::take(&mut self.streams) {
            match self.advance_stream(id, &mut stream, now) {
                Some(last) => self.send(id, &last),
                None => {
                    let due = match &stream {
                        Stream::Exec(exec) => [exec.deadline, exec.wakes],
                        Stream::Main(_) => {
                            [self.guest.with_main(|main| main.alarm()).flatten(), None]
                        }
                        Stream::Hooks(done) => [Some(*done), None],
                        Stream::Log { .. } => [None, None],
                    };
                    alarm = due.into_iter().chain([alarm]).flatten().min();
                    self.streams.insert(id, stream);
                }
            }
        }
        if let Some(stop_by) = self.stop_by {
            let is_over = !self.streams.values().any(|stream| matches!(stream, Stream::Main(_)));
            let lingers = self.lingers_until.filter(|until| *until > now);
            if !self.is_shut_down && ((is_over && lingers.is_none()) || stop_by <= now) {
                self.is_shut_down = true;
                self.guest.sync();
            }
            alarm = alarm.into_iter().chain(lingers).chain([stop_by]).min();
        }
        alarm
    }

    fn advance_stream(
        &mut self,
        id: u32,
        stream: &mut Stream,
        now: Instant,
    ) -> Option<GuestMessage> {
        match stream {
            Stream::Exec(exec) => {
                while self.out.len() < LIMIT {
                    let len = exec.stdout.take(exec.pending.len().min(MAX_BODY as usize));
                    if len == 0 {
                        break;
                    }
                    let data: Vec<u8> = exec.pending.drain(..len).collect();
                    self.send_frame(id, KIND_STDOUT, &data);
                    if exec.program == Program::Cat
                        && let Some(bytes) = exec.stdin.consume(len)
                    {
                        self.send(id, &GuestMessage::Credit { kind: KIND_STDIN, bytes });
                    }
                }
                exec.settle(now);
                let status = exec.status.filter(|_| exec.pending.is_empty())?;
                if exec.is_connection {
                    self.send(id, &GuestMessage::Eof { kind: KIND_STDOUT });
                    return Some(GuestMessage::Done);
                }
                Some(GuestMessage::Exit(status))
            }
            Stream::Hooks(done) => (*done <= now).then(|| {
                self.guest.sync();
                GuestMessage::Hooks(HookReport::default())
            }),
            Stream::Main(main) => loop {
                let longest = if self.out.len() < LIMIT { MAX_BODY as usize } else { 0 };
                let advanced = self.guest.with_main(|it| it.advance(main, longest, now));
                let (piece, status) = advanced?;
                if piece.is_empty() {
                    break status.map(GuestMessage::Exit);
                }
                self.send_frame(id, KIND_STDOUT, &piece);
            },
            Stream::Log { offset, follow, window } => {
                let (start, piece, end) = self
                    .guest
                    .shared
                    .log
                    .borrow()
                    .piece(*offset, window.available().min(MAX_BODY as usize));
                window.take(piece.len());
                *offset = start + piece.len();
                if !piece.is_empty() {
                    self.send_frame(id, KIND_STDOUT, &piece);
                }
                (*offset >= end && !*follow).then_some(GuestMessage::Done)
            }
        }
    }

    fn fail(&mut self, id: u32, error: GuestError) {
        self.streams.remove(&id);
        self.send(id, &GuestMessage::Error(error));
    }

    fn send(&mut self, id: u32, message: &GuestMessage) {
        if let Ok(body) = serde_json::to_vec(message) {
            self.send_frame(id, KIND_MESSAGE, &body);
        }
    }

    fn send_frame(&mut self, id: u32, kind: u8, body: &[u8]) {
        if let Some(tag) = self.session {
            let mut bytes = Vec::new();
            frame::encode(tag, id, kind, body, &mut bytes);
            self.out.extend(bytes);
        }
    }
}

impl Stream {
    fn grant(&mut self, kind: u8, bytes: u32) -> Result<(), CreditError> {
        match self {
            Self::Exec(Exec { stdout: window, .. })
            | Self::Log { window, .. }
            | Self::Main(MainStream { window, .. })
                if kind == KIND_STDOUT =>
            {
                window.grant(bytes)
            }
            _ => Err(CreditError::Overgrant { bytes, spent: 0 }),
        }
    }
}

impl Exec {
    fn new(program: Program, now: Instant) -> Self {
        let (pending, status, wakes) = match &program {
            Program::Print { stdout, code } => {
                (stdout.bytes().collect(), Some(ExitStatus::Exited { code: *code }), None)
            }
            Program::Sleep(time) => (VecDeque::new(), None, now.checked_add(*time)),
            Program::Cat => (VecDeque::new(), None, None),
        };
        Self {
            program,
            deadline: None,
            wakes,
            pending,
            stdin: ReceiveWindow::default(),
            stdout: SendWindow::default(),
            is_input_over: false,
            status,
            is_connection: false,
        }
    }

    /// Notes the program's end when it has come.
    fn settle(&mut self, now: Instant) {
        if self.status.is_some() {
            self.deadline = None;
            return;
        }
        let is_done = match self.program {
            Program::Cat => self.is_input_over && self.pending.is_empty(),
            _ => self.wakes.is_some_and(|wakes| wakes <= now),
        };
        if is_done {
            self.status = Some(ExitStatus::Exited { code: 0 });
        } else if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.status = Some(ExitStatus::TimedOut);
            self.pending.clear();
        }
    }
}

fn invalid(message: impl ToString) -> GuestError {
    GuestError { kind: ErrorKind::Invalid, message: message.to_string() }
}
