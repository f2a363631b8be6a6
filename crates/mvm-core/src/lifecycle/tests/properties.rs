//! Invariants that hold whatever happens in whatever order, also what a faithful host never does.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::strategy::{Union, ValueTree};
use proptest::test_runner::TestRunner;

use super::*;
use crate::death::ProgramFault;
use crate::guest::ExitStatus;
use crate::property::{cases, kinds};

fn any_exit() -> impl Strategy<Value = VmExit> {
    prop_oneof![Just(powered_off()), Just(signalled(9)), Just(signalled(11))]
}

kinds! {
    Event:
    Start, Pause, Sleep, Stop, Destroy, Launched, Ready, BootFailed, MainExited, ShutdownFailed, Exited,
    Released, ReleaseFailed, FoundAlive, FoundGone, PauseFailed, ResumeFailed, Saved, SleepFailed,
    RestoreRefused, LacksSpace, Tick,
}

fn any_image_ref() -> impl Strategy<Value = ImageRef> {
    let id = origin();
    prop_oneof![
        (1..9u64).prop_map(|number| ImageRef::Own { number }),
        Just(ImageRef::Shared { id }),
    ]
}

fn any_main_end() -> impl Strategy<Value = ExitStatus> {
    prop_oneof![
        (0..2).prop_map(|code| ExitStatus::Exited { code }),
        Just(ExitStatus::Signaled { signal: 9, out_of_memory: true }),
    ]
}

/// How often a kind comes: what leads somewhere, more often.
fn weight(kind: Kind) -> u32 {
    use Kind::*;
    match kind {
        Launched | Ready | Released => 4,
        Start | Exited | Tick => 3,
        Sleep | Pause | Saved | Stop | BootFailed | MainExited => 2,
        Destroy | ShutdownFailed | ReleaseFailed | FoundAlive | FoundGone | PauseFailed
        | ResumeFailed | SleepFailed | RestoreRefused | LacksSpace => 1,
    }
}

fn events_of(kind: Kind) -> BoxedStrategy<Event> {
    let grace = || prop_oneof![Just(0), Just(500), Just(GRACE_MS)];
    let error = || "no answer".to_owned();
    match kind {
        Kind::Start => {
            let origin = proptest::option::of(Just(origin()));
            (1..9u64, 1..3u8, origin)
                .prop_map(|(generation, number, origin)| Event::Start {
                    generation,
                    revision: revision(number),
                    boot_timeout_ms: BOOT_TIMEOUT_MS,
                    origin,
                })
                .boxed()
        }
        Kind::Pause => Just(Event::Pause).boxed(),
        Kind::Sleep => (1..4u64).prop_map(sleep).boxed(),
        Kind::Stop => (grace(), 1..9u64)
            .prop_map(|(grace_ms, generation)| Event::Stop { grace_ms, generation })
            .boxed(),
        Kind::Destroy => grace().prop_map(|grace_ms| Event::Destroy { grace_ms }).boxed(),
        Kind::Launched => (1..9u32).prop_map(|pid| Event::Launched(handle(pid))).boxed(),
        Kind::Ready => Just(Event::Ready).boxed(),
        Kind::BootFailed => proptest::option::of(Just(ProgramFault::NotFound))
            .prop_map(move |program| Event::BootFailed { error: error(), program })
            .boxed(),
        Kind::MainExited => any_main_end().prop_map(Event::MainExited).boxed(),
        Kind::ShutdownFailed => Just(Event::ShutdownFailed).boxed(),
        Kind::Exited => any_exit().prop_map(exited).boxed(),
        Kind::Released => {
            any::<bool>().prop_map(|everything| Event::Released { everything }).boxed()
        }
        Kind::ReleaseFailed => Just(Event::ReleaseFailed).boxed(),
        Kind::FoundAlive => Just(Event::FoundAlive).boxed(),
        Kind::FoundGone => (any_exit(), any::<bool>())
            .prop_map(|(exit, host_rebooted)| Event::FoundGone {
                exit,
                host_rebooted,
                console_tail: vec![],
            })
            .boxed(),
        Kind::PauseFailed => Just(Event::PauseFailed { error: error() }).boxed(),
        Kind::ResumeFailed => Just(Event::ResumeFailed { error: error() }).boxed(),
        Kind::Saved => (1..9u64, any_image_ref())
            .prop_map(|(number, memory)| Event::Saved(OwnSnapshot { number, memory }))
            .boxed(),
        Kind::SleepFailed => (1..4u64).prop_map(sleep_failed).boxed(),
        Kind::RestoreRefused => Just(restore_refused()).boxed(),
        Kind::LacksSpace => Just(Event::LacksSpace).boxed(),
        Kind::Tick => Just(Event::Tick).boxed(),
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    Union::new_weighted(KINDS.iter().map(|kind| (weight(*kind), events_of(*kind))).collect())
}

/// Events with the milliseconds that pass before each. Half of them begin with a guest that runs
/// or is being put to rest.
fn any_history() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let pause = prop_oneof![3 => 0..50u64, 1 => Just(GRACE_MS), 1 => Just(BOOT_TIMEOUT_MS)];
    let up = [start(1), Event::Launched(handle(1)), Event::Ready];
    let last = prop_oneof![Just(vec![]), Just(vec![sleep(1)]), Just(vec![Event::Pause])];
    let up = last.prop_map(move |last| [&up[..], &last].concat());
    let first = prop_oneof![Just(vec![]), up];
    (first, prop::collection::vec((pause, any_event()), 0..60))
        .prop_map(|(first, rest)| first.into_iter().map(|event| (0, event)).chain(rest).collect())
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

/// A fork begins with its snapshot, until that is given up or it has run.
fn is_to_begin_shared(before: &InstanceStatus, event: &Event) -> bool {
    let is_down = matches!(before.phase, Phase::Created | Phase::Stopped | Phase::Failed);
    let has_run = before.boots + before.wakes > 0 || before.cold_boot.is_some();
    is_down && !has_run && matches!(event, Event::Start { origin: Some(_), .. })
}

#[test]
fn an_event_of_each_kind_changes_something() {
    let mut runner = TestRunner::new(cases(256));
    let mut effective = BTreeSet::new();
    for _ in 0..256 {
        let history = any_history().new_tree(&mut runner).unwrap().current();
        let steps = steps(history).into_iter();
        let changing = steps.filter(|(_, before, _, after, _)| before != after);
        effective.extend(changing.map(|(_, _, event, _, _)| kind(&event)));
    }
    assert_eq!(effective, KINDS.iter().copied().collect());
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn a_fork_begins_with_its_snapshot_until_it_has_run(history in any_history()) {
        for (_, before, event, after, effects) in steps(history) {
            let Phase::Starting { begin, .. } = &after.phase else { continue };
            let is_shared = matches!(begin, StartFrom::Shared { .. });
            if is_to_begin_shared(&before, &event) {
                prop_assert!(is_shared, "{after:?}");
                prop_assert_eq!(effects, vec![Effect::Restore]);
            } else if !matches!(before.phase, Phase::Starting { .. }) {
                prop_assert!(!is_shared, "{after:?}");
            }
        }
    }

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
