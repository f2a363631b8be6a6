//! Frames that lie, and what becomes of them on real bridges, taps and nftables.
//!
//! The test plays the guests and the world outside by writing frames to taps. A packet that must
//! not arrive is sent twice: with the firewall, and without it, when it must arrive; so each of
//! these tests fails if the firewall lets the packet through, and if the packet proves nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use net_support::packet::{
    ARP, ARP_REPLY, BROADCAST, Frame, IPV4, IPV6, Mac, PROVIDER_VLAN, VLAN, arp, ethernet, tagged,
    udp, udp_over_ipv6,
};
use net_support::world::{
    At, HOST, INTERNET, MARKER, SERVICE, World, forbidden, is_marked, switched,
};
use net_support::{in_namespace, instance, ip};
use std::net::Ipv4Addr;

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
fn a_guest_whose_tap_left_its_bridge_reaches_nothing() {
    in_namespace(|| async {
        let mut world = World::new().await;
        ip("link set tn1i3 nomaster");
        let packet = udp((world.one.address, 5000), (HOST, SERVICE), MARKER);
        let frame = ethernet(link_mac("tn1i3"), world.one.mac, IPV4, &packet);
        world.one.send(&frame);
        world.two.fence();
        let packet = udp((world.one.address, 5000), (INTERNET, 53), MARKER);
        let onward = ethernet(link_mac("tn1i3"), world.one.mac, IPV4, &packet);
        world.one.send(&onward);
        assert!(!world.sees(At::HostService, is_marked));
        assert!(!world.sees(At::Outside, is_marked));
        world.remove_firewall();
        world.one.send(&frame);
        world.one.send(&onward);
        world.two.fence();
        assert!(world.sees(At::HostService, is_marked), "it proves nothing");
        assert!(world.sees(At::Outside, is_marked), "it proves nothing");
    });
}

fn link_mac(link: &str) -> Mac {
    let text = ip(&format!("link show {link}"));
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let octets = mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    octets.collect::<Vec<_>>().try_into().unwrap()
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

fn arp_claim(world: &World, frame_mac: Mac, claim: (Mac, Ipv4Addr)) -> Vec<u8> {
    let claim = arp(ARP_REPLY, claim, (world.two.mac, world.two.address));
    ethernet(world.two.mac, frame_mac, ARP, &claim)
}
