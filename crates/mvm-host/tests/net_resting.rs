//! Neighbours of instances that rest, with real packets: they are answered, and who rests learns of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use mvm_core::net::InstanceNetwork;
use mvm_host::net::{LinuxNetwork, Network};
use net_support::guest::Station;
use net_support::packet::{ARP, ARP_REQUEST, BROADCAST, Frame, IPV4, arp, ethernet, udp};
use net_support::{Machine, in_namespace, instance, node};
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(20);
const MARKER: &[u8] = b"a packet of the test";

struct Scene {
    network: LinuxNetwork,
    one: Station,
    two: Station,
    stranger: Station,
    _machine: Machine,
}

impl Scene {
    async fn new() -> Self {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3), (1, 4), (2, 3)])).await.unwrap();
        Self {
            network,
            one: Station::guest(instance(1, 3)),
            two: Station::guest(instance(1, 4)),
            stranger: Station::guest(instance(2, 3)),
            _machine: machine,
        }
    }

    /// The second falls asleep.
    async fn sleep(&mut self) {
        self.network.remove_tap(instance(1, 4)).await.unwrap();
        self.watch(&[instance(1, 4)]).await;
    }

    async fn watch(&self, resting: &[InstanceNetwork]) {
        let resting: BTreeSet<_> = resting.iter().copied().collect();
        for _ in 0..2 {
            self.network.watch_resting(&resting).await.unwrap();
        }
    }

    fn question(&self, address: Ipv4Addr) -> Vec<u8> {
        let question = arp(ARP_REQUEST, (self.one.mac, self.one.address), ([0; 6], address));
        ethernet(BROADCAST, self.one.mac, ARP, &question)
    }

    fn packet(&self) -> Vec<u8> {
        let packet = udp((self.one.address, 5000), (self.two.address, 5000), MARKER);
        ethernet(self.two.mac, self.one.mac, IPV4, &packet)
    }

    /// The first frame that the first instance receives and that is so.
    async fn one_receives(&mut self, is_it: impl Fn(&Frame) -> bool) -> Frame {
        let deadline = Instant::now() + DEADLINE;
        loop {
            // Whoever answers works meanwhile.
            tokio::time::sleep(Duration::from_millis(2)).await;
            if let Some(frame) = self.one.received().into_iter().find(&is_it) {
                return frame;
            }
            assert!(Instant::now() < deadline, "nobody answers");
        }
    }

    async fn visited(&self) -> InstanceNetwork {
        timeout(DEADLINE, self.network.visited()).await.expect("nobody was noticed")
    }

    async fn nobody_is_noticed(&mut self) {
        // What was sent before has been read by the time that this question is answered.
        let asked = self.two.address;
        let question = self.question(asked);
        self.one.send(&question);
        self.one_receives(|frame| frame.is_arp_reply_from(asked)).await;
        let noticed = timeout(Duration::ZERO, self.network.visited()).await;
        assert!(noticed.is_err(), "{noticed:?}");
    }
}

#[test]
fn a_question_for_who_sleeps_is_answered_and_a_packet_is_noticed() {
    in_namespace(|| async {
        let mut scene = Scene::new().await;
        scene.sleep().await;
        let (question, asleep) = (scene.question(scene.two.address), scene.two.address);
        scene.one.send(&question);
        let answer = scene.one_receives(|frame| frame.is_arp_reply_from(asleep)).await;
        assert_eq!(answer.source_mac(), scene.two.mac);
        scene.nobody_is_noticed().await;
        let packet = scene.packet();
        scene.one.send(&packet);
        assert_eq!(scene.visited().await, instance(1, 4));
        // Another tenant's guest cannot, whatever it claims.
        scene.stranger.send(&packet);
        let routed = udp((scene.stranger.address, 5000), (scene.two.address, 5000), MARKER);
        scene.stranger.route(&routed);
        scene.stranger.fence();
        scene.nobody_is_noticed().await;
    });
}

#[test]
fn who_is_awake_again_gets_its_frames_itself() {
    in_namespace(|| async {
        let mut scene = Scene::new().await;
        scene.sleep().await;
        let packet = scene.packet();
        scene.one.send(&packet);
        scene.visited().await;
        // It is awake before those who watch know.
        scene.network.add_instance(instance(1, 4)).await.unwrap();
        scene.two = Station::guest(instance(1, 4));
        for is_watched in [true, false] {
            if !is_watched {
                scene.watch(&[]).await;
            }
            scene.one.send(&packet);
            scene.one.fence();
            let seen = scene.two.received();
            assert!(seen.iter().any(|frame| frame.contains(MARKER)), "watched: {is_watched}");
        }
    });
}

#[test]
fn a_packet_to_one_whose_processors_stand_still_is_noticed_instead_of_being_queued() {
    in_namespace(|| async {
        let mut scene = Scene::new().await;
        // Everybody knows where it is.
        scene.two.fence();
        scene.watch(&[instance(1, 4)]).await;
        scene.two.received();
        let packet = scene.packet();
        scene.one.send(&packet);
        assert_eq!(scene.visited().await, instance(1, 4));
        assert!(!scene.two.received().iter().any(|frame| frame.contains(MARKER)));
        scene.watch(&[]).await;
        scene.two.fence();
        scene.one.send(&packet);
        scene.one.fence();
        assert!(scene.two.received().iter().any(|frame| frame.contains(MARKER)));
    });
}

#[test]
fn neighbours_are_noticed_on_a_bridge_that_was_made_anew() {
    in_namespace(|| async {
        let mut scene = Scene::new().await;
        scene.sleep().await;
        net_support::ip("link del br-tenant-1");
        assert!(scene.network.mend_links().await.unwrap());
        scene.one.fence();
        scene.watch(&[instance(1, 4)]).await;
        let packet = scene.packet();
        scene.one.send(&packet);
        assert_eq!(scene.visited().await, instance(1, 4));
    });
}
