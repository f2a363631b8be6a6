//! Whatever has happened before, a wish is fulfilled in the end, and nothing is left behind.

use proptest::prelude::*;

use super::world::World;
use super::*;
use crate::property::{Choices, cases};

/// Most steps from any state to a wished one, once failures have ended.
const STEPS_MAX: usize = 40;

/// Lets anything happen until the choices are used up; returns the time.
fn suffer(world: &mut World, choices: &mut Choices, wishes: &[Event]) -> u64 {
    let mut now = NOW;
    while !choices.is_calm() && !world.is_forgotten {
        now += [0, 10, 900, GRACE_MS, STABLE_MS][choices.pick(5)];
        match choices.pick(8) {
            0..=3 => drop(world.progress(now, choices)),
            4 => world.feed(Event::Tick, now),
            5 => world.feed(
                [start(1), sleep(1), Event::Pause, start_fork(1)][choices.pick(4)].clone(),
                now,
            ),
            6 => world.feed(wishes[choices.pick(wishes.len())].clone(), now),
            _ => world.misfortune(now, choices),
        }
    }
    now
}

/// Repeats a wish, as the planner does, until it is fulfilled. Time passes only when nothing else
/// is left to do.
fn pursue(
    world: &mut World,
    mut now: u64,
    wish: impl Fn(&Phase) -> Event,
    fulfilled: impl Fn(&Phase) -> bool,
) -> u64 {
    let mut calm = Choices::new(vec![]);
    for _ in 0..STEPS_MAX {
        if fulfilled(&world.status.phase) {
            return now;
        }
        world.feed(wish(&world.status.phase), now);
        if world.progress(now, &mut calm) {
            continue;
        }
        if let Some(due) = world.status.deadline_unix_ms() {
            now = now.max(due);
            world.feed(Event::Tick, now);
        }
    }
    assert!(fulfilled(&world.status.phase), "never fulfilled: {world:?}");
    now
}

/// A wish for something that runs: what does not is started first.
fn rest(wish: Event) -> impl Fn(&Phase) -> Event {
    move |phase| match phase {
        Phase::Running { .. } | Phase::Warm { .. } => wish.clone(),
        _ => start(3),
    }
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn a_stop_always_ends_in_stopped_and_a_start_leads_up_again(
        bytes in prop::collection::vec(any::<u8>(), 0..240),
    ) {
        let mut world = World::default();
        let now = suffer(&mut world, &mut Choices::new(bytes), &[stop(2)]);
        let now = pursue(&mut world, now, |_| stop(3), |phase| {
            matches!(phase, Phase::Created | Phase::Stopped)
        });
        prop_assert!(world.is_at_rest(), "{world:?}");
        pursue(&mut world, now, |_| start(4), |phase| matches!(phase, Phase::Running { .. }));
    }

    #[test]
    fn what_runs_falls_asleep_and_wakes_again(
        bytes in prop::collection::vec(any::<u8>(), 0..240),
    ) {
        let mut world = World::default();
        let now = suffer(&mut world, &mut Choices::new(bytes), &[stop(2), start(2)]);
        let is_up = |phase: &Phase| matches!(phase, Phase::Running { .. });
        let mut now = pursue(&mut world, now, |_| start(3), is_up);
        for _ in 0..3 {
            let wakes = world.status.wakes;
            now = pursue(&mut world, now, rest(sleep(9)), |phase| {
                matches!(phase, Phase::Sleeping { .. })
            });
            prop_assert!(world.is_at_rest(), "{world:?}");
            now = pursue(&mut world, now, |_| start(3), is_up);
            prop_assert_eq!(world.status.wakes, wakes + 1);
            now = pursue(&mut world, now, rest(Event::Pause), |phase| {
                matches!(phase, Phase::Warm { .. })
            });
        }
    }

    #[test]
    fn a_guest_that_can_be_reached_never_loses_its_power_unasked(
        bytes in prop::collection::vec(any::<u8>(), 0..240),
    ) {
        // The world looks at every kill.
        let mut world = World::default();
        let by_force = Event::Stop { grace_ms: 0, generation: 2 };
        let wishes = [stop(2), start(2), stop(2), destroy(), by_force];
        suffer(&mut world, &mut Choices::new(bytes), &wishes);
    }

    #[test]
    fn a_destroy_always_ends_in_nothing(
        bytes in prop::collection::vec(any::<u8>(), 0..240),
    ) {
        let mut world = World::default();
        let wishes = [stop(2), destroy(), Event::Destroy { grace_ms: 0 }];
        let now = suffer(&mut world, &mut Choices::new(bytes), &wishes);
        pursue(&mut world, now, |_| destroy(), |phase| *phase == Phase::Destroyed);
        prop_assert!(world.is_at_rest() && world.is_forgotten, "{world:?}");
    }
}
