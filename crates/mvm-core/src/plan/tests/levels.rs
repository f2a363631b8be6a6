//! One instance or image at a time: what is asked for against what is there.

use super::*;

#[test]
fn an_instance_that_is_to_run_is_brought_up() {
    let wait = |waiting| (vec![], Some(waiting));
    for (phase, (actions, waiting)) in [
        (Phase::Created, (vec![start_action()], None)),
        (STARTING, wait(Waiting::Step)),
        (RUNNING, (vec![], None)),
        (stopping(Outcome::Stopped), wait(Waiting::Step)),
        (releasing(Outcome::Failed), wait(Waiting::Step)),
    ] {
        let plan = plan_one(record(1, DesiredState::Running), status(phase.clone()), NOW);
        assert_eq!(plan.actions, actions, "{phase:?}");
        assert_eq!(plan.waiting.get(&path(1)), waiting.as_ref(), "{phase:?}");
    }
}

#[test]
fn an_instance_that_is_to_be_stopped_is_brought_down() {
    for (phase, stops) in [
        (Phase::Created, false),
        (STARTING, true),
        (RUNNING, true),
        (stopping(Outcome::Stopped), true),
        (releasing(Outcome::Stopped), false),
        (releasing(Outcome::Failed), true),
        (Phase::Failed, true),
        (Phase::Stopped, false),
    ] {
        let plan = plan_one(record(1, DesiredState::Stopped), status(phase.clone()), NOW);
        let actions = if stops { vec![stop_action(2)] } else { vec![] };
        assert_eq!(plan, Plan { actions, ..Plan::default() }, "{phase:?}");
    }
}

#[test]
fn an_instance_that_was_never_observed_counts_as_created() {
    let desired = desired([record(1, DesiredState::Running)]);
    assert_eq!(plan(&desired, &observed(built(), []), LIMITS, NOW).actions, [start_action()]);
}

#[test]
fn a_fresh_wish_stops_what_is_up_and_then_starts_it() {
    let older = |phase| InstanceStatus { generation: 1, ..status(phase) };
    let wanted = || record(1, DesiredState::Running);
    for phase in [STARTING, RUNNING] {
        // The stop carries the older generation: the start that follows carries the new one.
        assert_eq!(plan_one(wanted(), older(phase), NOW).actions, [stop_action(1)]);
    }
    for phase in [stopping(Outcome::Stopped), releasing(Outcome::Stopped)] {
        assert_eq!(plan_one(wanted(), older(phase), NOW).actions, []);
    }
    for phase in [Phase::Stopped, Phase::Failed] {
        let no_backoff = InstanceStatus { generation: 1, ..ended(phase, 9) };
        assert_eq!(plan_one(wanted(), no_backoff, NOW).actions, [start_action()]);
    }
}

#[test]
fn backoff_doubles_up_to_its_cap() {
    let seconds: Vec<u64> = (0..=10).map(|failures| backoff_ms(failures) / 1_000).collect();
    assert_eq!(seconds, [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
    assert_eq!(backoff_ms(u32::MAX), BACKOFF_MAX_MS);
}

#[test]
fn a_failed_instance_waits_out_its_backoff() {
    let failed = || ended(Phase::Failed, 3);
    let until_unix_ms = NOW + 4_000;
    let wanted = || record(1, DesiredState::Running);
    let plan = plan_one(wanted(), failed(), until_unix_ms - 1);
    assert_eq!(plan.actions, []);
    let waiting = Waiting::Backoff { failures: 3, short_runs: 0, until_unix_ms };
    assert_eq!(plan.waiting[&path(1)], waiting);
    assert_eq!(plan.next_unix_ms, Some(until_unix_ms));
    assert_eq!(plan_one(wanted(), failed(), until_unix_ms).actions, [start_action()]);
}

#[test]
fn what_ends_with_success_again_and_again_waits_as_long_as_what_fails() {
    for in_a_row in 1..12 {
        let failed = ended(Phase::Failed, in_a_row);
        let succeeded = InstanceStatus { short_runs: in_a_row, ..ended(Phase::Stopped, 0) };
        let mut wanted = record(1, DesiredState::Running);
        wanted.spec.restart = RestartPolicy::Always;
        let due = |status| plan_one(wanted.clone(), status, NOW).next_unix_ms.unwrap();
        assert_eq!(due(failed), due(succeeded), "{in_a_row}");
    }
}

#[test]
fn a_restart_of_what_falls_asleep_stops_it_in_order() {
    let mut wanted = record(1, DesiredState::Running);
    wanted.generation = 2;
    let falling = InstanceStatus {
        generation: 1,
        phase: Phase::Suspending { since_unix_ms: NOW },
        ..InstanceStatus::default()
    };
    let (instance, grace_ms) = (path(1), wanted.grace_ms);
    let stop = Action::Stop { instance, grace_ms, generation: 1 };
    assert_eq!(plan_one(wanted, falling, NOW).actions, [stop]);
}

#[test]
fn the_next_round_is_due_when_the_first_backoff_ends() {
    let desired = desired((1..=3).map(|number| record(number, DesiredState::Running)));
    let failed = [(1, 3), (2, 1), (3, 2)].map(|(n, failures)| (n, ended(Phase::Failed, failures)));
    let plan = plan(&desired, &observed(built(), failed), LIMITS, NOW);
    assert_eq!((plan.waiting.len(), plan.next_unix_ms), (3, Some(NOW + 1_000)));
}

#[test]
fn the_restart_policy_decides_over_what_ended_by_itself() {
    let much_later = NOW + BACKOFF_MAX_MS;
    for (policy, after_failure, after_power_off) in [
        (RestartPolicy::Always, true, true),
        (RestartPolicy::OnFailure, true, false),
        (RestartPolicy::Never, false, false),
    ] {
        for (phase, again) in [(Phase::Failed, after_failure), (Phase::Stopped, after_power_off)] {
            let mut wanted = record(1, DesiredState::Running);
            wanted.spec.restart = policy;
            let plan = plan_one(wanted, ended(phase.clone(), 1), much_later);
            if again {
                assert_eq!(plan.actions, [start_action()], "{policy} {phase:?}");
            } else {
                assert_eq!(plan.actions, [], "{policy} {phase:?}");
                assert_eq!(
                    plan.waiting[&path(1)],
                    Waiting::RestartPolicy { policy: policy.into() }
                );
            }
        }
    }
}

#[test]
fn what_goes_at_its_end_goes_when_it_has_ended_for_good() {
    let much_later = NOW + BACKOFF_MAX_MS;
    let with = |desired, restart| {
        let mut record = record(1, desired);
        record.spec.restart = restart;
        record.spec.auto_remove = true;
        record
    };
    let (run, rest) = (DesiredState::Running, DesiredState::Stopped);
    let gone = vec![Action::RemoveEnded(path(1))];
    for (record, status, actions) in [
        (with(run, RestartPolicy::Never), ended(Phase::Failed, 1), &gone),
        (with(run, RestartPolicy::Never), ended(Phase::Stopped, 0), &gone),
        (with(rest, RestartPolicy::Always), ended(Phase::Stopped, 0), &gone),
        (with(run, RestartPolicy::Always), ended(Phase::Stopped, 0), &vec![start_action()]),
        (with(rest, RestartPolicy::Never), status(Phase::Created), &vec![]),
        (with(run, RestartPolicy::Never), status(RUNNING), &vec![]),
    ] {
        assert_eq!(plan_one(record, status.clone(), much_later).actions, *actions, "{status:?}");
    }
}

#[test]
fn the_node_starts_no_more_at_once_than_it_should() {
    let desired = desired((1..=4).map(|number| record(number, DesiredState::Running)));
    let observed = observed(built(), [(2, status(STARTING))]);
    let plan = plan(&desired, &observed, PlanLimits { starting: 2 }, NOW);
    assert_eq!(plan.actions, [start_action()]);
    let waiting = [(2, Waiting::Step), (3, Waiting::StartSlot), (4, Waiting::StartSlot)];
    assert_eq!(plan.waiting, waiting.map(|(number, why)| (path(number), why)).into());
}

#[test]
fn an_instance_keeps_the_revision_that_its_disk_lies_on() {
    let first = RevisionId::from_digest([9; 8]);
    let on_first = InstanceStatus { revision: Some(first.clone()), ..status(Phase::Created) };
    let plan = plan_one(record(1, DesiredState::Running), on_first, NOW);
    assert_eq!(plan.actions, [Action::Start { instance: path(1), generation: 2, revision: first }]);
}

fn build(generation: u64) -> Action {
    Action::Build { pool: pool(), generation }
}

fn failed_build(failures: u32) -> PoolStatus {
    let build = BuildState::Failed { error: "no mirror".to_owned(), at_unix_ms: NOW, failures };
    PoolStatus { build, ..PoolStatus::default() }
}

#[test]
fn an_image_is_built_when_the_first_instance_is_to_run() {
    let nothing = Observed::default();
    let stopped = desired([record(1, DesiredState::Stopped)]);
    assert_eq!(plan(&stopped, &nothing, LIMITS, NOW), Plan::default());

    let desired = desired([record(1, DesiredState::Running)]);
    let first = plan(&desired, &nothing, LIMITS, NOW);
    assert_eq!(first.actions, [build(0)]);
    assert_eq!(first.waiting[&path(1)], Waiting::Image { error: None });

    let build = BuildState::Building { step: "unpacking".to_owned() };
    let building = observed(PoolStatus { build, ..PoolStatus::default() }, []);
    assert_eq!(plan(&desired, &building, LIMITS, NOW).actions, [], "one build at a time");
}

#[test]
fn a_build_that_was_asked_for_is_done_once() {
    let mut desired = desired([]);
    desired.pools.get_mut(&pool()).unwrap().build_generation = 3;
    assert_eq!(plan(&desired, &observed(built(), []), LIMITS, NOW).actions, [build(3)]);
    let done = PoolStatus { build_generation: 3, ..built() };
    assert_eq!(plan(&desired, &observed(done, []), LIMITS, NOW), Plan::default());
    let failed = PoolStatus { build_generation: 3, ..failed_build(1) };
    let later = NOW + BACKOFF_MAX_MS;
    assert_eq!(plan(&desired, &observed(failed, []), LIMITS, later), Plan::default());
}

#[test]
fn a_failed_build_that_is_needed_is_tried_again_with_backoff() {
    let mut desired = desired([record(1, DesiredState::Running)]);
    let observed = observed(failed_build(2), []);
    let wait = plan(&desired, &observed, LIMITS, NOW + 1_999);
    assert_eq!((wait.actions, wait.next_unix_ms), (vec![], Some(NOW + 2_000)));
    let error = Some("no mirror".to_owned());
    assert_eq!(wait.waiting[&path(1)], Waiting::Image { error });
    assert_eq!(plan(&desired, &observed, LIMITS, NOW + 2_000).actions, [build(0)]);

    desired.pools.get_mut(&pool()).unwrap().build_generation = 1;
    assert_eq!(plan(&desired, &observed, LIMITS, NOW).actions, [build(1)], "a request is at once");
}

#[test]
fn more_than_the_quota_that_is_to_run_waits_and_what_runs_stays() {
    let quota = Quota { running: Some(2), ..Quota::default() };
    let mut all = desired([
        record(1, DesiredState::Running),
        record(2, DesiredState::Running),
        record(3, DesiredState::Running),
        record(4, DesiredState::Warm),
    ]);
    let tenant = pool().tenant;
    all.tenants.get_mut(&tenant).unwrap().quota = quota;
    let sleeping = || status(Phase::Sleeping { since_unix_ms: NOW });
    let statuses = [(1, sleeping()), (2, status(RUNNING)), (3, sleeping())];
    let plan = plan(&all, &observed(built(), statuses), LIMITS, NOW);
    assert_eq!(plan.actions, [start_action()], "one more, and no other");
    assert_eq!(plan.waiting[&path(3)], Waiting::Quota);
    assert_eq!(plan.waiting[&path(4)], Waiting::Quota);
    // One that stands still has its place already.
    let warm = status(Phase::Warm { since_unix_ms: NOW });
    let statuses = [(1, warm), (2, status(RUNNING)), (3, status(RUNNING))];
    let plan = super::plan(&all, &observed(built(), statuses), LIMITS, NOW);
    assert_eq!(plan.actions, [start_action()]);
}
