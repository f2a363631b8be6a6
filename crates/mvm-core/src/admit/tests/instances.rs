//! Instances and the counts of their pools.

use super::*;

const WEB: &str = "demo/web";

#[test]
fn scaling_starts_stopped_instances_before_it_makes_new_ones() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 2, false));
    let stopped = node.ids(WEB, DesiredState::Stopped);
    node.accept(scale(WEB, 1));
    assert_eq!(node.ids(WEB, DesiredState::Running), stopped[..1], "the oldest first");
    node.accept(scale(WEB, 3));
    let running = node.ids(WEB, DesiredState::Running);
    assert_eq!((&running[..2], running.len()), (&stopped[..], 3));
}

#[test]
fn scaling_down_stops_the_newest_first_and_keeps_them() {
    let mut node = Node::with_pool();
    node.accept(scale(WEB, 2));
    node.accept(scale(WEB, 4));
    let all = node.ids(WEB, DesiredState::Running);
    node.accept(scale(WEB, 1));
    assert_eq!(node.ids(WEB, DesiredState::Running), all[..1]);
    assert_eq!(node.ids(WEB, DesiredState::Stopped), all[1..]);
    assert_eq!(node.desired.pools[&WEB.parse::<PoolPath>().unwrap()].running, 1);
}

#[test]
fn the_newest_is_the_one_made_last_also_on_a_slot_used_before() {
    let mut node = Node::with_pool();
    node.accept(scale(WEB, 2));
    let [first, second] = &node.ids(WEB, DesiredState::Running)[..] else { panic!("not two") };
    node.accept(destroy(&first.to_string(), false, true));
    node.forget_the_gone();
    node.accept(scale(WEB, 2));
    node.accept(scale(WEB, 1));
    assert_eq!(node.ids(WEB, DesiredState::Running), std::slice::from_ref(second));
}

#[test]
fn each_wish_that_changes_something_has_a_new_generation() {
    let mut node = Node::with_pool();
    let generation = |node: &Node| node.instances(WEB)[0].generation;
    let first = |node: &mut Node, request| {
        node.accept(request);
        generation(node)
    };
    assert_eq!(first(&mut node, create(WEB, 1, false)), 0);
    assert_eq!(first(&mut node, start(WEB, false)), 1);
    assert_eq!(first(&mut node, start(WEB, false)), 1, "it is to run already");
    assert_eq!(first(&mut node, stop(WEB, false)), 2);
    assert_eq!(first(&mut node, stop(WEB, false)), 2);
    let selector: Selector = WEB.parse().unwrap();
    let restart =
        || Request::InstanceRestart { selector: selector.clone(), all: false, grace_ms: 0 };
    assert_eq!(first(&mut node, restart()), 3);
    assert_eq!(first(&mut node, restart()), 4, "a restart is always a fresh wish");
    assert_eq!(node.instances(WEB)[0].desired, DesiredState::Running);
}

#[test]
fn to_start_what_ended_by_itself_is_a_fresh_wish() {
    for request in [start(WEB, false), scale(WEB, 1)] {
        let mut node = Node::with_pool();
        node.accept(create(WEB, 1, true));
        let path = node.instances(WEB)[0].path.clone();
        node.observe(&path, Phase::Failed);
        node.accept(request);
        assert_eq!(node.instances(WEB)[0].generation, 2);
    }
}

#[test]
fn a_stop_says_what_is_lost_only_of_what_sleeps_already() {
    for (is_up, notes) in [(false, 1), (true, 0)] {
        let mut node = Node::with_pool();
        node.accept(create(WEB, 1, true));
        let selector: Selector = WEB.parse().unwrap();
        node.accept(Request::InstanceSleep { selector, all: false, hooks_ms: 1 });
        if is_up {
            let path = node.instances(WEB)[0].path.clone();
            node.observe(&path, Phase::Suspending { since_unix_ms: 1 });
        }
        assert_eq!(node.accept(stop(WEB, false)).notes.len(), notes);
    }
}

#[test]
fn what_has_ended_for_good_reserves_nothing_until_it_is_to_run_again() {
    let mut node = Node::new();
    let quota = Quota { running: Some(1), ..Quota::default() };
    node.accept(tenant_with("demo", quota, None));
    node.accept(pool(WEB));
    node.accept(create(WEB, 1, true));
    assert!(matches!(node.deny(create(WEB, 1, true)), Denial::OverLimit(_)));
    let path = node.instances(WEB)[0].path.clone();
    node.observe(&path, Phase::Failed);
    assert!(matches!(node.deny(create(WEB, 1, true)), Denial::OverLimit(_)), "it starts again");
    node.observe(&path, Phase::Stopped);
    node.accept(create(WEB, 1, true));
    let is_finished = |path: &InstancePath| node.facts.is_finished(&node.desired, path);
    let usage = node_usage(&node.desired, &is_finished);
    assert_eq!((usage.running, usage.instances), (1, 2));
    let first = path.id.to_string();
    assert!(matches!(node.deny(start(&first, false)), Denial::OverLimit(_)));
    let second = node.instances(WEB)[1].path.id.to_string();
    node.accept(stop(&second, false));
    node.accept(start(&first, false));
    assert!(matches!(node.deny(start(&second, false)), Denial::OverLimit(_)));
}

#[test]
fn a_stop_says_how_long_the_guest_has() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 1, true));
    assert_eq!(node.instances(WEB)[0].grace_ms, DEFAULT_GRACE_MS);
    node.accept(stop(WEB, false));
    assert_eq!(node.instances(WEB)[0].grace_ms, 500);
}

#[test]
fn several_instances_are_meant_only_if_all_is_said() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 2, false));
    let denial = node.deny(start(WEB, false));
    assert!(matches!(denial, Denial::Ambiguous { matches, .. } if matches.len() == 2));
    let edit = node.accept(start(WEB, true));
    assert_eq!(edit.instances.len(), 2);
    let one = node.instances(WEB)[1].path.id.to_string();
    assert_eq!(node.accept(stop(&one, false)).instances.len(), 1);
}

#[test]
fn a_running_instance_is_destroyed_only_by_force() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 1, true));
    node.accept(create(WEB, 1, false));
    let path = node.instances(WEB)[0].path.clone();
    let denial = node.deny(destroy(WEB, true, false));
    assert!(matches!(denial, Denial::StillRunning { running, .. } if running == [path]));
    assert_eq!(node.accept(destroy(WEB, true, true)).instances.len(), 2);
    assert_eq!(node.ids(WEB, DesiredState::Destroyed).len(), 2);
}

#[test]
fn what_is_being_destroyed_is_not_meant_by_any_selector() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 1, true));
    let id = node.instances(WEB)[0].path.id.to_string();
    node.accept(destroy(WEB, false, true));
    for selector in [WEB, "demo"] {
        assert!(matches!(node.deny(start(selector, true)), Denial::NoInstances { .. }));
    }
    assert!(matches!(node.deny(start(&id, true)), Denial::BeingRemoved { .. }));
    node.accept(scale(WEB, 1));
    assert_eq!(node.instances(WEB).len(), 2, "it is not brought back");
}

#[test]
fn a_slot_is_held_until_the_instance_is_gone_and_then_used_again() {
    let mut node = Node::with_pool();
    let slots = |node: &Node| node.instances(WEB).iter().map(|i| i.slot.0).collect::<Vec<_>>();
    node.accept(create(WEB, 3, false));
    assert_eq!(slots(&node), [3, 4, 5]);
    let middle = node.instances(WEB)[1].path.id.to_string();
    node.accept(destroy(&middle, false, false));
    node.accept(create(WEB, 1, false));
    assert_eq!(slots(&node), [3, 4, 5, 6]);
    node.forget_the_gone();
    node.accept(create(WEB, 2, false));
    assert_eq!(slots(&node), [3, 5, 6, 4, 7], "oldest first");
}

#[test]
fn an_id_that_is_taken_is_drawn_again() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 2, false));
    node.ids = 0;
    node.accept(create(WEB, 1, false));
    assert_eq!(node.instances(WEB)[2].path.id, InstanceId::from_bits(3));
}

#[test]
fn instances_keep_the_spec_that_they_were_made_with() {
    let mut node = Node::with_pool();
    node.accept(create(WEB, 1, false));
    let larger = serde_json::json!({"web": {"running": 2, "mem_mib": 512}});
    let larger = document(serde_json::json!({"tenant": "demo", "pools": larger}));
    let edit = node.accept(Request::Apply { document: larger });
    let sizes: Vec<u32> = node.instances(WEB).iter().map(|i| i.spec.mem_mib).collect();
    assert_eq!(sizes, [256, 512]);
    assert_eq!(
        edit.notes,
        ["pool demo/web has changed: its 1 existing instances stay as they are, new ones follow \
          the document (`mvm pool info demo/web` says how to renew them)"]
    );
}

#[test]
fn a_build_is_asked_for_by_a_new_generation() {
    let mut node = Node::with_pool();
    let path: PoolPath = WEB.parse().unwrap();
    let edit = node.accept(Request::PoolBuild { path: path.clone() });
    assert_eq!(edit.pools, std::slice::from_ref(&path));
    node.accept(Request::PoolBuild { path: path.clone() });
    assert_eq!(node.desired.pools[&path].build_generation, 2);
}

#[test]
fn a_pool_that_a_run_made_goes_with_its_last_instance() {
    let mut node = Node::new();
    node.accept(tenant("demo"));
    let spec = PoolSpec { ephemeral: true, ..PoolSpec::default() };
    let path: PoolPath = WEB.parse().unwrap();
    node.accept(Request::PoolCreate { path: path.clone(), spec: spec.into() });
    node.accept(create(WEB, 2, true));
    let ids: Vec<String> = node.instances(WEB).iter().map(|i| i.path.to_string()).collect();
    node.accept(destroy(&ids[0], false, true));
    assert_eq!(node.desired.pools[&path].existence, Existence::Kept);
    let edit = node.accept(destroy(&ids[1], false, true));
    assert_eq!(node.desired.pools[&path].existence, Existence::Removed);
    assert_eq!(edit.pools, [path], "the pool's end is waited for");

    let mut node = Node::with_pool();
    node.accept(create(WEB, 1, false));
    node.accept(destroy(WEB, false, false));
    assert_eq!(node.desired.pools.len(), 1, "a pool that was made by itself stays");
}

#[test]
fn a_name_alone_is_a_tenants_or_else_a_pools_of_the_default_tenant() {
    let mut node = Node::with_pool();
    node.accept(tenant("default"));
    node.accept(pool("default/web"));
    node.accept(pool("default/demo"));
    for (typed, meant) in [
        ("web", "default/web"),
        ("demo", "demo"),
        ("default", "default"),
        ("nope", "nope"),
        ("i-3f", "i-3f"),
        ("demo/web", "demo/web"),
    ] {
        let selector = node.desired.meant(typed.parse().unwrap());
        assert_eq!(selector, meant.parse().unwrap(), "{typed}");
    }
}

#[test]
fn what_has_ended_by_itself_is_removed_without_force_and_once_more_is_no_error() {
    for request in [
        |_: &str| Request::PoolDestroy { path: WEB.parse().unwrap(), force: false },
        |id: &str| destroy(id, false, false),
    ] {
        let mut node = Node::with_pool();
        node.accept(create(WEB, 1, true));
        let path = node.instances(WEB)[0].path.clone();
        let id = path.id.to_string();
        assert!(matches!(node.deny(request(&id)), Denial::StillRunning { .. }));
        node.observe(&path, Phase::Failed);
        node.accept(request(&id));
        assert_eq!(node.instances(WEB)[0].desired, DesiredState::Destroyed);
        let edit = node.accept(destroy(&id, false, false));
        assert_eq!(edit.instances, [path], "its end is waited for");
    }
}
