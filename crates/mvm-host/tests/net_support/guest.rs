//! The far end of a tap, played by the test: a guest, or the world beyond the host's uplink.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use mvm_core::net::InstanceNetwork;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::packet::{ARP, ARP_REQUEST, BROADCAST, Endpoint, Frame, IPV4, Mac, arp, ethernet, udp};

const DEADLINE: Duration = Duration::from_secs(20);

/// A station on a tap, with an address and a router.
pub struct Station {
    tap: File,
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub router: (Mac, Ipv4Addr),
    inbox: Vec<Frame>,
}

impl Station {
    /// Takes the place of an instance's VMM.
    pub fn guest(instance: InstanceNetwork) -> Self {
        Self::guest_on(open_tap(&instance.tap()), instance)
    }

    /// Takes the place of an instance's VMM that has its tap open.
    pub fn guest_on(tap: File, instance: InstanceNetwork) -> Self {
        let tenant = instance.tenant;
        let mut guest = Self {
            tap,
            mac: instance.mac().0,
            address: instance.address(),
            router: (tenant.gateway_mac().0, tenant.gateway()),
            inbox: Vec::new(),
        };
        guest.fence();
        guest
    }

    /// Makes an uplink of the host: a tap with a default route to `address` beyond it.
    pub fn uplink(name: &str, host: Ipv4Addr, address: Ipv4Addr) -> Self {
        let tap = open_tap(name);
        super::ip(&format!("address add {host}/24 dev {name}"));
        super::ip(&format!("link set {name} address 02:00:00:00:00:01 up"));
        super::ip(&format!("route add default via {address}"));
        let mac = [2, 0, 0, 0, 0, 9];
        let router = ([2, 0, 0, 0, 0, 1], host);
        let mut station = Self { tap, mac, address, router, inbox: Vec::new() };
        station.fence();
        station
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.tap.write_all(frame).unwrap();
    }

    /// Sends an IPv4 packet by way of the router.
    pub fn route(&mut self, packet: &[u8]) {
        let frame = ethernet(self.router.0, self.mac, IPV4, packet);
        self.send(&frame);
    }

    /// Sends a UDP packet by way of the router.
    pub fn route_udp(&mut self, port: u16, to: Endpoint, payload: &[u8]) {
        self.route(&udp((self.address, port), to, payload));
    }

    /// Waits until the router has answered a question, and so has handled all that was sent before.
    ///
    /// It also tells the router and the bridge where this station is.
    pub fn fence(&mut self) {
        let question = arp(ARP_REQUEST, (self.mac, self.address), ([0; 6], self.router.1));
        let question = ethernet(BROADCAST, self.mac, ARP, &question);
        let deadline = Instant::now() + DEADLINE;
        loop {
            // The link may still be coming up: ask again.
            let sent = self.tap.write(&question);
            assert!(sent.is_ok() || Instant::now() < deadline, "the tap stays down: {sent:?}");
            let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            poll(&mut [PollFd::new(&self.tap, PollFlags::IN)], Some(&wait)).unwrap();
            let new = self.inbox.len();
            self.receive();
            if self.inbox[new..].iter().any(|frame| frame.is_arp_reply_from(self.router.1)) {
                return;
            }
            assert!(Instant::now() < deadline, "{} does not answer", self.router.1);
        }
    }

    /// All frames that came since the last call.
    pub fn received(&mut self) -> Vec<Frame> {
        self.receive();
        std::mem::take(&mut self.inbox)
    }

    fn receive(&mut self) {
        let mut buffer = [0; 2048];
        loop {
            match self.tap.read(&mut buffer) {
                Ok(length) => self.inbox.push(Frame(buffer[..length].to_vec())),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The link is down.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return,
                Err(error) => panic!("cannot read from the tap: {error}"),
            }
        }
    }
}

/// Opens a tap, which is made if it does not exist.
#[allow(unsafe_code)]
pub fn open_tap(name: &str) -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an all-zero `ifreq` is valid: it is made of integers and a union of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "cannot open {name}: {}", std::io::Error::last_os_error());
    tap
}
