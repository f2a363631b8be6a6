//! One instance's life as a pure state machine: `step(status, event, now) -> (status, effects)`.
//!
//! ```text
//!              Start            Ready              Stop            Exited            Released
//!  Created ──────────> Starting ──────> Running ──────────> Stopping ──────> Releasing ──┬─> Stopped
//!                      ^   │ │             │ Exited            ^                 ^       ├─> Failed
//!   Stopped, Failed ───┘   │ └─ timeout, ──┼───────────────────┘                 │       └─> Destroyed
//!                          │    BootFailed └─────────────────────────────────────┤
//!                          └──── Exited, BootFailed without a VM ────────────────┘
//!  Destroy leads from every phase through Stopping (if a VM runs) and Releasing to Destroyed.
//! ```
//!
//! The instance's actor owns a status, feeds events in, makes the new status durable and then
//! performs the effects, whose results come back as events. Nothing here decides *whether* an
//! instance should run: that is [`crate::plan`]'s work.

use serde::{Deserialize, Serialize};

use crate::death::{Cause, Death, classify};
use crate::name::RevisionId;
use crate::vmm::{VmExit, VmHandle};

/// A run at least this long, in milliseconds, ends a series of failures.
pub const STABLE_MS: u64 = 60_000;
/// How long after a failed release it is tried again, in milliseconds.
pub const RELEASE_RETRY_MS: u64 = 1_000;

/// The state that people see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It exists and has never run.
    Created,
    /// Its guest answers.
    Running,
    /// It does not run; its disk and address are kept.
    Stopped,
    /// It ended, or could not be started, against its wish.
    Failed,
    /// It is gone.
    Destroyed,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Destroyed => "destroyed",
        })
    }
}

/// What a VM's end leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It stays, stopped.
    Stopped,
    /// It stays, failed.
    Failed,
    /// It goes.
    Destroyed,
}

/// Where an instance is in its life. Times are milliseconds since the Unix epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// It has never been started.
    #[default]
    Created,
    /// Its VM is being prepared, launched and waited for.
    Starting {
        /// When the start has taken too long.
        deadline_unix_ms: u64,
    },
    /// Its guest has answered.
    Running {
        /// Since when.
        since_unix_ms: u64,
    },
    /// Its VM is to end.
    Stopping {
        /// When it is ended by force.
        kill_unix_ms: u64,
        /// What follows.
        outcome: Outcome,
    },
    /// Its VM has ended; what it held on the host is given back.
    Releasing {
        /// When the release is tried again, if it failed.
        #[serde(default)]
        retry_unix_ms: Option<u64>,
        /// What follows.
        outcome: Outcome,
    },
    /// It does not run.
    Stopped,
    /// It ended, or could not be started, against its wish.
    Failed,
    /// It is gone.
    Destroyed,
}

/// What is observed of an instance: made durable by its actor before any effect.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InstanceStatus {
    /// Where it is in its life.
    #[serde(flatten)]
    pub phase: Phase,
    /// The generation of the last wish that was acted upon.
    pub generation: u64,
    /// The revision that it boots: fixed at its first start, as its writable layer lies on it.
    pub revision: Option<RevisionId>,
    /// Its VM's process, from launch to end.
    pub vm: Option<VmHandle>,
    /// Starts that reached a running guest.
    pub boots: u64,
    /// Failures in a row.
    pub failures: u32,
    /// How its last run ended.
    pub last_death: Option<Death>,
}

/// What happened to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is to run.
    Start {
        /// The wish's generation.
        generation: u64,
        /// The revision to boot if it has none yet.
        revision: RevisionId,
        /// How long it may take to answer, in milliseconds.
        boot_timeout_ms: u64,
    },
    /// It is not to run.
    Stop {
        /// How long the guest has to shut down, in milliseconds.
        grace_ms: u64,
        /// The wish's generation.
        generation: u64,
    },
    /// It is to go.
    Destroy {
        /// How long the guest has to shut down, in milliseconds.
        grace_ms: u64,
    },
    /// Its VM's process runs.
    Launched(VmHandle),
    /// Its guest answered and is configured.
    Ready,
    /// It could not be started.
    BootFailed {
        /// Why, with sources.
        error: String,
    },
    /// The guest did not take the request to shut down.
    ShutdownFailed,
    /// Its VM's process ended.
    Exited {
        /// How.
        exit: VmExit,
        /// The console's last lines.
        console_tail: Vec<String>,
    },
    /// What it held on the host was given back.
    Released {
        /// Whether that includes its disk and logs.
        everything: bool,
    },
    /// Something that it held could not be given back.
    ReleaseFailed,
    /// An agent that has just started found its VM alive.
    FoundAlive,
    /// An agent that has just started found no VM of it.
    FoundGone {
        /// How it ended, as far as can be told.
        exit: VmExit,
        /// Whether the host was rebooted since the VM was launched.
        host_rebooted: bool,
        /// The console's last lines.
        console_tail: Vec<String>,
    },
    /// Time has passed.
    Tick,
}

/// What the actor is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Prepare disk and tap, launch the VM, report `Launched` or `BootFailed`.
    Boot,
    /// Report `Exited` when the VM ends.
    Watch,
    /// Open the session with the guest, configure it, report `Ready` or `BootFailed`.
    Greet,
    /// Open the session with a guest that was running before this agent.
    Rejoin,
    /// Ask the guest to shut down; report `ShutdownFailed` if it does not take the request.
    Shutdown {
        /// How long its processes have, in milliseconds.
        grace_ms: u64,
    },
    /// End the VM by force.
    Kill,
    /// Give back what a stopped instance does not need; report `Released` or `ReleaseFailed`.
    Release,
    /// Give back everything, disk and logs included; report `Released` or `ReleaseFailed`.
    ReleaseAll,
    /// Remove the records; the actor ends.
    Forget,
}

impl InstanceStatus {
    /// The state that people see.
    pub fn state(&self) -> State {
        match &self.phase {
            Phase::Created => State::Created,
            Phase::Starting { .. } if self.last_death.is_none() => State::Created,
            Phase::Starting { .. } if self.failures > 0 => State::Failed,
            Phase::Starting { .. } => State::Stopped,
            Phase::Running { .. } | Phase::Stopping { .. } => State::Running,
            Phase::Releasing { outcome: Outcome::Failed, .. } | Phase::Failed => State::Failed,
            Phase::Releasing { .. } | Phase::Stopped => State::Stopped,
            Phase::Destroyed => State::Destroyed,
        }
    }

    /// What the instance is in the middle of, in one word.
    pub fn activity(&self) -> Option<&'static str> {
        match &self.phase {
            Phase::Starting { .. } => Some("starting"),
            Phase::Stopping { outcome: Outcome::Destroyed, .. }
            | Phase::Releasing { outcome: Outcome::Destroyed, .. } => Some("destroying"),
            Phase::Stopping { .. } | Phase::Releasing { .. } => Some("stopping"),
            _ => None,
        }
    }

    /// When a [`Event::Tick`] is due.
    pub fn deadline_unix_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Starting { deadline_unix_ms } => Some(deadline_unix_ms),
            Phase::Stopping { kill_unix_ms, .. } => Some(kill_unix_ms),
            Phase::Releasing { retry_unix_ms, .. } => retry_unix_ms,
            Phase::Created
            | Phase::Running { .. }
            | Phase::Stopped
            | Phase::Failed
            | Phase::Destroyed => None,
        }
    }

    fn died(&mut self, cause: Cause, now: u64, exit: Option<VmExit>, console_tail: Vec<String>) {
        let stable = matches!(self.phase, Phase::Running { since_unix_ms }
            if now.saturating_sub(since_unix_ms) >= STABLE_MS);
        if stable {
            self.failures = 0;
        }
        self.last_death = Some(Death { cause, at_unix_ms: now, exit, console_tail });
    }

    fn stop(&mut self, now: u64, grace_ms: u64, outcome: Outcome) -> Vec<Effect> {
        self.phase = Phase::Stopping { kill_unix_ms: now.saturating_add(grace_ms), outcome };
        match (&self.vm, grace_ms) {
            // The boot under way reports `Launched` or `BootFailed`.
            (None, _) => vec![],
            (Some(_), 0) => vec![Effect::Kill],
            (Some(_), grace_ms) => vec![Effect::Shutdown { grace_ms }],
        }
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
        let found = if host_rebooted { Cause::HostReboot } else { classify(&exit, &console_tail) };
        let (cause, outcome) = match &self.phase {
            // A cause that is already known (a boot that failed, a time limit) stays.
            Phase::Stopping { outcome: Outcome::Failed, .. } => (None, Outcome::Failed),
            Phase::Stopping { outcome, .. } => (Some(Cause::Operator), *outcome),
            Phase::Running { .. } if found == Cause::GuestShutdown => {
                (Some(found), Outcome::Stopped)
            }
            _ => (Some(found), Outcome::Failed),
        };
        match (cause, &mut self.last_death) {
            (None, Some(death)) => {
                death.exit = Some(exit);
                death.console_tail = console_tail;
            }
            (cause, _) => {
                self.died(cause.unwrap_or(Cause::Unobserved), now, Some(exit), console_tail);
            }
        }
        self.vm = None;
        self.release(outcome)
    }
}

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
            vec![Effect::Boot]
        }

        (Phase::Starting { .. }, Event::Launched(handle)) => {
            next.vm = Some(handle);
            vec![Effect::Watch, Effect::Greet]
        }
        (Phase::Starting { .. }, Event::Ready) => {
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
        // It was never launched, or launched and not recorded: boot ends strays first.
        (Phase::Starting { .. }, Event::FoundGone { .. }) if status.vm.is_none() => {
            vec![Effect::Boot]
        }
        (Phase::Starting { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Greet],
        (Phase::Running { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Rejoin],
        (Phase::Stopping { .. }, Event::FoundAlive) => vec![Effect::Watch, Effect::Kill],

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
            let effects = next.stop(now, 0, *outcome);
            // Asked again until the VM is gone.
            next.phase = Phase::Stopping {
                kill_unix_ms: now.saturating_add(RELEASE_RETRY_MS),
                outcome: *outcome,
            };
            effects
        }
        (Phase::Stopping { kill_unix_ms, outcome }, Event::Stop { grace_ms, generation }) => {
            next.generation = generation;
            next.phase = Phase::Stopping {
                kill_unix_ms: (*kill_unix_ms).min(now.saturating_add(grace_ms)),
                outcome: match outcome {
                    Outcome::Destroyed => Outcome::Destroyed,
                    Outcome::Stopped | Outcome::Failed => Outcome::Stopped,
                },
            };
            vec![]
        }
        (Phase::Stopping { kill_unix_ms, .. }, Event::Destroy { grace_ms }) => {
            next.phase = Phase::Stopping {
                kill_unix_ms: (*kill_unix_ms).min(now.saturating_add(grace_ms)),
                outcome: Outcome::Destroyed,
            };
            vec![]
        }

        (
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. },
            Event::Exited { exit, console_tail },
        ) => next.exited(now, exit, false, console_tail),
        (
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. },
            Event::FoundGone { exit, host_rebooted, console_tail },
        ) => next.exited(now, exit, host_rebooted, console_tail),

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
        (Phase::Destroyed, Event::FoundAlive | Event::FoundGone { .. }) => vec![Effect::Forget],

        _ => vec![],
    };
    (next, effects)
}

#[cfg(test)]
mod tests;
