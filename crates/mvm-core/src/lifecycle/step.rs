//! The transitions of [`super`], one match over phase and event.

use super::{
    Effect, Event, InstanceStatus, KILL_RETRY_MS, MAIN_ENDED_GRACE_MS, MainEnd, Outcome, Phase,
    RELEASE_RETRY_MS, RESUMED_START_MS, STABLE_MS,
};
use crate::death::{Cause, Death, classify};
use crate::guest::ExitStatus;
use crate::vmm::VmExit;

/// The next status and what to do, once it is durable. An event that does not concern the phase
/// changes nothing.
pub fn step(status: &InstanceStatus, event: Event, now: u64) -> (InstanceStatus, Vec<Effect>) {
    let mut next = status.clone();
    let effects = match (&status.phase, event) {
        (
            Phase::Created | Phase::Stopped | Phase::Failed,
            Event::Start { generation, revision, boot_timeout_ms },
        ) => {
            next.phase = Phase::Starting { deadline_unix_ms: now.saturating_add(boot_timeout_ms) };
            next.generation = generation;
            next.revision.get_or_insert(revision);
            next.main_end = None;
            vec![Effect::Boot]
        }

        (Phase::Starting { .. }, Event::Launched(handle)) => {
            next.vm = Some(handle);
            vec![Effect::Watch, Effect::Greet]
        }
        (Phase::Starting { .. }, Event::Ready) if status.vm.is_some() => {
            next.phase = Phase::Running { since_unix_ms: now };
            next.boots += 1;
            vec![]
        }
        (Phase::Starting { .. }, Event::BootFailed { error }) => {
            next.died(Cause::StartFailed { error }, now, None, Vec::new());
            if next.vm.is_some() {
                next.stop(now, 0, Outcome::Failed)
            } else {
                next.release(Outcome::Failed)
            }
        }
        (Phase::Starting { deadline_unix_ms }, Event::Tick) if now >= *deadline_unix_ms => {
            next.died(Cause::BootTimeout, now, None, Vec::new());
            next.stop(now, 0, Outcome::Failed)
        }
        // It was never launched, or launched and not recorded.
        (Phase::Starting { deadline_unix_ms }, Event::FoundGone { .. }) if status.vm.is_none() => {
            next.phase = resumed(*deadline_unix_ms, now);
            vec![Effect::Boot]
        }
        (Phase::Starting { deadline_unix_ms }, Event::FoundAlive) => {
            next.phase = resumed(*deadline_unix_ms, now);
            vec![Effect::Watch, Effect::Greet]
        }
        (Phase::Running { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Rejoin],
        (Phase::Stopping { kill_unix_ms, outcome }, Event::FoundAlive) => {
            // The guest may not have heard of it yet, and keeps the rest of its time.
            let grace_ms = match outcome {
                Outcome::Failed if status.main_end.is_none() => 0,
                _ => kill_unix_ms.saturating_sub(now),
            };
            let mut effects = vec![Effect::Watch];
            effects.extend(next.stop(now, grace_ms, *outcome));
            effects
        }

        (Phase::Starting { .. } | Phase::Running { .. }, Event::Stop { grace_ms, generation }) => {
            next.generation = generation;
            // A guest that is not up yet has nothing to shut down in order.
            let grace_ms = if matches!(status.phase, Phase::Running { .. }) { grace_ms } else { 0 };
            next.stop(now, grace_ms, Outcome::Stopped)
        }
        (Phase::Starting { .. } | Phase::Running { .. }, Event::Destroy { grace_ms }) => {
            let grace_ms = if matches!(status.phase, Phase::Running { .. }) { grace_ms } else { 0 };
            next.stop(now, grace_ms, Outcome::Destroyed)
        }

        (Phase::Running { .. }, Event::MainExited(status)) => {
            next.settle_series(now);
            next.main_end = Some(MainEnd { status, asked: false });
            next.stop(now, MAIN_ENDED_GRACE_MS, outcome_of(status))
        }
        (Phase::Stopping { .. }, Event::MainExited(end)) => {
            next.main_end.get_or_insert(MainEnd { status: end, asked: true });
            vec![]
        }

        (Phase::Stopping { .. }, Event::Launched(handle)) => {
            next.vm = Some(handle);
            vec![Effect::Watch, Effect::Kill]
        }
        (Phase::Stopping { outcome, .. }, Event::BootFailed { .. }) if status.vm.is_none() => {
            next.release(*outcome)
        }
        (Phase::Stopping { outcome, .. }, Event::FoundGone { .. }) if status.vm.is_none() => {
            next.release(*outcome)
        }
        (Phase::Stopping { outcome, .. }, Event::ShutdownFailed) => next.stop(now, 0, *outcome),
        (Phase::Stopping { kill_unix_ms, outcome }, Event::Tick) if now >= *kill_unix_ms => {
            next.stop(now, 0, *outcome)
        }
        (Phase::Stopping { kill_unix_ms, outcome }, Event::Stop { grace_ms, generation }) => {
            next.generation = generation;
            next.hasten(now, grace_ms, *kill_unix_ms, *outcome)
        }
        (Phase::Stopping { kill_unix_ms, .. }, Event::Destroy { grace_ms }) => {
            next.hasten(now, grace_ms, *kill_unix_ms, Outcome::Destroyed)
        }

        (
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. },
            Event::Exited { exit, console_tail },
        ) if status.vm.is_some() => next.exited(now, exit, false, console_tail),
        (
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. },
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

        (Phase::Created | Phase::Stopped | Phase::Failed, Event::Destroy { .. }) => {
            next.release(Outcome::Destroyed)
        }
        (Phase::Releasing { outcome, .. }, Event::Destroy { .. })
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
            // A release begun before the wish to destroy it: the greater one is under way.
            Outcome::Destroyed if !everything => vec![],
            Outcome::Stopped => {
                next.phase = Phase::Stopped;
                next.failures = 0;
                vec![]
            }
            Outcome::Failed => {
                next.phase = Phase::Failed;
                next.failures = next.failures.saturating_add(1);
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
    fn died(&mut self, cause: Cause, now: u64, exit: Option<VmExit>, console_tail: Vec<String>) {
        self.settle_series(now);
        self.last_death = Some(Death { cause, at_unix_ms: now, exit, console_tail });
    }

    /// Ends a series of failures if the run that ends now was a stable one.
    fn settle_series(&mut self, now: u64) {
        let stable = matches!(self.phase, Phase::Running { since_unix_ms }
            if now.saturating_sub(since_unix_ms) >= STABLE_MS);
        if stable {
            self.failures = 0;
        }
    }

    fn stop(&mut self, now: u64, grace_ms: u64, outcome: Outcome) -> Vec<Effect> {
        let wait_ms = if grace_ms == 0 { KILL_RETRY_MS } else { grace_ms };
        self.phase = Phase::Stopping { kill_unix_ms: now.saturating_add(wait_ms), outcome };
        match (&self.vm, grace_ms) {
            // The boot under way reports `Launched` or `BootFailed`.
            (None, _) => vec![],
            (Some(_), 0) => vec![Effect::Kill],
            (Some(_), grace_ms) => vec![Effect::Shutdown { grace_ms }],
        }
    }

    /// Another wish to end a VM that is to end at `kill_at`: it may come sooner, never later, and
    /// not within the time that a kill has to take effect.
    fn hasten(&mut self, now: u64, grace_ms: u64, kill_at: u64, outcome: Outcome) -> Vec<Effect> {
        let sooner = now.saturating_add(grace_ms.max(KILL_RETRY_MS));
        if grace_ms == 0 && sooner < kill_at {
            return self.stop(now, 0, outcome);
        }
        self.phase = Phase::Stopping { kill_unix_ms: sooner.min(kill_at), outcome };
        vec![]
    }

    fn release(&mut self, outcome: Outcome) -> Vec<Effect> {
        self.phase = Phase::Releasing { retry_unix_ms: None, outcome };
        vec![match outcome {
            Outcome::Destroyed => Effect::ReleaseAll,
            Outcome::Stopped | Outcome::Failed => Effect::Release,
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
        let found = if host_rebooted { Cause::HostReboot } else { classify(&exit, &console_tail) };
        let main_end = self.main_end.filter(|end| !end.asked).map(|end| end.status);
        let (cause, outcome) = match (&self.phase, main_end) {
            // The way down from there is of no interest.
            (Phase::Stopping { outcome, .. }, Some(status)) => (status.into(), *outcome),
            // Why it had to end (a boot that failed, a time limit) is known, unless that was only
            // the symptom of what the guest did by itself.
            (Phase::Stopping { outcome: Outcome::Failed, .. }, None) => {
                if let Some(death) = &mut self.last_death {
                    if matches!(
                        found,
                        Cause::GuestPanic
                            | Cause::GuestOom
                            | Cause::GuestShutdown
                            | Cause::GuestReboot
                    ) {
                        death.cause = found;
                    }
                    death.exit = Some(exit);
                    death.console_tail = console_tail;
                }
                return self.release(Outcome::Failed);
            }
            (Phase::Stopping { outcome, .. }, None) => (Cause::Operator, *outcome),
            (Phase::Running { .. }, _)
                if matches!(found, Cause::GuestShutdown | Cause::GuestReboot) =>
            {
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

fn resumed(deadline_unix_ms: u64, now: u64) -> Phase {
    Phase::Starting { deadline_unix_ms: deadline_unix_ms.max(now.saturating_add(RESUMED_START_MS)) }
}
