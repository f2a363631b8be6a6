//! One instance's life as a pure state machine: `step(status, event, now) -> (status, effects)`.
//!
//! ```text
//!              Start            Ready              Stop            Exited            Released
//!  Created ──────────> Starting ──────> Running ──────────> Stopping ──────> Releasing ──┬─> Stopped
//!                      ^   │ │             │ Exited            ^                 ^       ├─> Failed
//!   Stopped, Failed ───┘   │ └─ timeout, ──┼───────────────────┘                 │       └─> Destroyed
//!                          │    BootFailed └─────────────────────────────────────┤
//!                          └──── Exited, BootFailed without a VM ────────────────┘
//!  MainExited leads from Running through Stopping to Stopped (code 0) or Failed.
//!
//!            Pause                              Sleep              Saved, Exited, Released
//!  Running <───────> Warm        Running, Warm ───────> Suspending ───────────────────────> Sleeping
//!            Start                                          │ SleepFailed                      │
//!                                  Running <────────────────┘          Starting <──────────────┘
//!                                                                                     Start
//!
//!  Destroy leads from every phase through Stopping (if a VM runs) and Releasing to Destroyed.
//!  Stop turns Failed into Stopped: nobody wants it to run any more.
//! ```
//!
//! The instance's actor owns a status, feeds events in, makes the new status durable and then
//! performs the effects, whose results come back as events. When a VM has ended, the actor drops
//! what it was still doing with that VM, so that no event of one run reaches the next. Wishes are
//! levels: the same one again changes nothing. Nothing here decides *whether* an instance should
//! run: that is [`crate::plan`]'s work.

use serde::{Deserialize, Serialize};

use crate::death::{Death, ProgramFault};
use crate::guest::ExitStatus;
use crate::name::{RevisionId, SnapshotId};
use crate::snapshot::{ImageRef, OwnSnapshot};
use crate::vmm::{VmExit, VmHandle};

mod step;

pub use step::step;

/// A run at least this long, in milliseconds, ends a series of failures.
pub const STABLE_MS: u64 = 60_000;
/// How long after a failed release it is tried again, in milliseconds.
pub const RELEASE_RETRY_MS: u64 = 1_000;
/// How long a guest whose main process has ended has to shut down, in milliseconds: other
/// processes may still write, and disks have to be brought in order.
pub const MAIN_ENDED_GRACE_MS: u64 = 10_000;
/// How long a guest has to shut down in order, in milliseconds, that an agent which has just started
/// found in the middle of a stop: the time without an agent is not the guest's. A guest whose start
/// fails has as long.
pub const LAST_GRACE_MS: u64 = 10_000;
/// How long after a kill the VM is killed again, if it has not ended, in milliseconds.
pub const KILL_RETRY_MS: u64 = 1_000;
/// How long a start that an earlier agent began has at least, in milliseconds: the time without an
/// agent is not the guest's.
pub const RESUMED_START_MS: u64 = 60_000;
/// Failed attempts in a row to restore a snapshot, for reasons that are not the snapshot's, after
/// which the instance boots from its disk instead.
pub const RESTORE_ATTEMPTS: u32 = 3;

/// The state that people see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It exists and has never run.
    Created,
    /// Its guest answers.
    Running,
    /// Its vCPUs are stopped, its memory is kept.
    Warm,
    /// It has no process and no memory; it goes on from its snapshot.
    Sleeping,
    /// It does not run; its disk and address are kept.
    Stopped,
    /// It ended, or could not be started, against its wish.
    Failed,
    /// It is gone.
    Destroyed,
    /// A state of a newer agent.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Warm => "warm",
            Self::Sleeping => "sleeping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Destroyed => "destroyed",
            Self::Unknown => "unknown",
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
    /// It sleeps.
    Asleep,
}

/// What a start begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum StartFrom {
    /// Its kernel.
    #[default]
    Boot,
    /// The VM that is there, whose vCPUs are stopped.
    Warm,
    /// Its own snapshot.
    Own,
    /// A snapshot that instances share.
    Shared {
        /// Which.
        id: SnapshotId,
    },
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
        /// What it begins with.
        #[serde(default)]
        begin: StartFrom,
    },
    /// Its guest has answered.
    Running {
        /// Since when.
        since_unix_ms: u64,
    },
    /// Its vCPUs are stopped.
    Warm {
        /// Since when.
        since_unix_ms: u64,
    },
    /// Its guest is prepared, and then saved.
    Suspending {
        /// Since when it has been running.
        since_unix_ms: u64,
    },
    /// It has a snapshot and no VM.
    Sleeping {
        /// Since when.
        since_unix_ms: u64,
    },
    /// Its VM is to end.
    Stopping {
        /// When it is ended by force, or once more.
        kill_unix_ms: u64,
        /// What follows.
        outcome: Outcome,
        /// Whether it is ended by force already; otherwise its guest is asked.
        #[serde(default)]
        is_forced: bool,
    },
    /// Its VM has ended; what it held on the host is given back.
    Releasing {
        /// When the release is tried again, if it failed; one is under way otherwise, and there are never two.
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
    /// Runs in a row that soon ended by themselves, and without a failure.
    pub short_runs: u32,
    /// How its last run ended.
    pub last_death: Option<Death>,
    /// How the main process of its last run ended, if it did while that was observed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub main_end: Option<MainEnd>,
    /// What it goes on from. Taken away, durably, before a vCPU of a restored VM runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<OwnSnapshot>,
    /// The image that its VM's memory is mapped from, if the VM was restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ImageRef>,
    /// Snapshots that were made of it.
    pub sleeps: u64,
    /// Times that it went on from a snapshot.
    pub wakes: u64,
    /// What went wrong when it was last put to sleep or woken, until that succeeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setback: Option<Setback>,
    /// Why its last start was a boot although there was a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_boot: Option<ColdBoot>,
}

/// A failure that left the instance as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setback {
    /// What could not be done.
    #[serde(flatten)]
    pub step: RestStep,
    /// Why, with sources.
    pub error: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Failures in a row.
    pub failures: u32,
}

/// A step between running, warm and sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum RestStep {
    /// Stop the vCPUs.
    Pause,
    /// Save the VM and end it.
    Sleep {
        /// Which request it was.
        request: u64,
    },
    /// Go on from the snapshot.
    Wake,
    /// A step of a newer version.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for RestStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pause => "paused",
            Self::Sleep { .. } => "put to sleep",
            Self::Wake => "woken",
            Self::Unknown => "put into its state",
        })
    }
}

/// A snapshot that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdBoot {
    /// Why it could not be restored.
    pub reason: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// The end of a main process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainEnd {
    /// How.
    pub status: ExitStatus,
    /// Whether the instance was being stopped, so that the end is no cause of its own.
    pub asked: bool,
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
        /// The snapshot that it begins with if it has never run.
        origin: Option<SnapshotId>,
    },
    /// Its vCPUs are to stop, and its memory is kept.
    Pause,
    /// It is to sleep.
    Sleep {
        /// Which request it is.
        request: u64,
        /// How long the guest's own preparations may take, in milliseconds; 0 asks for none.
        hooks_ms: u64,
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
        /// What is wrong with the main program, if it is that.
        program: Option<ProgramFault>,
    },
    /// Its main process ended.
    MainExited(ExitStatus),
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
    /// Its vCPUs could not be stopped.
    PauseFailed {
        /// Why, with sources.
        error: String,
    },
    /// Its vCPUs could not be set going again.
    ResumeFailed {
        /// Why, with sources.
        error: String,
    },
    /// Its snapshot is complete, and on disk.
    Saved(OwnSnapshot),
    /// It could not be saved; its VM may be paused.
    SleepFailed {
        /// Why, with sources.
        error: String,
        /// The request that failed.
        request: u64,
    },
    /// Its snapshot can never be restored here.
    RestoreRefused {
        /// Why, with sources.
        error: String,
    },
    /// Time has passed, and its VM stands still until the host has space for what it writes: that time
    /// is not its own.
    LacksSpace,
    /// Time has passed.
    Tick,
}

/// What the actor is to do. What concerns the vCPUs (`Pause`, `Resume`, `Suspend`) is done in the
/// order in which it comes, one after the other: a late `Resume` would let the guest go on after it
/// was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// End a VM that was launched but not recorded, prepare disk and tap, launch the VM, report
    /// `Launched` or `BootFailed`.
    Boot,
    /// End a VM that was launched but not recorded, prepare disk and tap, restore the snapshot that
    /// the phase names, report `Launched`, `RestoreRefused` or `BootFailed`. Its vCPUs stay stopped.
    Restore,
    /// Stop the vCPUs; report `PauseFailed` if they do not.
    Pause,
    /// Let the vCPUs run; report `ResumeFailed` if they do not.
    Resume,
    /// Prepare the guest, stop its vCPUs, save it; report `Saved` or `SleepFailed`.
    Suspend {
        /// Which request it is.
        request: u64,
        /// How long the guest's own preparations may take, in milliseconds; 0 asks for none.
        hooks_ms: u64,
    },
    /// Report `Exited` when the VM ends.
    Watch,
    /// Open the session with the guest, configure it, report `Ready` or `BootFailed`.
    Greet,
    /// Open the session with a guest that was running before this agent.
    Rejoin,
    /// Ask the guest to shut down, over the session that is open or being opened, or else over one
    /// of its own; report `ShutdownFailed` if it refuses, or if its kernel has only just been started
    /// and no guest agent has answered yet.
    Shutdown {
        /// How long it has, in milliseconds; that includes the time until it hears of it.
        grace_ms: u64,
    },
    /// End the VM by force.
    Kill,
    /// End a VM that was launched but not recorded, give back what a stopped instance does not
    /// need; report `Released` or `ReleaseFailed`.
    Release,
    /// Like `Release`, but give back everything, disk and logs included; report `Released` or `ReleaseFailed`.
    ReleaseAll,
    /// Remove the records; the actor ends.
    Forget,
}

impl InstanceStatus {
    /// The state that people see.
    pub fn state(&self) -> State {
        match &self.phase {
            Phase::Created => State::Created,
            Phase::Starting { begin: StartFrom::Warm, .. } | Phase::Warm { .. } => State::Warm,
            Phase::Starting { begin: StartFrom::Own, .. } | Phase::Sleeping { .. } => {
                State::Sleeping
            }
            Phase::Starting { .. } if self.last_death.is_none() => State::Created,
            Phase::Starting { .. } if self.failures > 0 => State::Failed,
            Phase::Starting { .. } => State::Stopped,
            Phase::Running { .. } | Phase::Suspending { .. } | Phase::Stopping { .. } => {
                State::Running
            }
            Phase::Releasing { outcome: Outcome::Asleep, .. } => State::Sleeping,
            Phase::Releasing { outcome: Outcome::Failed, .. } | Phase::Failed => State::Failed,
            Phase::Releasing { .. } | Phase::Stopped => State::Stopped,
            Phase::Destroyed => State::Destroyed,
        }
    }

    /// What the instance is in the middle of, in one word.
    pub fn activity(&self) -> Option<&'static str> {
        match &self.phase {
            Phase::Starting { begin: StartFrom::Warm, .. } => Some("resuming"),
            Phase::Starting { begin: StartFrom::Own, .. } => Some("waking"),
            Phase::Starting { .. } => Some("starting"),
            Phase::Suspending { .. }
            | Phase::Stopping { outcome: Outcome::Asleep, .. }
            | Phase::Releasing { outcome: Outcome::Asleep, .. } => Some("falling asleep"),
            Phase::Stopping { outcome: Outcome::Destroyed, .. }
            | Phase::Releasing { outcome: Outcome::Destroyed, .. } => Some("destroying"),
            Phase::Stopping { .. } | Phase::Releasing { .. } => Some("stopping"),
            _ => None,
        }
    }

    /// Whether its last run is over, or is being brought to an end because it failed, so that a
    /// wish to run it that comes now is a fresh one.
    pub fn has_ended(&self) -> bool {
        let has_exited = self.main_end.is_some_and(|end| !end.asked);
        matches!(
            &self.phase,
            Phase::Stopping { outcome: Outcome::Stopped, .. } if has_exited
        ) || matches!(
            &self.phase,
            Phase::Stopped
                | Phase::Failed
                | Phase::Stopping { outcome: Outcome::Failed, .. }
                | Phase::Releasing { outcome: Outcome::Stopped | Outcome::Failed, .. }
        )
    }

    /// When a [`Event::Tick`] is due.
    pub fn deadline_unix_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Starting { deadline_unix_ms, .. } => Some(deadline_unix_ms),
            Phase::Stopping { kill_unix_ms, .. } => Some(kill_unix_ms),
            Phase::Releasing { retry_unix_ms, .. } => retry_unix_ms,
            Phase::Created
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
            | Phase::Sleeping { .. }
            | Phase::Stopped
            | Phase::Failed
            | Phase::Destroyed => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
