//! Admission: `admit(desired, node, request) -> Edit or Denial`, the only writer of desired records.
//!
//! A request is carried out on a copy of the desired documents, where addresses are taken, and the
//! result is checked against the tenant's quota and the node's capacity *as a whole*; the agent then
//! writes the difference in one compare-and-swap. So everything that a request needs is reserved at
//! once or not at all, and the imperative verbs and the declarative document take the same path.

mod apply;
mod copies;
mod denial;
mod disks;
mod instances;
mod limits;
mod own;
mod pools;
mod published;
mod sleep_policy;
mod spares;
mod tenants;
mod upkeep;

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use copies::make_own;
pub use denial::{Denial, DiskConflict, Limit};
pub use limits::{IsFinished, Usage, node_usage, tenant_usage};
pub use own::{OwnRequest, admit_own};
pub use spares::{spare_fits, spares_of};
pub use upkeep::{forget, take_over};

use crate::authored;
use crate::disk::DiskMount;
use crate::image::ImageSpec;
use crate::lifecycle::{InstanceStatus, Phase};
use crate::name::{DiskPath, InstanceId, InstancePath, PoolPath, Selector, TenantName};
use crate::net::NetId;
use crate::plan::has_ended_for_good;
use crate::record::{Desired, Existence, Observed, PoolStatus};
use crate::settings::Settings;
use crate::sleep_policy::SleepPolicy;
use crate::spec::{Document, PoolSpec, Quota};

/// How long a guest has to shut down unless the request says otherwise, in milliseconds.
pub const DEFAULT_GRACE_MS: u64 = 10_000;

/// Most instances that one request may create.
pub const MAX_CREATE: u32 = 1_000;

/// What a person or program asks of a node. It is read strictly, at any depth: to ignore a field that is not
/// known would be to do something else than was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Makes a tenant.
    TenantCreate {
        /// Its name.
        name: TenantName,
        /// Its limits.
        #[serde(with = "authored")]
        quota: Quota,
        /// Its subnet; chosen if absent.
        subnet: Option<Ipv4Net>,
    },
    /// Changes a tenant's limits; absent ones stay.
    TenantUpdate {
        /// Its name.
        name: TenantName,
        /// The new limits.
        #[serde(with = "authored")]
        quota: Quota,
        /// Names of limits to lift.
        lift: Vec<String>,
    },
    /// Gives a tenant another subnet; its instances, none of which may run, keep their slots in it.
    TenantMove {
        /// Its name.
        name: TenantName,
        /// The new subnet.
        subnet: Ipv4Net,
    },
    /// Removes a tenant.
    TenantDestroy {
        /// Its name.
        name: TenantName,
        /// Whether its pools and instances go with it.
        force: bool,
    },
    /// Makes a pool.
    PoolCreate {
        /// Its path.
        path: PoolPath,
        /// What its instances are like.
        #[serde(with = "authored")]
        spec: Box<PoolSpec>,
    },
    /// Builds a pool's image, or finds it built.
    PoolBuild {
        /// Its path.
        path: PoolPath,
    },
    /// Builds what a pool's image is now, or another image, for new instances, and gives them more
    /// settings.
    PoolUpdate {
        /// Its path.
        path: PoolPath,
        /// The image; the same as before if absent.
        image: Option<ImageSpec>,
        /// Settings that are added to, or replace, those that it has.
        #[serde(default, with = "authored", skip_serializing_if = "Settings::is_default")]
        settings: Settings,
    },
    /// Gives new instances of a pool the revision before the present one.
    PoolRollback {
        /// Its path.
        path: PoolPath,
    },
    /// Sets how many instances of a pool run, stand still and sleep.
    PoolScale {
        /// Its path.
        path: PoolPath,
        /// How many run.
        running: u32,
        /// How many have their vCPUs stopped; those that have, and are not needed to run, stay so
        /// if absent.
        #[serde(default)]
        warm: Option<u32>,
        /// How many sleep; those that do, and are not needed to run, stay so if absent.
        #[serde(default)]
        sleeping: Option<u32>,
    },
    /// Removes a pool and its stopped instances.
    PoolDestroy {
        /// Its path.
        path: PoolPath,
        /// Whether running instances are stopped and go with it.
        force: bool,
    },
    /// Makes a pool's base, or makes it anew: what new instances begin with instead of booting.
    PoolWarmUp {
        /// Its path.
        path: PoolPath,
    },
    /// Sets how many new instances of a pool are to stand by.
    PoolReady {
        /// Its path.
        path: PoolPath,
        /// How many.
        ready: u32,
    },
    /// Says when a pool's instances are put to rest by themselves, those that exist included.
    PoolPolicy {
        /// Its path.
        path: PoolPath,
        /// The policy.
        #[serde(with = "authored")]
        policy: SleepPolicy,
    },
    /// Makes instances, stopped.
    InstanceCreate {
        /// Their pool.
        pool: PoolPath,
        /// How many.
        count: u32,
        /// Whether they are started at once.
        start: bool,
        /// Data disks that they have besides those of the pool.
        #[serde(default, with = "authored")]
        disks: Vec<DiskMount>,
        /// Whether they boot although their pool has a base.
        #[serde(default)]
        cold: bool,
    },
    /// Starts instances.
    InstanceStart {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
    },
    /// Stops instances.
    InstanceStop {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
        /// How long the guest has to shut down, in milliseconds; 0 ends it at once.
        grace_ms: u64,
    },
    /// Stops the vCPUs of instances and keeps their memory; sleeping ones are woken first.
    InstanceWarm {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
    },
    /// Puts instances to sleep.
    InstanceSleep {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
        /// How long the guest has to prepare, in milliseconds; 0 does without.
        hooks_ms: u64,
    },
    /// Lets instances be left alone by their pools' sleep policies, or no longer.
    InstancePin {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
        /// Whether they are left alone.
        pinned: bool,
    },
    /// Stops and starts instances; stopped ones are started.
    InstanceRestart {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
        /// How long the guest has to shut down, in milliseconds; 0 ends it at once.
        grace_ms: u64,
    },
    /// Removes instances with their disks.
    InstanceDestroy {
        /// Which.
        selector: Selector,
        /// Whether the selector may mean more than one.
        all: bool,
        /// Whether running ones are stopped first.
        force: bool,
    },
    /// Makes a data disk.
    DiskCreate {
        /// Its path.
        path: DiskPath,
        /// Its size in MiB.
        size_mib: u64,
    },
    /// Grows a data disk.
    DiskResize {
        /// Its path.
        path: DiskPath,
        /// Its new size in MiB.
        size_mib: u64,
    },
    /// Removes a data disk with what is on it.
    DiskRemove {
        /// Its path.
        path: DiskPath,
    },
    /// Makes the node agree with a document.
    Apply {
        /// The document.
        document: Document,
    },
    /// Removes what a document describes.
    Remove {
        /// The document.
        document: Document,
    },
}

impl Request {
    /// Which instances it is about, if it selects some.
    pub fn selector_mut(&mut self) -> Option<&mut Selector> {
        match self {
            Self::InstanceStart { selector, .. }
            | Self::InstanceStop { selector, .. }
            | Self::InstanceWarm { selector, .. }
            | Self::InstanceSleep { selector, .. }
            | Self::InstancePin { selector, .. }
            | Self::InstanceRestart { selector, .. }
            | Self::InstanceDestroy { selector, .. } => Some(selector),
            Self::TenantCreate { .. }
            | Self::TenantUpdate { .. }
            | Self::TenantMove { .. }
            | Self::TenantDestroy { .. }
            | Self::PoolCreate { .. }
            | Self::PoolBuild { .. }
            | Self::PoolUpdate { .. }
            | Self::PoolRollback { .. }
            | Self::PoolScale { .. }
            | Self::PoolDestroy { .. }
            | Self::PoolReady { .. }
            | Self::PoolPolicy { .. }
            | Self::PoolWarmUp { .. }
            | Self::InstanceCreate { .. }
            | Self::DiskCreate { .. }
            | Self::DiskResize { .. }
            | Self::DiskRemove { .. }
            | Self::Apply { .. }
            | Self::Remove { .. } => None,
        }
    }
}

/// What admission knows of the node besides the desired documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// What the node can hold.
    pub capacity: Capacity,
    /// Net ids that other software, or another agent, uses on this machine.
    pub foreign_net_ids: BTreeSet<NetId>,
    /// Subnets that the host itself is connected to or routes.
    pub foreign_subnets: Vec<Ipv4Net>,
    /// What is known of instances and of pools' images.
    pub observed: Observed,
    /// Instances of which nothing is known.
    pub unknown: BTreeSet<InstancePath>,
}

impl NodeFacts {
    /// What is known of a pool's image.
    fn image(&self, pool: &PoolPath) -> Option<&PoolStatus> {
        self.observed.pools.get(pool)
    }

    /// Whether an instance has, or is getting or losing, a microVM; one of which nothing is known may.
    fn is_up(&self, path: &InstancePath) -> bool {
        let is_down = |status: &InstanceStatus| {
            matches!(
                status.phase,
                Phase::Created
                    | Phase::Sleeping { .. }
                    | Phase::Stopped
                    | Phase::Failed
                    | Phase::Destroyed
            )
        };
        self.unknown.contains(path) || !self.observed.instances.get(path).is_none_or(is_down)
    }

    /// Whether an instance was to run and has ended for good.
    fn is_finished(&self, desired: &Desired, path: &InstancePath) -> bool {
        let known = desired.instances.get(path).zip(self.observed.instances.get(path));
        !self.unknown.contains(path)
            && known.is_some_and(|(record, status)| has_ended_for_good(record, status))
    }

    /// Whether an instance that stands by could go on at once.
    fn is_ready(&self, path: &InstancePath) -> bool {
        let status = self.observed.instances.get(path);
        let is_warm = status.is_some_and(|status| matches!(status.phase, Phase::Warm { .. }));
        is_warm && !self.unknown.contains(path)
    }
}

/// What a node can hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Virtual CPUs, overcommit included.
    pub vcpus: u64,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Writable layers and data disks in MiB, overcommit included.
    pub disk_mib: u64,
}

/// An accepted request: the desired documents after it, and what to say and wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// The desired documents as they are to be.
    pub desired: Desired,
    /// Instances that the request concerns, in order.
    pub instances: Vec<InstancePath>,
    /// Pools that the request concerns.
    pub pools: Vec<PoolPath>,
    /// Data disks that the request concerns.
    pub disks: Vec<DiskPath>,
    /// What to tell the person, one line each.
    pub notes: Vec<String>,
}

/// Decides a request.
///
/// `entropy` gives the random bits of new ids.
///
/// # Errors
/// The request is denied; nothing is to be changed.
pub fn admit(
    desired: &Desired,
    node: &NodeFacts,
    request: &Request,
    entropy: &mut dyn FnMut() -> u32,
    now: u64,
) -> Result<Edit, Denial> {
    let mut draft = Draft::of(desired, node, entropy, now);
    match request {
        Request::TenantCreate { name, quota, subnet } => {
            draft.tenant_create(name, quota.clone(), *subnet)?;
        }
        Request::TenantUpdate { name, quota, lift } => draft.tenant_update(name, quota, lift)?,
        Request::TenantMove { name, subnet } => draft.tenant_move(name, *subnet)?,
        Request::TenantDestroy { name, force } => draft.tenant_destroy(name, *force)?,
        Request::PoolCreate { path, spec } => draft.pool_create(path, spec)?,
        Request::PoolBuild { path } => draft.pool_update(path, None, &Settings::default())?,
        Request::PoolUpdate { path, image, settings } => {
            draft.pool_update(path, image.as_ref(), settings)?;
        }
        Request::PoolRollback { path } => draft.pool_rollback(path)?,
        Request::PoolScale { path, running, warm, sleeping } => {
            draft.pool_scale(path, *running, *warm, *sleeping)?;
        }
        Request::PoolDestroy { path, force } => draft.pool_destroy(path, *force)?,
        Request::PoolWarmUp { path } => draft.pool_warm_up(path)?,
        Request::InstanceCreate { pool, count, start, disks, cold } => {
            draft.instance_create(pool, *count, *start, disks, *cold)?;
        }
        Request::InstanceStart { selector, all } => draft.instance_start(selector, *all)?,
        Request::InstanceStop { selector, all, grace_ms } => {
            draft.instance_stop(selector, *all, *grace_ms)?;
        }
        Request::InstanceWarm { selector, all } => draft.instance_warm(selector, *all)?,
        Request::InstanceSleep { selector, all, hooks_ms } => {
            draft.instance_sleep(selector, *all, *hooks_ms)?;
        }
        Request::PoolReady { path, ready } => draft.pool_ready(path, *ready)?,
        Request::PoolPolicy { path, policy } => draft.pool_policy(path, policy)?,
        Request::InstancePin { selector, all, pinned } => {
            draft.instance_pin(selector, *all, *pinned)?;
        }
        Request::InstanceRestart { selector, all, grace_ms } => {
            draft.instance_restart(selector, *all, *grace_ms)?;
        }
        Request::InstanceDestroy { selector, all, force } => {
            draft.instance_destroy(selector, *all, *force)?;
        }
        Request::DiskCreate { path, size_mib } => draft.disk_create(path, *size_mib)?,
        Request::DiskResize { path, size_mib } => draft.disk_resize(path, *size_mib)?,
        Request::DiskRemove { path } => draft.disk_remove(path)?,
        Request::Apply { document } => draft.apply(document)?,
        Request::Remove { document } => draft.remove(document)?,
    }
    let is_finished = |path: &InstancePath| node.is_finished(desired, path);
    check_result(desired, &draft.edit.desired, node.capacity, &is_finished)?;
    Ok(draft.edit)
}

/// Checks what a change would lead to as a whole.
///
/// # Errors
/// It may not be.
pub(crate) fn check_result(
    before: &Desired,
    after: &Desired,
    capacity: Capacity,
    is_finished: IsFinished<'_>,
) -> Result<(), Denial> {
    published::check(before, after)?;
    disks::check_holders(before, after)?;
    limits::check(before, after, capacity, is_finished)
}

/// A request being carried out on a copy.
struct Draft<'a> {
    before: &'a Desired,
    edit: Edit,
    /// Those that are among the edit's instances.
    concerned: BTreeSet<InstancePath>,
    node: &'a NodeFacts,
    entropy: &'a mut dyn FnMut() -> u32,
    now: u64,
}

impl<'a> Draft<'a> {
    /// Nothing is changed yet.
    fn of(
        desired: &'a Desired,
        node: &'a NodeFacts,
        entropy: &'a mut dyn FnMut() -> u32,
        now: u64,
    ) -> Self {
        let edit = Edit {
            desired: desired.clone(),
            instances: Vec::new(),
            pools: Vec::new(),
            disks: Vec::new(),
            notes: Vec::new(),
        };
        Self { before: desired, edit, concerned: BTreeSet::new(), node, entropy, now }
    }
}

impl Draft<'_> {
    fn note(&mut self, text: impl Into<String>) {
        self.edit.notes.push(text.into());
    }

    fn concerns(&mut self, path: &InstancePath) {
        if self.concerned.insert(path.clone()) {
            self.edit.instances.push(path.clone());
        }
    }

    /// Whether an instance was to run and has ended by itself: a request to run it is a fresh wish.
    fn has_ended(&self, path: &InstancePath) -> bool {
        let record = self.before.instances.get(path).filter(|record| record.desired.is_alive());
        record.zip(self.node.observed.instances.get(path)).is_some_and(|(record, status)| {
            status.has_ended() && status.generation == record.generation
        })
    }

    fn fresh_id(&mut self) -> InstanceId {
        loop {
            let id = InstanceId::from_bits((self.entropy)());
            if !self.edit.desired.instances.keys().any(|path| path.id == id) {
                return id;
            }
        }
    }

    /// The tenant exists and is not being removed.
    fn require_tenant(&self, name: &TenantName) -> Result<(), Denial> {
        match self.edit.desired.tenants.get(name) {
            Some(tenant) if tenant.existence == Existence::Kept => Ok(()),
            Some(_) => Err(Denial::BeingRemoved { object: format!("tenant {name}") }),
            None => Err(Denial::NoSuchTenant { name: name.clone() }),
        }
    }

    /// The pool exists and is not being removed.
    fn require_pool(&self, path: &PoolPath) -> Result<(), Denial> {
        self.require_tenant(&path.tenant)?;
        match self.edit.desired.pools.get(path) {
            Some(pool) if pool.existence == Existence::Kept => Ok(()),
            Some(_) => Err(Denial::BeingRemoved { object: format!("pool {path}") }),
            None => Err(Denial::NoSuchPool { path: path.clone() }),
        }
    }
}

#[cfg(test)]
mod tests;
