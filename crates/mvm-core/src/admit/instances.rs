//! Instances: created with a slot for life, started, stopped, restarted and destroyed.

use std::collections::BTreeSet;

use super::{DEFAULT_GRACE_MS, Denial, Draft, Limit, MAX_CREATE};
use crate::name::{InstancePath, PoolPath, Selector};
use crate::net::{FIRST_SLOT, Slot};
use crate::record::{DesiredState, InstanceRecord};

/// The generation of something that was never asked for.
pub(super) const NEVER_GENERATION: u64 = 0;

impl Draft<'_> {
    pub(super) fn instance_create(
        &mut self,
        pool: &PoolPath,
        count: u32,
        start: bool,
    ) -> Result<(), Denial> {
        self.require_pool(pool)?;
        if !(1..=MAX_CREATE).contains(&count) {
            let expected = format!("1 to {MAX_CREATE}");
            return Err(Denial::Number { what: "the count", value: count.into(), expected });
        }
        let desired = if start { DesiredState::Running } else { DesiredState::Stopped };
        for _ in 0..count {
            self.create_one(pool, desired)?;
        }
        self.recount(pool);
        Ok(())
    }

    pub(super) fn create_one(
        &mut self,
        pool: &PoolPath,
        desired: DesiredState,
    ) -> Result<(), Denial> {
        let slot = self.free_slot(pool)?;
        let path = pool.instance(self.fresh_id());
        let Some(spec) = self.edit.desired.pools.get(pool).map(|pool| pool.spec.clone()) else {
            return Err(Denial::NoSuchPool { path: pool.clone() });
        };
        let generation = match desired {
            DesiredState::Running => NEVER_GENERATION + 1,
            DesiredState::Stopped | DesiredState::Destroyed => NEVER_GENERATION,
        };
        let record = InstanceRecord {
            path: path.clone(),
            spec,
            slot,
            desired,
            generation,
            grace_ms: DEFAULT_GRACE_MS,
            created_unix_ms: self.now,
        };
        self.edit.desired.instances.insert(path.clone(), record);
        self.concerns(&path);
        Ok(())
    }

    fn free_slot(&self, pool: &PoolPath) -> Result<Slot, Denial> {
        let Some(tenant) = self.edit.desired.tenants.get(&pool.tenant) else {
            return Err(Denial::NoSuchTenant { name: pool.tenant.clone() });
        };
        let taken: BTreeSet<Slot> =
            self.edit.desired.instances_of(&pool.tenant).map(|instance| instance.slot).collect();
        let last = tenant.network.last_slot().0;
        (FIRST_SLOT..=last).map(Slot).find(|slot| !taken.contains(slot)).ok_or_else(|| {
            Denial::OverLimit(Limit {
                of: format!("subnet {} of tenant {}", tenant.network.subnet, tenant.name),
                what: "instances".to_owned(),
                asked: 1,
                used: taken.len() as u64,
                allowed: tenant.network.capacity().into(),
                raise: None,
            })
        })
    }

    pub(super) fn instance_start(&mut self, selector: &Selector, all: bool) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            self.set_desired(&path, DesiredState::Running, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
        }
        Ok(())
    }

    pub(super) fn instance_stop(
        &mut self,
        selector: &Selector,
        all: bool,
        grace_ms: u64,
    ) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            self.set_desired(&path, DesiredState::Stopped, grace_ms);
            self.recount(&path.pool);
        }
        Ok(())
    }

    pub(super) fn instance_restart(
        &mut self,
        selector: &Selector,
        all: bool,
        grace_ms: u64,
    ) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            if let Some(instance) = self.edit.desired.instances.get_mut(&path) {
                instance.desired = DesiredState::Running;
                instance.generation += 1;
                instance.grace_ms = grace_ms;
            }
            self.concerns(&path);
            self.recount(&path.pool);
        }
        Ok(())
    }

    pub(super) fn instance_destroy(
        &mut self,
        selector: &Selector,
        all: bool,
        force: bool,
    ) -> Result<(), Denial> {
        let paths = self.select(selector, all)?;
        let instances = &self.edit.desired.instances;
        let is_running = |path: &&InstancePath| {
            instances.get(*path).is_some_and(|i| i.desired == DesiredState::Running)
        };
        let running: Vec<InstancePath> = paths.iter().filter(is_running).cloned().collect();
        if !force && !running.is_empty() {
            let many = if all { " --all" } else { "" };
            return Err(Denial::StillRunning {
                object: selector.to_string(),
                running,
                force: format!("mvm instance destroy {selector}{many} --force"),
            });
        }
        for path in paths {
            self.set_desired(&path, DesiredState::Destroyed, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
        }
        Ok(())
    }

    /// What a selector means, without what is being destroyed already.
    fn select(&self, selector: &Selector, all: bool) -> Result<Vec<InstancePath>, Denial> {
        let instances = self.edit.desired.instances.values();
        let matches: Vec<InstancePath> = instances
            .filter(|i| selector.matches(&i.path) && i.desired != DesiredState::Destroyed)
            .map(|instance| instance.path.clone())
            .collect();
        match matches.len() {
            0 => {
                match selector {
                    Selector::Tenant(tenant) => self.require_tenant(tenant)?,
                    Selector::Pool(pool) => self.require_pool(pool)?,
                    Selector::All | Selector::Id { .. } => {}
                }
                Err(Denial::NoSuchInstance { selector: selector.to_string() })
            }
            1 => Ok(matches),
            _ if all => Ok(matches),
            _ => Err(Denial::Ambiguous { selector: selector.to_string(), matches }),
        }
    }

    /// Changes what an instance is to do. To run what is already to run, but ended by itself, is a
    /// fresh wish: the plan starts whatever lags behind its generation.
    pub(super) fn set_desired(
        &mut self,
        path: &InstancePath,
        desired: DesiredState,
        grace_ms: u64,
    ) {
        let again = desired == DesiredState::Running && self.node.ended.contains(path);
        if let Some(instance) = self.edit.desired.instances.get_mut(path) {
            instance.grace_ms = grace_ms;
            if instance.desired != desired || again {
                instance.desired = desired;
                instance.generation += 1;
            }
        }
        self.concerns(path);
    }
}
