//! Names in guests, shown with real packets: each tenant's gateway asks whomever the machine asks.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mvm_core::net::TenantNetwork;
use mvm_host::net::{LinuxNetwork, Network, Surroundings};
use net_support::guest::Station;
use net_support::{Machine, in_namespace, instance, ip, nft, node, tenant};

const DEADLINE: Duration = Duration::from_secs(20);
/// A question's header: number 0x0709, recursion desired, one question. No more is looked at.
const QUESTION: [u8; 12] = [7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// A name server of the machine, which answers with the question, its own name and the mark of an answer.
struct Server {
    asked: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Server {
    fn start(address: Ipv4Addr, name: &'static str) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let datagrams = UdpSocket::bind((address, 53)).unwrap();
        let connections = TcpListener::bind((address, 53)).unwrap();
        let log = asked.clone();
        let answer = move |question: &[u8]| {
            let mut answer = [question, name.as_bytes()].concat();
            answer[2] |= 0x80;
            answer
        };
        // Both end with the test's process.
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
                log.lock().unwrap().push(buffer[..length].to_vec());
                // One with another number comes first, as from somebody who guesses.
                let mut forged = answer(&buffer[..length]);
                forged[0] ^= 1;
                datagrams.send_to(&forged, from).unwrap();
                datagrams.send_to(&answer(&buffer[..length]), from).unwrap();
            }
        });
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = connections.accept() {
                let mut buffer = [0; 2048];
                let length = stream.read(&mut buffer).unwrap();
                stream.write_all(&answer(&buffer[..length])).unwrap();
            }
        });
        Self { asked }
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

struct Scene {
    network: LinuxNetwork,
    resolv_conf: PathBuf,
    one: Station,
    stranger: Station,
    _machine: Machine,
}

impl Scene {
    async fn new(resolv_conf: &str) -> Self {
        ip("link set lo up");
        let machine = Machine::new();
        let path = machine.state_dir("etc").join("resolv.conf");
        fs::write(&path, resolv_conf).unwrap();
        let network = machine.agent("a").with_resolv_conf(path.clone());
        network.ensure(&node(&[(1, 3), (2, 3)])).await.unwrap();
        network.serve_names(&BTreeSet::from([tenant(1), tenant(2)])).await.unwrap();
        Self {
            network,
            resolv_conf: path,
            one: Station::guest(instance(1, 3)),
            stranger: Station::guest(instance(2, 3)),
            _machine: machine,
        }
    }

    /// What a guest is answered that asks its gateway.
    async fn ask(&mut self, question: &[u8]) -> Vec<u8> {
        let gateway = tenant(1).gateway();
        let deadline = Instant::now() + DEADLINE;
        self.one.route_udp(5000, (gateway, 53), question);
        loop {
            // The relay works meanwhile.
            tokio::time::sleep(Duration::from_millis(2)).await;
            let seen = self.one.received();
            let from_gateway = seen.iter().find(|frame| {
                frame.addresses() == Some((gateway, self.one.address))
                    && frame.ports() == (53, 5000)
            });
            if let Some(frame) = from_gateway {
                return frame.0[42..].to_vec();
            }
            assert!(Instant::now() < deadline, "the gateway does not answer");
        }
    }
}

#[test]
fn a_resolver_that_only_the_machine_reaches_answers_guests() {
    // On loopback, link-local, an address of the machine, in the range of tenants' subnets.
    for address in ["127.0.0.53", "169.254.7.7", "192.0.2.7", "10.255.255.53"] {
        in_namespace(move || async move {
            ip("link set lo up");
            let resolver: Ipv4Addr = address.parse().unwrap();
            if !resolver.is_loopback() {
                ip(&format!("address add {address}/32 dev lo"));
            }
            let server = Server::start(resolver, "the machine's");
            let mut scene = Scene::new(&format!("nameserver {address}\n")).await;
            let answer = scene.ask(&QUESTION).await;
            assert_eq!(answer[..2], QUESTION[..2], "{address}");
            assert!(answer.ends_with(b"the machine's"), "{address}: {answer:?}");
            assert_eq!(server.asked(), 1);
        });
    }
}

#[test]
fn a_change_of_the_machines_resolver_is_followed_and_none_is_told() {
    in_namespace(|| async {
        ip("link set lo up");
        let _first = Server::start(Ipv4Addr::new(127, 0, 0, 1), "first");
        let _second = Server::start(Ipv4Addr::new(127, 0, 0, 2), "second");
        let mut scene = Scene::new("nameserver 127.0.0.1\n").await;
        assert!(scene.ask(&QUESTION).await.ends_with(b"first"));
        // The first of these does not answer.
        let text =
            "nameserver 127.0.0.9\nnameserver 127.0.0.2\nsearch a.example\noptions ndots:2\n";
        fs::write(&scene.resolv_conf, text).unwrap();
        assert!(scene.ask(&QUESTION).await.ends_with(b"second"));
        ip("link add name wan type bridge");
        ip("link set wan mtu 1400 up");
        ip("route add default dev wan");
        assert_eq!(
            scene.network.surroundings().await.unwrap(),
            Surroundings {
                nameservers: vec![],
                is_gateway_last: false,
                search: vec!["a.example".to_owned()],
                resolver_options: vec!["ndots:2".to_owned()],
                mtu: Some(1400),
            }
        );
        nft(
            "table inet fw {\n chain in {\n type filter hook input priority 0; policy drop;\n }\n}\n",
        );
        scene.network.mend_firewall().await.unwrap();
        assert!(scene.network.surroundings().await.unwrap().is_gateway_last);
        nft("delete table inet fw\n");
        scene.network.mend_firewall().await.unwrap();
        assert!(!scene.network.surroundings().await.unwrap().is_gateway_last);
        fs::write(&scene.resolv_conf, "nameserver 127.0.0.9\n").unwrap();
        let refused = scene.ask(&QUESTION).await;
        assert_eq!(refused[3] & 0xf, 2, "a server's failure");
    });
}

#[test]
fn nobody_else_is_answered() {
    in_namespace(|| async {
        ip("link set lo up");
        let server = Server::start(Ipv4Addr::new(127, 0, 0, 1), "mine");
        let mut scene = Scene::new("nameserver 127.0.0.1\n").await;
        scene.stranger.route_udp(5000, (tenant(1).gateway(), 53), &QUESTION);
        scene.stranger.fence();
        // Not a question.
        scene.one.route_udp(
            5000,
            (tenant(1).gateway(), 53),
            &[7, 9, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        );
        scene.ask(&QUESTION).await;
        assert_eq!(server.asked(), 1);
        // The machine itself is no guest, wherever it asks from.
        let outsider = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        outsider.send_to(&QUESTION, (tenant(1).gateway(), 53)).unwrap();
        scene.ask(&QUESTION).await;
        assert_eq!(server.asked(), 2);
        // A tenant that is gone has no name server.
        scene.network.serve_names(&BTreeSet::<TenantNetwork>::new()).await.unwrap();
        tokio::task::yield_now().await;
        UdpSocket::bind((tenant(1).gateway(), 53)).unwrap();
    });
}
