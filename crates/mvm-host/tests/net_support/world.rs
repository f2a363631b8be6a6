//! A machine with guests and an uplink, all played by the test, and packets among them.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use mvm_host::net::{LinuxNetwork, Network};

use super::guest::Station;
use super::packet::{Frame, IPV4, Mac, ethernet, udp};
use super::{Machine, in_namespace, instance, nft, node};

/// The host's address on its uplink.
pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The next hop beyond the uplink.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// Some address on the internet.
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where the host listens, on all addresses, with TCP and UDP.
pub const SERVICE: u16 = 7700;
pub const MARKER: &[u8] = b"a packet of the test";

/// Two instances of one tenant, one of another, a host with services, and an uplink.
pub struct World {
    pub network: LinuxNetwork,
    pub one: Station,
    pub two: Station,
    pub stranger: Station,
    pub outside: Station,
    pub service: UdpSocket,
    _tcp_service: TcpListener,
    pub machine: Machine,
}

/// Where a packet is looked for.
#[derive(Clone, Copy)]
pub enum At {
    One,
    Two,
    Stranger,
    Outside,
    HostService,
}

impl World {
    pub async fn new() -> Self {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3), (1, 4), (2, 3)])).await.unwrap();
        let outside = Station::uplink("wan0", HOST, OUTSIDE);
        let service = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SERVICE)).unwrap();
        service.set_nonblocking(true).unwrap();
        Self {
            network,
            one: Station::guest(instance(1, 3)),
            two: Station::guest(instance(1, 4)),
            stranger: Station::guest(instance(2, 3)),
            outside,
            service,
            _tcp_service: TcpListener::bind((Ipv4Addr::UNSPECIFIED, SERVICE)).unwrap(),
            machine,
        }
    }

    fn station(&mut self, at: At) -> &mut Station {
        match at {
            At::One => &mut self.one,
            At::Two => &mut self.two,
            At::Stranger => &mut self.stranger,
            At::Outside => &mut self.outside,
            At::HostService => panic!("the host's service is no station"),
        }
    }

    /// Everybody is known to their bridge and the host, and has read what came before.
    pub fn settle(&mut self) {
        for station in [&mut self.one, &mut self.two, &mut self.stranger, &mut self.outside] {
            station.fence();
            station.received();
        }
        while self.service.recv(&mut [0; 2048]).is_ok() {}
    }

    /// Sends a frame and says whether it (or what it became) is seen.
    pub fn arrives(
        &mut self,
        from: At,
        frame: &[u8],
        at: At,
        is_it: impl Fn(&Frame) -> bool,
    ) -> bool {
        self.settle();
        self.station(from).send(frame);
        // Instance two has nothing to do with it and is always there to wait with.
        self.two.fence();
        self.sees(at, is_it)
    }

    pub fn sees(&mut self, at: At, is_it: impl Fn(&Frame) -> bool) -> bool {
        let At::HostService = at else {
            return self.station(at).received().iter().any(is_it);
        };
        let mut buffer = [0; 2048];
        let mut is_seen = false;
        while let Ok(length) = self.service.recv(&mut buffer) {
            is_seen |= is_it(&Frame(buffer[..length].to_vec()));
        }
        is_seen
    }

    pub fn remove_firewall(&self) {
        nft("flush ruleset\n");
    }
}

pub fn is_marked(frame: &Frame) -> bool {
    frame.contains(MARKER)
}

/// A packet of instance one that must not arrive, and would without the firewall.
pub fn forbidden(
    at: At,
    frame: impl Fn(&World) -> Vec<u8> + Send + 'static,
    is_it: impl Fn(&Frame) -> bool + Send + 'static,
) {
    forbidden_from(At::One, at, frame, is_it);
}

pub fn forbidden_from(
    from: At,
    at: At,
    frame: impl Fn(&World) -> Vec<u8> + Send + 'static,
    is_it: impl Fn(&Frame) -> bool + Send + 'static,
) {
    in_namespace(move || async move {
        let mut world = World::new().await;
        let frame = frame(&world);
        assert!(!world.arrives(from, &frame, at, &is_it), "the firewall lets it through");
        world.remove_firewall();
        assert!(world.arrives(from, &frame, at, &is_it), "it proves nothing");
    });
}

/// A marked UDP packet from instance one to this address by way of its gateway.
pub fn routed(world: &World, to: Ipv4Addr) -> Vec<u8> {
    let packet = udp((world.one.address, 5000), (to, SERVICE), MARKER);
    ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
}

/// A marked UDP packet to instance two, from these addresses.
pub fn switched(world: &World, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let packet = udp((address, 5000), (world.two.address, SERVICE), MARKER);
    ethernet(world.two.mac, mac, IPV4, &packet)
}
