//! The loop of plan, act and observe, closed over a simulated node with faults.

use proptest::prelude::*;

use super::node::Node;
use super::*;
use crate::admit::{OwnRequest, Request};
use crate::lifecycle::tests::origin;
use crate::name::{RequestId, Selector};
use crate::property::{Choices, cases};
use crate::spec::Document;

const FOREVER: u64 = u64::MAX;

fn document(restart: &str, running: u32) -> Document {
    let json = serde_json::json!({
        "tenant": "demo",
        "pools": {
            "web": { "running": running, "restart": restart },
            "work": { "running": 1, "restart": restart },
        },
    });
    serde_json::from_value(json).unwrap()
}

fn node(restart: &str, running: u32) -> Node {
    let mut node = Node::new();
    node.ask(&Request::Apply { document: document(restart, running) }).unwrap();
    node
}

/// What people and the world do to a node, none of which makes or removes an instance.
fn suffer(node: &mut Node, choices: &mut Choices) {
    let records = node.desired.instances.len();
    disturb(node, choices);
    assert_eq!(node.desired.instances.len(), records, "an instance was lost or doubled");
}

fn disturb(node: &mut Node, choices: &mut Choices) {
    while !choices.is_calm() {
        node.now += [0, 10, 1_000, 30_000][choices.pick(4)];
        let (selector, all) = (Selector::Pool(pool()), true);
        match choices.pick(14) {
            0..=3 => drop(node.progress(choices)),
            4..=6 => drop(node.round()),
            7 => node.tick(),
            8 => drop(node.ask(&Request::InstanceRestart { selector, all, grace_ms: 0 })),
            9 => drop(node.ask(&Request::InstanceStop { selector, all, grace_ms: 5_000 })),
            10 => drop(node.ask(&Request::InstanceStart { selector, all })),
            11 => drop(node.ask(&Request::InstanceSleep { selector, all, hooks_ms: 9 })),
            12 => drop(node.ask(&Request::InstanceWarm { selector, all })),
            _ => node.misfortune(choices),
        }
    }
}

/// Forks, what bases are saved from and what stands by come and go, and anything else happens.
fn multiply(node: &mut Node, choices: &mut Choices) {
    while !choices.is_calm() {
        let paths: Vec<InstancePath> = node.desired.instances.keys().cloned().collect();
        let path = paths[choices.pick(paths.len())].clone();
        match choices.pick(6) {
            0 => node.save_base(&pool()),
            1 => {
                let count = choices.pick(3) as u32;
                drop(node.ask_own(&OwnRequest::Spares { pool: pool(), count }));
            }
            2 => drop(node.ask(&Request::PoolWarmUp { path: pool() })),
            3 => {
                let id = RequestId::from_bits(choices.pick(2) as u128);
                let begin = OwnRequest::BeginFork { id: id.clone(), source: path, count: 1 };
                drop(node.ask_own(&begin));
                let (snapshot, revision) = (origin(), revision());
                drop(node.ask_own(&OwnRequest::MakeForks { id, snapshot, revision }));
            }
            4 if paths.len() > 4 => {
                let selector = Selector::from(&path);
                let destroy = Request::InstanceDestroy { selector, all: false, force: true };
                drop(node.ask(&destroy));
            }
            _ => {
                let path = pool();
                drop(node.ask(&Request::PoolScale {
                    path,
                    running: 2,
                    warm: Some(1),
                    sleeping: None,
                }));
            }
        }
        let some = (0..12).map(|_| choices.pick(256) as u8).collect();
        disturb(node, &mut Choices::new(some));
    }
}

fn assert_converged(node: &Node) {
    for record in node.desired.instances.values() {
        let status = node.worlds.get(&record.path).map(|world| world.status.clone());
        let status = status.unwrap_or_default();
        match record.desired {
            DesiredState::Running => {
                assert!(matches!(status.phase, Phase::Running { .. }), "{status:?}");
                assert_eq!(status.generation, record.generation);
            }
            DesiredState::Warm => {
                assert!(matches!(status.phase, Phase::Warm { .. }), "{status:?}");
            }
            DesiredState::Sleeping => {
                assert!(matches!(status.phase, Phase::Sleeping { .. }), "{status:?}");
            }
            DesiredState::Stopped => {
                assert!(matches!(status.phase, Phase::Created | Phase::Stopped), "{status:?}");
            }
            DesiredState::Destroyed => panic!("{} is still there", record.path),
        }
    }
    for now in [node.now, node.now + BACKOFF_MAX_MS] {
        assert_eq!(node.plan_at(now), Plan::default());
    }
}

#[test]
fn a_document_is_brought_up_and_then_nothing_is_planned() {
    let mut node = node("on-failure", 3);
    node.settle(FOREVER);
    assert_eq!((node.worlds.len(), node.starts.len()), (4, 4));
    assert_converged(&node);
}

#[test]
fn an_instance_that_cannot_start_is_retried_with_backoff_and_never_replaced() {
    const HOUR_MS: u64 = 3_600_000;
    let mut node = node("on-failure", 1);
    let paths: Vec<InstancePath> = node.desired.instances.keys().cloned().collect();
    let broken = paths.iter().find(|path| path.pool == pool()).unwrap();
    node.worlds.entry(broken.clone()).or_default().is_broken = true;
    node.settle(NOW + HOUR_MS);

    assert!(node.desired.instances.keys().eq(&paths), "the same instances as before");
    // The other instance's one start, and then 1, 2, 4, … 256 and again and again 300 seconds.
    let waits: Vec<u64> =
        node.starts[1..].windows(2).map(|pair| (pair[1] - pair[0]) / 1_000).collect();
    assert_eq!(waits[..11], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    assert!(waits[11..].iter().all(|wait| *wait == 300), "{waits:?}");

    node.worlds.get_mut(broken).unwrap().is_broken = false;
    node.settle(FOREVER);
    assert_converged(&node);
}

#[test]
fn what_a_guest_ended_itself_stays_ended_under_the_policy() {
    let mut node = node("on-failure", 1);
    node.settle(FOREVER);
    let first = node.worlds.keys().next().unwrap().clone();
    node.worlds.get_mut(&first).unwrap().end_from_outside(&mut Choices::new(vec![]));
    node.settle(FOREVER);
    let plan = node.plan_at(node.now + BACKOFF_MAX_MS);
    let policy = RestartPolicy::OnFailure;
    assert_eq!(plan.waiting, [(first, Waiting::RestartPolicy { policy: policy.into() })].into());
    assert_eq!(plan.actions, []);
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn after_any_faults_the_node_converges_and_then_plans_nothing(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut node = node("always", 3);
        suffer(&mut node, &mut Choices::new(bytes));
        node.settle(FOREVER);
        assert_converged(&node);
        prop_assert_eq!(node.desired.instances.len(), 4);
    }

    #[test]
    fn forks_bases_and_spares_converge_too_and_a_removal_leaves_nothing(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut node = node("always", 3);
        multiply(&mut node, &mut Choices::new(bytes));
        node.settle(FOREVER);
        assert_converged(&node);
        node.ask(&Request::Remove { document: document("always", 3) }).unwrap();
        node.settle(FOREVER);
        prop_assert_eq!(&node.desired, &Desired::default());
        prop_assert!(node.worlds.is_empty());
    }

    #[test]
    fn after_any_faults_a_removal_leaves_nothing(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut node = node("on-failure", 2);
        suffer(&mut node, &mut Choices::new(bytes));
        node.ask(&Request::Remove { document: document("on-failure", 2) }).unwrap();
        node.settle(FOREVER);
        prop_assert_eq!(&node.desired, &Desired::default());
        prop_assert!(node.worlds.is_empty());
    }
}
