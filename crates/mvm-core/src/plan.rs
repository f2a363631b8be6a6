//! The planner: `plan(desired, observed, limits, now)` says what to do next and what is waited for.
//!
//! It is called by the agent's loop in every round with whatever is there, and compares levels, not
//! edges: a lost event costs a round, never a wish. The same inputs give the same plan. There is no
//! retry inside an action: the next round is the retry, and backoff is part of the comparison.

mod disks;
mod grants;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::death::Cause;
use crate::lifecycle::{InstanceStatus, Outcome, Phase, RestStep};
use crate::name::{DiskPath, InstancePath, PoolPath, RevisionId, TenantName};
use crate::record::{
    BuildState, Desired, DesiredState, Existence, InstanceRecord, Observed, PoolRecord, PoolStatus,
};
use crate::shown::Shown;
use crate::spec::RestartPolicy;

use grants::Grants;

/// Backoff after the first failure, in milliseconds; it doubles with each further one.
pub const BACKOFF_FIRST_MS: u64 = 1_000;
/// Longest backoff, in milliseconds.
pub const BACKOFF_MAX_MS: u64 = 300_000;

/// One step towards the desired state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Build the pool's image and report this generation.
    Build {
        /// The pool.
        pool: PoolPath,
        /// The build request that this answers.
        generation: u64,
    },
    /// Start an instance.
    Start {
        /// The instance.
        instance: InstancePath,
        /// The wish's generation.
        generation: u64,
        /// The revision to boot if it has none yet.
        revision: RevisionId,
    },
    /// Stop an instance's vCPUs.
    Pause {
        /// The instance.
        instance: InstancePath,
    },
    /// Put an instance to sleep.
    Sleep {
        /// The instance.
        instance: InstancePath,
        /// Which request it is.
        request: u64,
        /// How long the guest's own preparations may take, in milliseconds; 0 asks for none.
        hooks_ms: u64,
    },
    /// Stop an instance.
    Stop {
        /// The instance.
        instance: InstancePath,
        /// How long the guest has to shut down, in milliseconds.
        grace_ms: u64,
        /// The generation that is reported with it.
        generation: u64,
    },
    /// Destroy an instance.
    Destroy {
        /// The instance.
        instance: InstancePath,
        /// How long the guest has to shut down, in milliseconds.
        grace_ms: u64,
    },
    /// Ask for the removal of an instance that goes at its end and has ended for good, and with the
    /// last one of its pool.
    RemoveEnded(InstancePath),
    /// Make a data disk's file, or grow it to its size.
    MakeDisk(DiskPath),
    /// Remove the file and the records of a data disk that no instance has any more.
    RemoveDisk(DiskPath),
    /// Remove the records of a pool that has no instances any more.
    RemovePool(PoolPath),
    /// Remove the network and the record of a tenant that has no pools and data disks any more.
    RemoveTenant(TenantName),
}

/// Why an instance is not where it is wished to be, although nothing is to be done right now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "waiting", rename_all = "snake_case")]
pub enum Waiting {
    /// Its pool has no image yet.
    Image {
        /// Why the last build failed, if it did.
        error: Option<String>,
    },
    /// A data disk of it is not made or grown yet.
    Disk {
        /// The disk.
        disk: DiskPath,
        /// Why it could not be made or grown at last, if it could not.
        error: Option<String>,
    },
    /// An instance that still runs has a data disk of it.
    DiskHeld {
        /// The disk.
        disk: DiskPath,
        /// The instance that has it.
        holder: InstancePath,
    },
    /// The network of its tenant is not made yet.
    Network,
    /// Its tenant has as much running as it may; one more was admitted in the moment in which another was woken,
    /// or the quota was lowered since.
    Quota,
    /// The node starts as many instances at once as it should.
    StartSlot,
    /// It failed, or ended by itself, and is started again later.
    Backoff {
        /// Failures in a row.
        failures: u32,
        /// Runs in a row that soon ended by themselves, and without a failure.
        #[serde(default)]
        short_runs: u32,
        /// When it is tried again, in milliseconds since the Unix epoch.
        until_unix_ms: u64,
    },
    /// It could not be put to sleep, paused or woken, and that is tried again later.
    Setback {
        /// What could not be done.
        #[serde(flatten)]
        step: RestStep,
        /// Why, with sources.
        error: String,
        /// When it is tried again, in milliseconds since the Unix epoch.
        until_unix_ms: u64,
    },
    /// It ended by itself and its restart policy leaves it so.
    RestartPolicy {
        /// The policy.
        policy: Shown<RestartPolicy>,
    },
    /// An earlier step has to end first.
    Step,
    /// It waits for what only a newer agent knows.
    #[serde(other)]
    Unknown,
}

/// What a node may do at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLimits {
    /// Instances that may be starting at once.
    pub starting: usize,
}

/// What to do next, and what is waited for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps to take now, in order.
    pub actions: Vec<Action>,
    /// Instances that wait, with the reason.
    pub waiting: BTreeMap<InstancePath, Waiting>,
    /// When time alone makes the next step due, in milliseconds since the Unix epoch.
    pub next_unix_ms: Option<u64>,
}

impl Plan {
    fn due(&mut self, at: u64) {
        self.next_unix_ms = Some(self.next_unix_ms.map_or(at, |next| next.min(at)));
    }
}

/// How long to wait after this many failures in a row, in milliseconds.
pub fn backoff_ms(failures: u32) -> u64 {
    let doublings = failures.saturating_sub(1).min(20);
    (BACKOFF_FIRST_MS << doublings).min(BACKOFF_MAX_MS)
}

/// Plans the next round.
pub fn plan(desired: &Desired, observed: &Observed, limits: PlanLimits, now: u64) -> Plan {
    let mut plan = Plan::default();
    for pool in desired.pools.values() {
        plan_pool(&mut plan, desired, pool, observed.pools.get(&pool.path), now);
    }
    disks::plan_disks(&mut plan, desired, observed, now);
    let mut start_slots = limits.starting.saturating_sub(
        observed
            .instances
            .values()
            .filter(|status| matches!(status.phase, Phase::Starting { .. }))
            .count(),
    );
    let created = InstanceStatus::default();
    let mut grants = Grants::of(desired, observed);
    for record in desired.instances.values() {
        let status = observed.instances.get(&record.path).unwrap_or(&created);
        let image = observed.pools.get(&record.path.pool);
        let from = plan.actions.len();
        plan_instance(&mut plan, record, status, image, &mut start_slots, now);
        let starts = matches!(plan.actions.get(from), Some(Action::Start { .. }));
        if !starts {
            continue;
        }
        let waiting = match disks::disks_wait(desired, observed, record) {
            Some(waiting) => Some(waiting),
            None => (!grants.take(record, status)).then_some(Waiting::Quota),
        };
        if let Some(waiting) = waiting {
            plan.actions.truncate(from);
            plan.waiting.insert(record.path.clone(), waiting);
            start_slots += 1;
        }
    }
    for tenant in desired.tenants.values().filter(|t| t.existence == Existence::Removed) {
        if desired.pools_of(&tenant.name).next().is_none()
            && desired.instances_of(&tenant.name).next().is_none()
            && desired.disks_of(&tenant.name).next().is_none()
        {
            plan.actions.push(Action::RemoveTenant(tenant.name.clone()));
        }
    }
    plan
}

fn plan_pool(
    plan: &mut Plan,
    desired: &Desired,
    pool: &PoolRecord,
    status: Option<&PoolStatus>,
    now: u64,
) {
    if pool.existence == Existence::Removed {
        if desired.instances_in(&pool.path).next().is_none() {
            plan.actions.push(Action::RemovePool(pool.path.clone()));
        }
        return;
    }
    let nothing = PoolStatus::default();
    let status = status.unwrap_or(&nothing);
    let asked = status.build_generation < pool.build_generation;
    let needed =
        status.revision.is_none() && desired.instances_in(&pool.path).any(|i| i.desired.is_alive());
    if !asked && !needed {
        return;
    }
    match &status.build {
        BuildState::Building { .. } => {}
        BuildState::Failed { at_unix_ms, failures, .. } if !asked => {
            let until = at_unix_ms.saturating_add(backoff_ms(*failures));
            if now >= until {
                plan.actions.push(build(pool));
            } else {
                plan.due(until);
            }
        }
        _ => plan.actions.push(build(pool)),
    }
}

fn build(pool: &PoolRecord) -> Action {
    Action::Build { pool: pool.path.clone(), generation: pool.build_generation }
}

fn plan_instance(
    plan: &mut Plan,
    record: &InstanceRecord,
    status: &InstanceStatus,
    image: Option<&PoolStatus>,
    start_slots: &mut usize,
    now: u64,
) {
    let path = &record.path;
    let behind = status.generation < record.generation;
    match record.desired {
        DesiredState::Destroyed => {
            plan.actions
                .push(Action::Destroy { instance: path.clone(), grace_ms: record.grace_ms });
        }
        DesiredState::Stopped => match status.phase {
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Warm { .. }
            | Phase::Suspending { .. }
            | Phase::Sleeping { .. }
            | Phase::Stopping { .. }
            | Phase::Releasing { outcome: Outcome::Failed | Outcome::Asleep, .. }
            | Phase::Failed => plan.actions.push(Action::Stop {
                instance: path.clone(),
                grace_ms: record.grace_ms,
                generation: record.generation,
            }),
            Phase::Stopped if status.last_death.is_some() => auto_remove(plan, record),
            Phase::Created | Phase::Releasing { .. } | Phase::Stopped | Phase::Destroyed => {}
        },
        DesiredState::Running | DesiredState::Warm | DesiredState::Sleeping => {
            match &status.phase {
                Phase::Starting { .. }
                | Phase::Running { .. }
                | Phase::Warm { .. }
                | Phase::Suspending { .. }
                | Phase::Sleeping { .. }
                    if behind =>
                {
                    // The stop belongs to the wish before; the start that follows carries the new one.
                    plan.actions.push(Action::Stop {
                        instance: path.clone(),
                        grace_ms: record.grace_ms,
                        generation: status.generation,
                    });
                }
                Phase::Running { .. } | Phase::Warm { .. } | Phase::Sleeping { .. } => {
                    plan_rest(plan, record, status, image, start_slots, now);
                }
                Phase::Starting { .. }
                | Phase::Suspending { .. }
                | Phase::Stopping { .. }
                | Phase::Releasing { .. } => {
                    plan.waiting.insert(path.clone(), Waiting::Step);
                }
                Phase::Destroyed => {}
                Phase::Created => start(plan, record, status, image, start_slots),
                Phase::Stopped | Phase::Failed if behind => {
                    start(plan, record, status, image, start_slots);
                }
                Phase::Stopped | Phase::Failed => {
                    if has_ended_for_good(record, status) {
                        let policy = record.spec.restart;
                        plan.waiting
                            .insert(path.clone(), Waiting::RestartPolicy { policy: policy.into() });
                        auto_remove(plan, record);
                        return;
                    }
                    let died = status.last_death.as_ref().map_or(0, |death| death.at_unix_ms);
                    let (failures, short_runs) = (status.failures, status.short_runs);
                    let in_a_row = failures.saturating_add(short_runs);
                    let until_unix_ms = died.saturating_add(backoff_ms(in_a_row));
                    if now < until_unix_ms {
                        plan.due(until_unix_ms);
                        let waiting = Waiting::Backoff { failures, short_runs, until_unix_ms };
                        plan.waiting.insert(path.clone(), waiting);
                        return;
                    }
                    start(plan, record, status, image, start_slots);
                }
            }
        }
    }
}

/// Between running, warm and sleeping. What failed is tried again later, unless it was asked for
/// once more.
fn plan_rest(
    plan: &mut Plan,
    record: &InstanceRecord,
    status: &InstanceStatus,
    image: Option<&PoolStatus>,
    start_slots: &mut usize,
    now: u64,
) {
    let instance = record.path.clone();
    let is_there = matches!(
        (record.desired, &status.phase),
        (DesiredState::Running, Phase::Running { .. })
            | (DesiredState::Warm, Phase::Warm { .. })
            | (DesiredState::Sleeping, Phase::Sleeping { .. })
    );
    if is_there {
        return;
    }
    let next = match (record.desired, &status.phase) {
        (DesiredState::Sleeping, _) => RestStep::Sleep { request: record.sleep_request },
        (DesiredState::Warm, Phase::Running { .. }) => RestStep::Pause,
        _ => RestStep::Wake,
    };
    if let Some(setback) = status.setback.as_ref().filter(|setback| setback.step == next) {
        let until_unix_ms = setback.at_unix_ms.saturating_add(backoff_ms(setback.failures));
        if now < until_unix_ms {
            plan.due(until_unix_ms);
            let (step, error) = (setback.step, setback.error.clone());
            plan.waiting.insert(instance, Waiting::Setback { step, error, until_unix_ms });
            return;
        }
    }
    match next {
        RestStep::Sleep { request } => {
            plan.actions.push(Action::Sleep { instance, request, hooks_ms: record.hooks_ms });
        }
        RestStep::Pause => plan.actions.push(Action::Pause { instance }),
        RestStep::Wake | RestStep::Unknown => start(plan, record, status, image, start_slots),
    }
}

/// Whether an instance that was to run has ended and is not started again without a request.
pub fn has_ended_for_good(record: &InstanceRecord, status: &InstanceStatus) -> bool {
    if !record.desired.is_alive()
        || status.generation < record.generation
        || !matches!(status.phase, Phase::Stopped | Phase::Failed)
    {
        return false;
    }
    let has_rebooted =
        status.last_death.as_ref().is_some_and(|death| death.cause == Cause::GuestReboot);
    match record.spec.restart {
        RestartPolicy::Always => false,
        RestartPolicy::OnFailure => !has_rebooted && status.phase == Phase::Stopped,
        RestartPolicy::Never => true,
    }
}

fn auto_remove(plan: &mut Plan, record: &InstanceRecord) {
    if record.spec.auto_remove {
        plan.actions.push(Action::RemoveEnded(record.path.clone()));
    }
}

fn start(
    plan: &mut Plan,
    record: &InstanceRecord,
    status: &InstanceStatus,
    image: Option<&PoolStatus>,
    start_slots: &mut usize,
) {
    let instance = record.path.clone();
    let of_pool = || image.and_then(|image| image.revision.as_ref());
    let revision = status.revision.as_ref().or(record.revision.as_ref()).or_else(of_pool);
    let Some(revision) = revision else {
        let error = match image.map(|image| &image.build) {
            Some(BuildState::Failed { error, .. }) => Some(error.clone()),
            _ => None,
        };
        plan.waiting.insert(instance, Waiting::Image { error });
        return;
    };
    if *start_slots == 0 {
        plan.waiting.insert(instance, Waiting::StartSlot);
        return;
    }
    *start_slots -= 1;
    plan.actions.push(Action::Start {
        instance,
        generation: record.generation,
        revision: revision.clone(),
    });
}

#[cfg(test)]
mod tests;
