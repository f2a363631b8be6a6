//! Where the program of a published port is found, and whom it sees.
//!
//! Programs trust what comes from loopback: databases let it in without a password, consoles do
//! whatever it says. A published port is for strangers, so its connections come from an address of
//! the guest that is not loopback, wherever they go:
//!
//! ```text
//!  from                  to
//!  the guest's address   the guest's address          everything that listens on all addresses
//!        "               the listeners' own ones      if that is refused: those of the port, as the
//!                                                     kernel lists them, loopback last
//! ```
//!
//! The first goes as any program's connection to its own machine does, so that what a firewall or a
//! container engine of the guest redirects is redirected here, too.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::io::Errno;

use super::{started, tcp_socket};
use crate::machine::outside_address;

/// Listeners of one port that are tried.
const MOST_LISTENERS: usize = 8;
/// `TCP_LISTEN`, as `/proc/net/tcp` writes it.
const LISTENING: &str = "0A";

/// The search for a port's program.
#[derive(Debug)]
pub(super) struct Search {
    port: u16,
    /// Whether an address may be added to the machine if it has none but loopback.
    may_add: bool,
    /// What is left to be tried; not known before the first address was.
    left: Option<VecDeque<IpAddr>>,
    /// How the first attempt failed, which says most: the others are for special cases.
    failure: Option<Errno>,
}

impl Search {
    pub(super) fn new(port: u16, may_add: bool) -> Self {
        Self { port, may_add, left: None, failure: None }
    }

    /// A socket that connects to the next address, after the last one failed.
    ///
    /// # Errors
    /// There is no other address: how the first one failed.
    pub(super) fn next(&mut self, failed: Option<Errno>) -> Result<OwnedFd, Errno> {
        let mut failed = failed;
        loop {
            if let Some(error) = failed {
                self.failure.get_or_insert(error);
            }
            let connecting = match &mut self.left {
                None => {
                    self.left = Some(listeners(self.port));
                    outside_address(true, self.may_add)
                        .map_err(|_| Errno::ADDRNOTAVAIL)
                        .and_then(|own| connect(own, SocketAddr::new(own, self.port)))
                }
                Some(left) => {
                    let Some(to) = left.pop_front() else {
                        return Err(self.failure.unwrap_or(Errno::CONNREFUSED));
                    };
                    outside_address(to.is_ipv4(), self.may_add)
                        .map_err(|_| Errno::ADDRNOTAVAIL)
                        .and_then(|from| connect(from, SocketAddr::new(to, self.port)))
                }
            };
            match connecting {
                Ok(socket) => return Ok(socket),
                Err(error) => failed = Some(error),
            }
        }
    }
}

/// A socket that connects from one address to another.
fn connect(from: IpAddr, to: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = tcp_socket(&to)?;
    let late: libc::c_int = 1;
    // SAFETY: the option is read from a live integer of the length that is told. Without it, which an
    // old kernel may not have, each connection takes a port of its own.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const late).cast(),
            size_of_val(&late) as libc::socklen_t,
        );
    }
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    started(rustix::net::connect(&socket, &to), socket)
}

/// The addresses on which somebody listens on a port, loopback last.
fn listeners(port: u16) -> VecDeque<IpAddr> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // A kernel without IPv6 has no such file.
        let text = std::fs::read_to_string(table).unwrap_or_default();
        found.extend(text.lines().skip(1).filter_map(|line| listener(line, port)));
    }
    found.sort_by_key(|address| (address.is_loopback(), address.is_ipv6()));
    found.dedup();
    found.truncate(MOST_LISTENERS);
    found.into()
}

/// The address of a line of the kernel's table, if somebody listens there on the port. All addresses
/// of IPv4 are not told: they were tried with the guest's own.
fn listener(line: &str, port: u16) -> Option<IpAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    let (address, of) = local.split_once(':')?;
    if state != LISTENING || u16::from_str_radix(of, 16).ok()? != port {
        return None;
    }
    // Words in network order, each printed as a number of this machine.
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    match address {
        IpAddr::V4(address) if address.is_unspecified() => None,
        IpAddr::V6(address) if address.is_unspecified() => Some(Ipv6Addr::LOCALHOST.into()),
        // It is one of a single link, and which one is not told here.
        IpAddr::V6(address) if address.is_unicast_link_local() => None,
        other => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn listeners_are_read_from_the_kernels_tables() {
        let line = |local: &str, state: &str| {
            format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 0 0 0 1")
        };
        let at_80 = |local: &str| listener(&line(local, "0A"), 80);
        let v6 = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        assert_eq!(at_80("0100007F:0050"), v6("127.0.0.1"));
        assert_eq!(at_80("0201F00A:0050"), v6("10.240.1.2"));
        assert_eq!(at_80("00000000:0050"), None);
        assert_eq!(at_80("00000000000000000000000001000000:0050"), v6("::1"));
        assert_eq!(at_80("00000000000000000000000000000000:0050"), v6("::1"));
        assert_eq!(at_80("0000000000000000FFFF00000100007F:0050"), v6("127.0.0.1"));
        assert_eq!(at_80("000080FE0000000000000000010000FE:0050"), None);
        assert_eq!(at_80("0100007F:0051"), None);
        // A connection, not a listener.
        assert_eq!(listener(&line("0100007F:0050", "01"), 80), None);
        for bad in ["", "0: x 0 0A", "0: 0100007F:0050", "0: 01007F:0050 0:0 0A", "0: é:0050 0 0A"]
        {
            assert_eq!(listener(bad, 80), None, "{bad}");
        }
    }
}
