//! What each kind of request asks for.

use super::*;

impl Model {
    pub(super) fn carry_out(&mut self, request: &Request, facts: &NodeFacts) -> Option<()> {
        use DesiredState::{Destroyed, Running, Sleeping, Stopped, Warm};
        match request {
            Request::TenantCreate { name, quota, subnet } => {
                let tenant = Tenant { quota: quota.clone(), subnet: *subnet, is_going: false };
                self.add_tenant(name, tenant, facts)?;
            }
            Request::TenantUpdate { name, quota, lift } => {
                let limits = &mut self.tenant(name)?.quota;
                for limit in lift {
                    *limits.by_name(limit)? = None;
                }
                limits.merge(quota);
            }
            Request::TenantMove { name, subnet } => {
                self.tenant(name)?.subnet = None;
                let its = self.instances.iter().filter(|(path, _)| path.pool.tenant == *name);
                let last = (1u64 << (32 - subnet.prefix_len())) - 2;
                for (_, instance) in its {
                    let may_be_up = [Seen::Running, Seen::Warm, Seen::Unreadable];
                    let is_up = matches!(instance.desired, Running | Warm);
                    require(!is_up && !instance.is_seen(&may_be_up))?;
                    require(u64::from(instance.slot) <= last)?;
                }
                require(self.is_free(*subnet, facts))?;
                self.tenant(name)?.subnet = Some(*subnet);
            }
            Request::TenantDestroy { name, force } => {
                let pools: Vec<PoolPath> =
                    self.pools.keys().filter(|path| path.tenant == *name).cloned().collect();
                let has_pools = pools.iter().any(|path| !self.pools[path].is_going);
                require(*force || !(has_pools || self.has_disks(name)))?;
                self.tenants.get_mut(name)?.is_going = true;
                pools.iter().for_each(|path| self.clear(path));
                let disks = self.disks.iter_mut().filter(|(path, _)| path.tenant == *name);
                disks.for_each(|(_, disk)| disk.is_going = true);
            }
            Request::PoolCreate { path, spec } => self.add_pool(path, spec)?,
            Request::PoolBuild { path } => {
                let pool = self.pool(path)?;
                (pool.builds, pool.rolled_back_to) = (pool.builds + 1, None);
            }
            Request::PoolUpdate { path, image, settings } => {
                let pool = self.pool(path)?;
                (pool.builds, pool.rolled_back_to) = (pool.builds + 1, None);
                pool.spec.image = image.clone().unwrap_or(pool.spec.image.clone());
                pool.spec.settings.merge(settings);
            }
            Request::PoolRollback { path } => {
                let pool = self.pool(path)?;
                let past = pool.image.history.last()?.clone();
                (pool.builds, pool.rolled_back_to) = (pool.builds + 1, Some(past.revision));
                pool.spec.image = past.image;
            }
            Request::PoolScale { path, running, warm, sleeping } => {
                self.scale(path, *running, *warm, *sleeping)?;
            }
            Request::PoolDestroy { path, force } => {
                let is_missed = |instance: &Instance| {
                    instance.is_alive()
                        && !instance.has_ended()
                        && instance.purpose != Purpose::Spare
                };
                require(*force || self.of_pool(path, is_missed).is_empty())?;
                require(self.pools.contains_key(path))?;
                self.clear(path);
            }
            Request::PoolReady { path, ready } => {
                let pool = self.pool(path)?;
                pool.spec.ready = *ready;
                require(is_sound(&pool.spec))?;
            }
            Request::PoolPolicy { path, policy } => {
                let pool = self.pool(path)?;
                pool.spec.sleep_policy = policy.clone();
                require(is_sound(&pool.spec))?;
            }
            Request::PoolWarmUp { path } => {
                self.pool(path)?.bases += 1;
                let spec = self.pool(path)?.spec.clone();
                let writes = spec.disks.iter().any(|mount| !mount.read_only);
                require(!writes && !spec.auto_remove)?;
                for instance in self.of_pool(path, |it| it.purpose == Purpose::Base) {
                    self.want(&instance, Destroyed);
                }
                self.retry_failed_build(path);
                let new = New { desired: Running, purpose: Purpose::Base, takes_base: false };
                self.add_instances(path, 1, &[], &new)?;
            }
            Request::InstanceCreate { pool, count, start, disks, cold } => {
                require((1..=1_000).contains(count))?;
                let desired = if *start { Running } else { Stopped };
                let new = New { takes_base: !cold, ..New::to_be(desired) };
                self.add_instances(pool, u64::from(*count), disks, &new)?;
            }
            Request::InstanceStart { selector, all } => {
                self.selected(selector, *all)?.iter().for_each(|it| self.want(it, Running));
            }
            Request::InstanceStop { selector, all, grace_ms: _ } => {
                self.selected(selector, *all)?.iter().for_each(|it| self.want(it, Stopped));
            }
            Request::InstanceWarm { selector, all } => {
                self.awake(selector, *all)?.iter().for_each(|it| self.want(it, Warm));
            }
            Request::InstanceSleep { selector, all, hooks_ms: _ } => {
                self.awake(selector, *all)?.iter().for_each(|it| self.want(it, Sleeping));
            }
            Request::InstancePin { selector, all, pinned } => {
                for path in self.selected(selector, *all)? {
                    self.instances.get_mut(&path)?.is_pinned = *pinned;
                }
            }
            Request::InstanceRestart { selector, all, grace_ms: _ } => {
                for path in self.selected(selector, *all)? {
                    self.take(&path);
                    let instance = self.instances.get_mut(&path)?;
                    (instance.desired, instance.wishes) = (Running, instance.wishes + 1);
                }
            }
            Request::InstanceDestroy { selector, all, force } => {
                let is_going = |path: &InstancePath| !self.instances[path].is_kept();
                let covered = self.covered(selector);
                let is_named = matches!(selector, Selector::Id { .. });
                // Once more is no error.
                if is_named && !covered.is_empty() && covered.iter().all(is_going) {
                    return Some(());
                }
                let paths = self.selected(selector, *all)?;
                let is_missed = |path: &InstancePath| {
                    self.instances[path].is_alive() && !self.ended.contains(path)
                };
                require(*force || !paths.iter().any(is_missed))?;
                for path in paths {
                    self.want(&path, Destroyed);
                    let spec = &self.pools[&path.pool].spec;
                    let goes_with_the_last = spec.ephemeral || spec.auto_remove;
                    let is_needed = |it: &Instance| it.is_kept() && it.purpose == Purpose::Use;
                    if goes_with_the_last && self.of_pool(&path.pool, is_needed).is_empty() {
                        self.clear(&path.pool);
                    }
                }
            }
            Request::DiskCreate { path, size_mib } => self.add_disk(path, *size_mib)?,
            Request::DiskResize { path, size_mib } => self.grow_disk(path, *size_mib)?,
            Request::DiskRemove { path } => {
                let is_attached = self.is_attached(path);
                let disk = self.disks.get_mut(path)?;
                require(disk.is_going || !is_attached)?;
                disk.is_going = true;
            }
            Request::Apply { document } => self.apply(document, facts)?,
            Request::Remove { document } => self.remove(document),
        }
        Some(())
    }

    fn has_disks(&self, tenant: &TenantName) -> bool {
        self.disks.iter().any(|(path, disk)| path.tenant == *tenant && !disk.is_going)
    }

    fn apply(&mut self, document: &Document, facts: &NodeFacts) -> Option<()> {
        let Document { tenant: name, subnet, quota, disks, pools } = document;
        if !self.tenants.contains_key(name) {
            let quota = quota.clone().unwrap_or_default();
            self.add_tenant(name, Tenant { quota, subnet: *subnet, is_going: false }, facts)?;
        }
        let tenant = self.tenant(name)?;
        require(subnet.is_none() || tenant.subnet == *subnet)?;
        tenant.quota = quota.clone().unwrap_or(tenant.quota.clone());
        for (disk, wanted) in disks {
            let path = DiskPath { tenant: name.clone(), disk: disk.clone() };
            match self.disks.contains_key(&path) {
                true => self.grow_disk(&path, wanted.size_mib)?,
                false => self.add_disk(&path, wanted.size_mib)?,
            }
        }
        for (pool, wanted) in pools {
            let path = PoolPath { tenant: name.clone(), pool: pool.clone() };
            if self.pools.contains_key(&path) {
                self.require_disks(name, &wanted.spec.disks)?;
                let pool = self.pool(&path)?;
                require(is_sound(&wanted.spec))?;
                let before = std::mem::replace(&mut pool.spec, wanted.spec.clone());
                if !wanted.names_image {
                    pool.spec.image = before.image.clone();
                }
                if pool.spec.image != before.image {
                    (pool.builds, pool.rolled_back_to) = (pool.builds + 1, None);
                }
            } else {
                self.add_pool(&path, &wanted.spec)?;
            }
            self.scale(&path, wanted.running, None, None)?;
        }
        Some(())
    }

    fn remove(&mut self, document: &Document) {
        let name = &document.tenant;
        for pool in document.pools.keys() {
            self.clear(&PoolPath { tenant: name.clone(), pool: pool.clone() });
        }
        let mut pools = self.pools.iter().filter(|(path, _)| path.tenant == *name);
        let has_pools = pools.any(|(_, pool)| !pool.is_going);
        let has_disks = self.has_disks(name);
        if let Some(tenant) = self.tenants.get_mut(name) {
            tenant.is_going |= !has_pools && !has_disks;
        }
    }
}
