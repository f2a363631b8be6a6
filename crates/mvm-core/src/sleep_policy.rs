//! The sleep policy: when instances that nobody uses are put to rest, and which go first when the
//! machine runs short of memory.
//!
//! ```text
//!  Sample, Sample, … ──> Activity::observe ──> Activity     what an instance does, and since when nothing
//!  Desired, Observed, activities, memory ──> decide ──> RestAction, …
//! ```
//!
//! Being idle is measured, never guessed: an instance whose guest cannot tell what it does is in use.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guest::Health;
use crate::lifecycle::Phase;
use crate::name::InstancePath;
use crate::record::{Desired, DesiredState, Existence, InstanceRecord, Observed};

/// Share of one processor, in thousandths, up to which a guest counts as idle: its kernel and the
/// questions of the host take some.
pub const IDLE_CPU_PERMILLE: u64 = 50;
/// Network traffic, in bytes per second, up to which a guest counts as idle: a question for an
/// address now and then, but not somebody who pings.
pub const IDLE_NET_BYTES_PER_S: u64 = 100;
/// Shortest time between two measurements, in milliseconds.
pub const SAMPLE_MIN_MS: u64 = 1_000;
/// Longest time between two measurements, in milliseconds.
pub const SAMPLE_MAX_MS: u64 = 10_000;

/// When a pool's instances are put to rest by themselves. Without times they are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SleepPolicy {
    /// Seconds without use after which an instance's vCPUs are stopped.
    pub warm_after_s: Option<u32>,
    /// Seconds without use after which an instance is put to sleep.
    pub sleep_after_s: Option<u32>,
    /// Seconds that an instance runs at least, from each start and wake.
    pub min_running_s: u32,
    /// Whether its instances are left alone whatever the times say, also when memory runs short.
    pub critical: bool,
    /// Whether what a sleeping instance has changed of its memory is compressed: it takes less space,
    /// and longer to save and to wake.
    pub compress: bool,
    /// Whether what rests goes on resting when another instance of its tenant sends it a packet.
    pub ignore_neighbours: bool,
}

impl Default for SleepPolicy {
    fn default() -> Self {
        Self {
            warm_after_s: None,
            sleep_after_s: None,
            min_running_s: 30,
            critical: false,
            compress: false,
            ignore_neighbours: false,
        }
    }
}

/// Why a sleep policy makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A time is 0, which would put to rest what has just been used.
    #[error("{field} is 0, but must be at least 1 second")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// Instances would sleep before they are warm.
    #[error(
        "sleep_after_s is {sleep_after_s}, but must be more than warm_after_s, which is {warm_after_s}"
    )]
    Order {
        /// As given.
        warm_after_s: u32,
        /// As given.
        sleep_after_s: u32,
    },
}

impl SleepPolicy {
    /// Whether it says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether instances may be put to rest by it.
    pub fn is_active(&self) -> bool {
        !self.critical && (self.warm_after_s.is_some() || self.sleep_after_s.is_some())
    }

    /// Checks that the times make sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<(), PolicyError> {
        let times = [("warm_after_s", self.warm_after_s), ("sleep_after_s", self.sleep_after_s)];
        if let Some((field, _)) = times.into_iter().find(|(_, time)| *time == Some(0)) {
            return Err(PolicyError::Zero { field });
        }
        match (self.warm_after_s, self.sleep_after_s) {
            (Some(warm_after_s), Some(sleep_after_s)) if sleep_after_s <= warm_after_s => {
                Err(PolicyError::Order { warm_after_s, sleep_after_s })
            }
            _ => Ok(()),
        }
    }

    /// How often its instances are measured, in milliseconds: a few times before anything is due.
    pub fn sample_ms(&self) -> u64 {
        let times = [self.warm_after_s, self.sleep_after_s];
        let shortest = times.into_iter().flatten().min().map_or(u64::MAX, u64::from);
        (shortest.saturating_mul(1000) / 4).clamp(SAMPLE_MIN_MS, SAMPLE_MAX_MS)
    }
}

/// What a guest had done at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// CPU time that it has used since it booted, in milliseconds.
    pub cpu_ms: u64,
    /// Bytes that its interfaces have sent and received since it booted.
    pub net_bytes: u64,
    /// Programs that run in it for somebody, and connections into it.
    pub streams: u32,
    /// Whether it asks not to be put to rest.
    pub is_busy: bool,
}

impl Sample {
    /// What a guest says of itself, if it says what is needed.
    pub fn of(health: &Health, at_unix_ms: u64) -> Option<Self> {
        Some(Self {
            at_unix_ms,
            cpu_ms: health.cpu_ms?,
            net_bytes: health.net_bytes?,
            streams: health.execs.saturating_add(health.connections),
            is_busy: health.busy,
        })
    }
}

/// What an instance is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Use {
    /// A program in the guest asks not to be put to rest.
    Busy,
    /// Programs run in it for somebody, or connections into it are open.
    Streams {
        /// How many.
        count: u32,
    },
    /// It computes.
    Cpu {
        /// Thousandths of one processor.
        permille: u64,
    },
    /// It talks to others.
    Network {
        /// Bytes per second, both directions.
        bytes_per_s: u64,
    },
    /// It is not known: its guest was not asked twice yet, or does not tell.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("not known, as its guest has not told it yet"),
            Self::Busy => f.write_str("its guest says that it is busy"),
            Self::Streams { count } => write!(f, "open execs and connections: {count}"),
            Self::Cpu { permille } => write!(f, "its processors: {} %", permille / 10),
            Self::Network { bytes_per_s } => write!(f, "its network: {bytes_per_s} B/s"),
        }
    }
}

/// What an instance does, as of its last measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// When it was measured, in milliseconds since the Unix epoch.
    pub measured_unix_ms: u64,
    /// Its load, in thousandths of one processor, since the measurement before.
    pub cpu_permille: u64,
    /// Its traffic in bytes per second, both directions, since the measurement before.
    pub net_bytes_per_s: u64,
    /// Programs that run in it for somebody, and connections into it.
    pub streams: u32,
    /// Whether its guest asks not to be put to rest.
    pub busy: bool,
    /// What it is used for; nothing if it is idle.
    pub used_by: Option<Use>,
    /// Since when it is idle, in milliseconds since the Unix epoch.
    pub idle_since_unix_ms: Option<u64>,
    #[serde(skip)]
    last: Option<(u64, u64)>,
}

impl Activity {
    /// That of an instance that was asked in vain.
    pub fn unknown(at_unix_ms: u64) -> Self {
        Self {
            measured_unix_ms: at_unix_ms,
            cpu_permille: 0,
            net_bytes_per_s: 0,
            streams: 0,
            busy: false,
            used_by: Some(Use::Unknown),
            idle_since_unix_ms: None,
            last: None,
        }
    }

    /// The first measurement of a run: what was done before is not known.
    pub fn first(sample: Sample) -> Self {
        Self {
            streams: sample.streams,
            busy: sample.is_busy,
            last: Some((sample.cpu_ms, sample.net_bytes)),
            ..Self::unknown(sample.at_unix_ms)
        }
    }

    /// After one more measurement.
    #[must_use]
    pub fn observe(self, sample: Sample) -> Self {
        let elapsed = sample.at_unix_ms.saturating_sub(self.measured_unix_ms);
        let since = self.last.and_then(|(cpu_ms, net_bytes)| {
            let cpu = sample.cpu_ms.checked_sub(cpu_ms)?;
            Some((cpu, sample.net_bytes.checked_sub(net_bytes)?))
        });
        // Counters that ran backwards are those of another boot.
        let Some((cpu_ms, net_bytes)) = since.filter(|_| elapsed > 0) else {
            return Self::first(sample);
        };
        let cpu_permille = cpu_ms.saturating_mul(1000) / elapsed;
        let net_bytes_per_s = net_bytes.saturating_mul(1000) / elapsed;
        let used_by = if sample.is_busy {
            Some(Use::Busy)
        } else if sample.streams > 0 {
            Some(Use::Streams { count: sample.streams })
        } else if cpu_permille > IDLE_CPU_PERMILLE {
            Some(Use::Cpu { permille: cpu_permille })
        } else if net_bytes_per_s > IDLE_NET_BYTES_PER_S {
            Some(Use::Network { bytes_per_s: net_bytes_per_s })
        } else {
            None
        };
        let idle_since = self.idle_since_unix_ms.unwrap_or(self.measured_unix_ms);
        Self {
            measured_unix_ms: sample.at_unix_ms,
            cpu_permille,
            net_bytes_per_s,
            streams: sample.streams,
            busy: sample.is_busy,
            used_by,
            idle_since_unix_ms: used_by.is_none().then_some(idle_since),
            last: Some((sample.cpu_ms, sample.net_bytes)),
        }
    }
}

/// A machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// What programs may still take, in MiB.
    pub available_mib: u64,
    /// What is to stay available, in MiB.
    pub wanted_mib: u64,
}

impl HostMemory {
    /// Whether there is less than there is to be.
    pub fn is_short(self) -> bool {
        self.available_mib < self.wanted_mib
    }

    /// Whether there would still be enough if so much more was taken, in MiB.
    pub fn has_room_for(self, mib: u64) -> bool {
        self.available_mib >= self.wanted_mib.saturating_add(mib)
    }
}

/// A way to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// Its vCPUs are stopped, and its memory is kept.
    Warm,
    /// It is saved and ended.
    Sleep,
}

/// Why an instance is put to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum RestReason {
    /// Nobody used it.
    Idle {
        /// How long, in seconds.
        idle_s: u64,
        /// What its pool's policy says, in seconds.
        after_s: u32,
    },
    /// The machine ran short of memory, and of what could rest it was unused the longest.
    Memory {
        /// How long it was idle, in seconds.
        idle_s: u64,
        /// What programs could still take, in MiB.
        available_mib: u64,
        /// What is to stay available, in MiB.
        wanted_mib: u64,
    },
    /// A reason of a newer version.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for RestReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle { idle_s, after_s } => {
                write!(f, "it was idle for {idle_s}s, and its pool's policy says {after_s}s")
            }
            Self::Memory { idle_s, available_mib, wanted_mib } => write!(
                f,
                "memory ran short ({available_mib} MiB of {wanted_mib} MiB that are to stay available), and it was idle the longest, for {idle_s}s"
            ),
            Self::Unknown => f.write_str("for a reason that this version does not know"),
        }
    }
}

/// What the policy did to an instance, until somebody asks something else of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rested {
    /// What.
    pub rest: Rest,
    /// Why.
    #[serde(flatten)]
    pub reason: RestReason,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// What the policy wants done to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestAction {
    /// The instance.
    pub instance: InstancePath,
    /// What.
    pub rest: Rest,
    /// Why.
    pub reason: RestReason,
}

/// An instance that may be put to rest now.
struct Candidate<'a> {
    record: &'a InstanceRecord,
    policy: &'a SleepPolicy,
    is_warm: bool,
    idle_since_unix_ms: u64,
}

/// Which instances are to be put to rest now.
///
/// When memory is short, at most one is put to sleep for it, and none while another still falls
/// asleep: what that gives back is looked at first.
pub fn decide(
    desired: &Desired,
    observed: &Observed,
    activities: &BTreeMap<InstancePath, Activity>,
    memory: Option<HostMemory>,
    now: u64,
) -> Vec<RestAction> {
    let candidates: Vec<Candidate<'_>> = desired
        .instances
        .values()
        .filter_map(|record| candidate(desired, observed, activities, record, now))
        .collect();
    let mut actions: Vec<RestAction> =
        candidates.iter().filter_map(|candidate| candidate.when_idle(now)).collect();
    let falls_asleep = |record: &InstanceRecord| {
        let phase = observed.instances.get(&record.path).map(|status| &status.phase);
        record.desired == DesiredState::Sleeping && !matches!(phase, Some(Phase::Sleeping { .. }))
    };
    let frees_memory = actions.iter().any(|action| action.rest == Rest::Sleep)
        || desired.instances.values().any(falls_asleep);
    if let Some(memory) = memory.filter(|memory| memory.is_short() && !frees_memory) {
        let coldest = candidates.iter().min_by_key(|candidate| candidate.idle_since_unix_ms);
        if let Some(coldest) = coldest {
            let instance = coldest.record.path.clone();
            actions.retain(|action| action.instance != instance);
            let idle_s = now.saturating_sub(coldest.idle_since_unix_ms) / 1000;
            let HostMemory { available_mib, wanted_mib } = memory;
            let reason = RestReason::Memory { idle_s, available_mib, wanted_mib };
            actions.push(RestAction { instance, rest: Rest::Sleep, reason });
        }
    }
    actions
}

fn candidate<'a>(
    desired: &'a Desired,
    observed: &Observed,
    activities: &BTreeMap<InstancePath, Activity>,
    record: &'a InstanceRecord,
    now: u64,
) -> Option<Candidate<'a>> {
    let pool = desired.pools.get(&record.path.pool)?;
    let policy = &pool.spec.sleep_policy;
    if pool.existence == Existence::Removed
        || !policy.is_active()
        || record.pinned
        || !record.purpose.is_use()
    {
        return None;
    }
    let activity = activities.get(&record.path);
    let idle_since = activity.and_then(|activity| activity.idle_since_unix_ms);
    let (is_warm, idle_since_unix_ms) =
        match (record.desired, &observed.instances.get(&record.path)?.phase) {
            (DesiredState::Running, Phase::Running { since_unix_ms }) => {
                let least = u64::from(policy.min_running_s) * 1000;
                (now >= since_unix_ms.saturating_add(least)).then_some((false, idle_since?))?
            }
            (DesiredState::Warm, Phase::Warm { since_unix_ms }) => {
                // What stands still is idle at least since then.
                (true, idle_since.map_or(*since_unix_ms, |idle| idle.min(*since_unix_ms)))
            }
            _ => return None,
        };
    Some(Candidate { record, policy, is_warm, idle_since_unix_ms })
}

impl Candidate<'_> {
    fn when_idle(&self, now: u64) -> Option<RestAction> {
        let idle_ms = now.saturating_sub(self.idle_since_unix_ms);
        let is_due = |after_s: &u32| idle_ms >= u64::from(*after_s) * 1000;
        let sleep = self.policy.sleep_after_s.filter(is_due).map(|after_s| (Rest::Sleep, after_s));
        let warm = self.policy.warm_after_s.filter(is_due).filter(|_| !self.is_warm);
        let (rest, after_s) = sleep.or(warm.map(|after_s| (Rest::Warm, after_s)))?;
        let reason = RestReason::Idle { idle_s: idle_ms / 1000, after_s };
        Some(RestAction { instance: self.record.path.clone(), rest, reason })
    }
}

#[cfg(test)]
mod tests;
