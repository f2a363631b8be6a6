//! One forwarded connection: a socket of the guest, carried to the host and back.
//!
//! ```text
//!             connected               both directions have ended
//!  Connecting ────────> Open ──────────────────────────────────> Done is sent
//!      └─ refused, or too slow ──> Error is sent
//! ```
//!
//! Each direction ends by itself, as it does between two programs. The server polls the socket
//! with everything else. A published port is looked for on several addresses, see [`published`].

mod published;

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{ErrorKind, ForwardTarget, GuestError, GuestMessage};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with, sockopt};

use crate::exec::stdio::{Input, InputEnd, Output};
use crate::failure::{failure, invalid};
use crate::session::Link;
use published::Search;

/// How long the other side may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Which direction of a connection is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The connection is made, or has failed.
    Connect,
    /// Towards the socket.
    Input,
    /// Out of the socket.
    Output,
}

#[derive(Debug)]
enum State {
    Connecting { since: Instant, is_input_over: bool },
    Open { is_end_told: bool },
    Failed(GuestError),
}

/// A forwarded connection.
#[derive(Debug)]
pub(crate) struct Forward {
    target: ForwardTarget,
    /// Where else the program may listen.
    search: Option<Search>,
    state: State,
    input: Input,
    output: Output,
}

impl Forward {
    /// Begins to connect; whether somebody accepts is known later. On a machine that is the agent's own
    /// an address may be added for that.
    pub(crate) fn open(
        target: &ForwardTarget,
        is_own_machine: bool,
        now: Instant,
    ) -> Result<Self, GuestError> {
        let mut search = match target {
            ForwardTarget::Published { port } => Some(Search::new(*port, is_own_machine)),
            _ => None,
        };
        let socket = match &mut search {
            _ if target.port() == Some(0) => return Err(invalid("port 0 is no port")),
            Some(search) => search.next(None).map_err(|error| failed(target, error))?,
            None => connect(target)?,
        };
        let other = twin(target, &socket)?;
        Ok(Self {
            target: target.clone(),
            search,
            state: State::Connecting { since: now, is_input_over: false },
            input: Input::new(Some(socket), InputEnd::Shutdown).with_credit(target.credit()),
            output: Output::new(KIND_STDOUT, Some(other)).with_credit(target.credit()),
        })
    }

    /// Whether it is to a published port.
    pub(crate) fn is_published(&self) -> bool {
        self.search.is_some()
    }

    /// The descriptors to poll now.
    pub(crate) fn wants<'a>(
        &'a self,
        has_room: bool,
        mut add: impl FnMut(End, BorrowedFd<'a>, PollFlags),
    ) {
        match &self.state {
            State::Connecting { .. } => {
                if let Some(socket) = self.output.descriptor() {
                    add(End::Connect, socket.as_fd(), PollFlags::OUT);
                }
            }
            State::Open { .. } => {
                if let Some(socket) = self.input.wants() {
                    add(End::Input, socket, PollFlags::OUT);
                }
                if let Some(socket) = self.output.wants().filter(|_| has_room) {
                    add(End::Output, socket, PollFlags::IN);
                }
            }
            State::Failed(_) => {}
        }
    }

    /// Does what a ready descriptor allows.
    pub(crate) fn ready(&mut self, end: End, link: Link<'_>, now: Instant) {
        match end {
            End::Connect => self.finish_connecting(link),
            End::Input => self.input.write(link),
            End::Output => self.output.read(link, now),
        }
        if let State::Open { is_end_told: is_end_told @ false } = &mut self.state
            && self.output.is_over()
        {
            *is_end_told = true;
            link.message(&GuestMessage::Eof { kind: KIND_STDOUT });
            // A connection that was reset has ended in both directions.
            if !self.input.is_connected() {
                self.input.give_up();
            }
        }
    }

    fn finish_connecting(&mut self, link: Link<'_>) {
        let Some(socket) = self.output.descriptor() else { return };
        let State::Connecting { is_input_over, .. } = self.state else { return };
        let connected = match sockopt::socket_error(socket).unwrap_or_else(Err) {
            // Nobody listened there, and the socket's own port happened to be that one.
            Ok(()) if is_its_own_peer(socket) => Err(Errno::CONNREFUSED),
            connected => connected,
        };
        match connected {
            Ok(()) => {
                self.state = State::Open { is_end_told: false };
                link.message(&GuestMessage::Connected);
                // What came before there was anybody to take it.
                self.input.write(link);
                if is_input_over {
                    self.input.end();
                }
            }
            Err(error) => {
                if let Err(error) = self.connect_elsewhere(error) {
                    self.state = State::Failed(error);
                }
            }
        }
    }

    /// Goes on with the next address, if there is another.
    fn connect_elsewhere(&mut self, error: Errno) -> Result<(), GuestError> {
        let next = match &mut self.search {
            Some(search) => search.next(Some(error)),
            None => Err(error),
        };
        let socket = next.map_err(|error| failed(&self.target, error))?;
        self.output.replace(twin(&self.target, &socket)?);
        self.input.replace(socket);
        Ok(())
    }

    /// Data for the socket.
    pub(crate) fn input(&mut self, data: Vec<u8>, link: Link<'_>) -> Result<(), GuestError> {
        if !self.input.is_open() {
            return Err(invalid("data for a connection that is closed in this direction"));
        }
        let is_connecting = matches!(self.state, State::Connecting { .. });
        let pushed = match is_connecting {
            true => self.input.hold(data),
            false => self.input.push(data, link),
        };
        pushed.map_err(|error| invalid(error.to_string()))
    }

    /// The end of data of a kind.
    pub(crate) fn end_of(&mut self, kind: u8) {
        match &mut self.state {
            _ if kind != KIND_STDIN => {}
            State::Connecting { is_input_over, .. } => *is_input_over = true,
            State::Open { .. } | State::Failed(_) => self.input.end(),
        }
    }

    /// Credit that the host returned.
    pub(crate) fn grant(&mut self, kind: u8, bytes: u32) -> Result<(), GuestError> {
        match kind == self.output.kind() {
            true => self.output.grant(bytes).map_err(|error| invalid(error.to_string())),
            false => Err(invalid(format!("credit for frames of kind {kind}, which are not sent"))),
        }
    }

    /// When [`Forward::settle`] wants to be called at the latest.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        match self.state {
            State::Connecting { since, .. } => Some(since + CONNECT_LIMIT),
            State::Open { .. } | State::Failed(_) => None,
        }
    }

    /// Tells the connection's last message when it is over.
    pub(crate) fn settle(&self, now: Instant) -> Option<GuestMessage> {
        match &self.state {
            State::Connecting { since, .. } if now.duration_since(*since) >= CONNECT_LIMIT => {
                Some(GuestMessage::Error(failed(&self.target, Errno::TIMEDOUT)))
            }
            State::Connecting { .. } => None,
            State::Failed(error) => Some(GuestMessage::Error(error.clone())),
            State::Open { is_end_told } => {
                (*is_end_told && self.input.is_over()).then_some(GuestMessage::Done)
            }
        }
    }
}

/// A second descriptor of a socket: each direction has its own.
fn twin(target: &ForwardTarget, socket: &OwnedFd) -> Result<OwnedFd, GuestError> {
    socket
        .try_clone()
        .map_err(|error| failure(ErrorKind::Limit, format!("cannot connect to {target}: {error}")))
}

fn open(family: AddressFamily) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, SocketType::STREAM, flags, None)
}

/// A socket that can connect to an address.
fn tcp_socket(to: &SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = open(match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    })?;
    // Answers to single keys must not wait for each other.
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    Ok(socket)
}

/// Whether a TCP socket has connected to itself.
fn is_its_own_peer(socket: &OwnedFd) -> bool {
    let own = rustix::net::getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    let peer = rustix::net::getpeername(socket).ok().flatten();
    own.is_some() && own == peer.and_then(|peer| SocketAddr::try_from(peer).ok())
}

/// A socket that connects, or has.
fn connect(target: &ForwardTarget) -> Result<OwnedFd, GuestError> {
    let connected = match target {
        ForwardTarget::Tcp { address, port } => {
            let address = SocketAddr::new(*address, *port);
            tcp_socket(&address)
                .and_then(|socket| started(rustix::net::connect(&socket, &address), socket))
        }
        ForwardTarget::Unix { path } => {
            let address = SocketAddrUnix::new(path.as_str())
                .map_err(|_| invalid(format!("`{path}` is too long for a socket's path")))?;
            open(AddressFamily::UNIX)
                .and_then(|socket| started(rustix::net::connect(&socket, &address), socket))
        }
        ForwardTarget::Published { .. } | ForwardTarget::Unknown => {
            let text = "the guest agent does not know this kind of socket";
            return Err(failure(ErrorKind::Unsupported, text));
        }
    };
    connected.map_err(|error| failed(target, error))
}

fn started(connected: Result<(), Errno>, socket: OwnedFd) -> Result<OwnedFd, Errno> {
    match connected {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn failed(target: &ForwardTarget, error: Errno) -> GuestError {
    let kind = match error {
        Errno::NOENT | Errno::CONNREFUSED => ErrorKind::NotFound,
        Errno::ACCESS | Errno::PERM => ErrorKind::Denied,
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => ErrorKind::Limit,
        _ => ErrorKind::System,
    };
    failure(kind, format!("cannot connect to {target}: {}", std::io::Error::from(error)))
}
