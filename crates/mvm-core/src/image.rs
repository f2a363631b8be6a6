//! Images: where a pool's root filesystem comes from, and what an image says about running it.
//!
//! Commands, documents and records all hold an [`ImageSpec`] as one line of text. Nothing here
//! looks at a file or a registry.

mod reference;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::init::InitMode;

pub use reference::Reference;

/// What an image source may look like, for errors.
const EXPECTED: &str = "builtin, an image of a registry such as nginx:1.27, oci:DIR[:TAG], \
     oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], mmdebstrap:SUITE[,PACKAGE...] or \
     rootfs:DIR-OR-TAR";
/// Prefixes that other tools know and that would otherwise pass for names of images.
const FOREIGN: [&str; 6] =
    ["docker-daemon", "containers-storage", "dir", "ostree", "sif", "tarball"];

/// Where a pool's root filesystem comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ImageSpec {
    /// The small image that mvm makes from distribution packages.
    #[default]
    Builtin,
    /// An image that is pulled from a registry.
    Registry(Reference),
    /// A directory in the OCI image layout.
    OciLayout {
        /// The directory.
        path: String,
        /// The image's name in the directory; needed only if there are several.
        tag: Option<String>,
    },
    /// A tar archive of an OCI image layout.
    OciArchive {
        /// The file.
        path: String,
        /// The image's name in the archive; needed only if there are several.
        tag: Option<String>,
    },
    /// What `docker save` writes.
    DockerArchive {
        /// The file.
        path: String,
        /// The image's name in the archive; needed only if there are several.
        name: Option<String>,
    },
    /// A Debian system that `mmdebstrap` makes out of the host's package sources.
    Debian {
        /// The release, such as `bookworm`.
        suite: String,
        /// Packages beside the base system, sorted.
        packages: BTreeSet<String>,
    },
    /// The tree in a directory or in a tar archive.
    RootFs {
        /// The directory or file.
        path: String,
    },
}

impl ImageSpec {
    /// The file or directory on the node that the image is made from.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::OciLayout { path, .. }
            | Self::OciArchive { path, .. }
            | Self::DockerArchive { path, .. }
            | Self::RootFs { path } => Some(path),
            Self::Builtin | Self::Registry(_) | Self::Debian { .. } => None,
        }
    }

    /// The same image in another place; an image without a path stays as it is.
    ///
    /// # Errors
    /// The path cannot be written in an image source.
    pub fn with_path(mut self, new: &str) -> Result<Self, String> {
        match &mut self {
            Self::OciLayout { path, .. }
            | Self::OciArchive { path, .. }
            | Self::DockerArchive { path, .. }
            | Self::RootFs { path } => *path = checked_path(new)?,
            Self::Builtin | Self::Registry(_) | Self::Debian { .. } => {}
        }
        Ok(self)
    }

    /// A Debian system.
    ///
    /// # Errors
    /// Names the suite or package that cannot be one.
    pub fn debian<'a>(
        suite: &str,
        packages: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, String> {
        let word = |text: &str, what, expected| {
            let starts = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
            let allowed = |c: char| {
                c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.')
            };
            if starts && text.chars().all(allowed) {
                Ok(text.to_owned())
            } else {
                Err(format!("`{text}` is not {what}: expected {expected}"))
            }
        };
        let package = |text| word(text, "a Debian package", "names such as openssh-server");
        Ok(Self::Debian {
            suite: word(suite, "a Debian suite", "a name such as bookworm")?,
            packages: packages.into_iter().map(package).collect::<Result<_, _>>()?,
        })
    }
}

impl FromStr for ImageSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "builtin" {
            return Ok(Self::Builtin);
        }
        if text.is_empty() {
            return Err(format!("an image source is empty: expected {EXPECTED}"));
        }
        let Some((transport, rest)) = text.split_once(':') else {
            return reference(text, text);
        };
        match transport {
            "docker" => match rest.strip_prefix("//") {
                Some(name) => reference(text, name),
                None => reference(text, text),
            },
            "oci" => {
                let (path, tag) = path_and_name(rest)?;
                Ok(Self::OciLayout { path, tag })
            }
            "oci-archive" => {
                let (path, tag) = path_and_name(rest)?;
                Ok(Self::OciArchive { path, tag })
            }
            "docker-archive" => {
                let (path, name) = path_and_name(rest)?;
                Ok(Self::DockerArchive { path, name })
            }
            "mmdebstrap" => {
                let mut words = rest.split(',');
                let suite = words.next().unwrap_or_default();
                Self::debian(suite, words)
            }
            "rootfs" => Ok(Self::RootFs { path: checked_path(rest)? }),
            "oci-layout" => Err(format!(
                "`{text}` is not an image source: `oci:{rest}` reads a directory in the OCI layout"
            )),
            other if FOREIGN.contains(&other) => Err(format!(
                "`{text}` is not an image source, as mvm cannot read `{other}:`: `skopeo copy {text} oci-archive:FILE` makes a file that it reads; expected {EXPECTED}"
            )),
            _ => reference(text, text),
        }
    }
}

fn reference(text: &str, name: &str) -> Result<ImageSpec, String> {
    let parsed = name.parse::<Reference>();
    parsed
        .map(ImageSpec::Registry)
        .map_err(|why| format!("`{text}` is not an image source: {why}; expected {EXPECTED}"))
}

fn path_and_name(text: &str) -> Result<(String, Option<String>), String> {
    let (path, name) = match text.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (text, None),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    match name {
        Some(name) if name.is_empty() || !name.chars().all(is_name) => Err(format!(
            "`{name}` is not the name of an image in `{path}`: expected a tag such as latest"
        )),
        name => Ok((checked_path(path)?, name.map(str::to_owned))),
    }
}

fn checked_path(path: &str) -> Result<String, String> {
    if path.is_empty() {
        return Err("an image source has an empty path: expected a file or directory".to_owned());
    }
    if path.contains(|c: char| c == ':' || c.is_control()) {
        return Err(format!(
            "the path `{}` cannot be an image's: expected one without colons and control characters",
            path.escape_debug()
        ));
    }
    Ok(path.to_owned())
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |transport: &str, path: &str, name: &Option<String>| match name {
            Some(name) => format!("{transport}:{path}:{name}"),
            None => format!("{transport}:{path}"),
        };
        match self {
            Self::Builtin => f.pad("builtin"),
            Self::Registry(reference) => f.pad(&reference.to_string()),
            Self::OciLayout { path, tag } => f.pad(&named("oci", path, tag)),
            Self::OciArchive { path, tag } => f.pad(&named("oci-archive", path, tag)),
            Self::DockerArchive { path, name } => f.pad(&named("docker-archive", path, name)),
            Self::Debian { suite, packages } => {
                let words = packages.iter().map(|package| format!(",{package}"));
                f.pad(&format!("mmdebstrap:{suite}{}", words.collect::<String>()))
            }
            Self::RootFs { path } => f.pad(&format!("rootfs:{path}")),
        }
    }
}

crate::serde_as_text!(ImageSpec);

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
    /// Directories that are to be kept apart from the rest: made if the image has none, and else
    /// directories like others.
    pub volumes: BTreeSet<String>,
    /// Whether it says how to check a container's health. mvm does not do that.
    pub has_healthcheck: bool,
    /// The image's own init program (systemd, runit, OpenRC …), which becomes PID 1 instead of a
    /// program of the fields above.
    pub init: Option<String>,
    /// Links to inits, by their paths, with what each is as a main process: those whose own names do
    /// not say it.
    pub init_links: BTreeMap<String, InitMode>,
}

#[cfg(test)]
mod tests;
