//! What holds for the plan of any node, however odd its records.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::lifecycle::Setback;
use crate::name::SnapshotId;
use crate::property::cases;
use crate::record::change_all;

fn any_phase() -> impl Strategy<Value = Phase> {
    let outcome = prop_oneof![
        Just(Outcome::Stopped),
        Just(Outcome::Failed),
        Just(Outcome::Destroyed),
        Just(Outcome::Asleep)
    ];
    prop_oneof![
        Just(Phase::Created),
        Just(STARTING),
        Just(RUNNING),
        outcome.clone().prop_map(stopping),
        outcome.prop_map(releasing),
        Just(Phase::Stopped),
        Just(Phase::Failed),
        Just(Phase::Destroyed),
        Just(Phase::Warm { since_unix_ms: NOW }),
        Just(Phase::Suspending { since_unix_ms: NOW }),
        Just(Phase::Sleeping { since_unix_ms: NOW }),
    ]
}

/// Why it could not be put to rest or woken at last.
fn any_setback() -> impl Strategy<Value = Option<Setback>> {
    let step = prop_oneof![
        Just(RestStep::Pause),
        (0..2u64).prop_map(|request| RestStep::Sleep { request }),
        Just(RestStep::Wake)
    ];
    let setback = (step, 1..4u32).prop_map(|(step, failures)| Setback {
        step,
        error: "no space".to_owned(),
        at_unix_ms: NOW,
        failures,
    });
    proptest::option::of(setback)
}

fn any_status() -> impl Strategy<Value = InstanceStatus> {
    (any_phase(), 1..4u64, 0..6u32, any::<bool>(), any_setback()).prop_map(
        |(phase, generation, failures, has_revision, setback)| InstanceStatus {
            generation,
            revision: has_revision.then(revision),
            setback,
            ..ended(phase, failures)
        },
    )
}

/// Of a pool, a fork, what a base is saved from, or what stands by.
fn any_record() -> impl Strategy<Value = InstanceRecord> {
    let state = prop_oneof![
        3 => Just(DesiredState::Running),
        1 => Just(DesiredState::Warm),
        1 => Just(DesiredState::Sleeping),
        1 => Just(DesiredState::Stopped),
        1 => Just(DesiredState::Destroyed),
    ];
    let restart = prop_oneof![
        Just(RestartPolicy::Always),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Never)
    ];
    let purpose = prop_oneof![Just(Purpose::Use), Just(Purpose::Base), Just(Purpose::Spare)];
    (state, 1..4u64, restart, purpose, any::<bool>()).prop_map(
        |(state, generation, restart, purpose, is_fork)| {
            let mut record = InstanceRecord { generation, purpose, ..record(0, state) };
            record.spec.restart = restart;
            record.origin = is_fork.then(|| SnapshotId::from_bits(1));
            record.revision = is_fork.then(|| RevisionId::from_digest([2; 8]));
            record
        },
    )
}

fn any_image() -> impl Strategy<Value = PoolStatus> {
    let build = prop_oneof![
        Just(BuildState::Idle),
        Just(BuildState::Building { step: "unpacking".to_owned() }),
        Just(BuildState::Built { already_there: true, took_ms: 1 }),
        (1..4u32).prop_map(|failures| {
            BuildState::Failed { error: "no mirror".to_owned(), at_unix_ms: NOW, failures }
        }),
    ];
    (any::<bool>(), 0..3u64, build).prop_map(|(has_revision, build_generation, build)| PoolStatus {
        revision: has_revision.then(revision),
        build_generation,
        build,
        ..PoolStatus::default()
    })
}

fn any_existence() -> impl Strategy<Value = Existence> {
    prop_oneof![3 => Just(Existence::Kept), 1 => Just(Existence::Removed)]
}

fn any_node() -> impl Strategy<Value = (Desired, Observed)> {
    let instances = prop::collection::vec((any_record(), any_status()), 0..6);
    let quota = proptest::option::of(0..4u64);
    (instances, any_image(), any_existence(), any_existence(), 0..3u64, quota).prop_map(
        |(instances, image, tenant_existence, pool_existence, build_generation, running)| {
            let (mut records, mut statuses) = (vec![], vec![]);
            for (number, (it, status)) in (1..).zip(instances) {
                let InstanceRecord { path, slot, .. } = record(number, it.desired);
                records.push(InstanceRecord { path, slot, ..it });
                statuses.push((number, status));
            }
            let mut desired = desired(records);
            change_all(&mut desired.tenants, |t| {
                t.existence = tenant_existence;
                t.quota.running = running;
            });
            change_all(&mut desired.pools, |pool| {
                pool.existence = pool_existence;
                pool.build_generation = build_generation;
            });
            (desired, observed(image, statuses))
        },
    )
}

/// What an action is about.
pub(super) fn object(action: &Action) -> String {
    match action {
        Action::Start { instance, .. }
        | Action::Stop { instance, .. }
        | Action::Pause { instance }
        | Action::Sleep { instance, .. }
        | Action::Destroy { instance, .. } => instance.to_string(),
        Action::Build { pool, .. } | Action::RemovePool(pool) => pool.to_string(),
        Action::RemoveEnded(instance) => format!("the rest of {instance}"),
        Action::RemoveTenant(tenant) => tenant.to_string(),
        Action::MakeDisk(disk) | Action::RemoveDisk(disk) => format!("disk {disk}"),
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn each_object_has_at_most_one_action_or_one_thing_to_wait_for(
        (desired, observed) in any_node(),
        now in NOW..NOW + 40_000,
        starting in 0..4usize,
    ) {
        let limits = PlanLimits { starting };
        let plan = plan(&desired, &observed, limits, now);
        prop_assert_eq!(&plan, &super::plan(&desired, &observed, limits, now));
        let mut objects: BTreeSet<String> = plan.waiting.keys().map(ToString::to_string).collect();
        for action in &plan.actions {
            prop_assert!(objects.insert(object(action)), "{action:?} is one too many");
        }
        prop_assert!(plan.next_unix_ms.is_none_or(|next| next > now));
    }

    #[test]
    fn an_action_fits_what_is_asked_for_and_what_is_there(
        (desired, observed) in any_node(),
        starting in 0..4usize,
    ) {
        let plan = plan(&desired, &observed, PlanLimits { starting }, NOW + 10_000);
        let mut starts = 0;
        for action in &plan.actions {
            match action {
                Action::Start { instance, revision, .. } => {
                    starts += 1;
                    let record = &desired.instances[instance];
                    prop_assert!(record.desired.is_alive());
                    // What it lies on, what it was forked from, what its pool has.
                    let own = observed.instances[instance].revision.clone();
                    let pools = observed.pools[&pool()].revision.clone();
                    let expected = own.or(record.revision.clone()).or(pools);
                    prop_assert_eq!(Some(revision), expected.as_ref());
                    let is_down = matches!(
                        observed.instances[instance].phase,
                        Phase::Created
                            | Phase::Stopped
                            | Phase::Failed
                            | Phase::Warm { .. }
                            | Phase::Sleeping { .. }
                    );
                    prop_assert!(is_down);
                }
                Action::Pause { instance } => {
                    prop_assert_eq!(desired.instances[instance].desired, DesiredState::Warm);
                    let phase = &observed.instances[instance].phase;
                    let is_up = matches!(phase, Phase::Running { .. });
                    prop_assert!(is_up);
                }
                Action::Sleep { instance, .. } => {
                    prop_assert_eq!(desired.instances[instance].desired, DesiredState::Sleeping);
                    let phase = &observed.instances[instance].phase;
                    let has_memory = matches!(phase, Phase::Running { .. } | Phase::Warm { .. });
                    prop_assert!(has_memory);
                }
                Action::Stop { instance, generation, .. } => {
                    let record = &desired.instances[instance];
                    let is_older = *generation < record.generation;
                    match record.desired {
                        DesiredState::Running | DesiredState::Warm | DesiredState::Sleeping => {
                            prop_assert!(is_older, "it would never start");
                        }
                        DesiredState::Stopped => prop_assert!(!is_older),
                        DesiredState::Destroyed => prop_assert!(false, "a stop is not enough"),
                    }
                }
                Action::Destroy { instance, .. } => {
                    prop_assert_eq!(desired.instances[instance].desired, DesiredState::Destroyed);
                }
                Action::RemoveEnded(_) => prop_assert!(false, "no instance goes by itself"),
                Action::MakeDisk(_) | Action::RemoveDisk(_) => {
                    prop_assert!(false, "there is no disk");
                }
                Action::RemovePool(pool) => {
                    prop_assert_eq!(desired.instances_in(pool).count(), 0);
                    prop_assert_eq!(desired.pools[pool].existence, Existence::Removed);
                }
                Action::RemoveTenant(tenant) => {
                    prop_assert_eq!(desired.pools_of(tenant).count(), 0);
                }
                Action::Build { pool, generation } => {
                    prop_assert_eq!(desired.pools[pool].build_generation, *generation);
                    prop_assert_eq!(desired.pools[pool].existence, Existence::Kept);
                }
            }
        }
        let is_starting = |s: &&InstanceStatus| matches!(s.phase, Phase::Starting { .. });
        let already = observed.instances.values().filter(is_starting).count();
        prop_assert!(starts == 0 || starts + already <= starting);
    }

    #[test]
    fn what_an_instance_is_for_is_no_matter_to_the_plan((desired, observed) in any_node()) {
        let expected = plan(&desired, &observed, LIMITS, NOW);
        let mut others = desired.clone();
        change_all(&mut others.instances, |record| record.purpose = Purpose::Use);
        prop_assert_eq!(plan(&others, &observed, LIMITS, NOW), expected);
    }

    #[test]
    fn no_more_is_started_than_the_tenant_may_have((desired, observed) in any_node()) {
        let plan = plan(&desired, &observed, LIMITS, NOW);
        let has_vm = |path: &InstancePath| {
            let phase = &observed.instances[path].phase;
            matches!(
                phase,
                Phase::Starting { .. }
                    | Phase::Running { .. }
                    | Phase::Warm { .. }
                    | Phase::Suspending { .. }
            )
        };
        let up = desired.instances.values().filter(|it| it.desired.is_up() && has_vm(&it.path));
        let fresh = plan.actions.iter().filter(|action| {
            matches!(action, Action::Start { instance, .. } if !has_vm(instance))
        });
        let (up, fresh) = (up.count() as u64, fresh.count() as u64);
        let allowed = desired.tenants[&pool().tenant].quota.running;
        prop_assert!(fresh == 0 || allowed.is_none_or(|allowed| up + fresh <= allowed));
    }

    #[test]
    fn an_instance_that_is_to_run_runs_has_an_action_or_says_what_it_waits_for(
        (desired, observed) in any_node(),
    ) {
        let plan = plan(&desired, &observed, LIMITS, NOW);
        for record in desired.instances.values().filter(|r| r.desired.is_alive()) {
            let status = &observed.instances[&record.path];
            let is_up = match record.desired {
                DesiredState::Warm => matches!(status.phase, Phase::Warm { .. }),
                DesiredState::Sleeping => matches!(status.phase, Phase::Sleeping { .. }),
                _ => matches!(status.phase, Phase::Running { .. }),
            };
            let is_gone = status.phase == Phase::Destroyed;
            let acts = plan.actions.iter().any(|a| object(a) == record.path.to_string());
            let waits = plan.waiting.contains_key(&record.path);
            prop_assert!(is_up || is_gone || acts || waits, "{} is forgotten", record.path);
        }
    }
}
