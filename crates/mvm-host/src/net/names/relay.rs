//! One tenant's name server: whole questions on to the machine's own name servers, whole answers back.
//!
//! Nothing of a question or an answer is looked into but the number that ties them together. What a
//! guest can have open at once is bounded; a question beyond that is dropped, as a network would.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use mvm_core::net::TenantNetwork;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::resolv_conf::{Followed, ResolvConf};

/// Where guests ask.
const PORT: u16 = 53;
/// The header of a message (RFC 1035, 4.1.1): two bytes of number, two of flags.
const HEADER: usize = 12;
const FLAG_RESPONSE: u8 = 0x80;
const CODE_SERVER_FAILURE: u8 = 2;
/// The largest question that is relayed, in bytes, and the largest answer, which is what UDP carries.
const MAX_QUESTION: usize = 4096;
const MAX_ANSWER: usize = 65_535;
/// How long one name server has to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How long a connection may last, and how long one may take to come about.
const CONNECTION_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Pause after an error of the listening socket.
const RECOVERY: Duration = Duration::from_millis(100);
/// Questions and connections of one tenant at once.
const MAX_ASKED: usize = 64;
const MAX_CONNECTIONS: usize = 16;

/// A name server at a tenant's gateway; it ends with this value.
#[derive(Debug)]
pub(super) struct Relay(Vec<AbortHandle>);

impl Drop for Relay {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Starts one; the gateway's address must be there.
pub(super) async fn start(tenant: TenantNetwork, conf: Arc<Followed>) -> io::Result<Relay> {
    let address = (tenant.gateway(), PORT);
    let datagrams = Arc::new(UdpSocket::bind(address).await?);
    let connections = TcpListener::bind(address).await?;
    let subnet = tenant.subnet;
    let questions = tokio::spawn(answer_datagrams(datagrams, subnet, conf.clone()));
    let streams = tokio::spawn(answer_connections(connections, subnet, conf));
    Ok(Relay(vec![questions.abort_handle(), streams.abort_handle()]))
}

async fn answer_datagrams(socket: Arc<UdpSocket>, subnet: Ipv4Net, conf: Arc<Followed>) {
    let seats = Arc::new(Semaphore::new(MAX_ASKED));
    let mut asked = JoinSet::new();
    let mut buffer = vec![0; MAX_QUESTION];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            Some(_) = asked.join_next() => continue,
        };
        let (length, from) = match received {
            Ok(received) => received,
            // An answer that nobody waited for came back; nothing is wrong with the socket.
            Err(_) => {
                tokio::time::sleep(RECOVERY).await;
                continue;
            }
        };
        let question = &buffer[..length];
        if !is_of(subnet, from) || !is_question(question) {
            continue;
        }
        let Ok(seat) = seats.clone().try_acquire_owned() else { continue };
        let (socket, conf, question) = (socket.clone(), conf.now(), question.to_vec());
        asked.spawn(async move {
            let answer = ask(&conf, &question, subnet).await;
            let answer = answer.unwrap_or_else(|| failure(question));
            // Whoever asked may be gone.
            let _ = socket.send_to(&answer, from).await;
            drop(seat);
        });
    }
}

async fn answer_connections(listener: TcpListener, subnet: Ipv4Net, conf: Arc<Followed>) {
    let seats = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
        };
        let Ok((mut guest, from)) = accepted else {
            tokio::time::sleep(RECOVERY).await;
            continue;
        };
        if !is_of(subnet, from) {
            continue;
        }
        let Ok(seat) = seats.clone().try_acquire_owned() else { continue };
        let conf = conf.now();
        open.spawn(async move {
            if let Some(mut server) = connect(&conf, subnet).await {
                let relayed = tokio::io::copy_bidirectional(&mut guest, &mut server);
                // However it ended, the guest asks again.
                let _ = timeout(CONNECTION_LIMIT, relayed).await;
            }
            drop(seat);
        });
    }
}

/// Whether somebody is a guest of the tenant: the address is also reachable from beyond the machine.
fn is_of(subnet: Ipv4Net, from: SocketAddr) -> bool {
    matches!(from.ip(), IpAddr::V4(address) if subnet.contains(&address))
}

fn is_question(message: &[u8]) -> bool {
    message.len() >= HEADER && message[2] & FLAG_RESPONSE == 0
}

/// The servers to ask, never this one itself; the machine's own if none is named, as resolv.conf(5) has it.
fn servers(conf: &ResolvConf, subnet: Ipv4Net) -> impl Iterator<Item = SocketAddr> {
    let own = subnet.hosts().next().map(IpAddr::V4);
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let local = conf.servers.is_empty().then_some(local);
    conf.servers.iter().copied().chain(local).filter(move |server| Some(server.ip()) != own)
}

/// The first answer that a server gives, in their order.
async fn ask(conf: &ResolvConf, question: &[u8], subnet: Ipv4Net) -> Option<Vec<u8>> {
    for server in servers(conf, subnet) {
        if let Ok(Ok(answer)) = timeout(ANSWER_LIMIT, ask_one(server, question)).await {
            return Some(answer);
        }
    }
    None
}

async fn ask_one(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A port of its own for each question: nobody else's answer is taken for this one's.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MAX_ANSWER];
    loop {
        let length = socket.recv(&mut answer).await?;
        let is_answer =
            length >= HEADER && answer[..2] == question[..2] && answer[2] & FLAG_RESPONSE != 0;
        if is_answer {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn connect(conf: &ResolvConf, subnet: Ipv4Net) -> Option<TcpStream> {
    for server in servers(conf, subnet) {
        if let Ok(Ok(stream)) = timeout(CONNECT_LIMIT, TcpStream::connect(server)).await {
            return Some(stream);
        }
    }
    None
}

/// The question as an answer that says that it cannot be answered.
fn failure(mut question: Vec<u8>) -> Vec<u8> {
    question[2] |= FLAG_RESPONSE;
    question[3] = question[3] & 0xf0 | CODE_SERVER_FAILURE;
    question
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_questions_of_the_tenant_are_relayed() {
        let subnet: Ipv4Net = "10.240.1.0/24".parse().unwrap();
        assert!(is_of(subnet, "10.240.1.3:5000".parse().unwrap()));
        assert!(!is_of(subnet, "10.240.2.3:5000".parse().unwrap()));
        assert!(!is_of(subnet, "[::1]:5000".parse().unwrap()));
        let mut message = vec![0; HEADER];
        assert!(is_question(&message));
        message[2] = 0x84;
        assert!(!is_question(&message));
        assert!(!is_question(&[0; HEADER - 1]));
    }

    #[test]
    fn what_cannot_be_answered_is_answered_with_that() {
        let question = vec![7, 9, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 0];
        assert_eq!(failure(question), [7, 9, 0x81, 0x22, 0, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_tenants_own_gateway_is_not_asked() {
        let conf = ResolvConf {
            servers: vec!["10.240.1.1:53".parse().unwrap(), "10.240.1.7:53".parse().unwrap()],
            ..ResolvConf::default()
        };
        let asked: Vec<_> = servers(&conf, "10.240.1.0/24".parse().unwrap()).collect();
        assert_eq!(asked, conf.servers[1..]);
    }
}
