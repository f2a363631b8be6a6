//! An address of the guest by which it can be seen from outside, in contrast to loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd as _;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{Interface, check};

/// What stands for an address in a guest without a network: IPv4's dummy address (RFC 7600).
const STAND_IN_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// The same of IPv6, of the prefix of which nothing is ever passed on (RFC 6666).
const STAND_IN_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0x6d76, 0x6d);
/// An address that is nobody's, to be asked the way to (RFC 5737, RFC 3849). Nothing is sent there.
const FAR: [&str; 2] = ["192.0.2.1:9", "[2001:db8::1]:9"];

/// The address by which the guest reaches the rest of the world, in one family. One that has no
/// network has none; if it may be added, loopback then has one more, which does not look like it.
pub(crate) fn outside_address(is_ipv4: bool, may_add: bool) -> io::Result<IpAddr> {
    if let Some(address) = way_out(is_ipv4) {
        return Ok(address);
    }
    let stand_in: IpAddr = match is_ipv4 {
        true => STAND_IN_V4.into(),
        false => STAND_IN_V6.into(),
    };
    if UdpSocket::bind((stand_in, 0)).is_err() {
        match may_add {
            true if is_ipv4 => add_v4()?,
            true => add_v6()?,
            false => return Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }
    Ok(stand_in)
}

/// The address that the kernel would choose to reach the world.
fn way_out(is_ipv4: bool) -> Option<IpAddr> {
    let (any, far): (IpAddr, _) = match is_ipv4 {
        true => (Ipv4Addr::UNSPECIFIED.into(), FAR[0]),
        false => (Ipv6Addr::UNSPECIFIED.into(), FAR[1]),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(far).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

fn add_v4() -> io::Result<()> {
    let alias = Interface::open("lo:mvm")?;
    alias.set(libc::SIOCSIFADDR, STAND_IN_V4)?;
    alias.set(libc::SIOCSIFNETMASK, Ipv4Addr::BROADCAST)
}

fn add_v6() -> io::Result<()> {
    let index = Interface::open("lo")?.index()?;
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: STAND_IN_V6.octets() },
        ifr6_prefixlen: 128,
        ifr6_ifindex: index,
    };
    // SAFETY: the operation reads a live request that is filled in.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR as _, &request) })
}
