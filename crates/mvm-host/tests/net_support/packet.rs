//! Ethernet frames made and read by hand, so that they can also be wrong.

use std::net::Ipv4Addr;

pub type Mac = [u8; 6];

pub const BROADCAST: Mac = [0xff; 6];
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;
pub const VLAN: u16 = 0x8100;
pub const PROVIDER_VLAN: u16 = 0x88a8;
pub const ARP_REQUEST: u16 = 1;
pub const ARP_REPLY: u16 = 2;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
const SYN_ACK: u8 = 0x12;

pub fn ethernet(to: Mac, from: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes(), payload].concat()
}

/// Puts a VLAN tag with id 1 into a frame.
pub fn tagged(tag: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &tag.to_be_bytes(), &[0, 1], &frame[12..]].concat()
}

/// The body of an ARP message: what `sender` says to `target`.
pub fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4];
    let (sender_ip, target_ip) = (sender.1.octets(), target.1.octets());
    let operation = operation.to_be_bytes();
    [&head[..], &operation, &sender.0, &sender_ip, &target.0, &target_ip].concat()
}

fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    [header, payload.to_vec()].concat()
}

pub type Endpoint = (Ipv4Addr, u16);

/// A UDP packet without checksum.
pub fn udp(from: Endpoint, to: Endpoint, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let head = [from.1, to.1, length, 0].map(u16::to_be_bytes).concat();
    ipv4(UDP, from.0, to.0, &[&head, payload].concat())
}

/// A TCP segment without data.
pub fn tcp(flags: u8, from: Endpoint, to: Endpoint) -> Vec<u8> {
    segment(flags, &[], from, to)
}

/// A TCP segment that asks for a connection with segments of this size.
pub fn syn_with_mss(mss: u16, from: Endpoint, to: Endpoint) -> Vec<u8> {
    let [high, low] = mss.to_be_bytes();
    segment(SYN, &[2, 4, high, low], from, to)
}

fn segment(flags: u8, options: &[u8], from: Endpoint, to: Endpoint) -> Vec<u8> {
    let mut segment = [from.1, to.1].map(u16::to_be_bytes).concat();
    let length = u8::try_from(20 + options.len()).unwrap();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, (length / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(options);
    let pseudo = [&from.0.octets()[..], &to.0.octets(), &[0, TCP, 0, length], &segment].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    ipv4(TCP, from.0, to.0, &segment)
}

pub fn ping(from: Ipv4Addr, to: Ipv4Addr, sequence: u16) -> Vec<u8> {
    let [high, low] = sequence.to_be_bytes();
    let mut message = vec![8, 0, 0, 0, 0, 1, high, low];
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    ipv4(ICMP, from, to, &message)
}

/// A minimal IPv6 UDP packet to all nodes of the link.
pub fn udp_over_ipv6(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([UDP, 255]);
    packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([7000, 7000, length, 0].map(u16::to_be_bytes).concat());
    packet.extend(payload);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A received frame.
#[derive(Debug, Clone)]
pub struct Frame(pub Vec<u8>);

impl Frame {
    pub fn contains(&self, marker: &[u8]) -> bool {
        self.0.windows(marker.len()).any(|window| window == marker)
    }

    fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.0[12], self.0[13]])
    }

    pub fn source_mac(&self) -> Mac {
        self.0[6..12].try_into().unwrap()
    }

    pub fn is_arp_reply_from(&self, address: Ipv4Addr) -> bool {
        self.ethertype() == ARP && self.0[20..22] == [0, 2] && self.0[28..32] == address.octets()
    }

    /// The IPv4 header's source and destination.
    pub fn addresses(&self) -> Option<(Ipv4Addr, Ipv4Addr)> {
        let address = |at: usize| {
            let octets: [u8; 4] = self.0[at..at + 4].try_into().unwrap();
            Ipv4Addr::from(octets)
        };
        (self.ethertype() == IPV4).then(|| (address(26), address(30)))
    }

    /// The ports of a UDP or TCP packet.
    pub fn ports(&self) -> (u16, u16) {
        let port = |at: usize| u16::from_be_bytes([self.0[at], self.0[at + 1]]);
        (port(34), port(36))
    }

    fn is_ip_protocol(&self, protocol: u8) -> bool {
        self.ethertype() == IPV4 && self.0[23] == protocol
    }

    pub fn is_syn_ack(&self) -> bool {
        self.is_ip_protocol(TCP) && self.0[47] == SYN_ACK
    }

    /// The size of segments that a connection is asked for with, if that is its first option.
    pub fn offered_mss(&self) -> Option<u16> {
        let is_offer = self.is_ip_protocol(TCP) && self.0[46] >= 0x60 && self.0[54] == 2;
        is_offer.then(|| u16::from_be_bytes([self.0[56], self.0[57]]))
    }

    pub fn is_pong(&self) -> bool {
        self.is_ip_protocol(ICMP) && self.0[34] == 0
    }
}
