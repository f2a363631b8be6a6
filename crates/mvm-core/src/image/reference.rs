//! Names of images in registries, as Docker reads them.

use std::fmt;
use std::str::FromStr;

/// The registry of a name without one.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The first part of a name that has one part only, at the default registry.
const DEFAULT_NAMESPACE: &str = "library";
/// The tag of a name with neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest registry and repository together, in bytes.
const NAME_MAX: usize = 255;
/// Longest tag, in bytes.
const TAG_MAX: usize = 128;

/// An image in a registry, with everything that its short form leaves out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl Reference {
    /// The registry's host name, with its port if it has one, such as `docker.io`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The image's path in the registry, such as `library/nginx`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. A reference has a tag, a digest, or both; then the digest decides.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, such as `sha256:…`.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(checked_digest(digest)?)),
            None => (text, None),
        };
        // A colon behind the last slash begins a tag; one before it, a port.
        let path_start = name.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match name[path_start..].find(':') {
            Some(colon) => {
                let (name, tag) = name.split_at(path_start + colon);
                (name, Some(checked_tag(&tag[1..])?))
            }
            None => (name, None),
        };
        let is_registry = |part: &str| {
            part.contains(['.', ':']) || part == "localhost" || part.contains(char::is_uppercase)
        };
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
            format!("{DEFAULT_NAMESPACE}/{repository}")
        } else {
            repository.to_owned()
        };
        check_registry(registry)?;
        repository.split('/').try_for_each(check_component)?;
        if registry.len() + repository.len() >= NAME_MAX {
            return Err(format!("the name is longer than {NAME_MAX} characters"));
        }
        let tag = tag.or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }
}

fn check_registry(host: &str) -> Result<(), String> {
    let bad = || format!("`{host}` is not a registry: expected a name such as ghcr.io:443");
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            ("v6", rest.strip_prefix(':').or(if rest.is_empty() { None } else { Some(rest) }))
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    if name.split('.').all(is_label) && is_port { Ok(()) } else { Err(bad()) }
}

/// Lower-case letters and digits, separated by `.`, `_`, `__` or any number of `-`.
fn check_component(part: &str) -> Result<(), String> {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_separator =
        |text: &str| matches!(text, "" | "." | "_" | "__") || text.chars().all(|c| c == '-');
    let sound = part.starts_with(is_word)
        && part.ends_with(is_word)
        && part.split(is_word).all(is_separator);
    if sound {
        return Ok(());
    }
    Err(format!("`{part}` is not part of an image's name: expected lower-case letters and digits"))
}

fn checked_tag(tag: &str) -> Result<String, String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let sound = tag.starts_with(is_word)
        && tag.len() <= TAG_MAX
        && tag.chars().all(|c| is_word(c) || matches!(c, '.' | '-'));
    if sound { Ok(tag.to_owned()) } else { Err(format!("`{tag}` is not a tag")) }
}

fn checked_digest(digest: &str) -> Result<String, String> {
    let is_hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    match digest.strip_prefix("sha256:") {
        Some(hex) if hex.len() == 64 && hex.chars().all(is_hex) => Ok(digest.to_owned()),
        _ => Err(format!("`{digest}` is not a digest: expected sha256: and 64 hexadecimal digits")),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}
