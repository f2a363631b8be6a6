//! Between running, warm and sleeping.

use super::*;
use crate::death::Cause;

#[test]
fn an_instance_falls_asleep_and_goes_on_from_its_snapshot() {
    let (status, effects) = run([path_to("running"), vec![sleep(1)]].concat());
    assert_eq!(effects, [Effect::Suspend { request: 1, hooks_ms: 1_000 }]);
    assert_eq!((status.state(), status.activity()), (State::Running, Some("falling asleep")));

    let (status, effects) = step(&status, saved(1), NOW);
    assert_eq!(effects, [Effect::Kill], "only what is complete replaces a VM");
    let (status, effects) = step(&status, exited(signalled(9)), NOW);
    assert_eq!(effects, [Effect::Release]);
    let (status, _) = step(&status, Event::Released { everything: false }, NOW);
    assert_eq!((status.state(), status.activity()), (State::Sleeping, None));
    assert_eq!(status.last_death, None, "nobody died");
    assert_eq!(status.memory, None, "nothing maps an image");

    let (status, effects) = step(&status, start(1), NOW);
    assert_eq!(effects, [Effect::Restore]);
    assert_eq!((status.state(), status.activity()), (State::Sleeping, Some("waking")));
    let (status, effects) = step(&status, Event::Launched(handle(2)), NOW);
    assert_eq!(effects, [Effect::Watch, Effect::Resume, Effect::Greet]);
    assert_eq!(status.snapshot, None, "it is used up before a vCPU runs");
    assert_eq!(status.memory, Some(ImageRef::Own { number: 1 }));
    let (status, _) = step(&status, Event::Ready, NOW);
    assert_eq!((status.state(), status.boots, status.wakes), (State::Running, 1, 1));
}

#[test]
fn a_failed_sleep_leaves_it_running() {
    let (status, effects) = step(&at("suspending"), sleep_failed(1), NOW + 9);
    assert_eq!(effects, [Effect::Resume, Effect::Rejoin]);
    assert_eq!((status.state(), status.activity()), (State::Running, None));
    let setback = status.setback.clone().unwrap();
    assert_eq!((setback.step, setback.failures), (RestStep::Sleep { request: 1 }, 1));

    let again = |status: &InstanceStatus, request| {
        step(&step(status, sleep(request), NOW).0, sleep_failed(request), NOW).0.setback.unwrap()
    };
    assert_eq!(again(&status, 1).failures, 2);
    assert_eq!(again(&status, 2).failures, 1, "another request begins anew");
}

#[test]
fn a_snapshot_that_is_refused_gives_way_to_a_boot_from_the_disk() {
    let (status, effects) = step(&at("waking"), restore_refused(), NOW);
    assert_eq!(effects, [Effect::Boot]);
    assert_eq!(status.snapshot, None);
    assert!(status.cold_boot.unwrap().reason.contains("VMM version"));
}

#[test]
fn a_host_that_cannot_restore_now_keeps_the_snapshot_for_a_while() {
    let mut status = at("waking");
    for failures in 1..RESTORE_ATTEMPTS {
        let (next, effects) = step(&status, boot_failed(), NOW);
        assert_eq!(effects, [Effect::Release]);
        assert_eq!(next.setback.as_ref().unwrap().failures, failures);
        let (next, _) = step(&next, Event::Released { everything: false }, NOW);
        assert_eq!(next.state(), State::Sleeping);
        status = step(&next, start(1), NOW).0;
    }
    let (status, effects) = step(&status, boot_failed(), NOW);
    assert_eq!(effects, [Effect::Boot]);
    assert!(status.cold_boot.is_some() && status.snapshot.is_none());
}

#[test]
fn an_agent_that_comes_back_takes_up_what_it_finds() {
    for (name, effects) in [
        ("warm", vec![Effect::Watch, Effect::Pause]),
        ("suspending", vec![Effect::Watch, Effect::Resume, Effect::Rejoin]),
        ("saved", vec![Effect::Watch, Effect::Kill]),
        ("woken", vec![Effect::Watch, Effect::Resume, Effect::Greet]),
    ] {
        assert_eq!(step(&at(name), Event::FoundAlive, NOW).1, effects, "{name}");
    }
    let (status, effects) = step(&at("saved"), found_gone(), NOW);
    assert_eq!(effects, [Effect::Release]);
    let (status, _) = step(&status, Event::Released { everything: false }, NOW);
    assert_eq!(status.state(), State::Sleeping, "what was saved is not lost");
    let (status, effects) = step(&at("waking"), found_gone(), NOW);
    assert_eq!(effects, [Effect::Restore]);
    assert!(status.snapshot.is_some());
    let (status, _) = step(&at("suspending"), found_gone(), NOW);
    assert_eq!(
        status.last_death.unwrap().cause,
        crate::death::classify(&VmExit { process: ProcessEnd::Unobserved, reason: None }, &[],)
    );
}

#[test]
fn a_wake_that_was_stopped_is_not_gone_on_with_by_an_agent_that_comes_back() {
    let (stopping, _) = step(&at("waking"), stop(2), NOW);
    let (status, effects) = step(&stopping, Event::Launched(handle(2)), NOW);
    assert_eq!(effects, [Effect::Watch, Effect::Kill]);
    assert!(status.snapshot.is_some());
    let (_, effects) = step(&status, Event::FoundAlive, NOW);
    assert_eq!(effects, [Effect::Watch, Effect::Kill], "its snapshot is not used up");
}

#[test]
fn a_warm_instance_resumes_and_shuts_down_in_order() {
    let (status, effects) = step(&at("warm"), start(1), NOW);
    assert_eq!(effects, [Effect::Resume, Effect::Greet]);
    assert_eq!((status.state(), status.activity()), (State::Warm, Some("resuming")));
    let (status, _) = step(&status, Event::Ready, NOW);
    assert_eq!((status.state(), status.boots, status.wakes), (State::Running, 1, 0));
    let (_, effects) = step(&at("warm"), stop(2), NOW);
    assert_eq!(effects, [Effect::Resume, Effect::Shutdown { grace_ms: GRACE_MS }]);
}

#[test]
fn stopping_a_sleeping_instance_gives_its_memory_up() {
    let (status, effects) = step(&at("sleeping"), stop(2), NOW);
    assert_eq!(effects, [Effect::Release]);
    assert_eq!(
        (status.snapshot.clone(), status.last_death.clone().unwrap().cause),
        (None, Cause::Operator,)
    );
    let (status, _) = step(&status, Event::Released { everything: false }, NOW);
    assert_eq!(status.state(), State::Stopped);
    assert_eq!(step(&status, start(3), NOW).1, [Effect::Boot]);
}

#[test]
fn what_is_kept_of_a_sleeper_is_given_back_when_it_is_stopped_on_the_way_to_sleep() {
    let (falling, _) = step(&at("saved"), exited(signalled(9)), NOW);
    assert_eq!(step(&falling, stop(2), NOW), (falling.clone(), vec![]), "one release at a time");
    let asleep = step(&falling, Event::Released { everything: false }, NOW).0;
    assert_eq!(step(&asleep, stop(2), NOW).1, [Effect::Release]);

    let failed = step(&falling, Event::ReleaseFailed, NOW).0;
    let (status, effects) = step(&failed, stop(2), NOW);
    assert_eq!((effects, status.snapshot), (vec![Effect::Release], None));
}

#[test]
fn a_new_instance_begins_from_the_snapshot_it_is_given_until_it_has_run() {
    let id: SnapshotId = "s-00000001".parse().unwrap();
    let origin = Some(id.clone());
    let start = Event::Start { generation: 1, revision: revision(1), boot_timeout_ms: 1, origin };
    let (status, effects) = run([start.clone()]);
    assert_eq!(effects, [Effect::Restore]);
    let failed = step(&status, boot_failed(), NOW).0;
    let failed = step(&failed, Event::Released { everything: false }, NOW).0;
    assert_eq!(failed.state(), State::Failed);
    assert_eq!(step(&failed, start.clone(), NOW).1, [Effect::Restore], "its disk is there, too");

    let (refused, effects) = step(&status, restore_refused(), NOW);
    assert_eq!(effects, [Effect::Boot]);
    let failed = step(&refused, boot_failed(), NOW).0;
    let failed = step(&failed, Event::Released { everything: false }, NOW).0;
    assert_eq!(step(&failed, start.clone(), NOW).1, [Effect::Boot], "it was given up for good");

    let (status, _) = step(&status, Event::Launched(handle(1)), NOW);
    assert_eq!(status.memory, Some(ImageRef::Shared { id }));
    let (status, _) = step(&status, Event::Ready, NOW);
    let (status, _) = step(&status, exited(powered_off()), NOW);
    let (status, _) = step(&status, Event::Released { everything: false }, NOW);
    assert_eq!(step(&status, start, NOW).1, [Effect::Boot]);
}
