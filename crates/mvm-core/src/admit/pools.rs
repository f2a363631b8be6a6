//! Pools: created, built, scaled and removed.

use super::instances::{Begin, NEVER_GENERATION};
use super::{DEFAULT_GRACE_MS, Denial, Draft, MAX_CREATE};
use crate::image::ImageSpec;
use crate::name::{InstancePath, PoolPath};
use crate::record::{
    BuildState, DEFAULT_HOOKS_MS, DesiredState, Existence, InstanceRecord, PoolRecord, Purpose,
};
use crate::settings::Settings;
use crate::spec::PoolSpec;

/// Raises the generation that the builder is to report, and gives up going back.
pub(super) fn ask_for_build(pool: &mut PoolRecord) {
    pool.build_generation += 1;
    pool.rolled_back_to = None;
}

impl Draft<'_> {
    pub(super) fn pool_create(&mut self, path: &PoolPath, spec: &PoolSpec) -> Result<(), Denial> {
        self.require_tenant(&path.tenant)?;
        self.require_spec(path, spec)?;
        match self.edit.desired.pools.get(path).map(|pool| pool.existence) {
            Some(Existence::Kept) => {
                return Err(Denial::Exists { object: format!("pool {path}") });
            }
            Some(Existence::Removed) => {
                return Err(Denial::BeingRemoved { object: format!("pool {path}") });
            }
            None => {}
        }
        let record = PoolRecord {
            path: path.clone(),
            spec: spec.clone(),
            running: 0,
            build_generation: NEVER_GENERATION,
            base_generation: NEVER_GENERATION,
            rolled_back_to: None,
            created_unix_ms: self.now,
            existence: Existence::Kept,
        };
        self.edit.desired.pools.insert(path.clone(), record);
        self.edit.pools.push(path.clone());
        Ok(())
    }

    /// The spec makes sense and its disks exist.
    pub(super) fn require_spec(&self, path: &PoolPath, spec: &PoolSpec) -> Result<(), Denial> {
        spec.check().map_err(|error| Denial::Spec { pool: path.clone(), error })?;
        self.require_mounts(&format_args!("pool {path}"), &path.tenant, &spec.disks)
    }

    /// Changes what a pool's spec says of the pool itself, as long as it makes sense.
    pub(super) fn change_spec(
        &mut self,
        path: &PoolPath,
        change: impl FnOnce(&mut PoolSpec),
    ) -> Result<(), Denial> {
        self.require_pool(path)?;
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            change(&mut pool.spec);
            let error = |error| Denial::Spec { pool: path.clone(), error };
            pool.spec.check().map_err(error)?;
        }
        self.edit.pools.push(path.clone());
        Ok(())
    }

    /// Asks for a build of what the image is now, or of another image, and adds settings.
    pub(super) fn pool_update(
        &mut self,
        path: &PoolPath,
        image: Option<&ImageSpec>,
        settings: &Settings,
    ) -> Result<(), Denial> {
        self.require_pool(path)?;
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            if let Some(image) = image {
                pool.spec.image = image.clone();
            }
            pool.spec.settings.merge(settings);
            let error = |error| Denial::Spec { pool: path.clone(), error };
            pool.spec.check().map_err(error)?;
            ask_for_build(pool);
        }
        self.edit.pools.push(path.clone());
        Ok(())
    }

    /// Asks for a base, and makes the instance that it is saved from. One that is there from a request before
    /// goes.
    pub(super) fn pool_warm_up(&mut self, path: &PoolPath) -> Result<(), Denial> {
        self.require_pool(path)?;
        let spec = self.edit.desired.pools.get(path).map(|pool| &pool.spec);
        let why = match spec {
            Some(spec) if spec.auto_remove => {
                "it is removed with the instance that it was made for"
            }
            Some(spec) if spec.disks.iter().any(|mount| !mount.read_only) => {
                "its instances write to a data disk, which has one writer"
            }
            _ => "",
        };
        if !why.is_empty() {
            return Err(Denial::NoBase { pool: path.clone(), why });
        }
        let instances = self.edit.desired.instances_in(path).filter(|i| i.purpose == Purpose::Base);
        let before: Vec<InstancePath> = instances.map(|instance| instance.path.clone()).collect();
        for instance in before {
            self.set_desired(&instance, DesiredState::Destroyed, 0);
        }
        self.retry_failed_build(path);
        self.create_some(path, 1, DesiredState::Running, &[], Begin::Template)?;
        // It is the pool that is asked for something, and its instances are as before.
        self.edit.instances.clear();
        self.concerned.clear();
        self.edit.pools = vec![path.clone()];
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            pool.base_generation += 1;
        }
        Ok(())
    }

    /// Asks for the latest of the earlier revisions, together with its image.
    pub(super) fn pool_rollback(&mut self, path: &PoolPath) -> Result<(), Denial> {
        self.require_pool(path)?;
        let history = self.node.image(path).map(|status| status.history.as_slice());
        let Some(past) = history.and_then(<[_]>::last) else {
            return Err(Denial::NoEarlierRevision { pool: path.clone() });
        };
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            ask_for_build(pool);
            pool.rolled_back_to = Some(past.revision.clone());
            pool.spec.image = past.image.clone();
        }
        self.note(format!("new instances get {} ({})", past.revision, past.image));
        self.edit.pools.push(path.clone());
        Ok(())
    }

    /// A person who asks again does not wait for the planner's next attempt.
    fn retry_failed_build(&mut self, path: &PoolPath) {
        let status = self.node.image(path);
        let has_failed =
            status.is_some_and(|status| matches!(status.build, BuildState::Failed { .. }));
        if let Some(pool) = self.edit.desired.pools.get_mut(path).filter(|_| has_failed) {
            pool.build_generation += 1;
        }
    }

    /// Wakes before it starts, and starts before it makes new ones; stops the newest first.
    pub(super) fn pool_scale(
        &mut self,
        path: &PoolPath,
        running: u32,
        warm: Option<u32>,
        sleeping: Option<u32>,
    ) -> Result<(), Denial> {
        use DesiredState::{Running, Sleeping, Stopped, Warm};
        self.require_pool(path)?;
        let count = u64::from(running)
            + u64::from(warm.unwrap_or_default())
            + u64::from(sleeping.unwrap_or_default());
        if count > MAX_CREATE.into() {
            let expected = format!("at most {MAX_CREATE}");
            return Err(Denial::Number { what: "the number of instances", value: count, expected });
        }
        self.retry_failed_build(path);
        let mut left = self.by_state_and_age(path);
        self.scale_to(path, &mut left, Running, running, &[Running, Warm, Sleeping, Stopped])?;
        if let Some(warm) = warm {
            self.scale_to(path, &mut left, Warm, warm, &[Warm, Running, Sleeping, Stopped])?;
        }
        if let Some(sleeping) = sleeping {
            self.scale_to(
                path,
                &mut left,
                Sleeping,
                sleeping,
                &[Sleeping, Warm, Running, Stopped],
            )?;
        }
        for (instance, state) in left {
            let stays = match state {
                Warm => warm.is_none(),
                Sleeping => sleeping.is_none(),
                Running | Stopped | DesiredState::Destroyed => state != Running,
            };
            if !stays {
                self.set_desired(&instance, Stopped, DEFAULT_GRACE_MS);
            }
        }
        self.recount(path);
        Ok(())
    }

    /// The pool's instances that are not being destroyed, the oldest first.
    fn by_state_and_age(&self, path: &PoolPath) -> Vec<(InstancePath, DesiredState)> {
        let mut by_age: Vec<_> = self
            .edit
            .desired
            .instances_in(path)
            .filter(|instance| {
                instance.desired != DesiredState::Destroyed && instance.purpose.is_use()
            })
            .collect();
        by_age.sort_by_key(|instance| (instance.created_unix_ms, instance.slot));
        by_age.into_iter().map(|instance| (instance.path.clone(), instance.desired)).collect()
    }

    /// Makes so many instances be in a state, taken from those that are `left` in this order, and
    /// new ones.
    fn scale_to(
        &mut self,
        path: &PoolPath,
        left: &mut Vec<(InstancePath, DesiredState)>,
        state: DesiredState,
        count: u32,
        from: &[DesiredState],
    ) -> Result<(), Denial> {
        let mut missing = count as usize;
        for source in from {
            while missing > 0
                && let Some(at) = left.iter().position(|(_, state)| state == source)
            {
                let (instance, before) = left.remove(at);
                if state == DesiredState::Sleeping && before != state {
                    self.ask_to_sleep(&instance, DEFAULT_HOOKS_MS);
                }
                self.set_desired(&instance, state, DEFAULT_GRACE_MS);
                missing -= 1;
            }
        }
        self.create_some(path, missing, state, &[], Begin::Base)
    }

    pub(super) fn pool_destroy(&mut self, path: &PoolPath, force: bool) -> Result<(), Denial> {
        if !self.edit.desired.pools.contains_key(path) {
            return Err(Denial::NoSuchPool { path: path.clone() });
        }
        let running: Vec<InstancePath> = self.alive_in(path);
        if !force && !running.is_empty() {
            return Err(Denial::StillRunning {
                object: format!("pool {path}"),
                running,
                force: format!("mvm pool destroy {path} --force"),
            });
        }
        for instance in &running {
            self.note(format!("stopping {instance}"));
        }
        self.remove_pool(path, DEFAULT_GRACE_MS);
        Ok(())
    }

    /// Marks a pool and all its instances for removal.
    pub(super) fn remove_pool(&mut self, path: &PoolPath, grace_ms: u64) {
        let instances: Vec<InstancePath> =
            self.edit.desired.instances_in(path).map(|i| i.path.clone()).collect();
        for instance in &instances {
            self.set_desired(instance, DesiredState::Destroyed, grace_ms);
        }
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            pool.existence = Existence::Removed;
            pool.running = 0;
        }
        self.edit.pools.push(path.clone());
    }

    /// Instances that run, stand still or sleep, and have not ended by themselves.
    pub(super) fn alive_in(&self, path: &PoolPath) -> Vec<InstancePath> {
        let instances = self.edit.desired.instances_in(path);
        // What stands by is nobody's yet.
        let is_spare = |instance: &&InstanceRecord| instance.purpose == Purpose::Spare;
        let has_ended = |instance: &&InstanceRecord| self.has_ended(&instance.path);
        let alive = instances.filter(|i| i.desired.is_alive() && !is_spare(i) && !has_ended(i));
        alive.map(|instance| instance.path.clone()).collect()
    }

    /// Keeps a pool's count what it says: how many of its instances are to run.
    pub(super) fn recount(&mut self, path: &PoolPath) {
        let is_counted =
            |i: &&InstanceRecord| i.desired == DesiredState::Running && i.purpose.is_use();
        let running = self.edit.desired.instances_in(path).filter(is_counted).count();
        let running = u32::try_from(running).unwrap_or(u32::MAX);
        let is_as_before =
            self.edit.desired.pools.get(path).is_none_or(|pool| pool.running == running);
        if !is_as_before && let Some(pool) = self.edit.desired.pools.get_mut(path) {
            pool.running = running;
        }
    }
}
