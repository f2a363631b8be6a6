//! The ways into a guest besides plain programs: terminals and forwarded connections.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{INITIAL_CREDIT, PUBLISHED_CREDIT};

/// An optional ability of a guest agent, which it names in its hello. An agent that does not name
/// one is older than the ability, and is not asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Execs with a terminal, and its resizing.
    Terminal,
    /// Execs that run on without the host.
    Detach,
    /// The guest agent's own programs.
    Builtins,
    /// Forwarded connections.
    Forward,
    /// Data disks, mounted before the guest is configured. An older agent would let programs
    /// write to the root instead.
    Disks,
    /// A main process.
    Main,
    /// Hooks before sleep and after a wake, and a new identity for a fork.
    Sleep,
    /// Reading the wall clock, and changing it gradually.
    Clock,
    /// Connections to published ports, which do not come from the guest's loopback.
    Published,
    /// Messages in several frames.
    LongMessages,
    /// Sysctls, limits and the size of `/dev/shm`.
    Settings,
}

impl Feature {
    /// All that this build has.
    pub const ALL: [Self; 11] = [
        Self::Terminal,
        Self::Detach,
        Self::Builtins,
        Self::Forward,
        Self::Disks,
        Self::Main,
        Self::Sleep,
        Self::Clock,
        Self::Published,
        Self::LongMessages,
        Self::Settings,
    ];

    /// The name in a hello.
    pub fn name(self) -> &'static str {
        match self {
            Self::Terminal => "terminal",
            Self::Detach => "detach",
            Self::Builtins => "builtins",
            Self::Forward => "forward",
            Self::Disks => "disks",
            Self::Main => "main",
            Self::Sleep => "sleep",
            Self::Clock => "clock",
            Self::Published => "published",
            Self::LongMessages => "long-messages",
            Self::Settings => "settings",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A terminal's size in characters. A size of 0 means that it is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A socket in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "socket", rename_all = "snake_case")]
pub enum ForwardTarget {
    /// A TCP port of an address that the guest reaches; usually its loopback.
    Tcp {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
    },
    /// A Unix stream socket.
    Unix {
        /// Its absolute path.
        path: String,
    },
    /// A TCP port for somebody outside: whichever of the guest's addresses a program listens on. The
    /// connection comes from an address of the guest that is not its loopback, because programs
    /// trust what comes from there. Needs [`Feature::Published`].
    Published {
        /// The port.
        port: u16,
    },
    /// A socket of a newer peer.
    #[serde(other)]
    Unknown,
}

impl ForwardTarget {
    /// Bytes in flight in each direction before the sender must wait for credit.
    pub fn credit(&self) -> u32 {
        match self {
            Self::Published { .. } => PUBLISHED_CREDIT,
            Self::Tcp { .. } | Self::Unix { .. } | Self::Unknown => INITIAL_CREDIT,
        }
    }

    /// The TCP port, if it is one.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp { port, .. } | Self::Published { port } => Some(*port),
            Self::Unix { .. } | Self::Unknown => None,
        }
    }
}

impl fmt::Display for ForwardTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address: IpAddr::V4(address), port } => write!(f, "{address}:{port}"),
            Self::Tcp { address: IpAddr::V6(address), port } => write!(f, "[{address}]:{port}"),
            Self::Unix { path } => f.write_str(path),
            Self::Published { port } => write!(f, "port {port}"),
            Self::Unknown => f.write_str("a socket of an unknown kind"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_the_wire_and_newer_ones_are_known_as_unknown() {
        let tcp = ForwardTarget::Tcp { address: "127.0.0.1".parse().unwrap(), port: 80 };
        let unix = ForwardTarget::Unix { path: "/run/x".into() };
        for target in [tcp, unix, ForwardTarget::Published { port: 80 }] {
            let text = serde_json::to_string(&target).unwrap();
            assert_eq!(serde_json::from_str::<ForwardTarget>(&text).unwrap(), target);
        }
        let newer = r#"{"socket":"vsock","cid":3,"port":5}"#;
        assert_eq!(serde_json::from_str::<ForwardTarget>(newer).unwrap(), ForwardTarget::Unknown);
    }
}
