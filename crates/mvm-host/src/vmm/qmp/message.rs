//! The lines that QEMU sends.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// A QEMU version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Version {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
    /// The patch level.
    #[serde(default)]
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU says of itself when a client connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Its version.
    pub version: Version,
    /// The distribution's package, if it says so.
    pub package: String,
}

impl Greeting {
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Line {
            #[serde(rename = "QMP")]
            qmp: Qmp,
        }
        #[derive(Deserialize)]
        struct Qmp {
            version: Versions,
        }
        #[derive(Deserialize)]
        struct Versions {
            qemu: Version,
            #[serde(default)]
            package: String,
        }
        let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        let Versions { qemu, package } = line.qmp.version;
        Ok(Self { version: qemu, package })
    }
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct QmpEvent {
    /// The event's name, such as `SHUTDOWN`.
    #[serde(rename = "event")]
    pub name: String,
    /// Its data, an object or null.
    #[serde(default)]
    pub data: Value,
}

/// How QEMU answered a command.
#[derive(Debug)]
pub(super) enum Reply {
    /// Success.
    Return(Value),
    /// Failure.
    Error { class: String, description: String },
}

/// One line.
#[derive(Debug)]
pub(super) enum Incoming {
    /// Something happened.
    Event(QmpEvent),
    /// An answer; QEMU leaves the id out when it could not parse the command.
    Reply { id: Option<u64>, reply: Reply },
}

impl Incoming {
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Line {
            event: Option<String>,
            #[serde(default)]
            data: Value,
            id: Option<u64>,
            #[serde(rename = "return")]
            value: Option<Value>,
            error: Option<Failure>,
        }
        #[derive(Deserialize)]
        struct Failure {
            #[serde(default)]
            class: String,
            #[serde(default)]
            desc: String,
        }
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| format!("QEMU sent what is not QMP: {error}"))?;
        if let Some(name) = line.event {
            return Ok(Self::Event(QmpEvent { name, data: line.data }));
        }
        let reply = match line.error {
            Some(failure) => Reply::Error { class: failure.class, description: failure.desc },
            None => Reply::Return(line.value.unwrap_or_default()),
        };
        Ok(Self::Reply { id: line.id, reply })
    }
}
