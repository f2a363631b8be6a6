//! A node's mirror, whatever it is told in whatever order, against what is to be in it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::admit::{Capacity, NodeFacts, Request, admit};
use crate::lifecycle::StartFrom;
use crate::name::SnapshotId;
use crate::property::cases;
use crate::record::{DesiredState, Purpose};

/// Something that a node hears, of the instance of this number where it is of one.
#[derive(Debug, Clone)]
enum Told {
    /// A document in which these are of such a kind; others are not in it.
    Document(BTreeMap<usize, Kind>),
    Local(usize, Option<LocalIntent>),
    Status(usize, Option<Phase>),
    /// A record of it does not parse: what it decided, or its status.
    Bad(usize, bool),
}

/// One of a pool, a fork, what a base is saved from, or what stands by; and what was asked of it.
#[derive(Debug, Clone)]
struct Kind {
    desired: DesiredState,
    purpose: Purpose,
    is_fork: bool,
    intent: u64,
    local_number: u64,
}

fn any_state() -> impl Strategy<Value = DesiredState> {
    use DesiredState::*;
    prop::sample::select(&[Running, Warm, Sleeping, Stopped, Destroyed])
}

fn any_kind() -> impl Strategy<Value = Kind> {
    let purpose = prop::sample::select(&[Purpose::Use, Purpose::Base, Purpose::Spare]);
    (any_state(), purpose, any::<bool>(), 0..2u64, 0..2u64).prop_map(
        |(desired, purpose, is_fork, intent, local_number)| Kind {
            desired,
            purpose,
            is_fork,
            intent,
            local_number,
        },
    )
}

fn any_local() -> impl Strategy<Value = LocalIntent> {
    let states = [DesiredState::Running, DesiredState::Warm, DesiredState::Sleeping];
    (1..3u64, 0..2u64, prop::sample::select(states.to_vec())).prop_map(
        |(number, intent, desired)| LocalIntent {
            number,
            intent,
            desired,
            sleep_request: 3,
            hooks_ms: 4,
            rested: None,
        },
    )
}

fn any_phase() -> impl Strategy<Value = Phase> {
    let since_unix_ms = 1;
    let outcome = prop::sample::select(&[
        Outcome::Stopped,
        Outcome::Failed,
        Outcome::Destroyed,
        Outcome::Asleep,
    ]);
    let (kill_unix_ms, deadline_unix_ms) = (2, 3);
    prop_oneof![
        prop::sample::select(vec![
            Phase::Created,
            Phase::Running { since_unix_ms },
            Phase::Warm { since_unix_ms },
            Phase::Suspending { since_unix_ms },
            Phase::Sleeping { since_unix_ms },
            Phase::Starting { deadline_unix_ms, begin: StartFrom::Own },
            Phase::Stopped,
            Phase::Failed,
            Phase::Destroyed,
        ]),
        outcome.clone().prop_map(move |outcome| {
            Phase::Stopping { kill_unix_ms, outcome, is_forced: false }
        }),
        outcome.prop_map(|outcome| Phase::Releasing { retry_unix_ms: None, outcome }),
    ]
}

fn any_told() -> impl Strategy<Value = Told> {
    let which = || 0..4usize;
    let option = proptest::option::of::<BoxedStrategy<_>>;
    prop_oneof![
        prop::collection::btree_map(which(), any_kind(), 0..4).prop_map(Told::Document),
        (which(), option(any_local().boxed())).prop_map(|(at, local)| Told::Local(at, local)),
        (which(), proptest::option::of(any_phase())).prop_map(|(at, it)| Told::Status(at, it)),
        (which(), any::<bool>()).prop_map(|(at, is_local)| Told::Bad(at, is_local)),
    ]
}

/// A tenant whose one pool has four instances.
fn four() -> Desired {
    let document = r#"{"tenant":"t","pools":{"p":{"running":4}}}"#;
    let request = Request::Apply { document: serde_json::from_str(document).unwrap() };
    let capacity = Capacity { vcpus: 9, mem_mib: 9_999, disk_mib: 99_999 };
    let facts = NodeFacts { capacity, ..NodeFacts::default() };
    let mut ids = 0;
    let mut entropy = || {
        ids += 1;
        ids
    };
    admit(&Desired::default(), &facts, &request, &mut entropy, 1).unwrap().desired
}

fn document(kinds: &BTreeMap<usize, Kind>) -> Desired {
    let mut desired = four();
    for (at, path) in four().instances.keys().enumerate() {
        let (Some(kind), Some(record)) = (kinds.get(&at), desired.instances.get_mut(path)) else {
            desired.instances.remove(path);
            continue;
        };
        (record.desired, record.purpose) = (kind.desired, kind.purpose);
        (record.intent, record.local_number) = (kind.intent, kind.local_number);
        record.origin = kind.is_fork.then(|| SnapshotId::from_bits(1));
    }
    desired
}

/// What was told, without the mirror.
#[derive(Default)]
struct Model {
    given: Desired,
    locals: BTreeMap<InstancePath, LocalIntent>,
    phases: BTreeMap<InstancePath, Phase>,
    bad: BTreeSet<String>,
}

impl Model {
    fn holds(&self, path: &InstancePath) -> bool {
        let both = self.given.instances.get(path).zip(self.locals.get(path));
        both.is_some_and(|(given, local)| {
            given.intent == local.intent && local.number > given.local_number
        })
    }

    /// What the node decided goes over what it was given, unless that is to go.
    fn desired(&self, given: &InstanceRecord) -> (DesiredState, Purpose, u64) {
        let as_given = (given.desired, given.purpose, given.local_number);
        match self.locals.get(&given.path).filter(|_| self.holds(&given.path)) {
            Some(local) if given.desired != DesiredState::Destroyed => {
                let is_needed = local.desired == DesiredState::Running;
                let is_taken = given.purpose == Purpose::Spare && is_needed;
                let purpose = if is_taken { Purpose::Use } else { given.purpose };
                (local.desired, purpose, local.number)
            }
            _ => as_given,
        }
    }

    fn is_bad(&self, path: &InstancePath) -> bool {
        self.bad.contains(&record::instance_status_key(path))
            || self.bad.contains(&record::local_key(path))
    }

    fn network(&self) -> NodeNetwork {
        let has_tap = |path: &InstancePath| {
            let phase = self.phases.get(path);
            let has_vm = phase.is_some_and(|phase| {
                !matches!(
                    phase,
                    Phase::Created
                        | Phase::Sleeping { .. }
                        | Phase::Releasing { .. }
                        | Phase::Stopped
                        | Phase::Failed
                        | Phase::Destroyed
                )
            });
            self.is_bad(path) || has_vm
        };
        let sleeps = |path: &InstancePath| {
            let sleeps = match self.phases.get(path) {
                Some(Phase::Sleeping { .. }) => true,
                Some(Phase::Releasing { outcome, .. }) => *outcome == Outcome::Asleep,
                _ => false,
            };
            sleeps && !self.is_bad(path)
        };
        let places = |is_meant: &dyn Fn(&InstancePath) -> bool| {
            let records = self.given.instances.values().filter(|it| is_meant(&it.path));
            records.filter_map(|it| self.given.network_of(it)).collect::<Vec<_>>()
        };
        let tenants = self.given.tenants.values().map(|tenant| tenant.network);
        let mut network = NodeNetwork::of(tenants, places(&has_tap)).unwrap();
        places(&sleeps).into_iter().for_each(|it| network.add_asleep(it).unwrap());
        network
    }
}

/// Tells both the same.
fn tell(told: &Told, mirror: &mut Mirror, model: &mut Model) {
    let paths: Vec<InstancePath> = four().instances.keys().cloned().collect();
    match told {
        Told::Document(kinds) => {
            model.given = document(kinds);
            let desired = model.given.clone();
            mirror.set_document(&NodeDocument { desired, ..NodeDocument::default() });
        }
        Told::Local(at, local) => {
            let (path, key) = (&paths[*at], record::local_key(&paths[*at]));
            let bytes = local.as_ref().map(|local| serde_json::to_vec(local).unwrap());
            mirror.apply(&key, bytes.as_deref());
            model.bad.remove(&key);
            model.locals.remove(path);
            model.locals.extend(local.iter().map(|local| (path.clone(), local.clone())));
        }
        Told::Status(at, phase) => {
            let (path, key) = (&paths[*at], record::instance_status_key(&paths[*at]));
            let status = phase.clone().map(|phase| InstanceStatus { phase, ..Default::default() });
            let bytes = status.map(|status| serde_json::to_vec(&status).unwrap());
            mirror.apply(&key, bytes.as_deref());
            model.bad.remove(&key);
            model.phases.remove(path);
            model.phases.extend(phase.iter().map(|phase| (path.clone(), phase.clone())));
        }
        Told::Bad(at, is_local) => {
            let path = &paths[*at];
            let key = match is_local {
                true => record::local_key(path),
                false => record::instance_status_key(path),
            };
            mirror.apply(&key, Some(b"{"));
            match is_local {
                true => drop(model.locals.remove(path)),
                false => drop(model.phases.remove(path)),
            }
            model.bad.insert(key);
        }
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn a_node_knows_what_it_was_told_last_and_touches_nothing_else(
        history in prop::collection::vec(any_told(), 0..24),
    ) {
        let (mut mirror, mut model) = (Mirror::default(), Model::default());
        for told in &history {
            tell(told, &mut mirror, &mut model);
        }
        prop_assert!(mirror.desired.instances.keys().eq(model.given.instances.keys()));
        for (path, given) in &model.given.instances {
            let has = &mirror.desired.instances[path];
            let has = (has.desired, has.purpose, has.local_number);
            prop_assert_eq!(has, model.desired(given), "{}", path);
            prop_assert_eq!(&mirror.desired.instances[path].origin, &given.origin);
            prop_assert_eq!(mirror.is_untouchable(path), model.is_bad(path));
            prop_assert_eq!(Some(&mirror.status(path).phase), model.phases.get(path).or(Some(&Phase::Created)));
        }
        prop_assert!(mirror.bad.keys().eq(&model.bad));
        let settled = model.locals.keys().filter(|path| !model.holds(path));
        let settled: Vec<String> = settled.map(record::local_key).collect();
        prop_assert_eq!(mirror.settled_local(), settled);
        prop_assert_eq!(mirror.expected_network().unwrap(), model.network());

        let touchable = mirror.touchable();
        let may_be_touched = |path: &&InstancePath| !model.is_bad(path);
        prop_assert!(touchable.instances.keys().eq(model.given.instances.keys().filter(may_be_touched)));
        prop_assert_eq!(touchable.tenants.is_empty(), !model.bad.is_empty() || model.given.tenants.is_empty());
    }
}
