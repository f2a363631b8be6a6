//! Random requests against a small node: what is accepted, and what always holds after it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseResult, TestError, TestRunner};

use super::generate::{
    Asked, KINDS, Kind, Seen, Step, any_document, any_history, any_pool_path, any_request, kind,
};
use super::model::Model;
use super::*;
use crate::net::FIRST_SLOT;
use crate::property::cases;
use crate::record::{BuildState, Purpose, change_all};

fn small_node() -> Node {
    let mut node = Node::new();
    node.facts.capacity = Capacity { vcpus: 12, mem_mib: 1_100, disk_mib: 800 };
    node.facts.foreign_subnets = vec!["10.9.0.0/16".parse().unwrap()];
    node
}

/// Asks with ids that are used again once they are free.
fn ask(node: &mut Node, asked: &Asked) -> Result<Edit, Denial> {
    node.ids = 0;
    match asked {
        Asked::Outside(request) => node.try_accept(request),
        Asked::Own(request) => node.try_accept_own(request),
    }
}

/// What happens without a request. Says what is seen of which instances.
fn go_on(node: &mut Node, step: &Step) -> Vec<(InstancePath, Seen)> {
    match step {
        Step::Ask(_) => vec![],
        Step::Gone => {
            node.forget_the_gone();
            let Desired { instances, pools, .. } = &node.desired;
            let Observed { instances: seen, pools: images, .. } =
                std::mem::take(&mut node.facts.observed);
            let seen = seen.into_iter().filter(|(path, _)| instances.contains_key(path));
            let images = images.into_iter().filter(|(path, _)| pools.contains_key(path));
            node.facts.observed.instances = seen.collect();
            node.facts.observed.pools = images.collect();
            node.facts.unknown.retain(|path| instances.contains_key(path));
            vec![]
        }
        Step::See(which, seen) => {
            let paths: Vec<InstancePath> = node.desired.instances.keys().cloned().collect();
            let seen_of =
                |(at, path)| which.is_none_or(|which| which == at).then_some((path, *seen));
            let seen: Vec<_> = paths.into_iter().enumerate().filter_map(seen_of).collect();
            seen.iter().for_each(|(path, seen)| see(node, path, *seen));
            seen
        }
        Step::Build(pool, status) => {
            if let Some(record) = node.desired.pools.get(pool) {
                let mut status = PoolStatus::clone(status);
                status.base.iter_mut().for_each(|base| base.spec = record.spec.clone());
                node.facts.observed.pools.insert(pool.clone(), status);
            }
            vec![]
        }
    }
}

fn see(node: &mut Node, path: &InstancePath, seen: Seen) {
    let since_unix_ms = 1;
    let phase = match seen {
        Seen::Running => Phase::Running { since_unix_ms },
        Seen::Warm => Phase::Warm { since_unix_ms },
        Seen::Sleeping => Phase::Sleeping { since_unix_ms },
        Seen::Stopped => Phase::Stopped,
        Seen::Failed => Phase::Failed,
        Seen::Unreadable => {
            node.facts.observed.instances.remove(path);
            node.facts.unknown.insert(path.clone());
            return;
        }
    };
    node.facts.unknown.remove(path);
    node.observe(path, phase);
}

fn take(node: &mut Node, history: Vec<Step>) {
    for step in history {
        match &step {
            Step::Ask(request) => drop(ask(node, request)),
            other => drop(go_on(node, other)),
        }
    }
}

/// What the records say, in the model's terms.
fn assert_agrees(node: &Node, model: &Model) {
    let desired = &node.desired;
    assert!(desired.tenants.keys().eq(model.tenants.keys()));
    assert!(desired.pools.keys().eq(model.pools.keys()));
    assert!(desired.disks.keys().eq(model.disks.keys()));
    assert!(desired.instances.keys().eq(model.instances.keys()));
    let is_going = |existence| existence == Existence::Removed;
    for (name, tenant) in &model.tenants {
        let record = &desired.tenants[name];
        assert_eq!((is_going(record.existence), &record.quota), (tenant.is_going, &tenant.quota));
        assert_eq!(Some(record.network.subnet), tenant.subnet, "{name}");
    }
    for (path, pool) in &model.pools {
        let record = &desired.pools[path];
        assert_eq!(
            (is_going(record.existence), &record.spec),
            (pool.is_going, &pool.spec),
            "{path}"
        );
        assert_eq!(u64::from(record.running), model.running(path), "{path}");
        assert_eq!((record.build_generation, record.base_generation), (pool.builds, pool.bases));
        assert_eq!(record.rolled_back_to, pool.rolled_back_to, "{path}");
    }
    let forks = desired.forks.iter().map(|(id, it)| (id, (it.source.clone(), it.count)));
    assert!(forks.eq(model.forks.iter().map(|(id, it)| (id, it.clone()))));
    for (path, disk) in &model.disks {
        let record = &desired.disks[path];
        assert_eq!((is_going(record.existence), record.size_mib), (disk.is_going, disk.size_mib));
    }
    for (path, instance) in &model.instances {
        let record = &desired.instances[path];
        assert_eq!(
            (record.desired, record.purpose, record.generation, record.slot.0, record.pinned),
            (
                instance.desired,
                instance.purpose,
                instance.wishes,
                instance.slot,
                instance.is_pinned
            ),
            "{path}"
        );
        assert_eq!((&record.origin, &record.revision), (&instance.origin, &instance.revision));
        assert_eq!(record.spec, instance.spec, "{path}");
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

/// What changed is named and keeps its place, and what its node decided of it before is void.
fn assert_changes_are_named(before: &Desired, edit: &Edit) {
    for (path, after) in &edit.desired.instances {
        let before = before.instances.get(path);
        // It is the pool that is asked for a base.
        let is_named = edit.instances.contains(path) || after.purpose == Purpose::Base;
        assert!(before == Some(after) || is_named, "{path} is not named");
        let Some(before) = before else { continue };
        assert_eq!(before.slot, after.slot);
        assert!(before.spec == after.spec || before.purpose == Purpose::Spare, "{path}");
        if before.desired != after.desired {
            assert!(before.intent < after.intent, "{path} has no fresh intent");
            assert_ne!(before.desired, DesiredState::Destroyed, "{path} is brought back");
        }
    }
    for path in before.instances.keys() {
        assert!(edit.desired.instances.contains_key(path), "{path} is dropped, not destroyed");
    }
}

/// How often requests of each kind were accepted and denied, and whether each kind of selector was among them.
#[derive(Debug, Default)]
struct Tally {
    answers: BTreeMap<(Kind, bool), u32>,
    selectors: BTreeSet<(&'static str, bool)>,
    spares_taken: u32,
    denials: BTreeSet<String>,
}

/// Every reason to deny a request, but for a machine that has no network left.
const DENIALS: &[&str] = &[
    "Ambiguous",
    "BeingRemoved",
    "DiskAttached",
    "DiskConflict",
    "DiskHeld",
    "DiskShrinks",
    "Exists",
    "ForkWrites",
    "Mounts",
    "NoBase",
    "NoEarlierRevision",
    "NoInstances",
    "NoSuchDisk",
    "NoSuchInstance",
    "NoSuchLimit",
    "NoSuchName",
    "NoSuchPool",
    "NoSuchTenant",
    "NotAlive",
    "Number",
    "OverLimit",
    "PortTaken",
    "Spec",
    "StillHasDisks",
    "StillHasPools",
    "StillRunning",
    "Subnet",
    "SubnetFixed",
    "SubnetInUse",
    "SubnetOverlaps",
    "SubnetTooSmall",
];

impl Tally {
    fn count(&mut self, asked: &Asked, before: &Desired, result: &Result<Edit, Denial>) {
        let is_accepted = result.is_ok();
        *self.answers.entry((kind(asked), is_accepted)).or_default() += 1;
        if let Err(denial) = result {
            let name = format!("{denial:?}");
            self.denials
                .extend(name.split(|c: char| !c.is_alphanumeric()).next().map(str::to_owned));
        }
        let Asked::Outside(request) = asked else { return };
        if let Some(selector) = request.clone().selector_mut() {
            let selector = match selector {
                Selector::All => "all",
                Selector::Tenant(_) => "a tenant",
                Selector::Pool(_) => "a pool",
                Selector::Id { pool: None, .. } => "an id",
                Selector::Id { pool: Some(_), .. } => "an id in a pool",
            };
            self.selectors.insert((selector, is_accepted));
        }
        if let (Ok(edit), Request::InstanceCreate { .. } | Request::PoolScale { .. }) =
            (result, request)
        {
            let stood_by = before.instances.values().filter(|it| it.purpose == Purpose::Spare);
            let is_taken = |it: &&InstanceRecord| edit.desired.instances[&it.path].purpose.is_use();
            self.spares_taken += u32::from(stood_by.filter(is_taken).count() > 0);
        }
    }

    fn assert_complete(&self) {
        for kind in KINDS {
            for is_accepted in [true, false] {
                let count = self.answers.get(&(*kind, is_accepted));
                // Nothing about a removal can be wrong.
                let is_possible = is_accepted || *kind != Kind::Remove;
                assert_eq!(count.is_some(), is_possible, "{kind:?}, accepted: {is_accepted}");
            }
        }
        let missing: Vec<_> = DENIALS.iter().filter(|it| !self.denials.contains(**it)).collect();
        assert!(missing.is_empty(), "never denied for {missing:?}");
        assert_eq!(self.selectors.len(), 2 * 5, "{:?}", self.selectors);
        assert!(self.spares_taken > 0, "{self:?}");
    }
}

fn check_against_the_model(history: Vec<Step>, tally: &mut Tally) -> TestCaseResult {
    let mut node = small_node();
    let mut model = Model::default();
    for step in history {
        let Step::Ask(request) = &step else {
            go_on(&mut node, &step).iter().for_each(|(path, seen)| model.see(path, *seen));
            match &step {
                Step::Gone => model.forget_the_gone(),
                Step::Build(pool, _) => {
                    let status = node.facts.observed.pools.get(pool);
                    status.into_iter().for_each(|status| model.build(pool, status));
                }
                _ => {}
            }
            assert_agrees(&node, &model);
            continue;
        };
        let before = node.desired.clone();
        let expected = model.after(request, &node.facts);
        let result = ask(&mut node, request);
        tally.count(request, &before, &result);
        match (result, expected) {
            (Ok(edit), Some(mut expected)) => {
                for (name, tenant) in &mut expected.tenants {
                    tenant.subnet.get_or_insert(edit.desired.tenants[name].network.subnet);
                }
                model = expected;
                assert_agrees(&node, &model);
                assert_disjoint(&node.desired);
                assert_changes_are_named(&before, &edit);
            }
            (Err(denial), None) => {
                let is_command = |hint: &str| hint.contains("`mvm ") || hint.contains("--");
                let hint = denial.hint();
                prop_assert!(hint.as_deref().is_none_or(is_command), "{denial:?}");
                prop_assert_eq!(&node.desired, &before, "a denial changed something");
            }
            (result, _) => prop_assert!(false, "{request:?} gave {result:?}"),
        }
    }
    Ok(())
}

#[test]
fn admission_agrees_with_a_model_for_requests_of_every_kind() {
    let config = cases(768);
    // Other seeds may leave out what is rare.
    let is_usual = config.cases >= 768 && config.rng_seed == RngSeed::Fixed(1);
    let tally = RefCell::new(Tally::default());
    let check = |history| check_against_the_model(history, &mut tally.borrow_mut());
    match TestRunner::new(config).run(&any_history(), check) {
        Ok(()) => {}
        Err(TestError::Fail(reason, history)) => {
            let steps: Vec<String> = history.iter().map(|step| format!("{step:?}")).collect();
            panic!("{reason}, after\n{}", steps.join("\n"));
        }
        Err(error) => panic!("{error}"),
    }
    if is_usual {
        tally.into_inner().assert_complete();
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn a_request_round_trips_through_json(request in any_request()) {
        let json = serde_json::to_string(&request).unwrap();
        prop_assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request, "{}", json);
    }

    #[test]
    fn a_scale_leaves_exactly_so_many_running(
        history in any_history(),
        path in any_pool_path(),
        running in 0..8u32,
    ) {
        let mut node = small_node();
        take(&mut node, history);
        let pool = path.clone();
        let in_use = |node: &Node, state: DesiredState| {
            let instances = node.desired.instances_in(&pool).filter(|it| it.purpose.is_use());
            instances.filter(|it| it.desired == state).count()
        };
        let before = node.desired.instances.len();
        let scale = Request::PoolScale { path, running, warm: None, sleeping: None };
        if ask(&mut node, &Asked::Outside(scale)).is_ok() {
            prop_assert_eq!(in_use(&node, DesiredState::Running), running as usize);
            let idle = in_use(&node, DesiredState::Stopped);
            let made = node.desired.instances.len() - before;
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
        // Whoever applies a document again has a failed build tried again.
        change_all(&mut node.facts.observed.pools, |status| status.build = BuildState::Idle);
        let apply = Asked::Outside(Request::Apply { document: document.clone() });
        if ask(&mut node, &apply).is_err() {
            return Ok(());
        }
        let once = node.desired.clone();
        prop_assert!(ask(&mut node, &apply).is_ok());
        prop_assert_eq!(&node.desired, &once);

        let tenant = document.tenant.clone();
        let others = once.pools_of(&tenant).any(|pool| {
            pool.existence == Existence::Kept && !document.pools.contains_key(&pool.path.pool)
        });
        let disks = once.disks_of(&tenant).any(|disk| disk.existence == Existence::Kept);
        let named = |pool: &PoolPath| document.pools.contains_key(&pool.pool);
        let remove = Asked::Outside(Request::Remove { document: document.clone() });
        prop_assert!(ask(&mut node, &remove).is_ok());
        node.forget_the_gone();
        prop_assert!(!node.desired.pools_of(&tenant).any(|pool| named(&pool.path)));
        prop_assert!(!node.desired.instances_of(&tenant).any(|i| named(&i.path.pool)));
        prop_assert_eq!(node.desired.tenants.contains_key(&tenant), others || disks);
    }
}
