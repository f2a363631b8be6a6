//! Tenants, their networks and the removal of what is in them.

use super::*;
use crate::lifecycle::Outcome;

fn subnet_of(node: &Node, name: &str) -> String {
    node.desired.tenants[&name.parse::<TenantName>().unwrap()].network.subnet.to_string()
}

#[test]
fn tenants_get_the_first_free_network() {
    let mut node = Node::new();
    for (name, subnet) in [("a", "10.240.1.0/24"), ("b", "10.240.2.0/24")] {
        node.accept(tenant(name));
        assert_eq!(subnet_of(&node, name), subnet);
    }
    node.accept(Request::TenantDestroy { name: "a".parse().unwrap(), force: false });
    node.accept(tenant("c"));
    assert_eq!(subnet_of(&node, "c"), "10.240.3.0/24", "a's is in use until a is gone");
    node.forget_the_gone();
    node.accept(tenant("d"));
    assert_eq!(subnet_of(&node, "d"), "10.240.1.0/24");
}

#[test]
fn a_network_that_others_use_is_left_to_them() {
    let mut node = Node::new();
    node.facts.foreign_net_ids.insert(NetId(1));
    node.facts.foreign_subnets.push("10.240.2.128/25".parse().unwrap());
    node.accept(tenant_with("own", Quota::default(), Some("10.240.3.0/28")));
    assert_eq!(
        node.desired.tenants[&"own".parse::<TenantName>().unwrap()].network.net_id,
        NetId(2)
    );
    node.accept(tenant("a"));
    assert_eq!(subnet_of(&node, "a"), "10.240.4.0/24");
}

#[test]
fn a_subnet_overlaps_from_inside_and_from_outside() {
    let mut node = Node::new();
    node.facts.foreign_subnets.push("192.168.0.0/16".parse().unwrap());
    node.accept(tenant_with("a", Quota::default(), Some("10.1.2.0/24")));
    for subnet in ["10.1.2.0/24", "10.1.0.0/16", "10.1.2.64/26", "192.168.7.0/24"] {
        let denial = node.deny(tenant_with("b", Quota::default(), Some(subnet)));
        assert!(matches!(denial, Denial::SubnetOverlaps { .. }), "{subnet}: {denial}");
    }
    node.accept(tenant_with("b", Quota::default(), Some("10.1.3.0/24")));
}

#[test]
fn limits_are_changed_and_lifted_one_by_one() {
    let mut node = Node::new();
    let quota = Quota { vcpus: Some(4), mem_mib: Some(1_024), ..Quota::default() };
    node.accept(tenant_with("demo", quota, None));
    let name: TenantName = "demo".parse().unwrap();
    let update = |quota, lift: &[&str]| Request::TenantUpdate {
        name: name.clone(),
        quota,
        lift: lift.iter().map(ToString::to_string).collect(),
    };
    node.accept(update(Quota { vcpus: Some(8), pools: Some(2), ..Quota::default() }, &["mem"]));
    let expected = Quota { vcpus: Some(8), pools: Some(2), ..Quota::default() };
    assert_eq!(node.desired.tenants[&name].quota, expected);
    let denial = node.deny(update(Quota::default(), &["memory"]));
    assert_eq!(denial, Denial::NoSuchLimit { name: "memory".to_owned() });
}

#[test]
fn a_lowered_limit_stops_growth_and_nothing_that_runs() {
    let mut node = Node::with_pool();
    node.accept(scale("demo/web", 3));
    let quota = Quota { running: Some(2), ..Quota::default() };
    node.accept(Request::TenantUpdate { name: "demo".parse().unwrap(), quota, lift: vec![] });
    node.deny(create("demo/web", 1, true));
    node.accept(create("demo/web", 1, false));
    node.accept(scale("demo/web", 3));
    node.accept(scale("demo/web", 2));
    node.deny(scale("demo/web", 3));
}

#[test]
fn a_tenant_goes_with_everything_in_it_only_by_force() {
    let mut node = Node::with_pool();
    node.accept(scale("demo/web", 2));
    let name: TenantName = "demo".parse().unwrap();
    let remove = |force| Request::TenantDestroy { name: name.clone(), force };
    let denial = node.deny(remove(false));
    assert!(matches!(denial, Denial::StillHasPools { pools, .. } if pools.len() == 1));
    let edit = node.accept(remove(true));
    assert_eq!((edit.instances.len(), edit.pools.len()), (2, 1));
    for request in [tenant("demo"), pool("demo/other"), create("demo/web", 1, false)] {
        assert!(matches!(node.deny(request), Denial::BeingRemoved { .. }));
    }
    node.forget_the_gone();
    assert_eq!(node.desired, Desired::default());
}

#[test]
fn a_pool_with_running_instances_goes_only_by_force() {
    let mut node = Node::with_pool();
    node.accept(scale("demo/web", 1));
    let path: PoolPath = "demo/web".parse().unwrap();
    let remove = |force| Request::PoolDestroy { path: path.clone(), force };
    let running = node.instances("demo/web")[0].path.clone();
    let denial = node.deny(remove(false));
    let names_it =
        matches!(&denial, Denial::StillRunning { running: r, .. } if *r == [running.clone()]);
    assert!(names_it, "{denial}");
    let edit = node.accept(remove(true));
    assert_eq!(edit.notes, [format!("stopping {running}")]);
    assert_eq!(node.desired.pools[&path].running, 0);
}

#[test]
fn a_tenants_subnet_changes_only_while_none_of_its_instances_is_up() {
    let mut node = Node::with_pool();
    node.accept(tenant("other"));
    node.accept(scale("demo/web", 1));
    let name: TenantName = "demo".parse().unwrap();
    let to =
        |subnet: &str| Request::TenantMove { name: name.clone(), subnet: subnet.parse().unwrap() };
    let before = node.desired.tenants[&name].network;
    assert!(matches!(node.deny(to("10.99.0.0/24")), Denial::SubnetInUse { .. }));
    node.accept(scale("demo/web", 0));
    // Stopped it shall be, and is not yet.
    let instance = node.desired.instances.keys().next().unwrap().clone();
    node.observe(&instance, Phase::Releasing { retry_unix_ms: None, outcome: Outcome::Stopped });
    assert!(matches!(node.deny(to("10.99.0.0/24")), Denial::SubnetInUse { .. }));
    node.observe(&instance, Phase::Stopped);
    let other = node.desired.tenants[&"other".parse::<TenantName>().unwrap()].network.subnet;
    assert!(matches!(node.deny(to(&other.to_string())), Denial::SubnetOverlaps { .. }));
    node.accept(to("10.99.0.0/24"));
    let after = node.desired.tenants[&name].network;
    assert_eq!((after.net_id, after.subnet.to_string().as_str()), (before.net_id, "10.99.0.0/24"));
    // A part of its own is fine, as long as all of its instances have a place in it.
    node.accept(to("10.99.0.0/28"));
    for _ in 0..9 {
        node.accept(create("demo/web", 1, false));
    }
    assert!(matches!(node.deny(to("10.99.0.0/29")), Denial::SubnetTooSmall { .. }));
    // A net id that was lost is given up.
    node.facts.foreign_net_ids.insert(before.net_id);
    node.accept(to("10.98.0.0/24"));
    assert_ne!(node.desired.tenants[&name].network.net_id, before.net_id);
}
