//! Judges whether a request's targets are in their desired states: levels, never edges.
//!
//! A snapshot that was missed does not matter: each one is judged by itself against the goal.

use std::collections::BTreeMap;
use std::fmt;

use mvm_core::death::{Cause, ProgramFault};
use mvm_core::image::ImageSpec;
use mvm_core::lifecycle::State;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_core::plan::Waiting;
use mvm_core::record::{BuildState, DesiredState};
use mvm_core::spec::RestartPolicy;
use mvm_wire::view::{DiskView, InstanceView, PoolView};
use mvm_wire::{Accepted, DiskTarget, InstanceTarget, PoolTarget};

use crate::error::build_hint;
use crate::units::duration_text;

/// Items that are named when there are many.
const NAMED: usize = 5;

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Goal {
    /// Each instance is in its desired state, and each data disk is as large.
    Settled,
    /// Every instance runs.
    Running,
    /// Every instance has its vCPUs stopped.
    Warm,
    /// Every instance sleeps.
    Sleeping,
    /// No instance runs.
    Stopped,
    /// Every pool's image is built.
    Built,
    /// New instances of every pool begin with its base.
    WarmedUp,
    /// The instances, pools and disks, and the tenant if named, are gone.
    Gone {
        /// The tenant that is to go.
        tenant: Option<TenantName>,
    },
}

impl Goal {
    /// The tenant whose end is waited for.
    pub(crate) fn tenant(&self) -> Option<&TenantName> {
        match self {
            Self::Gone { tenant } => tenant.as_ref(),
            Self::Settled
            | Self::Running
            | Self::Warm
            | Self::Sleeping
            | Self::Stopped
            | Self::Built
            | Self::WarmedUp => None,
        }
    }
}

/// A request that was accepted, and what is waited for.
#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    /// The targets.
    pub(crate) accepted: &'a Accepted,
    /// What is waited for.
    pub(crate) goal: &'a Goal,
    /// When it was submitted, in milliseconds since the Unix epoch: an image that failed to build
    /// before is no failure of this request.
    pub(crate) submitted_unix_ms: u64,
}

/// What a watch saw last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// The watched instances that exist.
    pub(crate) instances: BTreeMap<InstancePath, InstanceView>,
    /// The watched pools that exist.
    pub(crate) pools: BTreeMap<PoolPath, PoolView>,
    /// Whether the watched tenant exists.
    pub(crate) tenant_exists: bool,
    /// The watched data disks that exist.
    pub(crate) disks: BTreeMap<DiskPath, DiskView>,
}

impl Snapshot {
    /// A snapshot as it arrives.
    pub(crate) fn new(
        instances: Vec<InstanceView>,
        pools: Vec<PoolView>,
        tenant_exists: bool,
    ) -> Self {
        Self {
            instances: instances.into_iter().map(|view| (view.path.clone(), view)).collect(),
            pools: pools.into_iter().map(|view| (view.path.clone(), view)).collect(),
            tenant_exists,
            disks: BTreeMap::new(),
        }
    }

    /// Takes over what has changed: some instances, and everything else as it is now.
    pub(crate) fn change(&mut self, changed: Self, gone: &[InstancePath]) {
        let mut instances = std::mem::take(&mut self.instances);
        for path in gone {
            instances.remove(path);
        }
        instances.extend(changed.instances);
        *self = Self { instances, ..changed };
    }

    /// The same with data disks.
    pub(crate) fn with_disks(mut self, disks: Vec<DiskView>) -> Self {
        self.disks = disks.into_iter().map(|view| (view.path.clone(), view)).collect();
        self
    }
}

/// How far a request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Not there yet.
    Waiting {
        /// All of it in one line.
        line: String,
        /// What is not there yet and why, each in a line.
        items: Vec<String>,
    },
    /// The goal is reached.
    Done,
    /// It will not be reached by waiting.
    Failed(Failure),
}

/// Why waiting is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What failed, and why.
    pub(crate) message: String,
    /// The console's last lines.
    pub(crate) console: Vec<String>,
    /// What to type next.
    pub(crate) hint: String,
    /// Whether another request took over.
    pub(crate) superseded: bool,
    /// How many more failed.
    pub(crate) others: usize,
    /// What is wrong with the main program, if it is that.
    pub(crate) program: Option<ProgramFault>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match self.others {
            0 => Ok(()),
            others => write!(f, " (and {others} more failed)"),
        }
    }
}

/// One target's level.
enum Level {
    Reached,
    NotYet(String),
    Failed(Failure),
}

/// Judges a snapshot.
pub(crate) fn progress(request: &Request<'_>, snapshot: &Snapshot, now_unix_ms: u64) -> Progress {
    let Accepted { instances, pools, disks, .. } = request.accepted;
    let mut levels: Vec<Level> = Vec::new();
    match request.goal {
        Goal::Built => levels.extend(pools.iter().map(|pool| built(pool, snapshot))),
        Goal::WarmedUp => levels.extend(pools.iter().map(|pool| warmed_up(pool, snapshot))),
        Goal::Gone { tenant } => {
            let instances = instances.iter().filter_map(|i| snapshot.instances.get(&i.path));
            levels.extend(instances.map(|view| Level::NotYet(describe(view, now_unix_ms))));
            let pools = pools.iter().filter(|pool| snapshot.pools.contains_key(&pool.path));
            levels.extend(pools.map(|pool| Level::NotYet(format!("removing pool {}", pool.path))));
            let disks = disks.iter().filter(|disk| snapshot.disks.contains_key(&disk.path));
            levels.extend(disks.map(|disk| Level::NotYet(format!("removing disk {}", disk.path))));
            if let Some(tenant) = tenant.as_ref().filter(|_| snapshot.tenant_exists) {
                levels.push(Level::NotYet(format!("removing tenant {tenant}")));
            }
        }
        goal @ (Goal::Settled | Goal::Running | Goal::Warm | Goal::Sleeping | Goal::Stopped) => {
            let judge = |target| instance_level(goal, request, target, snapshot, now_unix_ms);
            levels.extend(disks.iter().map(|target| disk_level(target, snapshot)));
            levels.extend(instances.iter().map(judge));
        }
    }
    summarize(request.goal, levels)
}

fn summarize(goal: &Goal, levels: Vec<Level>) -> Progress {
    let total = levels.len();
    let mut items = Vec::new();
    let mut failures = Vec::new();
    for level in levels {
        match level {
            Level::Reached => {}
            Level::NotYet(item) => items.push(item),
            Level::Failed(failure) => failures.push(failure),
        }
    }
    let others = failures.len().saturating_sub(1);
    if let Some(first) = failures.into_iter().next() {
        return Progress::Failed(Failure { others, ..first });
    }
    let Some(first) = items.first() else { return Progress::Done };
    let done = total - items.len();
    let line = match (goal, total) {
        (_, 1) => first.clone(),
        (Goal::Settled, _) => format!("{done} of {total} ready; {first}"),
        (Goal::Running, _) => format!("{done} of {total} running; {first}"),
        (Goal::Warm, _) => format!("{done} of {total} warm; {first}"),
        (Goal::Sleeping, _) => format!("{done} of {total} asleep; {first}"),
        (Goal::Stopped, _) => format!("{done} of {total} stopped; {first}"),
        (Goal::Built, _) => format!("{done} of {total} built; {first}"),
        (Goal::WarmedUp, _) => format!("{done} of {total} have a base; {first}"),
        (Goal::Gone { .. }, _) => format!("{total} to go; {first}"),
    };
    if items.len() > NAMED {
        let more = items.len() - NAMED;
        items.truncate(NAMED);
        items.push(format!("and {more} more"));
    }
    Progress::Waiting { line, items }
}

fn disk_level(target: &DiskTarget, snapshot: &Snapshot) -> Level {
    let path = &target.path;
    match snapshot.disks.get(path) {
        None => superseded(format!("disk {path} was removed by another request")),
        Some(view) if view.removing => {
            superseded(format!("disk {path} is being removed by another request"))
        }
        Some(view) if view.ready && view.size_mib >= target.size_mib => Level::Reached,
        Some(DiskView { error: Some(error), .. }) => Level::Failed(Failure {
            message: format!("disk {path} cannot be made: {error}"),
            console: Vec::new(),
            hint: format!("it is tried again in the background; see `mvm disk info {path}`"),
            superseded: false,
            others: 0,
            program: None,
        }),
        Some(_) => Level::NotYet(format!("disk {path}: being made")),
    }
}

fn instance_level(
    goal: &Goal,
    request: &Request<'_>,
    target: &InstanceTarget,
    snapshot: &Snapshot,
    now: u64,
) -> Level {
    let path = &target.path;
    let Some(view) = snapshot.instances.get(path) else {
        return match goal {
            Goal::Settled => Level::Reached,
            _ => superseded(format!("{path} was destroyed by another request")),
        };
    };
    let Some(desired) = view.desired.known() else {
        return superseded(format!("{path} is to be what only a newer mvm knows"));
    };
    match (goal, desired) {
        (Goal::Settled | Goal::Running, DesiredState::Running) => {
            running(request, target, view, snapshot, now)
        }
        (Goal::Settled | Goal::Warm, DesiredState::Warm) => {
            resting(State::Warm, request, target, view, snapshot, now)
        }
        (Goal::Settled | Goal::Sleeping, DesiredState::Sleeping) => {
            resting(State::Sleeping, request, target, view, snapshot, now)
        }
        (Goal::Settled | Goal::Stopped, DesiredState::Stopped) => stopped(view, now),
        (Goal::Settled, DesiredState::Destroyed) => Level::NotYet(describe(view, now)),
        (_, DesiredState::Running) => superseded(format!("{path} was started by another request")),
        (_, DesiredState::Warm) => superseded(format!("{path} was paused by another request")),
        (_, DesiredState::Sleeping) => {
            superseded(format!("{path} was put to sleep by another request"))
        }
        (_, DesiredState::Stopped) => superseded(format!("{path} was stopped by another request")),
        (_, DesiredState::Destroyed) => {
            superseded(format!("{path} is being destroyed by another request"))
        }
    }
}

fn running(
    request: &Request<'_>,
    target: &InstanceTarget,
    view: &InstanceView,
    snapshot: &Snapshot,
    now: u64,
) -> Level {
    let settled = view.activity.is_none() && view.generation >= target.generation;
    match view.state {
        State::Running if settled => Level::Reached,
        // It has done its work and is not to do it again.
        State::Stopped if settled && has_succeeded(view) => Level::Reached,
        // Ended, after the wish was acted upon.
        State::Failed | State::Stopped if settled => Level::Failed(instance_failure(view)),
        _ => match (&view.waiting, snapshot.pools.get(&view.path.pool)) {
            (Some(Waiting::Image { .. }), Some(pool)) => image(request, pool, now),
            _ => Level::NotYet(describe(view, now)),
        },
    }
}

/// One that is to be at rest, and may have to run first.
fn resting(
    state: State,
    request: &Request<'_>,
    target: &InstanceTarget,
    view: &InstanceView,
    snapshot: &Snapshot,
    now: u64,
) -> Level {
    if view.state == state && view.activity.is_none() && view.generation >= target.generation {
        return Level::Reached;
    }
    let Some(Waiting::Setback { step, error, .. }) = &view.waiting else {
        return match running(request, target, view, snapshot, now) {
            Level::Reached => Level::NotYet(describe(view, now)),
            level => level,
        };
    };
    let path = &view.path;
    Level::Failed(Failure {
        message: format!("{path} could not be {step}: {error}"),
        console: Vec::new(),
        hint: format!("it runs on, and mvm tries again; `mvm wake {}` gives that up", path.id),
        superseded: false,
        others: 0,
        program: None,
    })
}

fn has_succeeded(view: &InstanceView) -> bool {
    let is_left_so = matches!(view.waiting, Some(Waiting::RestartPolicy { .. }));
    is_left_so && view.last_death.as_ref().is_some_and(|d| d.cause == Cause::Exited { code: 0 })
}

fn stopped(view: &InstanceView, now: u64) -> Level {
    match (view.state, &view.activity) {
        (State::Created | State::Stopped | State::Failed | State::Destroyed, None) => {
            Level::Reached
        }
        _ => Level::NotYet(describe(view, now)),
    }
}

/// The image that an instance waits for.
fn image(request: &Request<'_>, pool: &PoolView, now: u64) -> Level {
    let path = &pool.path;
    match &pool.build {
        BuildState::Failed { error, at_unix_ms, .. }
            if *at_unix_ms >= request.submitted_unix_ms =>
        {
            Level::Failed(build_failure(path, &pool.spec.image, error))
        }
        BuildState::Failed { error, at_unix_ms, .. } => {
            let ago = duration_text(now.saturating_sub(*at_unix_ms));
            Level::NotYet(format!(
                "{path}: building the image failed {ago} ago, it is tried again: {error}"
            ))
        }
        BuildState::Building { step } => Level::NotYet(building(path, step)),
        BuildState::Idle | BuildState::Built { .. } | BuildState::Unknown => {
            Level::NotYet(format!("{path}: looking for the image"))
        }
    }
}

fn warmed_up(target: &PoolTarget, snapshot: &Snapshot) -> Level {
    let path = &target.path;
    let Some(pool) = snapshot.pools.get(path) else {
        return superseded(format!("pool {path} was destroyed by another request"));
    };
    match (&pool.build, &pool.base_failure) {
        (_, None) if pool.base_generation >= target.base_generation => Level::Reached,
        (_, Some(error)) if pool.base_generation >= target.base_generation => {
            Level::Failed(Failure {
                message: format!("pool {path} gets no base: {error}"),
                console: Vec::new(),
                hint: format!(
                    "boot one with `mvm instance create {path} --start --cold`, and see `mvm why`"
                ),
                superseded: false,
                others: 0,
                program: None,
            })
        }
        (BuildState::Building { step }, _) => Level::NotYet(building(path, step)),
        _ => Level::NotYet(format!("{path}: booting an instance for its base")),
    }
}

fn built(target: &PoolTarget, snapshot: &Snapshot) -> Level {
    let path = &target.path;
    let Some(pool) = snapshot.pools.get(path) else {
        return superseded(format!("pool {path} was destroyed by another request"));
    };
    match &pool.build {
        BuildState::Building { step } => Level::NotYet(building(path, step)),
        BuildState::Built { .. } if pool.build_generation >= target.build_generation => {
            Level::Reached
        }
        BuildState::Failed { error, .. } if pool.build_generation >= target.build_generation => {
            Level::Failed(build_failure(path, &pool.spec.image, error))
        }
        _ => Level::NotYet(format!("{path}: looking for the image")),
    }
}

fn building(path: &PoolPath, step: &str) -> String {
    format!("{path}: building the image: {step}")
}

fn build_failure(path: &PoolPath, image: &ImageSpec, error: &str) -> Failure {
    Failure {
        message: format!("the image of {path} cannot be built: {error}"),
        console: Vec::new(),
        hint: build_hint(path, image),
        superseded: false,
        others: 0,
        program: None,
    }
}

fn instance_failure(view: &InstanceView) -> Failure {
    let path = &view.path;
    let (cause, console, program) = match &view.last_death {
        Some(death) => {
            let program = match &death.cause {
                Cause::StartFailed { program, .. } => *program,
                _ => None,
            };
            // The console knows nothing of a program that could not be started.
            let console = match program {
                Some(_) => Vec::new(),
                None => death.console_tail.clone(),
            };
            (format!(": {}", death.cause), console, program)
        }
        None => (String::new(), Vec::new(), None),
    };
    let state = view.state;
    // What the loop will do next may not be in the view yet.
    let is_tried_again = match view.restart.known() {
        Some(RestartPolicy::Always) => true,
        Some(RestartPolicy::OnFailure) => state == State::Failed || has_rebooted(view),
        Some(RestartPolicy::Never) | None => false,
    };
    let hint = match is_tried_again {
        false => format!("see `mvm why {path}` and `mvm logs {path}`"),
        true => format!(
            "it is tried again in the background; see `mvm why {path}` and `mvm logs {path}`"
        ),
    };
    Failure {
        message: format!("{path} {state}{cause}"),
        console,
        hint,
        superseded: false,
        others: 0,
        program,
    }
}

fn has_rebooted(view: &InstanceView) -> bool {
    view.last_death.as_ref().is_some_and(|death| death.cause == Cause::GuestReboot)
}

fn superseded(message: String) -> Level {
    let hint = "see `mvm ps -a`".to_owned();
    Level::Failed(Failure {
        message,
        console: Vec::new(),
        hint,
        superseded: true,
        others: 0,
        program: None,
    })
}

/// An instance that is not there yet, and why.
fn describe(view: &InstanceView, now: u64) -> String {
    let doing = view.activity.as_deref().map_or_else(|| view.state.to_string(), str::to_owned);
    match view.waiting.as_ref().and_then(|waiting| reason(waiting, now)) {
        Some(reason) => format!("{}: {doing}, {reason}", view.path),
        None => format!("{}: {doing}", view.path),
    }
}

/// Why an instance waits, in words; `None` if what it is in the middle of says it all.
pub(crate) fn reason(waiting: &Waiting, now: u64) -> Option<String> {
    match waiting {
        Waiting::Image { error: None } => Some("waiting for its pool's image".to_owned()),
        Waiting::Image { error: Some(error) } => {
            Some(format!("its pool's image could not be built and is tried again: {error}"))
        }
        Waiting::Disk { disk, error: None } => Some(format!("waiting for disk {disk}")),
        Waiting::Disk { disk, error: Some(error) } => {
            Some(format!("disk {disk} cannot be used: {error}"))
        }
        Waiting::DiskHeld { disk, holder } => {
            Some(format!("waiting until {holder} has stopped, which has disk {disk}"))
        }
        Waiting::Network => Some("waiting for the network of its tenant".to_owned()),
        Waiting::Quota => Some("waiting for the quota of its tenant".to_owned()),
        Waiting::StartSlot => Some("waiting until others have started".to_owned()),
        Waiting::Setback { step, error, until_unix_ms } => {
            let left = duration_text(until_unix_ms.saturating_sub(now).saturating_add(999));
            Some(format!("it could not be {step} ({error}), tried again in {left}"))
        }
        Waiting::Backoff { failures, short_runs, until_unix_ms } => {
            let left = duration_text(until_unix_ms.saturating_sub(now).saturating_add(999));
            Some(match (*failures, *short_runs) {
                (0, 0 | 1) => format!("it ended, and is started again in {left}"),
                (0, ends) => {
                    format!("it ended {ends} times in a row, and is started again in {left}")
                }
                (1, _) => format!("failed once, tried again in {left}"),
                (failures, _) => format!("failed {failures} times in a row, tried again in {left}"),
            })
        }
        Waiting::RestartPolicy { policy } => {
            Some(format!("left so by its restart policy `{policy}`"))
        }
        Waiting::Step => None,
        Waiting::Unknown => Some("waiting for what only a newer mvm knows".to_owned()),
    }
}

#[cfg(test)]
mod tests;
