//! The kernel's network settings under `/proc/sys/net`, of our links and the one of the machine.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::NetworkError;

/// IPv4 forwarding of the machine: only ever switched on.
pub(super) const IP_FORWARD: (&str, &str) = ("ipv4/ip_forward", "1");

/// A bridge's settings: it routes, answers ARP for its own address only, and speaks no IPv6.
const BRIDGE: [(&str, &str); 8] = [
    ("ipv4/conf/LINK/forwarding", "1"),
    ("ipv4/conf/LINK/rp_filter", "1"),
    ("ipv4/conf/LINK/arp_ignore", "1"),
    ("ipv4/conf/LINK/proxy_arp", "0"),
    ("ipv4/conf/LINK/send_redirects", "0"),
    ("ipv4/conf/LINK/accept_redirects", "0"),
    ("ipv4/conf/LINK/route_localnet", "0"),
    ("ipv6/conf/LINK/disable_ipv6", "1"),
];

/// A tap's settings: the host itself says nothing on it.
const TAP: [(&str, &str); 2] =
    [("ipv4/conf/LINK/arp_ignore", "8"), ("ipv6/conf/LINK/disable_ipv6", "1")];

/// One setting, with the value that it must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sysctl {
    /// Path under `/proc/sys/net`.
    pub(super) path: String,
    pub(super) value: &'static str,
}

/// The settings of a bridge.
pub(super) fn of_bridge(link: &str) -> impl Iterator<Item = Sysctl> {
    of_link(&BRIDGE, link)
}

/// The settings of a tap.
pub(super) fn of_tap(link: &str) -> impl Iterator<Item = Sysctl> {
    of_link(&TAP, link)
}

/// The machine's one setting.
pub(super) fn ip_forward() -> Sysctl {
    let (path, value) = IP_FORWARD;
    Sysctl { path: path.to_owned(), value }
}

fn of_link(
    settings: &'static [(&'static str, &'static str)],
    link: &str,
) -> impl Iterator<Item = Sysctl> {
    settings.iter().map(move |(path, value)| Sysctl { path: path.replace("LINK", link), value })
}

impl Sysctl {
    /// The value that it has; `None` where the kernel does without (it may have no IPv6).
    pub(super) fn read(&self) -> Result<Option<String>, NetworkError> {
        match fs::read_to_string(self.file()) {
            Ok(value) => Ok(Some(value.trim().to_owned())),
            Err(error) if self.may_be_absent(&error) => Ok(None),
            Err(error) => {
                Err(NetworkError::system(format!("read {}", self.file().display()))(error))
            }
        }
    }

    /// Gives it its value, if it has another.
    pub(super) fn ensure(&self) -> Result<(), NetworkError> {
        match self.read()? {
            Some(value) if value != self.value => fs::write(self.file(), self.value)
                .map_err(NetworkError::system(format!("set {}", self.file().display()))),
            _ => Ok(()),
        }
    }

    fn file(&self) -> PathBuf {
        PathBuf::from("/proc/sys/net").join(&self.path)
    }

    fn may_be_absent(&self, error: &io::Error) -> bool {
        self.path.starts_with("ipv6/") && error.kind() == io::ErrorKind::NotFound
    }
}
