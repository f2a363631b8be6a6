//! Every death has the right cause, and failures in a row are counted.

use super::*;
use crate::death::Cause;
use crate::guest::ExitStatus;

fn cause(events: Vec<Event>) -> Cause {
    run(events).0.last_death.expect("nothing died").cause
}

fn panics() -> Event {
    let tail = vec!["Kernel panic - not syncing: Attempted to kill init!".to_owned()];
    Event::Exited { exit: powered_off(), console_tail: tail }
}

fn with(name: &str, events: impl IntoIterator<Item = Event>) -> Vec<Event> {
    path_to(name).into_iter().chain(events).collect()
}

#[test]
fn an_operators_stop_is_the_cause_however_the_vm_ends() {
    for exit in [powered_off(), signalled(9)] {
        assert_eq!(cause(with("stopping", [exited(exit)])), Cause::Operator);
    }
    assert_eq!(cause(with("launched", [stop(2), exited(signalled(9))])), Cause::Operator);
    assert_eq!(cause(with("stopping", [found_gone()])), Cause::Operator);
}

#[test]
fn what_a_running_guest_does_is_told_apart() {
    for (event, expected, outcome) in [
        (exited(powered_off()), Cause::GuestShutdown, Outcome::Stopped),
        (panics(), Cause::GuestPanic, Outcome::Failed),
        (exited(signalled(9)), Cause::KilledFromOutside { signal: 9 }, Outcome::Failed),
        (exited(signalled(11)), Cause::VmmCrash, Outcome::Failed),
        (found_gone(), Cause::Unobserved, Outcome::Failed),
    ] {
        let (status, _) = run(with("running", [event]));
        assert_eq!(status.phase, Phase::Releasing { retry_unix_ms: None, outcome });
        assert_eq!(status.last_death.unwrap().cause, expected);
    }
}

#[test]
fn a_guest_that_powers_off_before_it_answers_has_failed() {
    let (status, _) = run(with("launched", [exited(powered_off())]));
    let outcome = Outcome::Failed;
    assert_eq!(status.phase, Phase::Releasing { retry_unix_ms: None, outcome });
    assert_eq!(status.last_death.unwrap().cause, Cause::GuestShutdown);
}

fn main_exited(code: i32) -> Event {
    Event::MainExited(ExitStatus::Exited { code })
}

#[test]
fn the_end_of_the_main_process_is_the_cause_however_the_vm_ends() {
    let killed = ExitStatus::Signaled { signal: 9, out_of_memory: false };
    for (main, expected, outcome) in [
        (main_exited(0), Cause::Exited { code: 0 }, Outcome::Stopped),
        (main_exited(7), Cause::Exited { code: 7 }, Outcome::Failed),
        (
            Event::MainExited(killed),
            Cause::Signaled { signal: 9, out_of_memory: false },
            Outcome::Failed,
        ),
    ] {
        for end in [exited(powered_off()), exited(signalled(9)), panics(), found_gone()] {
            let (status, effects) = run(with("running", [main.clone()]));
            assert_eq!(effects, [Effect::Shutdown { grace_ms: MAIN_ENDED_GRACE_MS }]);
            assert!(status.deadline_unix_ms().is_some());
            let (status, _) = run(with("running", [main.clone(), end]));
            assert_eq!(status.phase, Phase::Releasing { retry_unix_ms: None, outcome });
            assert_eq!(status.last_death.unwrap().cause, expected);
        }
    }
}

#[test]
fn an_operators_stop_is_the_cause_and_the_exit_code_is_kept() {
    let (status, effects) = run(with("stopping", [main_exited(143)]));
    assert!(effects.is_empty());
    let end = status.main_end.unwrap();
    assert_eq!((end.status.shell_code(), end.asked), (143, true));
    let cause = cause(with("stopping", [main_exited(143), exited(powered_off())]));
    assert_eq!(cause, Cause::Operator);
}

#[test]
fn the_exit_code_of_an_earlier_run_does_not_count_for_the_next() {
    let released = Event::Released { everything: false };
    let events = [main_exited(7), exited(powered_off()), released, start(2)];
    let (status, _) = run(with("running", events));
    assert!(status.last_death.is_some());
    assert_eq!(status.main_end, None);
}

#[test]
fn a_main_process_that_ends_after_the_operator_gave_it_time_is_left_that_time_by_a_new_agent() {
    let (status, effects) = run(with("running", [main_exited(7), Event::FoundAlive]));
    let expected = [Effect::Watch, Effect::Resume, Effect::Shutdown { grace_ms: LAST_GRACE_MS }];
    assert_eq!(effects, expected, "{status:?}");
}

#[test]
fn a_host_reboot_is_the_cause_of_what_ran() {
    let exit = VmExit { process: ProcessEnd::Unobserved, reason: None };
    let gone = || Event::FoundGone { exit, host_rebooted: true, console_tail: vec![] };
    for name in ["launched", "running"] {
        assert_eq!(cause(with(name, [gone()])), Cause::HostReboot, "{name}");
    }
}

#[test]
fn a_boot_timeout_keeps_its_cause_after_the_kill() {
    let at_the_limit = NOW + BOOT_TIMEOUT_MS;
    let timed_out = step(&at("launched"), Event::Tick, at_the_limit).0;
    for between in [None, Some(stop(2)), Some(Event::FoundAlive)] {
        let mut status = timed_out.clone();
        if let Some(event) = between {
            status = step(&status, event, at_the_limit + 1).0;
        }
        let tail = vec!["last words".to_owned()];
        let end = Event::Exited { exit: signalled(9), console_tail: tail.clone() };
        let death = step(&status, end, at_the_limit + 2).0.last_death.unwrap();
        assert_eq!(death.cause, Cause::BootTimeout);
        assert_eq!(
            (death.at_unix_ms, death.exit.clone()),
            (at_the_limit, Some(signalled(9).into()))
        );
        assert_eq!(death.console_tail, tail);
    }
}

#[test]
fn a_start_that_failed_keeps_its_error() {
    let error = "no tap".to_owned();
    let failed = Cause::StartFailed { error, program: None };
    assert_eq!(cause(path_to("failed")), failed);
    assert_eq!(cause(with("stopping to fail", [exited(signalled(9))])), failed);
}

#[test]
fn a_guest_that_ended_by_itself_explains_why_it_did_not_answer() {
    assert_eq!(cause(with("stopping to fail", [panics()])), Cause::GuestPanic);
    let by_itself = [Event::ShutdownFailed, exited(powered_off())];
    assert_eq!(cause(with("stopping to fail", by_itself)), Cause::GuestShutdown);
    let asked = cause(with("stopping to fail", [exited(powered_off())]));
    let failed = Cause::StartFailed { error: "no tap".to_owned(), program: None };
    assert_eq!(asked, failed, "it was asked to");
    let timed_out = step(&at("launched"), Event::Tick, NOW + BOOT_TIMEOUT_MS).0;
    let death = step(&timed_out, panics(), NOW + BOOT_TIMEOUT_MS).0.last_death.unwrap();
    assert_eq!(death.cause, Cause::GuestPanic);
}

/// Runs once for this long, dies, and is released.
fn crash(status: &InstanceStatus, after_ms: u64) -> InstanceStatus {
    let mut status = status.clone();
    for (at, event) in [
        (NOW, start(1)),
        (NOW, Event::Launched(handle(1))),
        (NOW, Event::Ready),
        (NOW + after_ms, exited(signalled(11))),
        (NOW + after_ms, Event::Released { everything: false }),
    ] {
        status = step(&status, event, at).0;
    }
    status
}

#[test]
fn failures_in_a_row_are_counted_until_a_run_is_stable() {
    let mut status = InstanceStatus::default();
    for failures in 1..=3 {
        status = crash(&status, STABLE_MS - 1);
        assert_eq!((status.failures, status.boots), (failures, u64::from(failures)));
    }
    let status = crash(&status, STABLE_MS);
    assert_eq!((status.failures, &status.phase), (1, &Phase::Failed));
}

#[test]
fn a_wanted_end_ends_a_series_of_failures() {
    let failed = crash(&InstanceStatus::default(), 1);
    for end in [vec![stop(2), exited(signalled(9))], vec![exited(powered_off())]] {
        let up = [start(2), Event::Launched(handle(2)), Event::Ready];
        let released = [Event::Released { everything: false }];
        let events = up.into_iter().chain(end).chain(released);
        let status = events.fold(failed.clone(), |status, event| step(&status, event, NOW).0);
        assert_eq!((status.failures, &status.phase), (0, &Phase::Stopped));
    }
}

#[test]
fn runs_that_soon_end_with_success_are_counted_until_one_is_stable_or_asked_for() {
    let run_for = |status: &InstanceStatus, ms: u64, generation: u64, end: Event| {
        let released = Event::Released { everything: false };
        let events = [
            (NOW, start(generation)),
            (NOW, Event::Launched(handle(1))),
            (NOW, Event::Ready),
            (NOW + ms, end),
            (NOW + ms, exited(powered_off())),
            (NOW + ms, released),
        ];
        events.into_iter().fold(status.clone(), |status, (at, event)| step(&status, event, at).0)
    };
    let mut status = InstanceStatus::default();
    for short_runs in 1..=3 {
        status = run_for(&status, 100, 1, main_exited(0));
        assert_eq!((status.short_runs, status.failures), (short_runs, 0));
        assert_eq!(status.phase, Phase::Stopped);
    }
    let mixed = run_for(&status, 100, 1, main_exited(1));
    assert_eq!((mixed.short_runs, mixed.failures), (3, 1), "a failure in between ends nothing");
    let powered_off = run_for(&status, 100, 1, exited(powered_off()));
    assert_eq!(powered_off.short_runs, 4);
    assert_eq!(run_for(&status, STABLE_MS, 1, main_exited(0)).short_runs, 1);
    assert_eq!(run_for(&status, 100, 2, main_exited(0)).short_runs, 1, "somebody asked");
    let json = serde_json::to_string(&status).unwrap();
    assert_eq!(serde_json::from_str::<InstanceStatus>(&json).unwrap(), status);
}
