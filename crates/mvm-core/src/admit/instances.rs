//! Instances: created with a slot for life, started, stopped, restarted and destroyed.

use std::collections::BTreeSet;

use super::{DEFAULT_GRACE_MS, Denial, Draft, Limit, MAX_CREATE};
use crate::disk::DiskMount;
use crate::name::{InstancePath, PoolPath, RevisionId, Selector, SnapshotId};
use crate::net::{FIRST_SLOT, Slot};
use crate::record::{DEFAULT_HOOKS_MS, DesiredState, InstanceRecord, Purpose};

/// What a new instance begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// Its pool's base, if there is one that fits, and else its kernel.
    Base,
    /// Its kernel.
    Boot,
    /// Its kernel, for the pool's base to be saved from it.
    Template,
    /// Its pool's base, to stand by.
    Spare,
}

impl Begin {
    fn purpose(self) -> Purpose {
        match self {
            Self::Base | Self::Boot => Purpose::Use,
            Self::Template => Purpose::Base,
            Self::Spare => Purpose::Spare,
        }
    }
}

/// The generation of something that was never asked for.
pub(super) const NEVER_GENERATION: u64 = 0;

/// Whether an instance may be forked, as far as its record tells.
///
/// # Errors
/// It writes a disk, which its fork would too.
fn check_forkable(source: &InstanceRecord) -> Result<(), Denial> {
    let tenant = &source.path.pool.tenant;
    match source.spec.disks.iter().find(|mount| !mount.read_only) {
        None => Ok(()),
        Some(mount) => {
            Err(Denial::ForkWrites { source_path: source.path.clone(), disk: mount.disk(tenant) })
        }
    }
}

impl Draft<'_> {
    pub(super) fn instance_create(
        &mut self,
        pool: &PoolPath,
        count: u32,
        start: bool,
        disks: &[DiskMount],
        cold: bool,
    ) -> Result<(), Denial> {
        self.require_pool(pool)?;
        check_count(count)?;
        let desired = if start { DesiredState::Running } else { DesiredState::Stopped };
        let begin = if cold { Begin::Boot } else { Begin::Base };
        self.create_some(pool, count as usize, desired, disks, begin)?;
        self.recount(pool);
        Ok(())
    }

    pub(super) fn instance_fork(
        &mut self,
        source: &InstancePath,
        snapshot: &SnapshotId,
        revision: &RevisionId,
        count: u32,
    ) -> Result<(), Denial> {
        self.require_pool(&source.pool)?;
        check_count(count)?;
        let Some(record) = self.edit.desired.instances.get(source).cloned() else {
            return Err(Denial::NoSuchInstance { selector: source.to_string() });
        };
        check_forkable(&record)?;
        self.require_mounts(source, &source.pool.tenant, &record.spec.disks)?;
        for slot in self.free_slots(&source.pool, count as usize)? {
            let path = source.pool.instance(self.fresh_id());
            let fork = InstanceRecord {
                path: path.clone(),
                slot,
                desired: DesiredState::Running,
                generation: NEVER_GENERATION + 1,
                grace_ms: DEFAULT_GRACE_MS,
                sleep_request: 0,
                origin: Some(snapshot.clone()),
                revision: Some(revision.clone()),
                intent: 0,
                local_number: 0,
                purpose: Purpose::Use,
                pinned: false,
                rested: None,
                created_unix_ms: self.now,
                ..record.clone()
            };
            self.edit.desired.instances.insert(path.clone(), fork);
            self.concerns(&path);
        }
        self.recount(&source.pool);
        Ok(())
    }

    pub(super) fn create_some(
        &mut self,
        pool: &PoolPath,
        count: usize,
        desired: DesiredState,
        disks: &[DiskMount],
        begin: Begin,
    ) -> Result<(), Denial> {
        let Some(mut spec) = self.edit.desired.pools.get(pool).map(|pool| pool.spec.clone()) else {
            return Err(Denial::NoSuchPool { path: pool.clone() });
        };
        spec.disks.extend_from_slice(disks);
        self.require_mounts(&format_args!("pool {pool}"), &pool.tenant, &spec.disks)?;
        let generation = match desired {
            DesiredState::Running | DesiredState::Warm | DesiredState::Sleeping => {
                NEVER_GENERATION + 1
            }
            DesiredState::Stopped | DesiredState::Destroyed => NEVER_GENERATION,
        };
        let base = match begin {
            Begin::Base | Begin::Spare => {
                self.node.image(pool).and_then(|status| status.base_for(&spec))
            }
            Begin::Boot | Begin::Template => None,
        };
        let taken = match begin {
            Begin::Base if desired.is_up() => self.take_spares(pool, count, desired, &spec),
            _ => 0,
        };
        for slot in self.free_slots(pool, count - taken)? {
            let path = pool.instance(self.fresh_id());
            let record = InstanceRecord {
                path: path.clone(),
                spec: spec.clone(),
                own_disks: disks.to_vec(),
                slot,
                desired,
                generation,
                grace_ms: DEFAULT_GRACE_MS,
                sleep_request: 0,
                hooks_ms: DEFAULT_HOOKS_MS,
                origin: base.map(|base| base.id.clone()),
                revision: base.map(|base| base.revision.clone()),
                intent: 0,
                local_number: 0,
                purpose: begin.purpose(),
                pinned: false,
                rested: None,
                created_unix_ms: self.now,
            };
            self.edit.desired.instances.insert(path.clone(), record);
            self.concerns(&path);
        }
        Ok(())
    }

    /// The lowest slots that are free in the tenant's subnet, so many or none.
    fn free_slots(&self, pool: &PoolPath, count: usize) -> Result<Vec<Slot>, Denial> {
        let Some(tenant) = self.edit.desired.tenants.get(&pool.tenant) else {
            return Err(Denial::NoSuchTenant { name: pool.tenant.clone() });
        };
        let taken: BTreeSet<Slot> =
            self.edit.desired.instances_of(&pool.tenant).map(|instance| instance.slot).collect();
        let slots = (FIRST_SLOT..=tenant.network.last_slot().0).map(Slot);
        let free: Vec<Slot> = slots.filter(|slot| !taken.contains(slot)).take(count).collect();
        if free.len() == count {
            return Ok(free);
        }
        Err(Denial::OverLimit(Limit {
            of: format!("subnet {} of tenant {}", tenant.network.subnet, tenant.name),
            what: "instances".to_owned(),
            asked: count as u64,
            used: taken.len() as u64,
            allowed: tenant.network.capacity().into(),
            raise: Some("destroy what is not needed: `mvm ps -a`".to_owned()),
        }))
    }

    pub(super) fn instance_start(&mut self, selector: &Selector, all: bool) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            self.void_local(&path);
            self.set_desired(&path, DesiredState::Running, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
        }
        Ok(())
    }

    /// What a node is about to decide of an instance goes behind what is asked of it now, also if that is
    /// nothing new.
    fn void_local(&mut self, path: &InstancePath) {
        if let Some(instance) = self.edit.desired.instances.get_mut(path) {
            instance.intent += 1;
        }
    }

    pub(super) fn instance_stop(
        &mut self,
        selector: &Selector,
        all: bool,
        grace_ms: u64,
    ) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            self.note_lost_memory(&path);
            self.set_desired(&path, DesiredState::Stopped, grace_ms);
            self.recount(&path.pool);
        }
        Ok(())
    }

    /// Says what a stop of an instance that sleeps costs. One that is only on its way there, or could
    /// not be put to sleep, is shut down in order.
    fn note_lost_memory(&mut self, path: &InstancePath) {
        let desired = self.edit.desired.instances.get(path).map(|instance| instance.desired);
        let is_at_rest = !self.has_ended(path) && !self.node.is_up(path);
        if desired == Some(DesiredState::Sleeping) && is_at_rest {
            self.note(format!(
                "{path} sleeps: what it has in memory is given up, and its disk stays as it was when it fell asleep; wake it first with `mvm start {}` to have its programs stopped in order",
                path.id
            ));
        }
    }

    pub(super) fn instance_warm(&mut self, selector: &Selector, all: bool) -> Result<(), Denial> {
        for path in self.select_alive(selector, all)? {
            self.void_local(&path);
            self.set_desired(&path, DesiredState::Warm, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
        }
        Ok(())
    }

    pub(super) fn instance_sleep(
        &mut self,
        selector: &Selector,
        all: bool,
        hooks_ms: u64,
    ) -> Result<(), Denial> {
        for path in self.select_alive(selector, all)? {
            self.ask_to_sleep(&path, hooks_ms);
            self.set_desired(&path, DesiredState::Sleeping, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
        }
        Ok(())
    }

    /// Makes a wish to sleep a fresh one.
    pub(super) fn ask_to_sleep(&mut self, path: &InstancePath, hooks_ms: u64) {
        if let Some(instance) = self.edit.desired.instances.get_mut(path) {
            instance.intent += 1;
            instance.sleep_request += 1;
            instance.hooks_ms = hooks_ms;
        }
    }

    /// What a selector means, of what runs, stands by or sleeps. One that is named has to.
    fn select_alive(&self, selector: &Selector, all: bool) -> Result<Vec<InstancePath>, Denial> {
        let paths = self.select(selector, all)?;
        let is_alive = |path: &InstancePath| {
            let desired = self.edit.desired.instances.get(path).map(|instance| instance.desired);
            desired.is_some_and(DesiredState::is_alive) && !self.has_ended(path)
        };
        let (alive, others): (Vec<_>, Vec<_>) = paths.into_iter().partition(is_alive);
        match others.into_iter().next() {
            Some(instance) if alive.is_empty() => Err(Denial::NotAlive { instance }),
            _ => Ok(alive),
        }
    }

    pub(super) fn instance_restart(
        &mut self,
        selector: &Selector,
        all: bool,
        grace_ms: u64,
    ) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            self.note_lost_memory(&path);
            if let Some(instance) = self.edit.desired.instances.get_mut(&path) {
                instance.desired = DesiredState::Running;
                instance.rested = None;
                instance.intent += 1;
                instance.generation += 1;
                instance.grace_ms = grace_ms;
                take_into_use(instance);
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
        let paths = match self.select(selector, all) {
            // Once more is no error: who asks wants it gone, and it is going.
            Err(Denial::BeingRemoved { .. }) if matches!(selector, Selector::Id { .. }) => {
                let going = self.edit.desired.instances_meant(selector);
                let going: Vec<_> = going.map(|instance| instance.path.clone()).collect();
                going.iter().for_each(|path| self.concerns(path));
                return Ok(());
            }
            selected => selected?,
        };
        let instances = &self.edit.desired.instances;
        // One that has ended by itself is to run by its record alone.
        let is_running = |path: &&InstancePath| {
            let is_alive = instances.get(*path).is_some_and(|i| i.desired.is_alive());
            is_alive && !self.has_ended(path)
        };
        let running: Vec<InstancePath> = paths.iter().filter(is_running).cloned().collect();
        if !force && !running.is_empty() {
            let typed = as_typed(selector);
            let many = if all && *selector != Selector::All { " --all" } else { "" };
            return Err(Denial::StillRunning {
                object: match selector {
                    Selector::All => "this node".to_owned(),
                    _ => typed.clone(),
                },
                running,
                force: format!("mvm rm -f {typed}{many}"),
            });
        }
        for path in paths {
            self.set_desired(&path, DesiredState::Destroyed, DEFAULT_GRACE_MS);
            self.recount(&path.pool);
            self.remove_if_ephemeral(&path.pool);
        }
        Ok(())
    }

    /// A pool that was made for its instances alone goes with the last of them.
    fn remove_if_ephemeral(&mut self, path: &PoolPath) {
        let desired = &self.edit.desired;
        let is_ephemeral = desired
            .pools
            .get(path)
            .is_some_and(|pool| pool.spec.ephemeral || pool.spec.auto_remove);
        let is_needed = |instance: &InstanceRecord| {
            instance.desired != DesiredState::Destroyed && instance.purpose.is_use()
        };
        if is_ephemeral && !desired.instances_in(path).any(is_needed) {
            self.remove_pool(path, DEFAULT_GRACE_MS);
        }
    }

    /// What a selector means, without what is being destroyed already, and without what is there for
    /// something else than use unless it is named.
    pub(super) fn select(
        &self,
        selector: &Selector,
        all: bool,
    ) -> Result<Vec<InstancePath>, Denial> {
        let is_named = matches!(selector, Selector::Id { .. });
        let instances = self.edit.desired.instances_meant(selector);
        let matches: Vec<InstancePath> = instances
            .filter(|i| i.desired != DesiredState::Destroyed)
            .filter(|i| is_named || i.purpose.is_use())
            .map(|instance| instance.path.clone())
            .collect();
        match matches.len() {
            0 => {
                match selector {
                    Selector::Tenant(name) if !self.edit.desired.tenants.contains_key(name) => {
                        return Err(Denial::NoSuchName { name: name.clone() });
                    }
                    Selector::Tenant(tenant) => self.require_tenant(tenant)?,
                    Selector::Pool(pool) => self.require_pool(pool)?,
                    Selector::Id { .. } => {
                        return Err(match self.edit.desired.instances_meant(selector).next() {
                            Some(going) => Denial::BeingRemoved { object: going.path.to_string() },
                            None => Denial::NoSuchInstance { selector: as_typed(selector) },
                        });
                    }
                    Selector::All => {}
                }
                Err(Denial::NoInstances { of: selector.clone() })
            }
            1 => Ok(matches),
            _ if all => Ok(matches),
            _ => Err(Denial::Ambiguous { selector: as_typed(selector), matches }),
        }
    }

    /// Changes what an instance is to do. To run what is already to run, but ended by itself, is a
    /// fresh wish: the plan starts whatever lags behind its generation. Between running and rest
    /// there is no fresh start.
    pub(super) fn set_desired(
        &mut self,
        path: &InstancePath,
        desired: DesiredState,
        grace_ms: u64,
    ) {
        let again = desired.is_alive() && self.has_ended(path);
        if let Some(instance) = self.edit.desired.instances.get_mut(path) {
            instance.grace_ms = grace_ms;
            if again || instance.desired != desired || instance.rested.is_some() {
                instance.intent += 1;
            }
            let goes_on = instance.desired.is_alive() && desired.is_alive();
            if again || (instance.desired != desired && !goes_on) {
                instance.generation += 1;
            }
            instance.desired = desired;
            instance.rested = None;
            if desired != DesiredState::Destroyed {
                take_into_use(instance);
            }
        }
        self.concerns(path);
    }
}

/// An instance that stands by and is asked to do something no longer stands by.
fn take_into_use(instance: &mut InstanceRecord) {
    if instance.purpose == Purpose::Spare {
        instance.purpose = Purpose::Use;
    }
}

fn check_count(count: u32) -> Result<(), Denial> {
    if (1..=MAX_CREATE).contains(&count) {
        return Ok(());
    }
    let expected = format!("1 to {MAX_CREATE}");
    Err(Denial::Number { what: "the number of instances", value: count.into(), expected })
}

/// A selector as it is given on the command line.
fn as_typed(selector: &Selector) -> String {
    match selector {
        Selector::All => "--all".to_owned(),
        named => named.to_string(),
    }
}
