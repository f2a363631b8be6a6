//! The protocol between a node's agent and the guest agent inside each microVM.
//!
//! One byte stream per microVM, whatever the VMM: Firecracker's vsock socket or QEMU's
//! virtio-serial port named [`PORT_NAME`]. A virtio-serial port has no connections: bytes in flight
//! when one end died reach whoever attaches next. So each session starts with a preamble:
//!
//! ```text
//!  host  -> guest   [FLUSH_LEN zero bytes, unless nobody wrote to the stream before]
//!                   HOST_MAGIC (8)  nonce (16)  min version (2)  max version (2)  zero (4)
//!  guest -> host    GUEST_MAGIC (8) nonce (16)  version (2)      max version (2)  zero (4)
//! ```
//!
//! The zero bytes complete whatever frame was cut, so that the guest finds a wrong trailer and
//! scans for the magic. The guest ends every stream of the earlier session, drops what it had
//! queued, and answers with the same nonce; the host discards input until it sees that answer.
//! The version in the answer is 0 if the two have none in common. The first four bytes of a nonce
//! are not all zero: [`crate::accept`] takes no such preamble, because the flush would be frames.
//! Then both speak [`crate::frame`]s whose tag is the first four bytes of the nonce.
//!
//! The guest sends [`GuestMessage::Hello`] on stream 0. The host opens streams: it picks a fresh
//! number above 0 and sends one request message on it; the guest answers on the same stream and
//! closes it with a terminal message ([`GuestMessage::ends_stream`]).
//!
//! Data frames (`KIND_STDIN`, `KIND_STDOUT`, `KIND_STDERR`) obey credit: a sender may have at most
//! [`INITIAL_CREDIT`] bytes per stream and kind that the receiver has not returned by
//! [`HostMessage::Credit`] / [`GuestMessage::Credit`].
//!
//! A message of the host that is longer than [`MAX_BODY`] comes in several frames of its stream
//! ([`crate::frame::KIND_PART`]), whose bodies [`Parts`] joins.
//!
//! The protocol is additive. Messages are JSON objects tagged by `type`; unknown fields are
//! ignored, missing ones have defaults, and an unknown request is answered with
//! [`ErrorKind::Unsupported`], so that host and guest may be months apart.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::net::MacAddr;
use crate::settings::Settings;

mod clock;
mod parts;
mod preamble;
mod sleep;
mod ways;

pub use clock::{ClockCorrection, ClockReading};
pub use parts::Parts;
pub use preamble::Preamble;
pub use sleep::{
    HookReport, HookRun, LONGEST_HOOK_OUTPUT, MOST_HOOKS, SleepRequest, WakeReason, WakeRequest,
};
pub use ways::{Feature, ForwardTarget, TerminalSize};

/// The name of the virtio-serial port that carries the protocol.
pub const PORT_NAME: &str = "mvm.agent.0";
/// The vsock port that carries it where the VMM has vsock and no virtio-serial port.
pub const VSOCK_PORT: u32 = 5252;
/// What a kernel says last before it switches the machine off. On a machine without a switch, which
/// can only be reset, the guest agent says it instead.
pub const POWER_OFF_WORDS: &str = "reboot: Power down";
/// On the kernel's command line, before the guest's name of the read-only disk (such as `vdc`) that
/// holds the modules of its kernel. A guest agent that is older than it leaves that disk alone.
pub const MODULES_ARGUMENT: &str = "mvm.modules=";
/// The protocol versions that this build speaks.
pub const MIN_VERSION: u16 = 1;
/// The newest protocol version that this build speaks.
pub const MAX_VERSION: u16 = 1;
/// First bytes of the host's preamble.
pub const HOST_MAGIC: [u8; 8] = *b"\x00MVMhg1\n";
/// First bytes of the guest's preamble.
pub const GUEST_MAGIC: [u8; 8] = *b"\x00MVMgh1\n";
/// Length of a preamble in bytes.
pub const PREAMBLE_LEN: usize = 32;
/// Largest frame body in either direction, in bytes.
pub const MAX_BODY: u32 = 64 * 1024;
/// Longest message of the host in several frames, in bytes: what Linux takes as arguments and
/// variables of one program, in JSON that escapes all of it. Needs [`Feature::LongMessages`].
pub const LONGEST_MESSAGE: usize = 40 * 1024 * 1024;
/// Zero bytes that complete any cut frame.
pub const FLUSH_LEN: usize = MAX_BODY as usize + 64;
/// Bytes in flight per stream and kind before the sender must wait for credit.
pub const INITIAL_CREDIT: u32 = 1024 * 1024;
/// Streams that may be open at once in a session. What the host itself asks, such as for health or a
/// shutdown, is not counted.
pub const MAX_STREAMS: usize = 1024;
/// Streams of connections to published ports that may be among them: however many strangers connect,
/// there is room for execs, logs and the operator's own connections. An older guest agent counts all
/// streams together, so that the host keeps to it for both.
pub const MAX_PUBLISHED: usize = MAX_STREAMS * 3 / 4;
/// What [`INITIAL_CREDIT`] is to others, for a [`ForwardTarget::Published`]: many strangers who do
/// not read what they asked for must not cost more memory than the machine has.
pub const PUBLISHED_CREDIT: u32 = 256 * 1024;

/// What the host sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HostMessage {
    /// Gives the guest its identity; sent once after each hello, and idempotent. Answer: `done`.
    Configure(Configuration),
    /// Asks for the guest's health. Answer: `health`.
    Health,
    /// Runs a program. Answer: `started`, output data, `exit`.
    Exec(ExecRequest),
    /// Sends a signal (by number) to the process of this stream's exec. No answer.
    Signal {
        /// The Linux signal number.
        signal: i32,
    },
    /// Changes the size of the terminal of this stream's exec. No answer.
    Resize(TerminalSize),
    /// Lets the program of this stream's exec run on without the host; its output is dropped from
    /// now on. Answer: `done`.
    Detach,
    /// Connects to a socket in the guest. Answer: `connected`, then data both ways (`KIND_STDIN` to
    /// the socket, `KIND_STDOUT` from it), `eof` when the socket sends no more, `done` when both
    /// directions have ended.
    Forward(ForwardTarget),
    /// No more data of this kind will come on this stream.
    Eof {
        /// The frame kind that ended.
        kind: u8,
    },
    /// The receiver has consumed this many bytes of this kind on this stream.
    Credit {
        /// The frame kind.
        kind: u8,
        /// Bytes consumed.
        bytes: u32,
    },
    /// Streams a log as `KIND_STDOUT` data. Answer: data, then `done` (never, if following).
    Logs {
        /// Which log.
        source: LogSource,
        /// Whether to go on with what comes later.
        #[serde(default)]
        follow: bool,
    },
    /// Starts the main process unless this boot has started it, and attaches to it: its output,
    /// its standard input and signals to it go over this stream. Answers: `main`, output data,
    /// `exit`. The session's end, and `cancel`, only detach from it.
    Main(MainRequest),
    /// Prepares for sleep. Answer: `hooks`. Needs [`Feature::Sleep`].
    PrepareSleep(SleepRequest),
    /// Tells that the guest was asleep, once it is configured again. Answer: `hooks`. Needs
    /// [`Feature::Sleep`].
    Woken(WakeRequest),
    /// Steps the wall clock to the host's, in nanoseconds since the Unix epoch. Answer: `done`, at
    /// once, so that the host knows how late it came. Needs [`Feature::Sleep`].
    SetClock {
        /// The host's time.
        unix_ns: u64,
    },
    /// Asks what the wall clock shows. Answer: `clock`. Needs [`Feature::Clock`].
    ReadClock,
    /// Lets the wall clock gain so much gradually, or lose it, in place of what an earlier one has
    /// left to do. Answer: `done`. Needs [`Feature::Clock`].
    SlewClock {
        /// Nanoseconds.
        by_ns: i64,
    },
    /// Ends the stream and whatever runs for it (an exec's process group is killed). No answer.
    Cancel,
    /// Powers the microVM off in an orderly way. Answer: `done`, then the machine stops.
    Shutdown {
        /// How long processes have between SIGTERM and SIGKILL, in milliseconds.
        grace_ms: u64,
    },
    /// A message of a newer peer.
    #[serde(other)]
    Unknown,
}

/// What the guest sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestMessage {
    /// The first message of a session, on stream 0.
    Hello(Hello),
    /// The request was carried out; ends the stream.
    Done,
    /// Answer to `health`; ends the stream.
    Health(Health),
    /// The program runs.
    Started {
        /// Its process id inside the guest.
        pid: u32,
    },
    /// The main process runs, or has run.
    Main(MainState),
    /// The program ended and all its output was sent; ends the stream.
    Exit(ExitStatus),
    /// The hooks have ended, and what belongs to the request is done; ends the stream.
    Hooks(HookReport),
    /// Answer to `read_clock`; ends the stream.
    Clock(ClockReading),
    /// The forwarded connection is open.
    Connected,
    /// No more data of this kind will come on this stream.
    Eof {
        /// The frame kind that ended.
        kind: u8,
    },
    /// The receiver has consumed this many bytes of this kind on this stream.
    Credit {
        /// The frame kind.
        kind: u8,
        /// Bytes consumed.
        bytes: u32,
    },
    /// The request failed; ends the stream.
    Error(GuestError),
    /// A message of a newer peer.
    #[serde(other)]
    Unknown,
}

impl GuestMessage {
    /// Whether this message is the last one of its stream.
    pub fn ends_stream(&self) -> bool {
        matches!(
            self,
            Self::Done
                | Self::Health(_)
                | Self::Exit(_)
                | Self::Hooks(_)
                | Self::Clock(_)
                | Self::Error(_)
        )
    }
}

/// Who the guest agent is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// The guest agent's own version.
    pub agent_version: String,
    /// The guest kernel's boot id: changes with each boot, not with a wake.
    pub boot_id: String,
    /// The guest kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// Sessions opened since this boot, this one included.
    pub session: u64,
    /// Whether this boot has been configured already.
    pub configured: bool,
    /// Optional abilities, by name.
    pub features: Vec<String>,
}

/// The identity that the host gives to a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configuration {
    /// Which instance the guest is (`tenant/pool/id`); empty if the host is older than the field.
    /// A guest that was another instance before is a fork of it and draws what is to be its own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub instance: String,
    /// The host name.
    pub hostname: String,
    /// The network interface, or `None` for a guest without a network.
    pub network: Option<NetworkConfiguration>,
    /// The host's wall clock in nanoseconds since the Unix epoch, if the guest is to step its own.
    pub wall_clock_unix_ns: Option<u64>,
    /// Data disks, in the order in which they are to be mounted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfiguration>,
    /// What is set in the kernel, and for programs. Needs [`Feature::Settings`] unless empty.
    #[serde(skip_serializing_if = "Settings::is_default")]
    pub settings: Settings,
}

/// A data disk that the guest is to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfiguration {
    /// The disk's name, for messages.
    pub name: String,
    /// The guest's name of the device, such as `vdc`.
    pub device: String,
    /// The directory to mount it on; made if it is not there.
    pub path: String,
    /// Whether it may only be read.
    #[serde(default)]
    pub read_only: bool,
}

/// A guest's only network interface besides loopback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfiguration {
    /// The interface's own address.
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix in bits.
    pub prefix_len: u8,
    /// The default gateway.
    pub gateway: Ipv4Addr,
    /// Name servers, in order of preference.
    #[serde(default)]
    pub nameservers: Vec<IpAddr>,
    /// Domains in which short names are looked for, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of resolv.conf(5).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resolver_options: Vec<String>,
    /// The largest packet that the interface sends, in bytes; it keeps what it has if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// The interface's Ethernet address; it keeps the one that it has if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// A program to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// The program and its arguments; a program without `/` is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Added to the guest's default environment.
    pub env: Vec<(String, String)>,
    /// The working directory; the user's home if absent.
    pub cwd: Option<String>,
    /// Whether nobody asked for this directory: if it cannot be entered, `/` does.
    pub is_cwd_default: bool,
    /// `NAME`, `UID` or either with `:GROUP`; root if absent.
    pub user: Option<String>,
    /// Whether data for standard input will come; else it is `/dev/null`.
    pub stdin: bool,
    /// The process group is killed after this many milliseconds.
    pub timeout_ms: Option<u64>,
    /// The program's terminal, of this size at first; else it has pipes. A terminal's output comes
    /// as standard output. Needs [`Feature::Terminal`].
    pub terminal: Option<TerminalSize>,
    /// Whether the program runs on without the host, with the null device as its input and
    /// outputs. Answer: `started`, `done`. Needs [`Feature::Detach`].
    pub detach: bool,
    /// Whether the program is one of the guest agent's own, so that it is there in every image.
    /// Needs [`Feature::Builtins`].
    pub builtin: bool,
}

/// The main process of a boot, and from where on its output is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MainRequest {
    /// The program, if it is one.
    pub program: Option<MainProgram>,
    /// The image's own init instead, which becomes process 1. The host names it on the kernel's
    /// command line too, as the guest agent must know it before it serves.
    pub init: Option<String>,
    /// That init with its arguments, variables and directory. An agent older than the field starts
    /// the init without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_program: Option<MainProgram>,
    /// Bytes of standard output that the host has.
    pub stdout_from: u64,
    /// Bytes of standard error that the host has.
    pub stderr_from: u64,
}

/// A program that is an instance's main process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MainProgram {
    /// The program and its arguments; a program without `/` is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Added to the guest's default environment.
    pub env: Vec<(String, String)>,
    /// `NAME`, `UID` or either with `:GROUP`; root if absent.
    pub user: Option<String>,
    /// The working directory; made if it is missing.
    pub cwd: String,
    /// The Linux number of the signal that asks the program to end.
    pub stop_signal: i32,
    /// Whether its standard input stays open; else it is `/dev/null`.
    pub stdin: bool,
    /// Its terminal, of this size at first; else it has pipes. A terminal's output comes as
    /// standard output.
    pub terminal: Option<TerminalSize>,
    /// Whether it is process 1 of a process namespace, which execs then join.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub is_first: bool,
}

/// Where the main process stands when a host attaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MainState {
    /// Its process id inside the guest.
    pub pid: u32,
    /// The position in standard output of the first byte that will be sent. What lies between it
    /// and what was asked for was dropped while no host was attached.
    pub stdout: u64,
    /// The same of standard error.
    pub stderr: u64,
}

/// A log that the guest can stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The guest kernel's ring buffer, as text lines.
    Kernel,
    /// A source of a newer peer.
    #[serde(other)]
    Unknown,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited by itself.
    Exited {
        /// The exit code, 0 to 255.
        code: i32,
    },
    /// A signal ended it.
    Signaled {
        /// The Linux signal number.
        signal: i32,
        /// Whether the guest's kernel sent it because memory ran out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        out_of_memory: bool,
    },
    /// It ran into its time limit and was killed.
    TimedOut,
}

impl ExitStatus {
    /// The code that a shell would report: the exit code, 128 + signal, or 124 for a time limit.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Exited { code } => code,
            Self::Signaled { signal, .. } => 128 + signal,
            Self::TimedOut => 124,
        }
    }
}

/// The guest's health, measured when asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// Whether the guest is configured and its root is mounted.
    pub ready: bool,
    /// Milliseconds since the guest kernel started.
    pub uptime_ms: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Total memory in KiB, as the guest kernel sees it.
    pub mem_total_kib: u64,
    /// Memory available to programs in KiB.
    pub mem_available_kib: u64,
    /// Size of the writable layer in KiB.
    pub disk_total_kib: u64,
    /// Free space of the writable layer in KiB.
    pub disk_free_kib: u64,
    /// Programs that the guest's kernel killed because memory ran out, since boot.
    pub oom_kills: u64,
    /// Running execs.
    pub execs: u32,
    /// Connections from the host to sockets in the guest.
    pub connections: u32,
    /// CPU time used since boot, in milliseconds; absent if the guest agent is older than the field.
    pub cpu_ms: Option<u64>,
    /// Bytes that the network interfaces, loopback aside, have sent and received since boot; absent
    /// if the guest agent is older than the field.
    pub net_bytes: Option<u64>,
    /// Whether a program asks not to be put to sleep now.
    pub busy: bool,
}

/// Why the guest refused or failed a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// The class of the failure.
    pub kind: ErrorKind,
    /// What went wrong, naming the object.
    pub message: String,
}

/// Classes of guest failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The guest agent does not know this request.
    Unsupported,
    /// The request does not make sense.
    Invalid,
    /// The program, directory or user does not exist.
    NotFound,
    /// The program may not be run, or the directory not entered.
    Denied,
    /// A limit of the guest agent is reached.
    Limit,
    /// The guest's kernel refused.
    System,
    /// A disk that may only be read was not unmounted in order: its journal has to be replayed.
    Unclean,
    /// A class of a newer peer.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests;
