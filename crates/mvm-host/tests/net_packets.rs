//! What a guest can and cannot reach, shown with real packets on real bridges, taps and nftables.
//!
//! The test plays the guests and the world outside by writing frames to taps. A packet that must
//! not arrive is sent twice: with the firewall, and without it, when it must arrive; so each of
//! these tests fails if the firewall lets the packet through, and if the packet proves nothing.

mod net_support;

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use mvm_host::net::{LinuxNetwork, Network};
use net_support::guest::Station;
use net_support::packet::{
    ARP, ARP_REPLY, BROADCAST, Frame, IPV4, IPV6, Mac, PROVIDER_VLAN, VLAN, arp, ethernet, ping,
    tagged, tcp_syn, udp, udp_over_ipv6,
};
use net_support::{Machine, in_namespace, instance, ip, nft, node, set_sysctl, sysctl};

/// The host's address on its uplink.
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The next hop beyond the uplink.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// Some address on the internet.
const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where the host listens, on all addresses, with TCP and UDP.
const SERVICE: u16 = 7700;
const MARKER: &[u8] = b"a packet of the test";

/// Two instances of one tenant, one of another, a host with services, and an uplink.
struct World {
    network: LinuxNetwork,
    one: Station,
    two: Station,
    stranger: Station,
    outside: Station,
    service: UdpSocket,
    _tcp_service: TcpListener,
    _machine: Machine,
}

/// Where a packet is looked for.
#[derive(Clone, Copy)]
enum At {
    One,
    Two,
    Stranger,
    Outside,
    HostService,
}

impl World {
    async fn new() -> Self {
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
            _machine: machine,
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
    fn settle(&mut self) {
        for station in [&mut self.one, &mut self.two, &mut self.stranger, &mut self.outside] {
            station.fence();
            station.received();
        }
        while self.service.recv(&mut [0; 2048]).is_ok() {}
    }

    /// Sends a frame and says whether it (or what it became) is seen.
    fn arrives(&mut self, from: At, frame: &[u8], at: At, is_it: impl Fn(&Frame) -> bool) -> bool {
        self.settle();
        self.station(from).send(frame);
        // Instance two has nothing to do with it and is always there to wait with.
        self.two.fence();
        self.sees(at, is_it)
    }

    fn sees(&mut self, at: At, is_it: impl Fn(&Frame) -> bool) -> bool {
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

    fn remove_firewall(&self) {
        nft("flush ruleset\n");
    }
}

fn is_marked(frame: &Frame) -> bool {
    frame.contains(MARKER)
}

/// A packet of instance one that must not arrive, and would without the firewall.
fn forbidden(
    at: At,
    frame: impl Fn(&World) -> Vec<u8> + Send + 'static,
    is_it: impl Fn(&Frame) -> bool + Send + 'static,
) {
    forbidden_from(At::One, at, frame, is_it);
}

fn forbidden_from(
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
fn routed(world: &World, to: Ipv4Addr) -> Vec<u8> {
    let packet = udp((world.one.address, 5000), (to, SERVICE), MARKER);
    ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
}

/// A marked UDP packet to instance two, from these addresses.
fn switched(world: &World, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let packet = udp((address, 5000), (world.two.address, SERVICE), MARKER);
    ethernet(world.two.mac, mac, IPV4, &packet)
}

fn arp_claim(world: &World, frame_mac: Mac, claim: (Mac, Ipv4Addr)) -> Vec<u8> {
    let claim = arp(ARP_REPLY, claim, (world.two.mac, world.two.address));
    ethernet(world.two.mac, frame_mac, ARP, &claim)
}

#[test]
fn instances_of_a_tenant_reach_each_other() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let frame = switched(&world, world.one.mac, world.one.address);
        assert!(world.arrives(At::One, &frame, At::Two, is_marked));
    });
}

#[test]
fn instances_of_a_tenant_reach_each_other_whether_or_not_bridged_packets_pass_ip_filters() {
    in_namespace(|| async {
        let setting = "bridge/bridge-nf-call-iptables";
        let mut world = World::new().await;
        if sysctl(setting).is_none() {
            return;
        }
        for value in ["0", "1"] {
            set_sysctl(setting, value);
            let frame = switched(&world, world.one.mac, world.one.address);
            assert!(world.arrives(At::One, &frame, At::Two, is_marked), "{setting} is {value}");
        }
    });
}

#[test]
fn a_guest_cannot_reach_another_tenant_through_its_gateway() {
    forbidden(At::Stranger, |world| routed(world, world.stranger.address), is_marked);
}

#[test]
fn a_guest_cannot_reach_another_tenant_when_bridged_packets_pass_ip_filters() {
    forbidden(
        At::Stranger,
        |world| {
            if sysctl("bridge/bridge-nf-call-iptables").is_some() {
                set_sysctl("bridge/bridge-nf-call-iptables", "1");
            }
            routed(world, world.stranger.address)
        },
        is_marked,
    );
}

#[test]
fn a_guest_cannot_reach_another_tenants_gateway() {
    forbidden(At::HostService, |world| routed(world, world.stranger.router.1), is_marked);
}

#[test]
fn a_guest_cannot_reach_a_service_of_the_host_on_its_gateway() {
    forbidden(At::HostService, |world| routed(world, world.one.router.1), is_marked);
}

#[test]
fn a_guest_cannot_reach_a_service_of_the_host_on_its_other_addresses() {
    forbidden(At::HostService, |world| routed(world, HOST), is_marked);
}

#[test]
fn a_guest_cannot_connect_to_a_tcp_port_of_the_host() {
    for host in [HOST, instance(1, 3).tenant.gateway()] {
        let syn = move |world: &World| {
            let packet = tcp_syn((world.one.address, 5000), (host, SERVICE));
            ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
        };
        forbidden(At::One, syn, Frame::is_syn_ack);
    }
}

#[test]
fn a_guest_cannot_reach_the_host_with_frames_for_reserved_addresses() {
    // 0: spanning tree, 2: LACP, 3: 802.1X, 0xe: LLDP.
    for last in [0, 2, 3, 0xe] {
        let frame = move |world: &World| {
            let packet = udp((world.one.address, 5000), (HOST, SERVICE), MARKER);
            ethernet([1, 0x80, 0xc2, 0, 0, last], world.one.mac, IPV4, &packet)
        };
        forbidden(At::HostService, frame, is_marked);
    }
}

#[test]
fn a_guest_cannot_take_its_neighbours_frames_with_frames_for_reserved_addresses() {
    for last in [0, 2, 3, 0xe] {
        in_namespace(move || async move {
            let mut world = World::new().await;
            let packet = udp((world.two.address, 5000), (HOST, SERVICE), MARKER);
            let lie = ethernet([1, 0x80, 0xc2, 0, 0, last], world.two.mac, IPV4, &packet);
            assert!(!tells_the_bridge(&mut world, &lie), "reserved address {last:x}");
            world.remove_firewall();
            // The bridge alone would believe the same lie to an ordinary address.
            let lie = ethernet(world.one.router.0, world.two.mac, IPV4, &packet);
            assert!(tells_the_bridge(&mut world, &lie), "it proves nothing");
        });
    }
}

/// Whether the bridge sends what is for instance two elsewhere after instance one sent a frame.
fn tells_the_bridge(world: &mut World, lie: &[u8]) -> bool {
    world.settle();
    world.one.send(lie);
    world.service.send_to(MARKER, (world.two.address, 5000)).unwrap();
    !world.two.received().iter().any(is_marked)
}

#[test]
fn a_guest_whose_tap_left_its_bridge_cannot_reach_the_host() {
    in_namespace(|| async {
        let mut world = World::new().await;
        ip("link set tn1i3 nomaster");
        let packet = udp((world.one.address, 5000), (HOST, SERVICE), MARKER);
        let frame = ethernet(link_mac("tn1i3"), world.one.mac, IPV4, &packet);
        world.one.send(&frame);
        world.two.fence();
        assert!(!world.sees(At::HostService, is_marked));
        world.remove_firewall();
        world.one.send(&frame);
        world.two.fence();
        assert!(world.sees(At::HostService, is_marked), "it proves nothing");
    });
}

fn link_mac(link: &str) -> Mac {
    let text = ip(&format!("link show {link}"));
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let octets = mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    octets.collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn a_guest_cannot_reach_the_metadata_address() {
    forbidden(At::Outside, |world| routed(world, METADATA), is_marked);
}

#[test]
fn a_guest_cannot_use_tenant_addresses_that_this_node_does_not_have() {
    forbidden(At::Outside, |world| routed(world, Ipv4Addr::new(10, 250, 0, 3)), is_marked);
}

#[test]
fn a_guest_cannot_reach_what_the_host_forwards_a_port_to() {
    in_namespace(|| async {
        let mut world = World::new().await;
        nft(&format!(
            "table ip other {{\n chain prerouting {{\n type nat hook prerouting priority dstnat;\n \
             udp dport {SERVICE} dnat to {OUTSIDE}:80\n }}\n}}\n"
        ));
        let frame = routed(&world, HOST);
        assert!(!world.arrives(At::One, &frame, At::Outside, is_marked));
        for table in ["inet", "bridge"] {
            let name = own_table(table);
            nft(&format!("delete table {table} {name}\n"));
        }
        let packet = udp((world.one.address, 5001), (HOST, SERVICE), MARKER);
        let frame = ethernet(world.one.router.0, world.one.mac, IPV4, &packet);
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked), "it proves nothing");
    });
}

/// The name of the agent's table.
fn own_table(family: &str) -> String {
    let tables = nft("list tables\n");
    let name = tables.lines().find_map(|line| line.strip_prefix(&format!("table {family} mvm")));
    format!("mvm{}", name.unwrap().split(' ').next().unwrap())
}

#[test]
fn a_spoofed_mac_is_dropped() {
    let other = [2, 0, 0, 0, 0, 0x77];
    forbidden(At::Two, move |world| switched(world, other, world.one.address), is_marked);
}

#[test]
fn a_spoofed_address_is_dropped() {
    for net_id in [1, 2] {
        let other = instance(net_id, 9).address();
        forbidden(At::Two, move |world| switched(world, world.one.mac, other), is_marked);
    }
}

#[test]
fn a_guest_cannot_pose_as_its_neighbour() {
    forbidden(
        At::Outside,
        |world| {
            let packet = udp((world.two.address, 5000), (INTERNET, 53), MARKER);
            ethernet(world.one.router.0, world.two.mac, IPV4, &packet)
        },
        is_marked,
    );
}

#[test]
fn arp_for_the_gateways_address_is_dropped() {
    let is_it = |frame: &Frame| frame.is_arp_reply_from(instance(1, 3).tenant.gateway());
    forbidden(
        At::Two,
        |world| arp_claim(world, world.one.mac, (world.one.mac, world.one.router.1)),
        move |frame| is_it(frame) && frame.source_mac() == instance(1, 3).mac().0,
    );
}

#[test]
fn arp_for_a_neighbours_address_is_dropped() {
    let stolen = instance(1, 9).address();
    forbidden(
        At::Two,
        move |world| arp_claim(world, world.one.mac, (world.one.mac, stolen)),
        move |frame| frame.is_arp_reply_from(stolen),
    );
}

#[test]
fn arp_with_another_mac_inside_or_outside_is_dropped() {
    let other = [2, 0, 0, 0, 0, 0x77];
    let is_it = |frame: &Frame| frame.is_arp_reply_from(instance(1, 3).address());
    forbidden(
        At::Two,
        move |world| arp_claim(world, world.one.mac, (other, world.one.address)),
        is_it,
    );
    forbidden(
        At::Two,
        move |world| arp_claim(world, other, (world.one.mac, world.one.address)),
        is_it,
    );
}

#[test]
fn ipv6_is_dropped() {
    forbidden(
        At::Two,
        |world| {
            let to = [0x33, 0x33, 0, 0, 0, 1];
            ethernet(to, world.one.mac, IPV6, &udp_over_ipv6(MARKER))
        },
        is_marked,
    );
}

#[test]
fn vlan_tags_are_dropped() {
    for tag in [VLAN, PROVIDER_VLAN] {
        forbidden(
            At::Two,
            move |world| tagged(tag, &switched(world, world.one.mac, world.one.address)),
            is_marked,
        );
        forbidden(
            At::Two,
            move |world| {
                let inner = tagged(VLAN, &switched(world, world.one.mac, world.one.address));
                tagged(tag, &inner)
            },
            is_marked,
        );
    }
}

#[test]
fn other_protocols_are_dropped() {
    // 802.3 length, RARP, PPPoE session, EAPOL, a local experiment.
    for ethertype in [0x0100, 0x8035, 0x8864, 0x888e, 0x88b5] {
        forbidden(
            At::Two,
            move |world| ethernet(BROADCAST, world.one.mac, ethertype, &[MARKER; 8].concat()),
            is_marked,
        );
    }
}

#[test]
fn unsolicited_packets_from_outside_do_not_reach_an_instance() {
    forbidden_from(
        At::Outside,
        At::One,
        |world| {
            let packet = udp((INTERNET, 53), (world.one.address, 5000), MARKER);
            ethernet(world.outside.router.0, world.outside.mac, IPV4, &packet)
        },
        is_marked,
    );
}

#[test]
fn a_guest_reaches_the_internet_with_the_hosts_address_and_gets_answers() {
    in_namespace(|| async {
        let mut world = World::new().await;
        world.settle();
        world.one.route_udp(5000, (INTERNET, 53), MARKER);
        world.one.fence();
        let seen = world.outside.received();
        let question = seen.iter().find(|frame| is_marked(frame)).expect("nothing came out");
        assert_eq!(question.addresses(), Some((HOST, INTERNET)));
        let (port, _) = question.ports();
        world.outside.route(&udp((INTERNET, 53), (HOST, port), b"the answer"));
        world.outside.fence();
        let seen = world.one.received();
        let answer = seen.iter().find(|frame| frame.contains(b"the answer")).expect("no answer");
        assert_eq!(answer.addresses(), Some((INTERNET, world.one.address)));
        assert_eq!(answer.ports(), (53, 5000));
    });
}

#[test]
fn the_host_reaches_an_instance_and_gets_answers() {
    in_namespace(|| async {
        let mut world = World::new().await;
        world.settle();
        world.service.send_to(MARKER, (world.one.address, 5000)).unwrap();
        let question = world.one.received().into_iter().find(is_marked).expect("nothing came in");
        assert_eq!(question.addresses(), Some((world.one.router.1, world.one.address)));
        let frame = routed(&world, world.one.router.1);
        assert!(world.arrives(At::One, &frame, At::HostService, is_marked));
    });
}

#[test]
fn a_guest_may_ping_its_own_gateway_and_no_other_address_of_the_host() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let pings = [world.one.router.1, world.stranger.router.1, HOST].map(|host| {
            let packet = ping(world.one.address, host, 1);
            ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
        });
        let answered = pings.map(|frame| world.arrives(At::One, &frame, At::One, Frame::is_pong));
        assert_eq!(answered, [true, false, false]);
    });
}

#[test]
fn a_flood_of_pings_is_cut_without_hurting_other_tenants() {
    in_namespace(|| async {
        let mut world = World::new().await;
        world.settle();
        let (from, to) = (world.one.address, world.one.router.1);
        for sequence in 0..1000 {
            world.one.route(&ping(from, to, sequence));
        }
        let answers = world.one.received().into_iter().filter(Frame::is_pong).count();
        assert!((1..1000).contains(&answers), "{answers} answers");
        let (from, to) = (world.stranger.address, world.stranger.router.1);
        world.stranger.route(&ping(from, to, 1));
        assert!(world.stranger.received().iter().any(Frame::is_pong));
    });
}

#[test]
fn a_removed_instance_is_cut_off_even_if_its_tap_lives_on() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let frame = routed(&world, INTERNET);
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked));
        // Its alias makes the tap somebody else's, so that it is not removed.
        ip("link set tn1i3 alias other");
        world.network.remove_instance(instance(1, 3)).await.unwrap();
        world.outside.received();
        world.one.send(&frame);
        world.two.fence();
        assert!(!world.outside.received().iter().any(is_marked));
    });
}

#[test]
fn two_agents_of_a_machine_keep_their_tenants_apart_and_working() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let other = world._machine.agent("b");
        other.ensure(&node(&[(5, 3), (5, 4)])).await.unwrap();
        let (mut five, mut six) = (Station::guest(instance(5, 3)), Station::guest(instance(5, 4)));
        six.received();
        five.send(&ethernet(
            six.mac,
            five.mac,
            IPV4,
            &udp((five.address, 5000), (six.address, 5000), MARKER),
        ));
        assert!(six.received().iter().any(is_marked), "within the other agent's tenant");
        five.route_udp(5000, (INTERNET, 53), MARKER);
        five.fence();
        assert!(world.outside.received().iter().any(is_marked), "from there to the internet");
        five.route_udp(5000, (world.one.address, SERVICE), MARKER);
        five.fence();
        assert!(!world.one.received().iter().any(is_marked), "from there to here");
        world.one.route_udp(5000, (five.address, SERVICE), MARKER);
        world.one.fence();
        assert!(!five.received().iter().any(is_marked), "from here to there");
        let frame = routed(&world, INTERNET);
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked), "from here out");
    });
}
