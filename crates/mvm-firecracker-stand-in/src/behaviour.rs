//! What a test wants of the stand-in: a version to be, and faults to have.

use std::fs;
use std::io::ErrorKind;

use serde::Deserialize;

use crate::VERSION;

/// The file beside the program; everything is as usual without it.
const FILE: &str = "behaviour.json";
/// What a fault is at that is had before the API is served.
const START: &str = "start";

/// See the module.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Behaviour {
    version: Option<String>,
    faults: Vec<Fault>,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fault {
    /// A request such as `PUT /vsock`, or `start`.
    at: String,
    what: Wrong,
}

/// What goes wrong.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Wrong {
    /// It is refused with this status and text.
    Refuse {
        /// The status of the answer.
        status: u16,
        /// The whole body of the answer.
        body: String,
    },
    /// The process ends before it has answered.
    Die {
        /// What it says last, in its log.
        words: String,
    },
    /// The request is never answered, or the API never served.
    Hang,
    /// The request is answered with this in place of HTTP, and the connection closed.
    Say(String),
    /// It is answered after this many milliseconds.
    Delay(u64),
}

impl Behaviour {
    /// What the file says, if there is one.
    pub(crate) fn beside_this_program() -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        match fs::read(program.with_file_name(FILE)) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| format!("{FILE}: {error}")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("{FILE}: {error}")),
        }
    }

    pub(crate) fn version(&self) -> &str {
        self.version.as_deref().unwrap_or(VERSION)
    }

    /// What goes wrong before anything is served.
    pub(crate) fn at_start(&self) -> Option<&Wrong> {
        self.at(START)
    }

    /// What goes wrong with a request.
    pub(crate) fn at(&self, request: &str) -> Option<&Wrong> {
        self.faults.iter().find(|fault| fault.at == request).map(|fault| &fault.what)
    }
}
