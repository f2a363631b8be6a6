//! Images: where a pool's root filesystem comes from, and what an image says about running it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a pool's root filesystem comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageSpec {
    /// The small image that mvm makes from distribution packages.
    #[default]
    Builtin,
}

impl FromStr for ImageSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "builtin" => Ok(Self::Builtin),
            _ => Err(format!("`{text}` is not an image source: expected builtin")),
        }
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin => f.pad("builtin"),
        }
    }
}

impl TryFrom<String> for ImageSpec {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ImageSpec> for String {
    fn from(spec: ImageSpec) -> Self {
        spec.to_string()
    }
}

/// What an image says about how it is run: the part of an OCI image's configuration that a
/// microVM honours. All empty for an image that only waits for `exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// More arguments, or the program if there is no entrypoint.
    pub cmd: Vec<String>,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// `USER`, `UID`, or either with `:GROUP` or `:GID`; root if empty.
    pub user: String,
    /// Where the program starts; `/` if empty.
    pub working_dir: String,
    /// The name (`SIGTERM`) or number of the signal that asks the program to end.
    pub stop_signal: Option<String>,
    /// `PORT` or `PORT/tcp|udp` each.
    pub exposed_ports: BTreeSet<String>,
    /// The image's own init program (systemd, runit, OpenRC …), which becomes PID 1 instead of a
    /// program of the fields above.
    pub init: Option<String>,
}
