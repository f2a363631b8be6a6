//! Tells the link which Ethernet address an IPv4 address has now: an ARP announcement as in
//! RFC 5227, from which bridges and neighbours learn at once what they would else find out.
#![allow(unsafe_code)]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::OnceLock;

use mvm_core::net::MacAddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

const BROADCAST: MacAddr = MacAddr([0xff; 6]);

/// What all announcements go through. It stays open: closing it waits for a grace period of the
/// kernel's RCU, which takes more than 10 ms.
static SOCKET: OnceLock<OwnedFd> = OnceLock::new();

/// What an interface has to say.
#[derive(Debug)]
pub(crate) struct Announcement {
    /// The interface's number, which it keeps when it is renamed.
    interface: libc::c_int,
    frame: Vec<u8>,
}

impl Announcement {
    pub(super) fn new(interface: libc::c_int, mac: MacAddr, address: Ipv4Addr) -> Self {
        Self { interface, frame: announcement(mac, address) }
    }

    /// Sends it; the interface has to be up.
    pub(crate) fn send(&self) -> io::Result<()> {
        let socket = socket()?;
        // SAFETY: all zeros is a valid value of this structure of integers; the call reads it and a
        // live frame, whose lengths are given.
        let sent = unsafe {
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = libc::AF_PACKET as libc::sa_family_t;
            to.sll_ifindex = self.interface;
            to.sll_halen = 6;
            to.sll_addr[..6].copy_from_slice(&BROADCAST.0);
            libc::sendto(
                socket.as_raw_fd(),
                self.frame.as_ptr().cast(),
                self.frame.len(),
                libc::MSG_DONTWAIT,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn socket() -> io::Result<&'static OwnedFd> {
    if let Some(socket) = SOCKET.get() {
        return Ok(socket);
    }
    // Without a protocol it receives nothing.
    let made = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    Ok(SOCKET.get_or_init(|| made))
}

/// An Ethernet frame that asks all for an address that its sender has.
fn announcement(mac: MacAddr, address: Ipv4Addr) -> Vec<u8> {
    let own = address.octets();
    // Ethertype ARP; Ethernet and IPv4 with their addresses' lengths, a request.
    let head = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1];
    [&BROADCAST.0[..], &mac.0, &head, &mac.0, &own, &[0; 6], &own].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_asks_for_the_sender_s_own_address() {
        let frame = announcement(MacAddr([2, 0x6d, 10, 240, 0, 9]), Ipv4Addr::new(10, 240, 0, 9));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!((&frame[6..12], &frame[22..28]), (&frame[22..28], &frame[6..12]));
        assert_eq!((&frame[28..32], &frame[38..42]), (&[10, 240, 0, 9][..], &[10, 240, 0, 9][..]));
    }
}
