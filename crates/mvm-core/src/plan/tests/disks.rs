//! Data disks: made before they are used, kept from two at once, removed last.

use proptest::prelude::*;

use super::node::Node;
use super::*;
use crate::admit::Request;
use crate::disk::DiskMount;
use crate::lifecycle::tests::world::World;
use crate::name::Selector;
use crate::property::{Choices, cases};
use crate::record::change_all;
use crate::record::{DiskFailure, DiskRecord, DiskStatus};

fn disk() -> DiskPath {
    "demo/data".parse().unwrap()
}

fn with_disk(mut record: InstanceRecord, mount: &str) -> InstanceRecord {
    record.spec.disks = vec![mount.parse().unwrap()];
    record
}

/// A disk of 64 MiB, of which so much is made, and instances with it.
fn node(
    made: DiskStatus,
    instances: impl IntoIterator<Item = (InstanceRecord, InstanceStatus)>,
) -> (Desired, Observed) {
    let (records, statuses): (Vec<_>, Vec<_>) = instances.into_iter().unzip();
    let mut desired = desired(records);
    let existence = Existence::Kept;
    let record = DiskRecord { path: disk(), size_mib: 64, created_unix_ms: 0, existence };
    desired.disks.insert(disk(), record);
    let mut observed = observed(built(), (1..).zip(statuses));
    observed.disks.insert(disk(), made);
    (desired, observed)
}

fn made(size_mib: u64) -> DiskStatus {
    DiskStatus { size_mib: Some(size_mib), failure: None }
}

fn run((desired, observed): &(Desired, Observed)) -> Plan {
    plan(desired, observed, LIMITS, NOW)
}

#[test]
fn an_instance_waits_until_its_disk_is_made_or_grown() {
    let record = || with_disk(record(1, DesiredState::Running), "data:/data");
    for earlier in [DiskStatus::default(), made(63)] {
        let plan = run(&node(earlier, [(record(), status(Phase::Created))]));
        assert_eq!(plan.actions, [Action::MakeDisk(disk())]);
        let waiting = Waiting::Disk { disk: disk(), error: None };
        assert_eq!(plan.waiting, [(path(1), waiting)].into());
    }
    let plan = run(&node(made(64), [(record(), status(Phase::Created))]));
    assert_eq!(plan.actions, [start_action()]);
}

#[test]
fn a_disk_that_could_not_be_made_is_tried_again_with_backoff_and_the_cause_is_told() {
    let failure = DiskFailure { error: "full".to_owned(), at_unix_ms: NOW - 1_000, failures: 2 };
    let failed = DiskStatus { size_mib: None, failure: Some(failure) };
    let record = with_disk(record(1, DesiredState::Running), "data:/data");
    let node = node(failed, [(record, status(Phase::Created))]);
    let early = run(&node);
    assert_eq!((early.actions.len(), early.next_unix_ms), (0, Some(NOW + 1_000)));
    let waiting = Waiting::Disk { disk: disk(), error: Some("full".to_owned()) };
    assert_eq!(early.waiting, [(path(1), waiting)].into());
    let later = plan(&node.0, &node.1, LIMITS, NOW + 1_000);
    assert_eq!(later.actions, [Action::MakeDisk(disk())]);
}

#[test]
fn a_disk_in_use_is_neither_grown_nor_given_to_another_writer() {
    let first = with_disk(record(1, DesiredState::Stopped), "data:/data");
    let second = || with_disk(record(2, DesiredState::Running), "data:/data:ro");
    for phase in [RUNNING, stopping(Outcome::Stopped), releasing(Outcome::Stopped)] {
        let held = node(
            made(64),
            [(first.clone(), status(phase.clone())), (second(), status(Phase::Created))],
        );
        let waiting = Waiting::DiskHeld { disk: disk(), holder: path(1) };
        assert_eq!(run(&held).waiting, [(path(2), waiting)].into(), "{phase:?}");
        let grown = run(&node(made(32), [(first.clone(), status(phase))]));
        assert!(!grown.actions.contains(&Action::MakeDisk(disk())));
    }
    let free =
        node(made(64), [(first, status(Phase::Stopped)), (second(), status(Phase::Created))]);
    assert!(
        matches!(&run(&free).actions[..], [Action::Start { instance, .. }] if *instance == path(2))
    );
}

#[test]
fn readers_do_not_wait_for_readers() {
    let reader = |number| with_disk(record(number, DesiredState::Running), "data:/data:ro");
    let both = node(made(64), [(reader(1), status(RUNNING)), (reader(2), status(Phase::Created))]);
    assert_eq!((run(&both).actions.len(), run(&both).waiting.len()), (1, 0));
}

#[test]
fn a_disk_goes_after_its_last_instance_and_before_its_tenant() {
    let gone = with_disk(record(1, DesiredState::Destroyed), "data:/data");
    let (mut desired, mut observed) = node(made(64), [(gone, status(RUNNING))]);
    change_all(&mut desired.disks, |disk| disk.existence = Existence::Removed);
    change_all(&mut desired.tenants, |tenant| tenant.existence = Existence::Removed);
    desired.pools.clear();
    let remove = Action::RemoveDisk(disk());
    assert!(!plan(&desired, &observed, LIMITS, NOW).actions.contains(&remove));
    desired.instances.clear();
    observed.instances.clear();
    assert_eq!(plan(&desired, &observed, LIMITS, NOW).actions, [remove]);
    desired.disks.clear();
    let tenant = Action::RemoveTenant(pool().tenant);
    assert_eq!(plan(&desired, &observed, LIMITS, NOW).actions, [tenant]);
}

/// What must never be, whatever was asked for: a writer that shares its disk.
fn assert_no_shared_writer(node: &Node) {
    let live: Vec<(&InstancePath, &DiskMount)> = node
        .worlds
        .iter()
        .filter(|(_, world)| world.has_process())
        .filter_map(|(path, _)| Some((path, node.desired.instances.get(path)?.spec.disks.first()?)))
        .collect();
    let writes = live.iter().any(|(_, mount)| !mount.read_only);
    assert!(live.len() < 2 || !writes, "a writer shares its disk: {live:?}");
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn whatever_people_and_the_world_do_a_writer_never_shares_its_disk(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut node = Node::new();
        let document = |web: u32, work: u32| serde_json::from_value(serde_json::json!({
            "tenant": "demo",
            "disks": { "data": { "size_mib": 64 } },
            "pools": {
                "web": { "running": web, "disks": [{ "name": "data", "path": "/data" }] },
                "work": {
                    "running": work,
                    "disks": [{ "name": "data", "path": "/data", "read_only": true }],
                },
            },
        })).unwrap();
        node.ask(&Request::Apply { document: document(1, 0) }).unwrap();
        node.settle(u64::MAX);
        prop_assert!(node.worlds.values().all(World::has_process));
        let mut choices = Choices::new(bytes);
        while !choices.is_calm() {
            node.now += [0, 10, 1_000, 30_000][choices.pick(4)];
            let (web, work) = (choices.pick(3) as u32, choices.pick(3) as u32);
            let selector = || Selector::Tenant("demo".parse().unwrap());
            let all = true;
            // Many of these are denied, as they should be.
            match choices.pick(10) {
                0..=2 => drop(node.progress(&mut choices)),
                3..=4 => drop(node.round()),
                5 => node.tick(),
                6 => drop(node.ask(&Request::Apply { document: document(web, work) })),
                7 => drop(node.ask(&Request::InstanceStop { selector: selector(), all, grace_ms: 9 })),
                8 => drop(node.ask(&Request::InstanceDestroy { selector: selector(), all, force: true })),
                _ => node.misfortune(&mut choices),
            }
            assert_no_shared_writer(&node);
        }
        node.ask(&Request::TenantDestroy { name: "demo".parse().unwrap(), force: true }).unwrap();
        node.settle(u64::MAX);
        prop_assert_eq!(&node.desired, &Desired::default());
        prop_assert!(node.disks.is_empty());
    }
}
