//! What new instances begin with when their pool has a base, and the instance that it is made of.

use super::*;
use crate::record::Base;
use crate::spec::RestartPolicy;

pub(super) fn web() -> PoolPath {
    "demo/web".parse().unwrap()
}

/// A node whose pool `demo/web` has a base.
pub(super) fn with_base() -> Node {
    let mut node = Node::with_pool();
    let revision = RevisionId::from_digest([1; 8]);
    let spec = node.desired.pools[&web()].spec.clone();
    let base = Base {
        id: SnapshotId::from_bits(7),
        revision: revision.clone(),
        spec,
        made_unix_ms: 1,
        given_up: None,
    };
    let status = PoolStatus { revision: Some(revision), base: Some(base), ..PoolStatus::default() };
    node.facts.observed.pools.insert(web(), status);
    node
}

fn origins(node: &Node) -> Vec<bool> {
    node.instances("demo/web").iter().map(|instance| instance.origin.is_some()).collect()
}

fn template() -> Request {
    Request::PoolWarmUp { path: web() }
}

/// Asks for a base, and returns the instance that it is to be saved from.
fn ask_for_base(node: &mut Node) -> InstancePath {
    let edit = node.accept(template());
    assert_eq!((edit.instances.len(), edit.pools), (0, vec![web()]), "the pool's are as before");
    let mut made = node.desired.instances.values().filter(|it| {
        it.purpose == crate::record::Purpose::Base && it.desired != DesiredState::Destroyed
    });
    let path = made.next().unwrap().path.clone();
    assert!(made.next().is_none());
    path
}

#[test]
fn new_instances_begin_with_the_base_unless_they_are_to_boot() {
    let mut node = with_base();
    node.accept(create("demo/web", 1, true));
    node.accept(scale("demo/web", 2));
    assert_eq!(origins(&node), [true, true]);
    assert!(node.instances("demo/web").iter().all(|i| i.revision.is_some()));
    let cold =
        Request::InstanceCreate { pool: web(), count: 1, start: true, disks: vec![], cold: true };
    node.accept(cold);
    assert_eq!(origins(&node), [true, true, false]);
}

#[test]
fn a_base_that_is_not_what_a_boot_would_make_is_not_begun_with() {
    let mut node = with_base();
    let pool = node.desired.pools.get_mut(&web()).unwrap();
    pool.spec.restart = RestartPolicy::Never;
    pool.spec.boot_timeout_s += 1;
    node.accept(create("demo/web", 1, true));
    node.desired.pools.get_mut(&web()).unwrap().spec.mem_mib += 1;
    node.accept(create("demo/web", 1, true));
    node.desired.pools.get_mut(&web()).unwrap().spec.mem_mib -= 1;
    let status = node.facts.observed.pools.get_mut(&web()).unwrap();
    status.revision = Some(RevisionId::from_digest([2; 8]));
    node.accept(create("demo/web", 1, true));
    assert_eq!(origins(&node), [true, false, false]);
}

#[test]
fn the_instance_that_a_base_is_made_of_is_none_of_the_pools_own() {
    let mut node = with_base();
    node.accept(scale("demo/web", 1));
    let made = ask_for_base(&mut node);
    assert_eq!(origins(&node), [true, false], "it boots");
    assert_eq!(node.desired.pools[&web()].running, 1);
    node.accept(scale("demo/web", 0));
    assert_eq!(node.desired.instances[&made].desired, DesiredState::Running);
    node.accept(scale("demo/web", 1));
    assert_eq!(node.desired.pools[&web()].running, 1);
    assert_eq!(node.instances("demo/web").len(), 2, "the stopped one runs again");

    let again = ask_for_base(&mut node);
    assert_eq!(node.desired.instances[&made].desired, DesiredState::Destroyed);
    assert_eq!(node.desired.pools[&web()].base_generation, 2);
    let fork = node.try_fork(&again).unwrap();
    assert!(node.desired.instances[&fork.instances[0]].purpose.is_use());
}

#[test]
fn a_pool_whose_instances_cannot_share_a_beginning_has_no_base() {
    let mut node = Node::with_pool();
    node.desired.pools.get_mut(&web()).unwrap().spec.auto_remove = true;
    assert!(matches!(node.deny(template()), Denial::NoBase { .. }));
    node.desired.pools.get_mut(&web()).unwrap().spec.auto_remove = false;
    let path: DiskPath = "demo/data".parse().unwrap();
    node.accept(Request::DiskCreate { path, size_mib: 64 });
    let mounts = &mut node.desired.pools.get_mut(&web()).unwrap().spec.disks;
    mounts.push("data:/srv".parse().unwrap());
    assert!(matches!(node.deny(template()), Denial::NoBase { .. }));
    let mounts = &mut node.desired.pools.get_mut(&web()).unwrap().spec.disks;
    mounts[0].read_only = true;
    node.accept(template());
}
