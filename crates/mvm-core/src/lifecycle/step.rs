//! The transitions of [`super`], one match over phase and event.

use super::{
    ColdBoot, Effect, Event, InstanceStatus, KILL_RETRY_MS, LAST_GRACE_MS, MAIN_ENDED_GRACE_MS,
    MainEnd, Outcome, Phase, RELEASE_RETRY_MS, RESTORE_ATTEMPTS, RESUMED_START_MS, RestStep,
    STABLE_MS, Setback, StartFrom,
};
use crate::death::{Cause, Death, classify};
use crate::guest::ExitStatus;
use crate::snapshot::ImageRef;
use crate::vmm::{VmExit, VmHandle};

/// The next status and what to do, once it is durable. An event that does not concern the phase
/// changes nothing.
pub fn step(status: &InstanceStatus, event: Event, now: u64) -> (InstanceStatus, Vec<Effect>) {
    let mut next = status.clone();
    let effects = match (&status.phase, event) {
        (
            Phase::Created | Phase::Stopped | Phase::Failed,
            Event::Start { generation, revision, boot_timeout_ms, origin },
        ) => {
            let has_run = status.boots + status.wakes > 0;
            let begin = match origin {
                // One that was given up is not begun with again.
                Some(id) if !has_run && status.cold_boot.is_none() => StartFrom::Shared { id },
                _ => StartFrom::Boot,
            };
            if generation != next.generation {
                // Somebody asked for it.
                next.short_runs = 0;
            }
            next.generation = generation;
            next.revision.get_or_insert(revision);
            next.main_end = None;
            next.begin(begin, now.saturating_add(boot_timeout_ms))
        }

        (Phase::Starting { begin, .. }, Event::Launched(handle)) => {
            next.launched(begin, handle);
            match begin {
                StartFrom::Boot => vec![Effect::Watch, Effect::Greet],
                // Its snapshot is used up from here on.
                _ => vec![Effect::Watch, Effect::Resume, Effect::Greet],
            }
        }
        (Phase::Starting { begin, .. }, Event::Ready) if status.vm.is_some() => {
            next.phase = Phase::Running { since_unix_ms: now };
            match begin {
                StartFrom::Warm => {}
                StartFrom::Boot => next.boots += 1,
                StartFrom::Own | StartFrom::Shared { .. } => next.wakes += 1,
            }
            if *begin != StartFrom::Boot {
                next.cold_boot = None;
            }
            next.setback = None;
            vec![]
        }
        (Phase::Starting { deadline_unix_ms, .. }, Event::RestoreRefused { error })
            if status.vm.is_none() =>
        {
            next.boot_cold(error, *deadline_unix_ms, now)
        }
        (
            Phase::Starting { begin: StartFrom::Own, deadline_unix_ms },
            Event::BootFailed { error, .. },
        ) if status.vm.is_none() => {
            // The snapshot is as good as it was.
            let failures = next.set_back(RestStep::Wake, error.clone(), now);
            match failures {
                RESTORE_ATTEMPTS.. => next.boot_cold(error, *deadline_unix_ms, now),
                _ => next.release(Outcome::Asleep),
            }
        }
        (Phase::Starting { .. }, Event::BootFailed { error, program }) => {
            next.died(Cause::StartFailed { error, program }, now, None, Vec::new());
            if next.vm.is_some() {
                next.stop(now, LAST_GRACE_MS, Outcome::Failed)
            } else {
                next.release(Outcome::Failed)
            }
        }
        (Phase::Starting { deadline_unix_ms, .. }, Event::Tick) if now >= *deadline_unix_ms => {
            next.died(Cause::BootTimeout, now, None, Vec::new());
            next.stop(now, LAST_GRACE_MS, Outcome::Failed)
        }
        (Phase::Starting { deadline_unix_ms, begin }, Event::LacksSpace) => {
            let deadline_unix_ms = with_more_time(*deadline_unix_ms, now);
            next.phase = Phase::Starting { deadline_unix_ms, begin: begin.clone() };
            vec![]
        }
        // It was never launched, or launched and not recorded.
        (Phase::Starting { deadline_unix_ms, begin }, Event::FoundGone { .. })
            if status.vm.is_none() =>
        {
            next.begin(begin.clone(), with_more_time(*deadline_unix_ms, now))
        }
        (Phase::Starting { deadline_unix_ms, begin }, Event::FoundAlive) => {
            let deadline_unix_ms = with_more_time(*deadline_unix_ms, now);
            next.phase = Phase::Starting { deadline_unix_ms, begin: begin.clone() };
            match begin {
                StartFrom::Boot => vec![Effect::Watch, Effect::Greet],
                _ => vec![Effect::Watch, Effect::Resume, Effect::Greet],
            }
        }
        (Phase::Running { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Rejoin],
        (Phase::Warm { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Pause],
        (Phase::Suspending { since_unix_ms }, Event::FoundAlive) => {
            // Whatever the agent before had written is not complete.
            next.phase = Phase::Running { since_unix_ms: *since_unix_ms };
            vec![Effect::Watch, Effect::Resume, Effect::Rejoin]
        }
        (
            Phase::Stopping { outcome: Outcome::Asleep, .. }
            | Phase::Stopping { is_forced: true, .. },
            Event::FoundAlive,
        ) => {
            let mut effects = vec![Effect::Watch];
            effects.extend(next.stop(now, 0, status.outcome()));
            effects
        }
        (Phase::Stopping { kill_unix_ms, outcome, .. }, Event::FoundAlive) => {
            // The guest may not have heard of it yet, and may still stand still.
            let grace_ms = kill_unix_ms.saturating_sub(now).max(LAST_GRACE_MS);
            let mut effects = vec![Effect::Watch, Effect::Resume];
            effects.extend(next.stop(now, grace_ms, *outcome));
            effects
        }

        // A sleep that is under way is given up: nothing of it is needed any more.
        (
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. },
            Event::Stop { grace_ms, generation },
        ) => {
            next.generation = generation;
            next.stop(now, grace_ms, Outcome::Stopped)
        }
        (
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. },
            Event::Destroy { grace_ms },
        ) => next.stop(now, grace_ms, Outcome::Destroyed),

        (
            Phase::Running { .. } | Phase::Warm { .. } | Phase::Suspending { .. },
            Event::MainExited(status),
        ) => {
            next.settle_series(now);
            next.main_end = Some(MainEnd { status, asked: false });
            let outcome = outcome_of(status);
            next.short_runs += u32::from(outcome == Outcome::Stopped);
            next.stop(now, MAIN_ENDED_GRACE_MS, outcome)
        }

        (Phase::Running { .. }, Event::Pause) => {
            next.phase = Phase::Warm { since_unix_ms: now };
            vec![Effect::Pause]
        }
        (Phase::Warm { .. }, Event::PauseFailed { error }) => {
            next.phase = Phase::Running { since_unix_ms: now };
            next.set_back(RestStep::Pause, error, now);
            // An agent that found it standing still has not talked to its guest yet.
            vec![Effect::Resume, Effect::Rejoin]
        }
        (Phase::Warm { .. }, Event::Start { generation, boot_timeout_ms, .. }) => {
            next.generation = generation;
            next.phase = Phase::Starting {
                deadline_unix_ms: now.saturating_add(boot_timeout_ms),
                begin: StartFrom::Warm,
            };
            vec![Effect::Resume, Effect::Greet]
        }
        (Phase::Running { since_unix_ms }, Event::Sleep { request, hooks_ms }) => {
            next.phase = Phase::Suspending { since_unix_ms: *since_unix_ms };
            vec![Effect::Suspend { request, hooks_ms }]
        }
        (Phase::Warm { since_unix_ms }, Event::Sleep { request, hooks_ms }) => {
            next.phase = Phase::Suspending { since_unix_ms: *since_unix_ms };
            // An agent that found it standing still has not talked to its guest yet.
            vec![Effect::Suspend { request, hooks_ms }, Effect::Rejoin]
        }
        (Phase::Suspending { .. }, Event::Saved(snapshot)) => {
            next.sleeps = snapshot.number;
            next.snapshot = Some(snapshot);
            next.setback = None;
            next.stop(now, 0, Outcome::Asleep)
        }
        (Phase::Suspending { since_unix_ms }, Event::SleepFailed { error, request }) => {
            next.phase = Phase::Running { since_unix_ms: *since_unix_ms };
            next.set_back(RestStep::Sleep { request }, error, now);
            vec![Effect::Resume, Effect::Rejoin]
        }
        (Phase::Running { .. } | Phase::Starting { .. }, Event::ResumeFailed { error })
            if status.vm.is_some() =>
        {
            next.died(Cause::StartFailed { error, program: None }, now, None, Vec::new());
            next.stop(now, 0, Outcome::Failed)
        }

        (Phase::Sleeping { .. }, Event::Start { generation, boot_timeout_ms, .. }) => {
            next.generation = generation;
            next.begin(StartFrom::Own, now.saturating_add(boot_timeout_ms))
        }
        (Phase::Sleeping { .. }, Event::Stop { generation, .. }) => {
            next.generation = generation;
            next.died(Cause::Operator, now, None, Vec::new());
            next.release(Outcome::Stopped)
        }
        (Phase::Stopping { .. }, Event::MainExited(end)) => {
            next.main_end.get_or_insert(MainEnd { status: end, asked: true });
            vec![]
        }

        // Nothing of it has run that could be lost: also an agent that comes after this one ends it at once.
        (Phase::Stopping { outcome, .. }, Event::Launched(handle)) => {
            next.vm = Some(handle);
            let mut effects = vec![Effect::Watch];
            effects.extend(next.stop(now, 0, *outcome));
            effects
        }
        (
            Phase::Stopping { outcome, .. },
            Event::BootFailed { .. } | Event::RestoreRefused { .. },
        ) if status.vm.is_none() => next.release(*outcome),
        (Phase::Stopping { outcome, .. }, Event::FoundGone { .. }) if status.vm.is_none() => {
            next.release(*outcome)
        }
        (Phase::Stopping { outcome, .. }, Event::ShutdownFailed) => next.stop(now, 0, *outcome),
        (Phase::Stopping { kill_unix_ms, outcome, .. }, Event::Tick) if now >= *kill_unix_ms => {
            next.stop(now, 0, *outcome)
        }
        (Phase::Stopping { kill_unix_ms, outcome, .. }, Event::Stop { grace_ms, generation }) => {
            next.generation = generation;
            next.hasten(now, grace_ms, *kill_unix_ms, *outcome)
        }
        (Phase::Stopping { kill_unix_ms, .. }, Event::Destroy { grace_ms }) => {
            next.hasten(now, grace_ms, *kill_unix_ms, Outcome::Destroyed)
        }

        (
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
            | Phase::Stopping { .. },
            Event::Exited { exit, console_tail },
        ) if status.vm.is_some() => next.exited(now, exit, false, console_tail),
        (
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
            | Phase::Stopping { .. },
            Event::FoundGone { exit, host_rebooted, console_tail },
        ) => next.exited(now, exit, host_rebooted, console_tail),

        (Phase::Failed, Event::Stop { generation, .. }) => {
            next.phase = Phase::Stopped;
            next.generation = generation;
            next.failures = 0;
            vec![]
        }
        (
            Phase::Releasing { retry_unix_ms, outcome: Outcome::Failed },
            Event::Stop { generation, .. },
        ) => {
            let retry_unix_ms = *retry_unix_ms;
            next.phase = Phase::Releasing { retry_unix_ms, outcome: Outcome::Stopped };
            next.generation = generation;
            vec![]
        }
        // What is kept of a sleeper is released, too. A release under way ends first: a wish that still holds then
        // comes again.
        (
            Phase::Releasing { retry_unix_ms: Some(_), outcome: Outcome::Asleep },
            Event::Stop { generation, .. },
        ) => {
            next.died(Cause::Operator, now, None, Vec::new());
            next.generation = generation;
            next.release(Outcome::Stopped)
        }

        (
            Phase::Created | Phase::Stopped | Phase::Failed | Phase::Sleeping { .. },
            Event::Destroy { .. },
        ) => next.release(Outcome::Destroyed),
        // The release under way ends first.
        (Phase::Releasing { retry_unix_ms: None, .. }, Event::Destroy { .. }) => {
            next.phase = Phase::Releasing { retry_unix_ms: None, outcome: Outcome::Destroyed };
            vec![]
        }
        (Phase::Releasing { retry_unix_ms: Some(_), outcome }, Event::Destroy { .. })
            if *outcome != Outcome::Destroyed =>
        {
            next.release(Outcome::Destroyed)
        }
        (Phase::Releasing { outcome, .. }, Event::FoundAlive | Event::FoundGone { .. }) => {
            next.release(*outcome)
        }
        (Phase::Releasing { retry_unix_ms: Some(at), outcome }, Event::Tick) if now >= *at => {
            next.release(*outcome)
        }
        (Phase::Releasing { outcome, .. }, Event::ReleaseFailed) => {
            next.phase = Phase::Releasing {
                retry_unix_ms: Some(now.saturating_add(RELEASE_RETRY_MS)),
                outcome: *outcome,
            };
            vec![]
        }
        (Phase::Releasing { outcome, .. }, Event::Released { everything }) => match outcome {
            // That was begun before the wish to destroy it.
            Outcome::Destroyed if !everything => next.release(Outcome::Destroyed),
            Outcome::Stopped => {
                next.phase = Phase::Stopped;
                next.failures = 0;
                next.snapshot = None;
                next.memory = None;
                vec![]
            }
            Outcome::Failed => {
                next.phase = Phase::Failed;
                next.failures = next.failures.saturating_add(1);
                vec![]
            }
            Outcome::Asleep => {
                next.phase = Phase::Sleeping { since_unix_ms: now };
                vec![]
            }
            Outcome::Destroyed => {
                next.phase = Phase::Destroyed;
                vec![Effect::Forget]
            }
        },
        (Phase::Destroyed, Event::Destroy { .. } | Event::FoundAlive | Event::FoundGone { .. }) => {
            vec![Effect::Forget]
        }

        _ => vec![],
    };
    (next, effects)
}

impl InstanceStatus {
    /// Begins a start; nothing runs yet.
    fn begin(&mut self, begin: StartFrom, deadline_unix_ms: u64) -> Vec<Effect> {
        let effect = match begin {
            StartFrom::Boot | StartFrom::Warm => Effect::Boot,
            StartFrom::Own | StartFrom::Shared { .. } => Effect::Restore,
        };
        self.phase = Phase::Starting { deadline_unix_ms, begin };
        vec![effect]
    }

    /// A VM runs, or is about to go on from a snapshot, which from now on is used up.
    fn launched(&mut self, begin: &StartFrom, handle: VmHandle) {
        self.vm = Some(handle);
        self.memory = match begin {
            StartFrom::Own => self.snapshot.take().map(|snapshot| snapshot.memory),
            StartFrom::Shared { id } => Some(ImageRef::Shared { id: id.clone() }),
            StartFrom::Boot | StartFrom::Warm => None,
        };
    }

    /// Gives the snapshot up and boots from the disk.
    fn boot_cold(&mut self, reason: String, deadline_unix_ms: u64, now: u64) -> Vec<Effect> {
        self.snapshot = None;
        self.memory = None;
        self.setback = None;
        self.cold_boot = Some(ColdBoot { reason, at_unix_ms: now });
        self.begin(StartFrom::Boot, with_more_time(deadline_unix_ms, now))
    }

    /// Notes a failure that leaves things as they were; returns how many there are in a row.
    fn set_back(&mut self, step: RestStep, error: String, now: u64) -> u32 {
        let before = self.setback.take().filter(|before| before.step == step);
        let failures = before.map_or(0, |before| before.failures).saturating_add(1);
        self.setback = Some(Setback { step, error, at_unix_ms: now, failures });
        failures
    }

    /// What the end of its VM leads to, if it is to end.
    fn outcome(&self) -> Outcome {
        match self.phase {
            Phase::Stopping { outcome, .. } | Phase::Releasing { outcome, .. } => outcome,
            _ => Outcome::Stopped,
        }
    }

    fn died(&mut self, cause: Cause, now: u64, exit: Option<VmExit>, console_tail: Vec<String>) {
        self.settle_series(now);
        self.last_death =
            Some(Death { cause, at_unix_ms: now, exit: exit.map(Into::into), console_tail });
    }

    /// Ends a series of failures, and of short runs, if the run that ends now was a stable one.
    fn settle_series(&mut self, now: u64) {
        let stable = matches!(self.phase, Phase::Running { since_unix_ms }
            if now.saturating_sub(since_unix_ms) >= STABLE_MS);
        if stable {
            self.failures = 0;
            self.short_runs = 0;
        }
    }

    /// Ends the VM: asks its guest, or does it by force if that has no time.
    fn stop(&mut self, now: u64, grace_ms: u64, outcome: Outcome) -> Vec<Effect> {
        let is_forced = grace_ms == 0;
        let wait_ms = if is_forced { KILL_RETRY_MS } else { grace_ms };
        let is_paused = matches!(self.phase, Phase::Warm { .. } | Phase::Suspending { .. });
        let kill_unix_ms = now.saturating_add(wait_ms);
        self.phase = Phase::Stopping { kill_unix_ms, outcome, is_forced };
        match (&self.vm, grace_ms) {
            // The boot under way reports `Launched` or `BootFailed`.
            (None, _) => vec![],
            (Some(_), 0) => vec![Effect::Kill],
            (Some(_), grace_ms) if is_paused => {
                vec![Effect::Resume, Effect::Shutdown { grace_ms }]
            }
            (Some(_), grace_ms) => vec![Effect::Shutdown { grace_ms }],
        }
    }

    /// Another wish to end a VM that is to end at `kill_at`: it may come sooner, never later, and
    /// not within the time that a kill has to take effect.
    fn hasten(&mut self, now: u64, grace_ms: u64, kill_at: u64, outcome: Outcome) -> Vec<Effect> {
        let sooner = now.saturating_add(grace_ms.max(KILL_RETRY_MS));
        let was_forced = matches!(self.phase, Phase::Stopping { is_forced: true, .. });
        if grace_ms == 0 && (sooner < kill_at || !was_forced) {
            return self.stop(now, 0, outcome);
        }
        let kill_unix_ms = sooner.min(kill_at);
        self.phase = Phase::Stopping { kill_unix_ms, outcome, is_forced: was_forced };
        vec![]
    }

    fn release(&mut self, outcome: Outcome) -> Vec<Effect> {
        self.phase = Phase::Releasing { retry_unix_ms: None, outcome };
        self.memory = None;
        if outcome != Outcome::Asleep {
            self.snapshot = None;
        }
        vec![match outcome {
            Outcome::Destroyed => Effect::ReleaseAll,
            Outcome::Stopped | Outcome::Failed | Outcome::Asleep => Effect::Release,
        }]
    }

    fn exited(
        &mut self,
        now: u64,
        exit: VmExit,
        host_rebooted: bool,
        console_tail: Vec<String>,
    ) -> Vec<Effect> {
        self.vm = None;
        if matches!(self.phase, Phase::Stopping { outcome: Outcome::Asleep, .. }) {
            return self.release(Outcome::Asleep);
        }
        let found = if host_rebooted { Cause::HostReboot } else { classify(&exit, &console_tail) };
        let main_end = self.main_end.filter(|end| !end.asked).map(|end| end.status);
        let (cause, outcome) = match (&self.phase, main_end) {
            // The way down from there is of no interest.
            (Phase::Stopping { outcome, .. }, Some(status)) => (status.into(), *outcome),
            // Why it had to end (a boot that failed, a time limit) is known, unless that was only
            // the symptom of what the guest did by itself.
            (Phase::Stopping { outcome: Outcome::Failed, is_forced, .. }, None) => {
                // One that was asked to has powered off because of that.
                let did_it_itself = match found {
                    Cause::GuestPanic | Cause::GuestOom | Cause::GuestReboot => true,
                    Cause::GuestShutdown => *is_forced,
                    _ => false,
                };
                if let Some(death) = &mut self.last_death {
                    if did_it_itself {
                        death.cause = found;
                    }
                    death.exit = Some(exit.into());
                    death.console_tail = console_tail;
                }
                return self.release(Outcome::Failed);
            }
            (Phase::Stopping { outcome, .. }, None) => (Cause::Operator, *outcome),
            (Phase::Running { .. }, _)
                if matches!(found, Cause::GuestShutdown | Cause::GuestReboot) =>
            {
                self.short_runs += 1;
                (found, Outcome::Stopped)
            }
            _ => (found, Outcome::Failed),
        };
        self.died(cause, now, Some(exit), console_tail);
        self.release(outcome)
    }
}

/// What the end of a main process leads to: only 0 is a success.
fn outcome_of(status: ExitStatus) -> Outcome {
    match status {
        ExitStatus::Exited { code: 0 } => Outcome::Stopped,
        _ => Outcome::Failed,
    }
}

fn with_more_time(deadline_unix_ms: u64, now: u64) -> u64 {
    deadline_unix_ms.max(now.saturating_add(RESUMED_START_MS))
}
