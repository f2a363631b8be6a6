//! A copied state directory that becomes one of its own.

use super::*;
use crate::admit::copies::make_own;

fn copied() -> Node {
    let mut node = Node::with_pool();
    node.accept(tenant("other"));
    node.accept(Request::PoolScale {
        path: "demo/web".parse().unwrap(),
        running: 2,
        warm: Some(1),
        sleeping: Some(1),
    });
    node
}

#[test]
fn nothing_of_a_copy_runs_and_what_sleeps_may_be_woken() {
    let node = copied();
    let own = make_own(&node.desired, &node.facts, node.now).unwrap();
    let mut states: Vec<DesiredState> =
        own.desired.instances.values().map(|instance| instance.desired).collect();
    states.sort_by_key(|state| state.is_alive());
    let stopped = DesiredState::Stopped;
    assert_eq!(states, [stopped, stopped, stopped, DesiredState::Sleeping]);
    assert!(own.desired.pools.values().all(|pool| pool.running == 0));
    assert_eq!(own.notes.len(), 3);
    assert_eq!(own.desired.tenants, node.desired.tenants, "nobody else has their networks");
}

#[test]
fn a_network_that_the_original_has_is_left_to_it() {
    let mut node = copied();
    let networks = |desired: &Desired| -> Vec<_> {
        desired.tenants.values().map(|tenant| tenant.network).collect()
    };
    let before = networks(&node.desired);
    node.facts.foreign_net_ids = before.iter().map(|network| network.net_id).collect();
    node.facts.foreign_subnets = before.iter().map(|network| network.subnet).collect();
    let own = make_own(&node.desired, &node.facts, node.now).unwrap();
    let after = networks(&own.desired);
    assert_eq!(after.len(), 2);
    for (old, new) in before.iter().zip(&after) {
        assert!(!node.facts.foreign_net_ids.contains(&new.net_id), "{new:?}");
        assert!(before.iter().all(|taken| taken.subnet != new.subnet), "{new:?}");
        assert_eq!(new.subnet.prefix_len(), old.subnet.prefix_len());
    }
    assert_ne!(after[0].net_id, after[1].net_id);
    assert_ne!(after[0].subnet, after[1].subnet);
}
