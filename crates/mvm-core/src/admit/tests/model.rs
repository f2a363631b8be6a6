//! An independent reference model of admission: it counts, and knows no records, ids or slots.

use std::collections::BTreeMap;

use super::*;
use crate::name::PoolName;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pool {
    pub(super) running: u64,
    pub(super) stopped: u64,
    /// Being destroyed.
    pub(super) going: u64,
    /// Being removed.
    pub(super) is_going: bool,
    vcpus: u64,
    mem_mib: u64,
    disk_mib: u64,
}

impl Pool {
    pub(super) fn all(&self) -> u64 {
        self.running + self.stopped + self.going
    }

    fn clear(&mut self) {
        *self = Self { going: self.all(), running: 0, stopped: 0, is_going: true, ..*self };
    }

    fn scale(&mut self, running: u64) {
        let (up, down) = (self.running, self.stopped);
        self.running = running;
        self.stopped =
            if running < up { down + up - running } else { (down + up).max(running) - running };
    }
}

#[derive(Debug, Clone)]
pub(super) struct Tenant {
    quota: Quota,
    /// As asked for, or as chosen by the tested code.
    pub(super) subnet: Option<Ipv4Net>,
    pub(super) is_going: bool,
    pub(super) pools: BTreeMap<PoolName, Pool>,
}

impl Tenant {
    fn new(quota: &Quota, subnet: Option<Ipv4Net>) -> Self {
        Self { quota: quota.clone(), subnet, is_going: false, pools: BTreeMap::new() }
    }

    fn sum(&self, of: impl Fn(&Pool) -> u64) -> u64 {
        self.pools.values().map(of).sum()
    }

    /// Each limited quantity with its limit.
    fn limited(&self) -> Vec<(u64, Option<u64>)> {
        let size = self.subnet.map(|subnet| (1 << (32 - subnet.prefix_len())) - 4);
        vec![
            (self.sum(|pool| pool.running * pool.vcpus), self.quota.vcpus),
            (self.sum(|pool| pool.running * pool.mem_mib), self.quota.mem_mib),
            (self.sum(|pool| pool.all() * pool.disk_mib), self.quota.disk_mib),
            (self.sum(|pool| pool.running), self.quota.running),
            (self.sum(|pool| u64::from(!pool.is_going)), self.quota.pools),
            (self.sum(Pool::all), size),
        ]
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub(super) tenants: BTreeMap<TenantName, Tenant>,
}

fn pool_of(spec: &PoolSpec) -> Pool {
    Pool {
        vcpus: spec.vcpus.into(),
        mem_mib: spec.mem_mib.into(),
        disk_mib: spec.disk_mib.into(),
        ..Pool::default()
    }
}

fn range(subnet: Ipv4Net) -> (u32, u32) {
    (subnet.network().into(), subnet.broadcast().into())
}

impl Model {
    /// The model after the request, or `None` if it is to be denied.
    pub(super) fn after(&self, request: &Request, capacity: Capacity) -> Option<Self> {
        let mut next = self.clone();
        next.carry_out(request)?;
        next.fits(self, capacity).then_some(next)
    }

    /// Drops what is going, as if it were gone.
    pub(super) fn forget_the_gone(&mut self) {
        self.tenants.retain(|_, tenant| !tenant.is_going);
        for tenant in self.tenants.values_mut() {
            tenant.pools.retain(|_, pool| !pool.is_going);
            tenant.pools.values_mut().for_each(|pool| pool.going = 0);
        }
    }

    fn tenant(&mut self, name: &TenantName) -> Option<&mut Tenant> {
        self.tenants.get_mut(name).filter(|tenant| !tenant.is_going)
    }

    fn pool(&mut self, path: &PoolPath) -> Option<&mut Pool> {
        self.tenant(&path.tenant)?.pools.get_mut(&path.pool).filter(|pool| !pool.is_going)
    }

    /// The pool of a selector that means all its instances, of which there is one.
    fn selected(&mut self, selector: &Selector) -> Option<&mut Pool> {
        let Selector::Pool(path) = selector else { panic!("{selector} is not generated") };
        self.pool(path).filter(|pool| pool.running + pool.stopped > 0)
    }

    fn add_tenant(
        &mut self,
        name: &TenantName,
        quota: &Quota,
        subnet: Option<Ipv4Net>,
    ) -> Option<()> {
        let taken = self.tenants.values().filter_map(|tenant| tenant.subnet).map(range);
        let overlaps = |(first, last)| { taken }.any(|(low, high)| first <= high && low <= last);
        if self.tenants.contains_key(name) || subnet.map(range).is_some_and(overlaps) {
            return None;
        }
        self.tenants.insert(name.clone(), Tenant::new(quota, subnet));
        Some(())
    }

    fn carry_out(&mut self, request: &Request) -> Option<()> {
        match request {
            Request::PoolUpdate { .. }
            | Request::PoolRollback { .. }
            | Request::PoolWarmUp { .. }
            | Request::TenantMove { .. }
            | Request::PoolPolicy { .. }
            | Request::PoolReady { .. }
            | Request::InstancePin { .. }
            | Request::InstanceWarm { .. }
            | Request::InstanceSleep { .. } => {
                panic!("not generated")
            }
            Request::TenantCreate { name, quota, subnet } => {
                self.add_tenant(name, quota, *subnet)?;
            }
            Request::TenantUpdate { name, quota, lift } => {
                assert!(lift.is_empty(), "not generated");
                self.tenant(name)?.quota.merge(quota);
            }
            Request::TenantDestroy { name, force } => {
                let tenant = self.tenants.get_mut(name)?;
                if !force && tenant.pools.values().any(|pool| !pool.is_going) {
                    return None;
                }
                tenant.pools.values_mut().for_each(Pool::clear);
                tenant.is_going = true;
            }
            Request::PoolCreate { path, spec } => {
                let tenant = self.tenant(&path.tenant)?;
                if tenant.pools.contains_key(&path.pool) {
                    return None;
                }
                tenant.pools.insert(path.pool.clone(), pool_of(spec));
            }
            Request::PoolBuild { path } => drop(self.pool(path)?),
            Request::PoolScale { path, running, .. } => self.pool(path)?.scale((*running).into()),
            Request::PoolDestroy { path, force } => {
                let pool = self.tenants.get_mut(&path.tenant)?.pools.get_mut(&path.pool)?;
                if pool.running > 0 && !force {
                    return None;
                }
                pool.clear();
            }
            Request::InstanceCreate { pool, count, start, .. } => {
                let pool = self.pool(pool)?;
                let state = if *start { &mut pool.running } else { &mut pool.stopped };
                *state += u64::from(*count);
            }
            Request::InstanceStart { selector, .. } | Request::InstanceRestart { selector, .. } => {
                let pool = self.selected(selector)?;
                pool.running += std::mem::take(&mut pool.stopped);
            }
            Request::InstanceStop { selector, .. } => {
                let pool = self.selected(selector)?;
                pool.stopped += std::mem::take(&mut pool.running);
            }
            Request::InstanceDestroy { selector, force, .. } => {
                let pool = self.selected(selector)?;
                if pool.running > 0 && !force {
                    return None;
                }
                *pool = Pool { going: pool.all(), running: 0, stopped: 0, ..*pool };
            }
            Request::DiskCreate { .. }
            | Request::DiskResize { .. }
            | Request::DiskRemove { .. } => panic!("{request:?} is not generated"),
            Request::Apply { document } => self.apply(document)?,
            Request::Remove { document } => self.remove(document),
        }
        Some(())
    }

    fn apply(&mut self, document: &Document) -> Option<()> {
        let name = &document.tenant;
        if !self.tenants.contains_key(name) {
            self.add_tenant(name, &document.quota.clone().unwrap_or_default(), document.subnet)?;
        }
        let tenant = self.tenant(name)?;
        if let Some(quota) = &document.quota {
            tenant.quota = quota.clone();
        }
        for (name, wanted) in &document.pools {
            let pool = tenant.pools.entry(name.clone()).or_insert_with(|| pool_of(&wanted.spec));
            if pool.is_going {
                return None;
            }
            pool.scale(wanted.running.into());
        }
        Some(())
    }

    fn remove(&mut self, document: &Document) {
        let Some(tenant) = self.tenants.get_mut(&document.tenant) else { return };
        for name in document.pools.keys() {
            tenant.pools.entry(name.clone()).and_modify(Pool::clear);
        }
        tenant.is_going |= tenant.pools.values().all(|pool| pool.is_going);
    }

    /// Whether nothing grew beyond its limit.
    fn fits(&self, before: &Self, capacity: Capacity) -> bool {
        let fits = |(now, limit): (u64, Option<u64>), before: u64| {
            limit.is_none_or(|limit| now <= limit) || now <= before
        };
        let tenants = self.tenants.iter().all(|(name, tenant)| {
            let older = before.tenants.get(name);
            let amounts = older.map(Tenant::limited).unwrap_or_default();
            let amounts = amounts.into_iter().map(|(amount, _)| amount).chain(std::iter::repeat(0));
            tenant.limited().into_iter().zip(amounts).all(|(now, before)| fits(now, before))
                && tenant.pools.iter().all(|(name, pool)| {
                    let older = older.and_then(|tenant| tenant.pools.get(name));
                    let now = (pool.all(), tenant.quota.instances_per_pool);
                    fits(now, older.map_or(0, Pool::all))
                })
        });
        let node = |model: &Self| {
            let sum = |of: fn(&Pool) -> u64| model.tenants.values().map(|t| t.sum(of)).sum::<u64>();
            [
                (sum(|pool| pool.running * pool.vcpus), Some(capacity.vcpus)),
                (sum(|pool| pool.running * pool.mem_mib), Some(capacity.mem_mib)),
                (sum(|pool| pool.all() * pool.disk_mib), Some(capacity.disk_mib)),
            ]
        };
        tenants && node(self).into_iter().zip(node(before)).all(|(now, before)| fits(now, before.0))
    }
}
