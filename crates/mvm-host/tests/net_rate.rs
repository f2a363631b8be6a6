//! A guest sends and receives no faster than its rate, shown with real packets through nftables.
//!
//! What arrives is held against the rate and the time that really went by, so that a busy machine
//! changes nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::time::{Duration, Instant};

use mvm_core::net::{InstanceNetwork, NodeNetwork};
use mvm_core::rates::bytes_per_second;
use mvm_host::net::Network;
use net_support::guest::Station;
use net_support::packet::{IPV4, ethernet, udp};
use net_support::world::{MARKER, SERVICE, World, is_marked};
use net_support::{in_namespace, instance};

const RATE_MBIT_S: u32 = 1;
/// What may come at once, in bytes: what the rate allows in a second, and a bit.
const BURST: u64 = 125_000 + (256 << 10);
/// How long it takes until all of that may come again, and more.
const REST: Duration = Duration::from_millis(3_500);
/// Times that the marker is in a packet.
const REPEATED: usize = 60;
/// Packets that are sent in one go: several times the burst.
const COUNT: usize = 1_000;

/// Sends as fast as it can; returns the bytes that were sent, those that arrived, and those that the
/// rate allows for the time that it took.
fn flood(from: &mut Station, to: &mut Station) -> (u64, u64, u64) {
    from.fence();
    to.fence();
    to.received();
    let packet = udp((from.address, 5000), (to.address, SERVICE), &MARKER.repeat(REPEATED));
    let frame = ethernet(to.mac, from.mac, IPV4, &packet);
    let began = Instant::now();
    let mut arrived = 0;
    for count in 1..=COUNT {
        from.send(&frame);
        // A tap's queue holds some hundred frames.
        if count % 50 == 0 {
            to.fence();
            arrived += to.received().iter().filter(|frame| is_marked(frame)).count();
        }
    }
    let took = u64::try_from(began.elapsed().as_micros()).unwrap();
    let allowed = BURST + took * bytes_per_second(RATE_MBIT_S) / 1_000_000;
    // The kernel counts no Ethernet headers here.
    let bytes = |frames: usize| (frames * packet.len()) as u64;
    (bytes(COUNT), bytes(arrived), allowed)
}

#[test]
fn a_guest_sends_and_receives_no_faster_than_its_rate() {
    in_namespace(|| async {
        let World { network, mut one, mut two, machine: _machine, .. } = World::new().await;
        let (sent, arrived, allowed) = flood(&mut one, &mut two);
        assert_eq!(arrived, sent, "nothing is limited yet");
        assert!(sent > allowed, "{sent} bytes in a time for {allowed}: it proves nothing");

        let limited = InstanceNetwork { rate_mbit_s: Some(RATE_MBIT_S), ..instance(1, 3) };
        network.add_instance(limited).await.unwrap();
        for is_sender in [true, false] {
            tokio::time::sleep(REST).await;
            let (_, arrived, allowed) = match is_sender {
                true => flood(&mut one, &mut two),
                false => flood(&mut two, &mut one),
            };
            assert!(arrived <= allowed, "{arrived} bytes, and {allowed} are allowed");
            assert!(arrived > BURST / 2, "{arrived} bytes, and at least {BURST} may come at once");
        }
        let others = [instance(1, 4), instance(2, 3)];
        let expected = NodeNetwork::of([], others.into_iter().chain([limited])).unwrap();
        assert_eq!(network.verify(&expected).await.unwrap(), []);
        let slower = InstanceNetwork { rate_mbit_s: Some(RATE_MBIT_S + 1), ..limited };
        let expected = NodeNetwork::of([], others.into_iter().chain([slower])).unwrap();
        assert!(
            !network.verify(&expected).await.unwrap().is_empty(),
            "a rate is part of the state"
        );

        network.add_instance(instance(1, 3)).await.unwrap();
        let (sent, arrived, _) = flood(&mut one, &mut two);
        assert_eq!(arrived, sent, "nothing is limited any more");
    });
}
