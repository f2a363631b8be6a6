//! Random requests against a small node: what is accepted, and what always holds after it.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::model::Model;
use super::*;
use crate::name::PoolName;
use crate::net::FIRST_SLOT;
use crate::property::cases;
use crate::spec::DocumentPool;

fn any_tenant() -> impl Strategy<Value = TenantName> {
    prop_oneof![3 => Just("a"), 1 => Just("b")].prop_map(|name| name.parse().unwrap())
}

fn any_path() -> impl Strategy<Value = PoolPath> {
    let pool = prop_oneof![Just("x"), Just("y")].prop_map(|name| name.parse().unwrap());
    (any_tenant(), pool).prop_map(|(tenant, pool)| PoolPath { tenant, pool })
}

/// A pool's spec follows from its name, so that the model needs no record of it.
fn spec_of(pool: &PoolName) -> PoolSpec {
    let vcpus = if pool.as_str() == "x" { 1 } else { 2 };
    PoolSpec { vcpus, mem_mib: 100 * vcpus, disk_mib: 50, ..PoolSpec::default() }
}

fn any_limit(most: u64) -> impl Strategy<Value = Option<u64>> {
    prop_oneof![3 => Just(None), 1 => (0..=most).prop_map(Some)]
}

fn any_quota() -> impl Strategy<Value = Quota> {
    (any_limit(9), any_limit(900), any_limit(500), any_limit(6), any_limit(2), any_limit(6))
        .prop_map(|(vcpus, mem_mib, disk_mib, running, pools, instances_per_pool)| Quota {
            vcpus,
            mem_mib,
            disk_mib,
            running,
            pools,
            instances_per_pool,
        })
}

fn any_subnet() -> impl Strategy<Value = Option<Ipv4Net>> {
    let some = prop_oneof![Just("10.0.0.0/28"), Just("10.0.0.8/29"), Just("10.240.1.0/29")];
    prop_oneof![Just(None), some.prop_map(|subnet| Some(subnet.parse().unwrap()))]
}

fn any_document() -> impl Strategy<Value = Document> {
    let pool = prop_oneof![Just("x"), Just("y")].prop_map(|name| name.parse::<PoolName>().unwrap());
    let pools = prop::collection::btree_map(pool, 0..4u32, 0..3);
    (any_tenant(), proptest::option::of(any_quota()), pools).prop_map(|(tenant, quota, pools)| {
        Document {
            tenant,
            subnet: None,
            quota,
            disks: Default::default(),
            pools: pools
                .into_iter()
                .map(|(name, running)| {
                    let spec = spec_of(&name);
                    (name, DocumentPool { running, names_image: true, spec })
                })
                .collect(),
        }
    })
}

fn any_request() -> impl Strategy<Value = Request> {
    let path = any_path;
    let selector = || any_path().prop_map(Selector::Pool);
    prop_oneof![
        4 => (any_tenant(), any_quota(), any_subnet())
            .prop_map(|(name, quota, subnet)| Request::TenantCreate { name, quota, subnet }),
        1 => (any_tenant(), any_quota())
            .prop_map(|(name, quota)| Request::TenantUpdate { name, quota, lift: vec![] }),
        1 => (any_tenant(), any::<bool>())
            .prop_map(|(name, force)| Request::TenantDestroy { name, force }),
        6 => path().prop_map(|path| {
            let spec = spec_of(&path.pool).into();
            Request::PoolCreate { path, spec }
        }),
        1 => path().prop_map(|path| Request::PoolBuild { path }),
        6 => (path(), 0..6u32).prop_map(|(path, running)| Request::PoolScale { path, running, warm: None, sleeping: None }),
        1 => (path(), any::<bool>())
            .prop_map(|(path, force)| Request::PoolDestroy { path, force }),
        4 => (path(), 1..4u32, any::<bool>())
            .prop_map(|(pool, count, start)| Request::InstanceCreate {
                pool,
                count,
                start,
                disks: vec![], cold: false
            }),
        2 => selector().prop_map(|selector| Request::InstanceStart { selector, all: true }),
        2 => selector()
            .prop_map(|selector| Request::InstanceStop { selector, all: true, grace_ms: 5 }),
        1 => selector()
            .prop_map(|selector| Request::InstanceRestart { selector, all: true, grace_ms: 5 }),
        2 => (selector(), any::<bool>()).prop_map(|(selector, force)| {
            Request::InstanceDestroy { selector, all: true, force }
        }),
        2 => any_document().prop_map(|document| Request::Apply { document }),
        1 => any_document().prop_map(|document| Request::Remove { document }),
    ]
}

/// Requests; between them, `None` lets what is to go be gone.
fn any_history() -> impl Strategy<Value = Vec<Option<Request>>> {
    let request = prop_oneof![9 => any_request().prop_map(Some), 1 => Just(None)];
    prop::collection::vec(request, 0..40)
}

fn small_node() -> Node {
    let mut node = Node::new();
    node.facts.capacity = Capacity { vcpus: 12, mem_mib: 1_100, disk_mib: 400 };
    node
}

fn take(node: &mut Node, history: Vec<Option<Request>>) {
    for request in history {
        match request {
            Some(request) => drop(node.try_accept(&request)),
            None => node.forget_the_gone(),
        }
    }
}

/// What the records say, in the model's terms.
fn assert_agrees(node: &Node, model: &Model) {
    assert!(node.desired.tenants.keys().eq(model.tenants.keys()));
    for (name, tenant) in &model.tenants {
        let record = &node.desired.tenants[name];
        assert_eq!(record.existence == Existence::Removed, tenant.is_going, "{name}");
        assert_eq!(node.desired.pools_of(name).count(), tenant.pools.len());
        for (pool, counts) in &tenant.pools {
            let path = PoolPath { tenant: name.clone(), pool: pool.clone() };
            let record = &node.desired.pools[&path];
            let count = |state| node.ids(&path.to_string(), state).len() as u64;
            assert_eq!(record.existence == Existence::Removed, counts.is_going, "{path}");
            assert_eq!(u64::from(record.running), counts.running, "{path}");
            assert_eq!(count(DesiredState::Running), counts.running, "{path}");
            assert_eq!(count(DesiredState::Stopped), counts.stopped, "{path}");
            assert_eq!(count(DesiredState::Destroyed), counts.going, "{path}");
        }
    }
}

/// Addresses and ids are unique and where they belong.
fn assert_disjoint(desired: &Desired) {
    let all = desired.instances.len();
    let ids: BTreeSet<_> = desired.instances.keys().map(|path| &path.id).collect();
    assert_eq!(ids.len(), all, "an id is used twice");
    let slots = desired.instances.values().map(|i| (&i.path.pool.tenant, i.slot));
    assert_eq!(slots.collect::<BTreeSet<_>>().len(), all, "a slot is used twice");
    for instance in desired.instances.values() {
        let network = desired.tenants[&instance.path.pool.tenant].network;
        assert!((FIRST_SLOT..=network.last_slot().0).contains(&instance.slot.0));
    }
    let networks: Vec<_> = desired.tenants.values().map(|tenant| tenant.network).collect();
    for (index, one) in networks.iter().enumerate() {
        for other in &networks[index + 1..] {
            assert_ne!(one.net_id, other.net_id);
            let overlap = one.subnet.contains(&other.subnet) || other.subnet.contains(&one.subnet);
            assert!(!overlap, "{} overlaps {}", one.subnet, other.subnet);
        }
    }
}

/// What changed is named, has a higher generation, and keeps its place and spec.
fn assert_changes_are_named(before: &Desired, edit: &Edit) {
    for (path, after) in &edit.desired.instances {
        let before = before.instances.get(path);
        assert!(before == Some(after) || edit.instances.contains(path), "{path} is not named");
        let Some(before) = before else { continue };
        assert_eq!((before.slot, &before.spec), (after.slot, &after.spec));
        if before.desired != after.desired {
            assert!(before.generation < after.generation, "{path} has no fresh generation");
            assert_ne!(before.desired, DesiredState::Destroyed, "{path} is brought back");
        }
    }
    for path in before.instances.keys() {
        assert!(edit.desired.instances.contains_key(path), "{path} is dropped, not destroyed");
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn admission_agrees_with_a_model_that_only_counts(history in any_history()) {
        let mut node = small_node();
        let mut model = Model::default();
        for request in history {
            let Some(request) = request else {
                node.forget_the_gone();
                model.forget_the_gone();
                assert_agrees(&node, &model);
                continue;
            };
            let before = node.desired.clone();
            let expected = model.after(&request, node.facts.capacity);
            match (node.try_accept(&request), expected) {
                (Ok(edit), Some(mut expected)) => {
                    for (name, tenant) in &mut expected.tenants {
                        tenant.subnet = Some(edit.desired.tenants[name].network.subnet);
                    }
                    model = expected;
                    assert_agrees(&node, &model);
                    assert_disjoint(&node.desired);
                    assert_changes_are_named(&before, &edit);
                }
                (Err(denial), None) => {
                    let is_command = |hint: &str| hint.contains("`mvm ") || hint.contains("--");
                    prop_assert!(denial.hint().as_deref().is_none_or(is_command), "{denial:?}");
                    prop_assert_eq!(&node.desired, &before, "a denial changed something");
                }
                (result, _) => prop_assert!(false, "{request:?} gave {result:?}"),
            }
        }
    }

    #[test]
    fn a_request_round_trips_through_json(request in any_request()) {
        let json = serde_json::to_string(&request).unwrap();
        prop_assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request, "{}", json);
    }

    #[test]
    fn a_scale_leaves_exactly_so_many_running(
        history in any_history(),
        path in any_path(),
        running in 0..8u32,
    ) {
        let mut node = small_node();
        take(&mut node, history);
        let pool = path.to_string();
        let before: Vec<InstanceRecord> = node.instances(&pool).into_iter().cloned().collect();
        if node.try_accept(&Request::PoolScale { path, running, warm: None, sleeping: None }).is_ok() {
            prop_assert_eq!(node.ids(&pool, DesiredState::Running).len(), running as usize);
            let made = node.instances(&pool).len() - before.len();
            let idle = node.ids(&pool, DesiredState::Stopped).len();
            prop_assert!(made == 0 || idle == 0, "one was made while another was stopped");
        }
    }

    #[test]
    fn applying_twice_is_applying_once_and_removing_leaves_nothing_kept(
        history in any_history(),
        document in any_document(),
    ) {
        let mut node = small_node();
        take(&mut node, history);
        let apply = Request::Apply { document: document.clone() };
        if node.try_accept(&apply).is_err() {
            return Ok(());
        }
        let once = node.desired.clone();
        prop_assert!(node.try_accept(&apply).is_ok());
        prop_assert_eq!(&node.desired, &once);

        let tenant = document.tenant.clone();
        let others = once.pools_of(&tenant).any(|pool| {
            pool.existence == Existence::Kept && !document.pools.contains_key(&pool.path.pool)
        });
        let named = |pool: &PoolPath| document.pools.contains_key(&pool.pool);
        let remove = Request::Remove { document: document.clone() };
        prop_assert!(node.try_accept(&remove).is_ok());
        node.forget_the_gone();
        prop_assert!(!node.desired.pools_of(&tenant).any(|pool| named(&pool.path)));
        prop_assert!(!node.desired.instances_of(&tenant).any(|i| named(&i.path.pool)));
        prop_assert_eq!(node.desired.tenants.contains_key(&tenant), others);
    }
}
