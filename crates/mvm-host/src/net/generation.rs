//! Whether anybody has changed the firewall: the kernel counts the transactions of each network
//! namespace.

use std::io;

use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

/// `NFT_MSG_GETGEN` and `NFT_MSG_NEWGEN` of `linux/netfilter/nf_tables.h`, of the subsystem
/// `NFNL_SUBSYS_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const GET: u16 = (10 << 8) | 16;
const NEW: u16 = (10 << 8) | 15;
/// `NLM_F_REQUEST` of `linux/netlink.h`.
const REQUEST: u16 = 1;
/// Lengths of `nlmsghdr`, of it with the `nfgenmsg` behind it, and of an attribute's header.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;
const ATTRIBUTE: usize = 4;
/// `NFTA_GEN_ID`: a number of 32 bits, the highest byte first.
const ID: u16 = 1;

/// The number of the last transaction in this thread's network namespace.
///
/// # Errors
/// The kernel has no nftables, or the operating system refused.
pub(super) fn current() -> io::Result<u32> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(), 0)?;
    // Netlink has answered when sending returns.
    let (answer, _) = socket.recv_from_full()?;
    parse(&answer)
        .ok_or_else(|| io::Error::other("the kernel does not tell the firewall's generation"))
}

fn request() -> [u8; HEADERS] {
    let mut request = [0; HEADERS];
    request[0..4].copy_from_slice(&(HEADERS as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&GET.to_ne_bytes());
    request[6..8].copy_from_slice(&REQUEST.to_ne_bytes());
    request
}

fn parse(answer: &[u8]) -> Option<u32> {
    let number = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    if number(4)? != NEW {
        return None;
    }
    let mut at = HEADERS;
    loop {
        let (len, kind) = (usize::from(number(at)?), number(at + 2)?);
        if kind == ID {
            let value = answer.get(at + ATTRIBUTE..at + ATTRIBUTE + 4)?;
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        at += len.max(ATTRIBUTE).next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_among_attributes_and_nothing_else_is_taken_for_it() {
        let mut answer = request().to_vec();
        answer[4..6].copy_from_slice(&NEW.to_ne_bytes());
        let attribute = |kind: u16, value: &[u8]| {
            let len = (ATTRIBUTE + value.len()) as u16;
            let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend_from_slice(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        assert_eq!(parse(&answer), None);
        answer.extend(attribute(3, b"nft"));
        answer.extend(attribute(ID, &[0, 0, 1, 2]));
        assert_eq!(parse(&answer), Some(258));
        assert_eq!(parse(&answer[..answer.len() - 1]), None);
        // `NLMSG_ERROR`.
        answer[4..6].copy_from_slice(&2u16.to_ne_bytes());
        assert_eq!(parse(&answer), None);
    }
}
