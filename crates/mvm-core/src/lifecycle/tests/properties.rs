//! Invariants that hold whatever happens in whatever order, also what a faithful host never does.

use proptest::prelude::*;

use super::*;
use crate::guest::ExitStatus;
use crate::property::cases;

fn any_exit() -> impl Strategy<Value = VmExit> {
    prop_oneof![Just(powered_off()), Just(signalled(9)), Just(signalled(11))]
}

fn any_event() -> impl Strategy<Value = Event> {
    let grace = prop_oneof![Just(0), Just(500), Just(GRACE_MS)];
    prop_oneof![
        3 => (1..9u64, 1..3u8).prop_map(|(generation, number)| Event::Start {
            generation,
            revision: revision(number),
            boot_timeout_ms: BOOT_TIMEOUT_MS,
            origin: None,
        }),
        2 => (1..4u64).prop_map(sleep),
        2 => Just(Event::Pause),
        2 => (1..9u64).prop_map(saved),
        1 => (1..4u64).prop_map(sleep_failed),
        1 => Just(restore_refused()),
        1 => Just(Event::PauseFailed { error: "no answer".to_owned() }),
        1 => Just(Event::ResumeFailed { error: "no answer".to_owned() }),
        2 => (grace.clone(), 1..9u64)
            .prop_map(|(grace_ms, generation)| Event::Stop { grace_ms, generation }),
        1 => grace.prop_map(|grace_ms| Event::Destroy { grace_ms }),
        4 => (1..9u32).prop_map(|pid| Event::Launched(handle(pid))),
        4 => Just(Event::Ready),
        2 => Just(boot_failed()),
        1 => Just(Event::ShutdownFailed),
        2 => (0..2).prop_map(|code| Event::MainExited(ExitStatus::Exited { code })),
        3 => any_exit().prop_map(exited),
        4 => any::<bool>().prop_map(|everything| Event::Released { everything }),
        1 => Just(Event::ReleaseFailed),
        1 => Just(Event::FoundAlive),
        1 => (any_exit(), any::<bool>()).prop_map(|(exit, host_rebooted)| Event::FoundGone {
            exit,
            host_rebooted,
            console_tail: vec![],
        }),
        3 => Just(Event::Tick),
        1 => Just(Event::LacksSpace),
    ]
}

/// Events with the milliseconds that pass before each.
fn any_history() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let pause = prop_oneof![3 => 0..50u64, 1 => Just(GRACE_MS), 1 => Just(BOOT_TIMEOUT_MS)];
    prop::collection::vec((pause, any_event()), 0..60)
}

/// Every step of a history: the time, the status before, the event, the status after, the effects.
fn steps(
    history: Vec<(u64, Event)>,
) -> Vec<(u64, InstanceStatus, Event, InstanceStatus, Vec<Effect>)> {
    let mut now = NOW;
    let mut status = InstanceStatus::default();
    let mut steps = vec![];
    let mut release = None;
    for (pause, event) in history {
        now += pause;
        // What was never launched cannot be found alive.
        if event == Event::FoundAlive && status.vm.is_none() {
            continue;
        }
        // Nor does a release tell more than it was begun for, nor one that is not under way anything.
        let event = match event {
            Event::Released { .. } => match release {
                Some(everything) => Event::Released { everything },
                None => continue,
            },
            event => event,
        };
        if matches!(event, Event::Released { .. } | Event::ReleaseFailed | Event::FoundGone { .. })
        {
            release = None;
        }
        let (next, effects) = step(&status, event.clone(), now);
        for effect in &effects {
            if let Effect::Release | Effect::ReleaseAll = effect {
                assert_eq!(release, None, "two releases at once");
                release = Some(*effect == Effect::ReleaseAll);
            }
        }
        steps.push((now, status, event, next.clone(), effects));
        status = next;
    }
    steps
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn a_vm_is_recorded_only_while_one_may_run(history in any_history()) {
        for (_, _, _, status, effects) in steps(history) {
            match status.phase {
                Phase::Running { .. } | Phase::Warm { .. } | Phase::Suspending { .. } => {
                    prop_assert!(status.vm.is_some());
                }
                Phase::Starting { .. } | Phase::Stopping { .. } => {}
                _ => prop_assert_eq!(&status.vm, &None),
            }
            let touches_the_vm = effects.iter().any(|effect| !matches!(
                effect,
                Effect::Boot | Effect::Restore | Effect::Release | Effect::ReleaseAll | Effect::Forget
            ));
            prop_assert!(!touches_the_vm || status.vm.is_some(), "{effects:?}");
        }
    }

    #[test]
    fn one_boot_at_a_time_and_only_without_a_vm(history in any_history()) {
        let mut boot_under_way = false;
        for (_, _, event, status, effects) in steps(history) {
            if matches!(
                event,
                Event::Launched(_)
                    | Event::BootFailed { .. }
                    | Event::RestoreRefused { .. }
                    | Event::FoundGone { .. }
            ) {
                boot_under_way = false;
            }
            if effects.contains(&Effect::Boot) || effects.contains(&Effect::Restore) {
                prop_assert!(!boot_under_way);
                prop_assert_eq!(&status.vm, &None);
                let is_starting = matches!(status.phase, Phase::Starting { .. });
                prop_assert!(is_starting);
                boot_under_way = true;
            }
        }
    }

    #[test]
    fn vcpus_run_only_once_their_snapshot_is_used_up(history in any_history()) {
        for (_, before, event, after, effects) in steps(history) {
            if effects.contains(&Effect::Resume) || matches!(after.phase, Phase::Running { .. }) {
                prop_assert_eq!(&after.snapshot, &None);
            }
            if after.snapshot.is_some() && before.snapshot.is_none() {
                let was_saved = matches!(event, Event::Saved(_));
                prop_assert!(was_saved);
                prop_assert_eq!(effects, vec![Effect::Kill]);
            }
            if matches!(after.phase, Phase::Sleeping { .. }) {
                prop_assert!(after.snapshot.is_some() && after.vm.is_none());
            }
        }
    }

    #[test]
    fn an_instance_goes_only_after_everything_was_given_back(history in any_history()) {
        let mut asked = false;
        for (_, before, event, after, effects) in steps(history) {
            if after.phase == Phase::Destroyed && before.phase != Phase::Destroyed {
                prop_assert!(asked);
                prop_assert_eq!(event, Event::Released { everything: true });
                prop_assert_eq!(&effects, &[Effect::Forget]);
            }
            if before.phase == Phase::Destroyed {
                prop_assert_eq!(after.phase, Phase::Destroyed, "there is no way back");
            }
            asked |= effects.contains(&Effect::ReleaseAll);
        }
    }

    #[test]
    fn a_wish_that_is_repeated_changes_nothing(history in any_history()) {
        for (now, _, event, after, _) in steps(history) {
            let is_wish = matches!(
                event,
                Event::Start { .. }
                    | Event::Stop { .. }
                    | Event::Destroy { .. }
                    | Event::Sleep { .. }
                    | Event::Pause
            );
            if is_wish && after.phase != Phase::Destroyed {
                for later in [now, now + 300, now + STABLE_MS] {
                    let again = step(&after, event.clone(), later);
                    prop_assert_eq!(again, (after.clone(), vec![]));
                }
            }
        }
    }

    #[test]
    fn the_first_revision_stays(history in any_history()) {
        for (_, before, _, after, _) in steps(history) {
            if before.revision.is_some() {
                prop_assert_eq!(before.revision, after.revision);
            }
        }
    }
}
