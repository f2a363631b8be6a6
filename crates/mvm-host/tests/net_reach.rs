//! What a guest can and cannot reach, shown with real packets on real bridges, taps and nftables.
//!
//! The test plays the guests and the world outside by writing frames to taps. A packet that must
//! not arrive is sent twice: with the firewall, and without it, when it must arrive; so each of
//! these tests fails if the firewall lets the packet through, and if the packet proves nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::net::Ipv4Addr;

use mvm_core::net::{InstanceNetwork, NodeNetwork};
use mvm_host::net::Network;
use net_support::guest::Station;
use net_support::packet::{Frame, IPV4, RST, SYN, ethernet, ping, syn_with_mss, tcp, udp};
use net_support::world::{
    At, HOST, INTERNET, MARKER, METADATA, OUTSIDE, SERVICE, World, forbidden, forbidden_from,
    is_marked, routed, switched,
};
use net_support::{in_namespace, instance, ip, nft, node, set_sysctl, skip, sysctl};

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
            return skip("this kernel has no br_netfilter");
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
            let packet = tcp(SYN, (world.one.address, 5000), (host, SERVICE));
            ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
        };
        forbidden(At::One, syn, Frame::is_syn_ack);
    }
}

#[test]
fn a_guest_cannot_reach_the_metadata_address() {
    forbidden(At::Outside, |world| routed(world, METADATA), is_marked);
}

#[test]
fn a_guest_reaches_hosts_in_the_range_of_tenants_subnets_that_are_no_tenants() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let frame = routed(&world, Ipv4Addr::new(10, 250, 0, 3));
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked));
    });
}

#[test]
fn segments_are_no_larger_than_the_way_out_takes() {
    in_namespace(|| async {
        let mut world = World::new().await;
        for (mtu, expected) in [(1500, 1460), (1400, 1360)] {
            ip(&format!("link set wan0 mtu {mtu}"));
            world.settle();
            let packet = syn_with_mss(1460, (world.one.address, 5000), (INTERNET, 80));
            world.one.route(&packet);
            world.one.fence();
            let seen = world.outside.received();
            let offered = seen.iter().find_map(Frame::offered_mss);
            assert_eq!(offered, Some(expected), "with packets of {mtu} bytes");
        }
    });
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
            nft(&format!("delete table {table} {}\n", world.machine.owner("a").table()));
        }
        let packet = udp((world.one.address, 5001), (HOST, SERVICE), MARKER);
        let frame = ethernet(world.one.router.0, world.one.mac, IPV4, &packet);
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked), "it proves nothing");
    });
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
        let other = world.machine.agent("b");
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

/// A tenant with a subnet of its own, outside the range that all tenants share.
fn tenant_with_own_subnet(net_id: u16) -> InstanceNetwork {
    let mut own = instance(net_id, 3);
    own.tenant.subnet = "192.168.77.0/24".parse().unwrap();
    own
}

#[test]
fn another_agents_tenant_is_out_of_reach_even_if_its_own_firewall_is_gone() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let other = world.machine.agent("b");
        let own = tenant_with_own_subnet(5);
        other.ensure(&NodeNetwork::of([], [own]).unwrap()).await.unwrap();
        let mut five = Station::guest(own);
        for family in ["inet", "bridge"] {
            nft(&format!("delete table {family} {}\n", world.machine.owner("b").table()));
        }
        let frame = routed(&world, five.address);
        for (is_guarded, expected) in [(true, false), (false, true)] {
            if !is_guarded {
                world.remove_firewall();
            }
            world.settle();
            five.received();
            world.one.send(&frame);
            five.fence();
            assert_eq!(five.received().iter().any(is_marked), expected);
        }
    });
}

#[test]
fn packets_for_a_tenants_own_subnet_do_not_leave_the_host_while_its_bridge_is_down() {
    in_namespace(|| async {
        let mut world = World::new().await;
        let own = tenant_with_own_subnet(5);
        world.network.add_instance(own).await.unwrap();
        ip("link set br-tenant-5 down");
        let frame = routed(&world, own.address());
        assert!(!world.arrives(At::One, &frame, At::Outside, is_marked));
        world.remove_firewall();
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked), "it proves nothing");
    });
}

#[test]
fn a_spoofed_address_is_not_routed_even_without_the_bridges_rules() {
    in_namespace(|| async {
        let mut world = World::new().await;
        nft(&format!("delete table bridge {}\n", world.machine.owner("a").table()));
        for link in ["all", "br-tenant-1"] {
            set_sysctl(&format!("ipv4/conf/{link}/rp_filter"), "0");
        }
        let packet = udp((Ipv4Addr::new(10, 99, 0, 1), 5000), (INTERNET, 53), MARKER);
        let frame = ethernet(world.one.router.0, world.one.mac, IPV4, &packet);
        assert!(!world.arrives(At::One, &frame, At::Outside, is_marked));
        world.remove_firewall();
        assert!(world.arrives(At::One, &frame, At::Outside, is_marked), "it proves nothing");
    });
}

#[test]
fn packets_that_belong_to_no_connection_do_not_leave_with_a_guests_address() {
    let guest = instance(1, 3).address();
    forbidden(
        At::Outside,
        move |world| {
            let packet = tcp(RST, (guest, 5000), (INTERNET, 80));
            ethernet(world.one.router.0, world.one.mac, IPV4, &packet)
        },
        move |frame| frame.addresses() == Some((guest, INTERNET)),
    );
}
