//! Instances that stand by: how many there are, who takes them, and when they do not fit.

use super::bases::{web, with_base};
use super::*;
use crate::record::Purpose;

fn spares(node: &mut Node, count: u32) -> Vec<InstancePath> {
    node.try_accept_own(&OwnRequest::Spares { pool: web(), count }).unwrap();
    node.forget_the_gone();
    let pool = web();
    let spares = spares_of(&node.desired, &pool);
    let paths: Vec<InstancePath> = spares.map(|spare| spare.path.clone()).collect();
    paths.iter().for_each(|path| node.observe(path, Phase::Warm { since_unix_ms: 1 }));
    paths
}

fn purpose(node: &Node, path: &InstancePath) -> (Purpose, DesiredState) {
    let record = &node.desired.instances[path];
    (record.purpose, record.desired)
}

#[test]
fn there_are_as_many_as_asked_for_and_the_newest_go_first() {
    let mut node = with_base();
    let three = spares(&mut node, 3);
    assert_eq!(three.len(), 3);
    for path in &three {
        assert_eq!(purpose(&node, path), (Purpose::Spare, DesiredState::Warm));
        assert!(node.desired.instances[path].origin.is_some());
    }
    assert_eq!(node.desired.pools[&web()].running, 0, "none is one of the pool's");
    assert_eq!(spares(&mut node, 3), three, "nothing changes");
    let one = spares(&mut node, 1);
    assert!(one.len() == 1 && three.contains(&one[0]));
    assert_eq!(spares(&mut node, 0), []);
}

#[test]
fn whoever_asks_for_a_new_instance_that_runs_takes_one_that_stands_by() {
    let mut node = with_base();
    let two = spares(&mut node, 2);
    let edit = node.accept(create("demo/web", 1, true));
    assert!(two.contains(&edit.instances[0]), "{:?}", edit.instances);
    assert_eq!(purpose(&node, &edit.instances[0]), (Purpose::Use, DesiredState::Running));
    assert_eq!(node.desired.pools[&web()].running, 1);
    // Scaling takes the other one, and makes the rest.
    node.accept(scale("demo/web", 3));
    assert!(two.iter().all(|path| purpose(&node, path).0 == Purpose::Use));
    assert_eq!(node.instances("demo/web").len(), 3);
}

#[test]
fn one_that_is_not_wanted_or_not_ready_is_left() {
    let mut node = with_base();
    let spare = spares(&mut node, 1).remove(0);
    node.accept(create("demo/web", 1, false));
    let cold =
        Request::InstanceCreate { pool: web(), count: 1, start: true, disks: vec![], cold: true };
    node.accept(cold);
    assert_eq!(purpose(&node, &spare).0, Purpose::Spare);
    node.observe(&spare, Phase::Created);
    node.accept(create("demo/web", 1, true));
    assert_eq!(purpose(&node, &spare).0, Purpose::Spare, "it is still being made");
    assert_eq!(node.instances("demo/web").len(), 4);
}

#[test]
fn one_that_is_not_what_a_new_instance_would_be_is_not_taken_and_goes() {
    for change in [
        (|node: &mut Node| node.desired.pools.get_mut(&web()).unwrap().spec.mem_mib += 1)
            as fn(&mut Node),
        |node| node.facts.observed.pools.get_mut(&web()).unwrap().base = None,
        |node| {
            let status = node.facts.observed.pools.get_mut(&web()).unwrap();
            status.base.as_mut().unwrap().id = SnapshotId::from_bits(8);
        },
    ] {
        let mut node = with_base();
        let spare = spares(&mut node, 1).remove(0);
        change(&mut node);
        node.accept(create("demo/web", 1, true));
        assert_eq!(purpose(&node, &spare).0, Purpose::Spare);
        assert!(!spares(&mut node, 1).contains(&spare));
    }
    let mut node = with_base();
    let spare = spares(&mut node, 1).remove(0);
    node.observe(&spare, Phase::Failed);
    assert!(!spares(&mut node, 1).contains(&spare), "one that ended is replaced");
}

#[test]
fn verbs_for_many_leave_them_and_whoever_names_one_takes_it() {
    let mut node = with_base();
    node.accept(create("demo/web", 1, true));
    let two = spares(&mut node, 2);
    let selector: Selector = "demo".parse().unwrap();
    let wake = Request::InstanceStart { selector: selector.clone(), all: true };
    assert_eq!(node.accept(wake).instances.len(), 1);
    let destroy = Request::InstanceDestroy { selector, all: true, force: true };
    assert_eq!(node.accept(destroy).instances.len(), 1);
    assert_eq!(spares(&mut node, 2), two);
    let named = Request::InstanceStart { selector: Selector::from(&two[0]), all: false };
    node.accept(named);
    assert_eq!(purpose(&node, &two[0]), (Purpose::Use, DesiredState::Running));
    let selector = Selector::from(&two[1]);
    node.accept(Request::InstanceRestart { selector, all: false, grace_ms: 0 });
    assert_eq!(purpose(&node, &two[1]), (Purpose::Use, DesiredState::Running));
    assert_eq!(node.desired.pools[&web()].running, 2);
}

#[test]
fn they_count_against_the_quota_and_do_not_keep_a_pool() {
    let mut node = with_base();
    let quota = Quota { mem_mib: Some(512), ..Quota::default() };
    let name = "demo".parse().unwrap();
    node.accept(Request::TenantUpdate { name, quota, lift: vec![] });
    let denial = node.try_accept_own(&OwnRequest::Spares { pool: web(), count: 3 });
    assert!(matches!(denial, Err(Denial::OverLimit(_))));
    spares(&mut node, 2);
    node.accept(Request::PoolDestroy { path: web(), force: false });
    assert_eq!(spares_of(&node.desired, &web()).count(), 0);
    let too_many = Request::PoolReady { path: "demo/api".parse().unwrap(), ready: 65 };
    node.accept(pool("demo/api"));
    let text = node.try_accept(&too_many).unwrap_err().to_string();
    assert!(text.contains("ready is 65, but must be at most 64"), "{text}");
}
