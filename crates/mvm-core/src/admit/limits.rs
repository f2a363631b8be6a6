//! Quotas and capacity, checked on the whole result of a request. The size of a subnet needs no
//! check here: an instance without a free slot cannot be made.

use std::collections::{BTreeMap, BTreeSet};

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use serde::{Deserialize, Serialize};

use super::{Capacity, Denial, Limit};
use crate::name::{InstancePath, PoolPath, TenantName};
use crate::record::{Desired, DiskRecord, Existence, InstanceRecord, PoolRecord, TenantRecord};

/// Whether an instance was to run and has ended for good ([`crate::plan::has_ended_for_good`]).
pub type IsFinished<'a> = &'a dyn Fn(&InstancePath) -> bool;

/// What is reserved by what is desired. What has ended for good, and is not started again without
/// being asked, reserves neither processors nor memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Virtual CPUs of instances that are to run or to stand by warm.
    pub vcpus: u64,
    /// Guest memory in MiB of instances that are to run or to stand by warm.
    pub mem_mib: u64,
    /// Writable layers of all instances and data disks, in MiB.
    pub disk_mib: u64,
    /// Instances that are to run or to stand by warm.
    pub running: u64,
    /// Pools, without those that are being removed.
    pub pools: u64,
    /// Instances, running or not.
    pub instances: u64,
}

impl Usage {
    /// An instance that is being destroyed holds its disk until it is gone, and nothing else.
    fn add(&mut self, instance: &InstanceRecord, is_finished: IsFinished<'_>) {
        self.disk_mib += u64::from(instance.spec.disk_mib);
        self.instances += 1;
        if instance.desired.is_up() && !is_finished(&instance.path) {
            self.vcpus += u64::from(instance.spec.vcpus);
            self.mem_mib += u64::from(instance.spec.mem_mib);
            self.running += 1;
        }
    }

    /// Both together.
    fn and(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus + other.vcpus,
            mem_mib: self.mem_mib + other.mem_mib,
            disk_mib: self.disk_mib + other.disk_mib,
            running: self.running + other.running,
            pools: self.pools + other.pools,
            instances: self.instances + other.instances,
        }
    }

    /// A disk that is being removed counts until it is gone.
    fn add_disk(&mut self, disk: &DiskRecord) {
        self.disk_mib += disk.size_mib;
    }
}

/// What a tenant has reserved, if these instances have ended for good.
pub fn tenant_usage(desired: &Desired, is_finished: IsFinished<'_>, tenant: &TenantName) -> Usage {
    let mut usage = Usage { pools: kept(desired.pools_of(tenant)), ..Usage::default() };
    desired.instances_of(tenant).for_each(|instance| usage.add(instance, is_finished));
    desired.disks_of(tenant).for_each(|disk| usage.add_disk(disk));
    usage
}

/// What all tenants have reserved, if these instances have ended for good.
pub fn node_usage(desired: &Desired, is_finished: IsFinished<'_>) -> Usage {
    let mut usage = Usage { pools: kept(desired.pools.values()), ..Usage::default() };
    desired.instances.values().for_each(|instance| usage.add(instance, is_finished));
    desired.disks.values().for_each(|disk| usage.add_disk(disk));
    usage
}

fn kept<'a>(pools: impl Iterator<Item = &'a PoolRecord>) -> u64 {
    pools.filter(|pool| pool.existence == Existence::Kept).count() as u64
}

/// Refuses a request that raises a reservation above its limit. What is over a limit already (a
/// lowered quota) may stay or shrink. So only tenants of which something changes are counted.
pub(super) fn check(
    before: &Desired,
    after: &Desired,
    capacity: Capacity,
    was_finished: IsFinished<'_>,
) -> Result<(), Denial> {
    // A fresh wish and another restart policy may have one run again.
    let reason_to_run = |desired: &Desired, path: &InstancePath| {
        let instance = desired.instances.get(path);
        instance.map(|instance| (instance.generation, instance.spec.restart))
    };
    let stays = |path: &InstancePath| reason_to_run(before, path) == reason_to_run(after, path);
    let is_finished = |path: &InstancePath| was_finished(path) && stays(path);
    let mut changed = (Usage::default(), Usage::default());
    for name in &changed_tenants(before, after) {
        let used = tenant_usage(before, was_finished, name);
        let wanted = tenant_usage(after, &is_finished, name);
        changed = (changed.0.and(used), changed.1.and(wanted));
        if let Some(tenant) = after.tenants.get(name) {
            check_quota(tenant, (before, used), (after, wanted))?;
        }
    }
    let (less, more) = changed;
    let is_raised =
        more.vcpus > less.vcpus || more.mem_mib > less.mem_mib || more.disk_mib > less.disk_mib;
    if !is_raised {
        return Ok(());
    }
    let used = node_usage(before, was_finished);
    for (what, used, less, more, allowed) in [
        ("vCPUs", used.vcpus, less.vcpus, more.vcpus, capacity.vcpus),
        ("MiB of memory", used.mem_mib, less.mem_mib, more.mem_mib, capacity.mem_mib),
        ("MiB of disk", used.disk_mib, less.disk_mib, more.disk_mib, capacity.disk_mib),
    ] {
        over("this node", what, used, used - less + more, Some(allowed), || {
            Some("stop or destroy something first: `mvm ps -a`".to_owned())
        })?;
    }
    Ok(())
}

/// The tenants whose reservations may differ.
fn changed_tenants(before: &Desired, after: &Desired) -> BTreeSet<TenantName> {
    fn keys<K: Ord + Clone, V: PartialEq>(
        before: &OrdMap<K, V>,
        after: &OrdMap<K, V>,
    ) -> impl Iterator<Item = K> {
        before.diff(after).map(|change| match change {
            DiffItem::Add(key, _) | DiffItem::Remove(key, _) => key.clone(),
            DiffItem::Update { new: (key, _), .. } => key.clone(),
        })
    }
    let instances = keys(&before.instances, &after.instances).map(|path| path.pool.tenant);
    let pools = keys(&before.pools, &after.pools).map(|path| path.tenant);
    let disks = keys(&before.disks, &after.disks).map(|path| path.tenant);
    instances.chain(pools).chain(disks).collect()
}

fn check_quota(
    tenant: &TenantRecord,
    (before, used): (&Desired, Usage),
    (after, wanted): (&Desired, Usage),
) -> Result<(), Denial> {
    let (name, quota) = (&tenant.name, &tenant.quota);
    let of = format!("the quota of tenant {name}");
    let raise = |flag: &str, to: u64| {
        Some(format!("raise it with `mvm tenant update {name} --{flag} {to}`"))
    };
    for (what, flag, used, wanted, allowed) in [
        ("vCPUs", "vcpus", used.vcpus, wanted.vcpus, quota.vcpus),
        ("MiB of memory", "mem", used.mem_mib, wanted.mem_mib, quota.mem_mib),
        ("MiB of disk", "disk", used.disk_mib, wanted.disk_mib, quota.disk_mib),
        ("running instances", "running", used.running, wanted.running, quota.running),
        ("pools", "pools", used.pools, wanted.pools, quota.pools),
    ] {
        over(&of, what, used, wanted, allowed, || raise(flag, wanted))?;
    }
    let Some(allowed) = quota.instances_per_pool else { return Ok(()) };
    let (used, wanted) = (per_pool(before, name), per_pool(after, name));
    for (path, wanted) in wanted {
        let of = format!("{of} (pool {path})");
        let used = used.get(path).copied().unwrap_or(0);
        over(&of, "instances per pool", used, wanted, Some(allowed), || {
            raise("instances-per-pool", wanted)
        })?;
    }
    Ok(())
}

fn per_pool<'a>(desired: &'a Desired, tenant: &'a TenantName) -> BTreeMap<&'a PoolPath, u64> {
    let mut counts = BTreeMap::new();
    for instance in desired.instances_of(tenant) {
        *counts.entry(&instance.path.pool).or_default() += 1;
    }
    counts
}

fn over(
    of: &str,
    what: &str,
    used: u64,
    wanted: u64,
    allowed: Option<u64>,
    raise: impl FnOnce() -> Option<String>,
) -> Result<(), Denial> {
    match allowed {
        Some(allowed) if wanted > allowed && wanted > used => Err(Denial::OverLimit(Limit {
            of: of.to_owned(),
            what: what.to_owned(),
            asked: wanted - used,
            used,
            allowed,
            raise: raise(),
        })),
        _ => Ok(()),
    }
}
