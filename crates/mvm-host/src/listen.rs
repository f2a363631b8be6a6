//! TCP sockets that the node listens on for strangers: who has a port that cannot be had, and clients
//! that vanish.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};

use crate::console::printable;

/// How long a client says nothing until it is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// How often it is asked again.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// How many answers may be missing.
const KEEPALIVE_COUNT: u32 = 4;
/// `TCP_LISTEN`, as `/proc/net/tcp` writes it.
const LISTENING: &str = "0A";

/// Why a port cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has it.
    #[error("{}", match holder {
        Some(holder) => format!("{holder} listens there"),
        None => "another program listens there".to_owned(),
    })]
    Taken {
        /// Who, as far as it can be told.
        holder: Option<String>,
    },
    /// The address is not this machine's.
    #[error("this machine does not have the address {address}")]
    NotHere {
        /// The address.
        address: IpAddr,
    },
    /// Ordinary users may not.
    #[error("the agent may not listen there, because it does not run as root")]
    NotAllowed,
    /// Something else.
    #[error("cannot listen there: {0}")]
    Other(io::Error),
}

/// Listens on an address.
///
/// # Errors
/// It cannot be had. Must be called on a tokio runtime.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => ListenError::Taken { holder: holder(address.port()) },
        io::ErrorKind::AddrNotAvailable => ListenError::NotHere { address: address.ip() },
        io::ErrorKind::PermissionDenied => ListenError::NotAllowed,
        _ => ListenError::Other(error),
    })
}

/// Makes a client's end known even if nobody says so: one that lost its power or its network is asked
/// from time to time, and its connection fails once it does not answer. If something is on the way to it,
/// the kernel's retransmissions tell, after a quarter of an hour. (`TCP_USER_TIMEOUT` would tell sooner,
/// and end the connection of a client, too, that answers and does not read for a while.)
///
/// # Errors
/// The kernel refused.
pub fn keep_alive(client: &TcpStream) -> io::Result<()> {
    let set = || -> Result<(), Errno> {
        sockopt::set_socket_keepalive(client, true)?;
        sockopt::set_tcp_keepidle(client, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(client, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(client, KEEPALIVE_COUNT)
    };
    Ok(set()?)
}

/// The program that listens on a port, as far as this process may see.
fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let text: String = tables.iter().filter_map(|table| fs::read_to_string(table).ok()).collect();
    let sockets: Vec<String> =
        text.lines().filter_map(|line| listening_socket(line, port)).collect();
    let processes = fs::read_dir("/proc").ok()?;
    for process in processes.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        // It may end meanwhile, or be somebody else's.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let has_it = descriptors.flatten().any(|descriptor| {
            let link = fs::read_link(descriptor.path());
            link.is_ok_and(|link| sockets.iter().any(|socket| link.as_os_str() == socket.as_str()))
        });
        if has_it {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (process {pid})", printable(&name)));
        }
    }
    None
}

/// The socket of a line of the kernel's table, as a link to it reads, if it listens on a port.
fn listening_socket(line: &str, port: u16) -> Option<String> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { return None };
    let (_, of) = local.rsplit_once(':')?;
    let is_it = state == LISTENING && u16::from_str_radix(of, 16) == Ok(port);
    is_it.then(|| format!("socket:[{inode}]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[tokio::test]
    async fn who_has_a_port_is_named() {
        let other = listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = other.local_addr().unwrap();
        for wanted in [address, (Ipv4Addr::UNSPECIFIED, address.port()).into()] {
            let error = listen(wanted).await.unwrap_err().to_string();
            let this = format!("(process {}) listens there", std::process::id());
            assert!(error.ends_with(&this), "{error}");
        }
        drop(other);
        listen(address).await.unwrap();
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_named() {
        let error = listen("198.51.100.7:80".parse().unwrap()).await.unwrap_err().to_string();
        assert_eq!(error, "this machine does not have the address 198.51.100.7");
    }

    #[tokio::test]
    async fn a_client_is_asked_whether_it_is_still_there() {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        keep_alive(&accepted).unwrap();
        assert!(sockopt::socket_keepalive(&accepted).unwrap());
        let longest = sockopt::tcp_keepidle(&accepted).unwrap()
            + sockopt::tcp_keepintvl(&accepted).unwrap() * sockopt::tcp_keepcnt(&accepted).unwrap();
        assert_eq!(longest, Duration::from_secs(120));
    }
}
