//! The policy of a pool, who is left alone, and what the policy asks for.

use imbl::OrdMap;

use super::*;
use crate::local;
use crate::sleep_policy::{Rest, RestAction, RestReason};

const REASON: RestReason = RestReason::Idle { idle_s: 70, after_s: 60 };

fn web() -> PoolPath {
    "demo/web".parse().unwrap()
}

fn policy() -> SleepPolicy {
    SleepPolicy { warm_after_s: Some(60), sleep_after_s: Some(90), ..SleepPolicy::default() }
}

/// A node with one instance that is to run, in a pool with a policy.
fn with_policy() -> (Node, InstancePath) {
    let mut node = Node::with_pool();
    node.accept(Request::PoolPolicy { path: web(), policy: policy() });
    node.accept(create("demo/web", 1, true));
    let path = node.instances("demo/web")[0].path.clone();
    (node, path)
}

fn pin(path: &InstancePath, pinned: bool) -> Request {
    Request::InstancePin { selector: Selector::from(path), all: false, pinned }
}

/// What the node decides because of the policy, taken over.
fn rest(node: &mut Node, instance: &InstancePath, rest: Rest) -> (DesiredState, u64, bool) {
    let action = RestAction { instance: instance.clone(), rest, reason: REASON };
    let has_ended =
        node.facts.observed.instances.get(instance).is_some_and(InstanceStatus::has_ended);
    if let Some(intent) = local::rest(&node.desired, has_ended, &action, node.now) {
        let decided = OrdMap::unit(instance.clone(), intent);
        node.desired = take_over(&node.desired, &decided);
    }
    let record = &node.instances("demo/web")[0];
    (record.desired, record.sleep_request, record.rested.is_some())
}

#[test]
fn the_policy_puts_to_rest_and_says_why_until_somebody_asks_for_something_else() {
    let (mut node, path) = with_policy();
    assert_eq!(rest(&mut node, &path, Rest::Warm), (DesiredState::Warm, 0, true));
    assert_eq!(rest(&mut node, &path, Rest::Sleep), (DesiredState::Sleeping, 1, true));
    assert_eq!(node.desired.pools[&web()].running, 0);
    let generation = node.instances("demo/web")[0].generation;
    node.accept(Request::InstanceStart { selector: Selector::from(&path), all: false });
    let record = &node.instances("demo/web")[0];
    assert_eq!((record.desired, record.rested), (DesiredState::Running, None));
    assert_eq!(record.generation, generation, "it goes on where it was");
}

#[test]
fn a_policy_that_comes_too_late_changes_nothing() {
    use DesiredState::{Running, Sleeping, Stopped};
    let unchanged = |change: fn(&mut Node, &InstancePath), desired| {
        let (mut node, path) = with_policy();
        change(&mut node, &path);
        let (now, _, is_rested) = rest(&mut node, &path, Rest::Warm);
        assert_eq!((now, is_rested), (desired, false));
    };
    unchanged(|node, path| drop(node.accept(pin(path, true))), Running);
    unchanged(
        |node, _| {
            let policy = SleepPolicy { critical: true, ..policy() };
            node.accept(Request::PoolPolicy { path: web(), policy });
        },
        Running,
    );
    unchanged(
        |node, path| {
            let stop =
                Request::InstanceStop { selector: Selector::from(path), all: false, grace_ms: 0 };
            node.accept(stop);
        },
        Stopped,
    );
    unchanged(
        |node, path| {
            let sleep =
                Request::InstanceSleep { selector: Selector::from(path), all: false, hooks_ms: 0 };
            node.accept(sleep);
        },
        Sleeping,
    );
    unchanged(
        |node, path| {
            node.observe(path, Phase::Failed);
        },
        Running,
    );
    let (mut node, path) = with_policy();
    node.accept(pin(&path, true));
    node.accept(pin(&path, false));
    assert_eq!(rest(&mut node, &path, Rest::Warm).0, DesiredState::Warm);
}

#[test]
fn a_policy_is_set_for_the_instances_that_exist_and_checked() {
    let (mut node, _) = with_policy();
    let backwards = SleepPolicy { sleep_after_s: Some(10), ..policy() };
    let denial = node.try_accept(&Request::PoolPolicy { path: web(), policy: backwards });
    let text = denial.unwrap_err().to_string();
    assert!(text.contains("sleep_policy: sleep_after_s is 10"), "{text}");
    assert_eq!(node.desired.pools[&web()].spec.sleep_policy, policy());
    let path = "demo/none".parse().unwrap();
    let denial = node.try_accept(&Request::PoolPolicy { path, policy: policy() });
    assert!(matches!(denial, Err(Denial::NoSuchPool { .. })));
}

#[test]
fn a_document_with_another_policy_does_not_set_instances_apart() {
    let (mut node, _) = with_policy();
    let text =
        r#"{"tenant":"demo","pools":{"web":{"running":1,"sleep_policy":{"sleep_after_s":5}}}}"#;
    let edit = node.accept(Request::Apply { document: serde_json::from_str(text).unwrap() });
    assert_eq!(edit.notes, [""; 0]);
    assert_eq!(node.desired.pools[&web()].spec.sleep_policy.sleep_after_s, Some(5));
}
