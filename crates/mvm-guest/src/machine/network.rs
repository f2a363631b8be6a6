//! Loopback, and the guest's one network interface, by the classic `ioctl`s.
#![allow(unsafe_code)]

mod announce;
mod outside;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use mvm_core::guest::{ErrorKind, GuestError, NetworkConfiguration};
use mvm_core::net::MacAddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::failure::{failure, refused};

pub(super) use announce::Announcement;
pub(crate) use outside::outside_address;

/// Brings `lo` up, which also gives it its addresses.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    Interface::open("lo")?.bring_up()
}

/// Gives the first interface besides loopback this configuration. What comes back tells the link.
pub(super) fn ensure(wanted: &NetworkConfiguration) -> Result<Announcement, GuestError> {
    let name = first_interface().ok_or_else(|| {
        failure(ErrorKind::NotFound, "the guest has no network interface besides loopback")
    })?;
    // No router is listened to and no address is made up. A kernel without IPv6 has no such file.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1\n");
    let what = |step: &str| format!("cannot {step} {name}");
    let interface = Interface::open(&name).map_err(|error| refused(what("open"), error))?;
    let step = |name, result: io::Result<()>| result.map_err(|error| refused(what(name), error));
    if let Some(mac) = wanted.mac {
        step("set the Ethernet address of", interface.ensure_mac(mac))?;
    }
    if let Some(mtu) = wanted.mtu {
        step("set the packet size of", interface.set_mtu(mtu))?;
    }
    step("bring up", interface.bring_up())?;
    step("set the address of", interface.set(libc::SIOCSIFADDR, wanted.address))?;
    step("set the netmask of", interface.set(libc::SIOCSIFNETMASK, netmask(wanted.prefix_len)))?;
    step("set the default route over", interface.ensure_default_route(&name, wanted.gateway))?;
    let told = interface
        .index()
        .and_then(|index| Ok(Announcement::new(index, interface.mac()?, wanted.address)));
    told.map_err(|error| refused(what("look at"), error))
}

/// The interface that the kernel numbered first.
fn first_interface() -> Option<String> {
    let entries = fs::read_dir("/sys/class/net").ok()?;
    let mut found: Vec<(u32, String)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
            let has_device = fs::exists(format!("/sys/class/net/{name}/device")).ok()?;
            (name != "lo" && has_device).then_some((index.trim().parse().ok()?, name))
        })
        .collect();
    found.sort();
    found.into_iter().next().map(|(_, name)| name)
}

fn netmask(prefix_len: u8) -> Ipv4Addr {
    let zeros = 32 - u32::from(prefix_len.min(32));
    Ipv4Addr::from(u32::MAX.checked_shl(zeros).unwrap_or(0))
}

/// The gateways of an interface's default routes, as `/proc/net/route` lists them.
fn default_gateways(table: &str, interface: &str) -> Vec<Ipv4Addr> {
    let routes = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (name, destination, gateway) = (fields.next()?, fields.next()?, fields.next()?);
        let mask = fields.nth(4)?;
        let is_default = name == interface && destination == "00000000" && mask == "00000000";
        // The number is in network order, printed as a number of this machine.
        let gateway = u32::from_str_radix(gateway, 16).ok()?;
        is_default.then(|| Ipv4Addr::from(gateway.to_ne_bytes()))
    });
    routes.collect()
}

struct Interface {
    socket: OwnedFd,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Interface {
    fn open(name: &str) -> io::Result<Self> {
        let mut bytes = [0; libc::IFNAMSIZ];
        if name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        Ok(Self { socket, name: bytes })
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: all zeros is a valid value of this structure of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name = self.name;
        request
    }

    fn bring_up(&self) -> io::Result<()> {
        self.change_flags(|flags| flags | (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short)
    }

    fn bring_down(&self) -> io::Result<()> {
        self.change_flags(|flags| flags & !(libc::IFF_UP as libc::c_short))
    }

    fn change_flags(&self, change: impl FnOnce(libc::c_short) -> libc::c_short) -> io::Result<()> {
        let mut request = self.request();
        // SAFETY: SIOCGIFFLAGS fills `ifru_flags` of a live request, and only that is read.
        unsafe {
            check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request))?;
            request.ifr_ifru.ifru_flags = change(request.ifr_ifru.ifru_flags);
            check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request))
        }
    }

    fn index(&self) -> io::Result<libc::c_int> {
        let mut request = self.request();
        // SAFETY: SIOCGIFINDEX fills `ifru_ifindex` of a live request, and only that is read.
        unsafe {
            check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFINDEX as _, &mut request))?;
            Ok(request.ifr_ifru.ifru_ifindex)
        }
    }

    fn mac(&self) -> io::Result<MacAddr> {
        let mut request = self.request();
        // SAFETY: SIOCGIFHWADDR fills `ifru_hwaddr` of a live request, and only that is read.
        let address = unsafe {
            check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFHWADDR as _, &mut request))?;
            request.ifr_ifru.ifru_hwaddr
        };
        let mut bytes = [0; 6];
        for (to, from) in bytes.iter_mut().zip(address.sa_data) {
            *to = from as u8;
        }
        Ok(MacAddr(bytes))
    }

    /// Gives the interface an Ethernet address; a driver that cannot do that while it is up is
    /// brought down, and with it go the routes.
    fn ensure_mac(&self, wanted: MacAddr) -> io::Result<()> {
        if self.mac()? == wanted {
            return Ok(());
        }
        match self.set_mac(wanted) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.bring_down()?;
                self.set_mac(wanted)
            }
            result => result,
        }
    }

    fn set_mac(&self, wanted: MacAddr) -> io::Result<()> {
        let mut data = [0; 14];
        for (to, from) in data.iter_mut().zip(wanted.0) {
            *to = from as libc::c_char;
        }
        let mut request = self.request();
        request.ifr_ifru.ifru_hwaddr =
            libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
        // SAFETY: the operation reads a live request whose Ethernet address is filled in.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFHWADDR as _, &request) })
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        // SAFETY: the operation reads a live request whose packet size is filled in.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFMTU as _, &request) })
    }

    fn set(&self, operation: libc::c_ulong, address: Ipv4Addr) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: the operation reads a live request whose address is filled in.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), operation as _, &request) })
    }

    fn ensure_default_route(&self, name: &str, gateway: Ipv4Addr) -> io::Result<()> {
        let present = default_gateways(&fs::read_to_string("/proc/net/route")?, name);
        for other in present.iter().filter(|&&other| other != gateway) {
            self.route(libc::SIOCDELRT, *other)?;
        }
        match present.contains(&gateway) {
            true => Ok(()),
            false => self.route(libc::SIOCADDRT, gateway),
        }
    }

    fn route(&self, operation: libc::c_ulong, gateway: Ipv4Addr) -> io::Result<()> {
        let mut device = self.name;
        // SAFETY: all zeros is a valid value of this structure of integers and pointers.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        route.rt_dev = device.as_mut_ptr();
        // SAFETY: the operation reads a live request; the device's name ends with a zero.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), operation as _, &route) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An IPv4 address as the generic socket address of the old interfaces.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netmasks_follow_the_prefix() {
        assert_eq!(netmask(24), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(netmask(32), Ipv4Addr::BROADCAST);
        assert_eq!(netmask(1), Ipv4Addr::new(128, 0, 0, 0));
        assert_eq!(netmask(0), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn default_routes_are_read_from_the_kernels_table() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                     eth0\t00000000\t0100F00A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth0\t0000F00A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                     eth1\t00000000\t0200F00A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     short\n";
        let gateways = default_gateways(table, "eth0");
        assert_eq!(gateways, [Ipv4Addr::new(10, 240, 0, 1)]);
    }
}
