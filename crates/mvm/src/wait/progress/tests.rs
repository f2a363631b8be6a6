use mvm_core::death::{Cause, Death};
use mvm_core::spec::RestartPolicy;

use super::*;
use crate::samples;

const NOW: u64 = 1_000_000;

fn instance(state: State, generation: u64) -> InstanceView {
    InstanceView { state, generation, ..samples::instance("demo/hello/i-00000001") }
}

fn died(view: InstanceView, cause: Cause) -> InstanceView {
    let console_tail = vec!["last words".to_owned()];
    let death = Death { cause, at_unix_ms: NOW, exit: None, console_tail };
    InstanceView { last_death: Some(death), ..view }
}

fn pool(build: BuildState, build_generation: u64) -> PoolView {
    PoolView { build, build_generation, ..samples::pool("demo/hello") }
}

fn failed_build(at_unix_ms: u64) -> BuildState {
    BuildState::Failed { error: "no network".into(), at_unix_ms, failures: 1 }
}

/// One instance at generation 2 and its pool at build generation 3, submitted now.
fn judge(goal: &Goal, instances: Vec<InstanceView>, pools: Vec<PoolView>) -> Progress {
    let accepted = Accepted {
        instances: vec![InstanceTarget {
            path: "demo/hello/i-00000001".parse().unwrap(),
            generation: 2,
        }],
        pools: vec![PoolTarget {
            path: "demo/hello".parse().unwrap(),
            build_generation: 3,
            base_generation: 5,
        }],
        ..Accepted::default()
    };
    let request = Request { accepted: &accepted, goal, submitted_unix_ms: NOW };
    progress(&request, &Snapshot::new(instances, pools, true), NOW)
}

fn line(progress: Progress) -> String {
    match progress {
        Progress::Waiting { line, .. } => line,
        other => panic!("{other:?}"),
    }
}

fn failure(progress: Progress) -> Failure {
    match progress {
        Progress::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn running_counts_from_the_wishs_generation_on() {
    for (state, generation, activity, done) in [
        (State::Running, 2, None, true),
        (State::Running, 3, None, true),
        (State::Running, 1, None, false),
        (State::Running, 2, Some("stopping"), false),
        (State::Created, 2, Some("starting"), false),
        (State::Failed, 2, Some("starting"), false),
        (State::Failed, 1, None, false),
        (State::Stopped, 1, None, false),
    ] {
        let view =
            InstanceView { activity: activity.map(str::to_owned), ..instance(state, generation) };
        for goal in [Goal::Running, Goal::Settled] {
            let progress = judge(&goal, vec![view.clone()], vec![]);
            assert_eq!(progress == Progress::Done, done, "{goal:?} {view:?}");
            assert!(!matches!(progress, Progress::Failed(_)), "{goal:?} {view:?}");
        }
    }
}

#[test]
fn a_failure_of_this_wish_ends_the_wait_with_cause_and_console() {
    let view = died(instance(State::Failed, 2), Cause::GuestPanic);
    let failure = failure(judge(&Goal::Running, vec![view], vec![]));
    assert_eq!(failure.to_string(), "demo/hello/i-00000001 failed: guest kernel panic");
    assert_eq!(failure.console, ["last words"]);
    assert!(failure.hint.contains("tried again"), "{}", failure.hint);
    assert!(!failure.superseded);
}

#[test]
fn a_guest_that_powers_itself_off_at_once_is_a_failure_to_run() {
    let view = InstanceView {
        waiting: Some(Waiting::RestartPolicy { policy: RestartPolicy::OnFailure.into() }),
        ..died(instance(State::Stopped, 2), Cause::GuestShutdown)
    };
    let failure = failure(judge(&Goal::Settled, vec![view], vec![]));
    assert_eq!(failure.to_string(), "demo/hello/i-00000001 stopped: the guest powered off");
    assert!(!failure.hint.contains("tried again"), "{}", failure.hint);
}

#[test]
fn a_failed_start_is_said_to_be_tried_again_only_if_it_is() {
    // The view may be older than the loop's word that the restart policy leaves it so.
    for (restart, is_tried) in [
        (RestartPolicy::Never, false),
        (RestartPolicy::OnFailure, true),
        (RestartPolicy::Always, true),
    ] {
        let program = Some(ProgramFault::NotFound);
        let cause = Cause::StartFailed { error: "no app".into(), program };
        let view =
            InstanceView { restart: restart.into(), ..died(instance(State::Failed, 2), cause) };
        let failure = failure(judge(&Goal::Settled, vec![view], vec![]));
        assert_eq!(failure.hint.contains("tried again"), is_tried, "{restart}");
        assert_eq!(failure.program, program);
    }
}

#[test]
fn an_image_that_fails_ends_the_wait_unless_it_failed_before_the_request() {
    let waiting = Some(Waiting::Image { error: Some("no network".into()) });
    let view = InstanceView { waiting, ..instance(State::Created, 0) };
    let judge_image = |build| judge(&Goal::Running, vec![view.clone()], vec![pool(build, 3)]);
    let failed = failure(judge_image(failed_build(NOW)));
    assert_eq!(failed.to_string(), "the image of demo/hello cannot be built: no network");
    let earlier = line(judge_image(failed_build(NOW - 5_000)));
    assert!(earlier.contains("failed 5s ago, it is tried again"), "{earlier}");
    let building = line(judge_image(BuildState::Building { step: "fetching".into() }));
    assert_eq!(building, "demo/hello: building the image: fetching");
}

#[test]
fn stopped_means_at_rest() {
    let stopped = |state, activity: Option<&str>| InstanceView {
        desired: DesiredState::Stopped.into(),
        activity: activity.map(str::to_owned),
        ..instance(state, 1)
    };
    for state in [State::Created, State::Stopped, State::Failed] {
        assert_eq!(judge(&Goal::Stopped, vec![stopped(state, None)], vec![]), Progress::Done);
    }
    for view in [
        stopped(State::Running, None),
        stopped(State::Running, Some("stopping")),
        stopped(State::Failed, Some("starting")),
    ] {
        line(judge(&Goal::Stopped, vec![view], vec![]));
    }
}

#[test]
fn a_request_that_another_one_took_over_is_a_conflict() {
    let desired = |desired: DesiredState| InstanceView {
        desired: desired.into(),
        ..instance(State::Stopped, 2)
    };
    for (goal, views) in [
        (Goal::Running, vec![desired(DesiredState::Stopped)]),
        (Goal::Running, vec![desired(DesiredState::Destroyed)]),
        (Goal::Running, vec![]),
        (Goal::Stopped, vec![desired(DesiredState::Running)]),
        (Goal::Stopped, vec![]),
        (Goal::Built, vec![]),
    ] {
        assert!(failure(judge(&goal, views, vec![])).superseded, "{goal:?}");
    }
    assert_eq!(judge(&Goal::Settled, vec![], vec![]), Progress::Done);
}

#[test]
fn a_build_counts_from_its_generation_on() {
    let built = BuildState::Built { already_there: true, took_ms: 1 };
    let judge = |build, generation| judge(&Goal::Built, vec![], vec![pool(build, generation)]);
    assert_eq!(judge(built.clone(), 3), Progress::Done);
    line(judge(built, 2));
    line(judge(failed_build(NOW), 2));
    line(judge(BuildState::Idle, 3));
    line(judge(BuildState::Building { step: "x".into() }, 3));
    assert!(failure(judge(failed_build(0), 3)).to_string().contains("no network"));
}

#[test]
fn gone_means_that_nothing_is_left() {
    let here = || vec![instance(State::Running, 1)];
    let pools = || vec![pool(BuildState::Idle, 0)];
    let goal = Goal::Gone { tenant: None };
    line(judge(&goal, here(), pools()));
    line(judge(&goal, vec![], pools()));
    assert_eq!(judge(&goal, vec![], vec![]), Progress::Done);
    let with_tenant = Goal::Gone { tenant: Some("demo".parse().unwrap()) };
    assert_eq!(line(judge(&with_tenant, vec![], vec![])), "removing tenant demo");
}

#[test]
fn many_targets_are_counted_and_a_few_are_named() {
    let paths: Vec<InstancePath> =
        (0..9).map(|i| format!("demo/hello/i-0000000{i}").parse().unwrap()).collect();
    let target = |path: &InstancePath| InstanceTarget { path: path.clone(), generation: 1 };
    let accepted =
        Accepted { instances: paths.iter().map(target).collect(), ..Accepted::default() };
    let views = paths.iter().enumerate().map(|(i, path)| InstanceView {
        state: if i < 2 { State::Running } else { State::Created },
        waiting: (i >= 2).then_some(Waiting::StartSlot),
        generation: 1,
        ..samples::instance(&path.to_string())
    });
    let snapshot = Snapshot::new(views.collect(), vec![], false);
    let request = Request { accepted: &accepted, goal: &Goal::Running, submitted_unix_ms: NOW };
    let Progress::Waiting { line, items } = progress(&request, &snapshot, NOW) else { panic!() };
    let first = "demo/hello/i-00000002: created, waiting until others have started";
    assert_eq!(line, format!("2 of 9 running; {first}"));
    assert_eq!(items.len(), NAMED + 1);
    assert_eq!((items[0].as_str(), items[NAMED].as_str()), (first, "and 2 more"));
}

#[test]
fn reasons_are_told_in_words() {
    for (waiting, expected) in [
        (
            Waiting::Backoff { failures: 1, short_runs: 0, until_unix_ms: NOW + 4_000 },
            "failed once, tried again in 4s",
        ),
        (
            Waiting::Backoff { failures: 0, short_runs: 3, until_unix_ms: NOW + 4_000 },
            "it ended 3 times in a row, and is started again in 4s",
        ),
        (
            Waiting::Backoff { failures: 3, short_runs: 0, until_unix_ms: NOW + 100 },
            "failed 3 times in a row, tried again in 1s",
        ),
        (
            Waiting::Backoff { failures: 0, short_runs: 1, until_unix_ms: NOW + 900 },
            "it ended, and is started again in 1s",
        ),
        (
            Waiting::RestartPolicy { policy: RestartPolicy::Never.into() },
            "left so by its restart policy `never`",
        ),
    ] {
        assert_eq!(reason(&waiting, NOW).as_deref(), Some(expected));
    }
    assert_eq!(reason(&Waiting::Step, NOW), None);
}

#[test]
fn a_base_counts_from_its_request_on() {
    let base = |base_generation, failure: Option<&str>| PoolView {
        base_generation,
        base_failure: failure.map(str::to_owned),
        ..samples::pool("demo/hello")
    };
    let judge = |view| judge(&Goal::WarmedUp, vec![], vec![view]);
    for failure in [None, Some("of the one before")] {
        let before = line(judge(base(4, failure)));
        assert_eq!(before, "demo/hello: booting an instance for its base");
    }
    assert_eq!(judge(base(5, None)), Progress::Done);
    assert_eq!(judge(base(6, None)), Progress::Done);
    let failed = failure(judge(base(5, Some("it ended"))));
    assert_eq!(failed.message, "pool demo/hello gets no base: it ended");
    assert!(failed.hint.contains("--cold"), "{failed:?}");
}
