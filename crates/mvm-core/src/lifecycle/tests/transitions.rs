//! Every documented transition, from the phase by name to the phase and the effects.

use super::*;

/// Steps from a named phase at [`NOW`] + 100.
fn then(name: &str, event: Event) -> (InstanceStatus, Vec<Effect>) {
    step(&at(name), event, NOW + 100)
}

fn stopping(kill_in_ms: u64, outcome: Outcome) -> Phase {
    Phase::Stopping { kill_unix_ms: NOW + 100 + kill_in_ms, outcome, is_forced: false }
}

fn killing(outcome: Outcome) -> Phase {
    Phase::Stopping { kill_unix_ms: NOW + 100 + KILL_RETRY_MS, outcome, is_forced: true }
}

fn releasing(outcome: Outcome) -> Phase {
    Phase::Releasing { retry_unix_ms: None, outcome }
}

#[test]
fn a_start_boots_with_a_deadline_and_fixes_the_revision() {
    let deadline_unix_ms = NOW + 100 + BOOT_TIMEOUT_MS;
    for name in ["created", "stopped", "failed"] {
        let (status, effects) = then(name, start(7));
        assert_eq!(
            status.phase,
            Phase::Starting { deadline_unix_ms, begin: StartFrom::Boot },
            "{name}"
        );
        assert_eq!((status.generation, effects), (7, vec![Effect::Boot]), "{name}");
    }
    let other =
        Event::Start { generation: 8, revision: revision(2), boot_timeout_ms: 1, origin: None };
    assert_eq!(then("stopped", other).0.revision, Some(revision(1)));
}

#[test]
fn the_way_up() {
    let (status, effects) = then("starting", Event::Launched(handle(5)));
    assert_eq!(status.vm, Some(handle(5)));
    assert_eq!(effects, [Effect::Watch, Effect::Greet]);

    let (status, effects) = then("launched", Event::Ready);
    assert_eq!(status.phase, Phase::Running { since_unix_ms: NOW + 100 });
    assert_eq!((status.boots, effects), (1, vec![]));
}

#[test]
fn a_start_that_fails_is_cleared_away() {
    let (status, effects) = then("starting", boot_failed());
    assert_eq!((status.phase, effects), (releasing(Outcome::Failed), vec![Effect::Release]));

    let (status, effects) = then("launched", boot_failed());
    let asked = Effect::Shutdown { grace_ms: LAST_GRACE_MS };
    let asking = stopping(LAST_GRACE_MS, Outcome::Failed);
    assert_eq!((status.phase, effects), (asking, vec![asked]), "its guest may be up");
}

#[test]
fn a_boot_timeout_ends_the_vm_or_waits_for_the_launch_to_report() {
    let late = NOW + BOOT_TIMEOUT_MS;
    let asked = Effect::Shutdown { grace_ms: LAST_GRACE_MS };
    for (name, expected) in [("launched", vec![asked]), ("starting", vec![])] {
        let (status, effects) = step(&at(name), Event::Tick, late);
        let kill_unix_ms = late + LAST_GRACE_MS;
        let (outcome, is_forced) = (Outcome::Failed, false);
        assert_eq!(status.phase, Phase::Stopping { kill_unix_ms, outcome, is_forced });
        assert_eq!(effects, expected, "{name}");
        assert_eq!(step(&status, Event::ShutdownFailed, late).1.is_empty(), name == "starting");
    }
}

#[test]
fn a_stop_asks_the_guest_first_however_far_its_start_is() {
    let (status, effects) = then("running", stop(9));
    assert_eq!((status.phase, status.generation), (stopping(GRACE_MS, Outcome::Stopped), 9));
    assert_eq!(effects, [Effect::Shutdown { grace_ms: GRACE_MS }]);

    let at_once = Event::Stop { grace_ms: 0, generation: 9 };
    assert_eq!(then("running", at_once).1, [Effect::Kill]);
    assert_eq!(then("starting", stop(9)).1, []);
    assert_eq!(then("starting", destroy()).1, []);
    let asked = [Effect::Shutdown { grace_ms: GRACE_MS }];
    for name in ["launched", "woken"] {
        assert_eq!(then(name, stop(9)).1, asked, "{name}");
        assert_eq!(then(name, destroy()).1, asked, "{name}");
    }
    let resumes = [path_to("warm"), vec![start(1)]].concat();
    let (status, effects) = run([resumes, vec![stop(9)]].concat());
    assert_eq!(effects, asked, "{status:?}");
}

#[test]
fn a_stop_of_what_falls_asleep_gives_the_sleep_up_and_asks_the_guest() {
    let asked = [Effect::Resume, Effect::Shutdown { grace_ms: GRACE_MS }];
    let (status, effects) = then("suspending", stop(9));
    assert_eq!(
        (status.phase.clone(), status.generation),
        (stopping(GRACE_MS, Outcome::Stopped), 9)
    );
    assert_eq!(effects, asked);
    assert_eq!(then("suspending", destroy()).1, asked);
    let at_once = Event::Stop { grace_ms: 0, generation: 9 };
    assert_eq!(then("suspending", at_once).1, [Effect::Kill]);
    for late in [saved(1), sleep_failed(1)] {
        assert_eq!(step(&status, late, NOW + 200), (status.clone(), vec![]), "nobody wants it");
    }
}

#[test]
fn a_launch_that_reports_after_the_stop_is_killed() {
    let (status, effects) = then("stopping before launch", Event::Launched(handle(4)));
    assert_eq!((status.vm, effects), (Some(handle(4)), vec![Effect::Watch, Effect::Kill]));

    let (status, effects) = then("stopping before launch", boot_failed());
    assert_eq!((status.phase, effects), (releasing(Outcome::Stopped), vec![Effect::Release]));
    assert_eq!(status.last_death, None, "nothing ran, so nothing died");
}

#[test]
fn a_guest_that_does_not_shut_down_is_killed_until_it_is_gone() {
    let asked = at("stopping");
    let kill = asked.deadline_unix_ms().unwrap();
    let (status, effects) = step(&asked, Event::Tick, kill);
    assert_eq!(effects, [Effect::Kill]);
    let (status, effects) = step(&status, Event::Tick, kill + KILL_RETRY_MS - 1);
    assert_eq!(effects, []);
    assert_eq!(step(&status, Event::Tick, kill + KILL_RETRY_MS).1, [Effect::Kill]);

    let (status, effects) = then("stopping", Event::ShutdownFailed);
    assert_eq!(status.phase, killing(Outcome::Stopped));
    assert_eq!(effects, [Effect::Kill]);
}

#[test]
fn a_second_wish_brings_the_end_forward_and_never_back() {
    let with = |grace_ms| Event::Stop { grace_ms, generation: 3 };
    let first = at("stopping");
    let kill = first.deadline_unix_ms();

    let (longer, effects) = then("stopping", with(GRACE_MS * 2));
    assert_eq!((longer.deadline_unix_ms(), effects), (kill, vec![]));

    let (shorter, effects) = then("stopping", with(2_000));
    assert_eq!((shorter.deadline_unix_ms(), effects), (Some(NOW + 2_100), vec![]));

    let (now, effects) = then("stopping", with(0));
    assert_eq!(now.phase, killing(Outcome::Stopped));
    assert_eq!(effects, [Effect::Kill]);
    let (again, effects) = step(&now, with(0), NOW + 101);
    assert_eq!((again, effects), (now, vec![]), "one kill at a time");
}

#[test]
fn a_destroy_overtakes_a_stop_and_a_stop_never_a_destroy() {
    let outcome = |status: &InstanceStatus| match status.phase {
        Phase::Stopping { outcome, .. } | Phase::Releasing { outcome, .. } => outcome,
        _ => panic!("{status:?}"),
    };
    for name in ["stopping", "stopping before launch", "stopping to fail"] {
        assert_eq!(outcome(&then(name, destroy()).0), Outcome::Destroyed, "{name}");
    }
    for name in ["created", "stopped", "failed"] {
        let (status, effects) = then(name, destroy());
        assert_eq!(outcome(&status), Outcome::Destroyed, "{name}");
        assert_eq!(effects, [Effect::ReleaseAll], "{name}");
    }
    for name in ["releasing", "releasing to fail"] {
        let (status, effects) = then(name, destroy());
        assert_eq!((outcome(&status), effects), (Outcome::Destroyed, vec![]), "{name}");
        let failed = step(&then(name, Event::ReleaseFailed).0, destroy(), NOW).1;
        assert_eq!(failed, [Effect::ReleaseAll], "{name}: none is under way");
    }
    for name in ["stopping to go", "releasing to go"] {
        assert_eq!(outcome(&then(name, stop(9)).0), Outcome::Destroyed, "{name}");
    }
}

#[test]
fn a_stop_takes_a_failed_instance_out_of_failure() {
    let (status, effects) = then("failed", stop(9));
    assert_eq!((&status.phase, effects), (&Phase::Stopped, vec![]));
    assert_eq!((status.generation, status.failures), (9, 0));
    assert!(status.last_death.is_some(), "why it failed stays on record");

    let (status, effects) = then("releasing to fail", stop(9));
    assert_eq!((status.phase, effects), (releasing(Outcome::Stopped), vec![]));
}

#[test]
fn a_release_that_fails_is_tried_again() {
    for (name, effect) in [("releasing", Effect::Release), ("releasing to go", Effect::ReleaseAll)]
    {
        let (status, effects) = then(name, Event::ReleaseFailed);
        assert_eq!(effects, []);
        let due = NOW + 100 + RELEASE_RETRY_MS;
        assert_eq!(status.deadline_unix_ms(), Some(due));
        assert_eq!(step(&status, Event::Tick, due - 1), (status.clone(), vec![]));
        let (status, effects) = step(&status, Event::Tick, due);
        assert_eq!((status.deadline_unix_ms(), effects), (None, vec![effect]));
    }
}

#[test]
fn a_release_ends_in_what_the_end_led_to() {
    let part = || Event::Released { everything: false };
    for (name, phase, failures) in
        [("releasing", Phase::Stopped, 0), ("releasing to fail", Phase::Failed, 1)]
    {
        let (status, effects) = then(name, part());
        assert_eq!((status.phase, status.failures, effects), (phase, failures, vec![]));
    }
    let (status, effects) = then("releasing to go", Event::Released { everything: true });
    assert_eq!((status.phase, effects), (Phase::Destroyed, vec![Effect::Forget]));
    let all = (at("releasing to go"), vec![Effect::ReleaseAll]);
    assert_eq!(then("releasing to go", part()), all, "it was begun before the wish to destroy it");
}

#[test]
fn an_agent_that_restarts_takes_up_a_living_vm() {
    for (name, expected) in [
        ("launched", vec![Effect::Watch, Effect::Greet]),
        ("running", vec![Effect::Watch, Effect::Rejoin]),
    ] {
        assert_eq!(then(name, Event::FoundAlive).1, expected, "{name}");
    }
    let late = NOW + 10 * GRACE_MS;
    for name in ["stopping", "stopping to fail", "stopping to go"] {
        let (status, effects) = step(&at(name), Event::FoundAlive, late);
        let asked = Effect::Shutdown { grace_ms: LAST_GRACE_MS };
        assert_eq!(effects, [Effect::Watch, Effect::Resume, asked], "{name}");
        assert_eq!(status.deadline_unix_ms(), Some(late + LAST_GRACE_MS), "{name}");
    }
    let patient = Event::Stop { grace_ms: 90_000, generation: 2 };
    let asked = run([path_to("running"), vec![patient]].concat()).0;
    let left = asked.deadline_unix_ms().unwrap() - (NOW + 20_000);
    let (status, effects) = step(&asked, Event::FoundAlive, NOW + 20_000);
    let shutdown = Effect::Shutdown { grace_ms: left };
    assert_eq!(effects, [Effect::Watch, Effect::Resume, shutdown]);
    assert_eq!(status, asked, "the guest keeps the rest of its time");

    let killed = then("stopping", Event::ShutdownFailed).0;
    assert_eq!(step(&killed, Event::FoundAlive, late).1, [Effect::Watch, Effect::Kill]);
}

#[test]
fn an_agent_that_restarts_goes_on_without_a_vm() {
    for (name, phase, effect) in [
        ("running", releasing(Outcome::Failed), Effect::Release),
        ("launched", releasing(Outcome::Failed), Effect::Release),
        ("stopping", releasing(Outcome::Stopped), Effect::Release),
        ("stopping before launch", releasing(Outcome::Stopped), Effect::Release),
        ("stopping to go", releasing(Outcome::Destroyed), Effect::ReleaseAll),
        ("releasing", releasing(Outcome::Stopped), Effect::Release),
        ("releasing to go", releasing(Outcome::Destroyed), Effect::ReleaseAll),
        ("destroyed", Phase::Destroyed, Effect::Forget),
    ] {
        let (status, effects) = then(name, found_gone());
        assert_eq!((status.phase, effects), (phase, vec![effect]), "{name}");
    }
    assert_eq!(then("starting", found_gone()).1, [Effect::Boot]);
    for name in ["created", "stopped", "failed"] {
        assert_eq!(then(name, found_gone()), (at(name), vec![]), "{name}");
    }
}

#[test]
fn records_that_could_not_be_removed_are_removed_by_the_next_wish() {
    assert_eq!(then("destroyed", destroy()), (at("destroyed"), vec![Effect::Forget]));
}

#[test]
fn the_time_without_an_agent_is_not_counted_against_a_start() {
    let late = NOW + 10 * BOOT_TIMEOUT_MS;
    for (name, found) in [("starting", found_gone()), ("launched", Event::FoundAlive)] {
        let (status, _) = step(&at(name), found, late);
        assert_eq!(status.deadline_unix_ms(), Some(late + RESUMED_START_MS), "{name}");
    }
}

#[test]
fn what_does_not_concern_a_phase_changes_nothing() {
    for (name, event) in [
        ("starting", Event::Ready),
        ("starting", exited(powered_off())),
        ("running", boot_failed()),
        ("running", Event::ShutdownFailed),
        ("running", start(9)),
        ("running", Event::Released { everything: true }),
        ("stopping", Event::Ready),
        ("stopping", boot_failed()),
        ("stopping", start(9)),
        ("releasing", start(9)),
        ("releasing", exited(powered_off())),
        ("releasing", stop(9)),
        ("created", stop(9)),
        ("stopped", stop(9)),
        ("destroyed", start(9)),
        ("destroyed", stop(9)),
    ] {
        assert_eq!(then(name, event.clone()), (at(name), vec![]), "{name}: {event:?}");
    }
}

#[test]
fn a_run_has_ended_before_what_it_held_is_given_back() {
    let ended = ["stopping to fail", "releasing", "releasing to fail", "stopped", "failed"];
    for name in PHASES {
        assert_eq!(at(name).has_ended(), ended.contains(&name), "{name}");
    }
}
