//! Pools: created, built, scaled and removed.

use super::instances::NEVER_GENERATION;
use super::{DEFAULT_GRACE_MS, Denial, Draft, MAX_CREATE};
use crate::image::ImageSpec;
use crate::name::{InstancePath, PoolPath};
use crate::record::{BuildState, DesiredState, Existence, PoolRecord};
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

    /// Asks for a build of what the image is now, or of another image.
    pub(super) fn pool_update(
        &mut self,
        path: &PoolPath,
        image: Option<&ImageSpec>,
    ) -> Result<(), Denial> {
        self.require_pool(path)?;
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            if let Some(image) = image {
                pool.spec.image = image.clone();
                let error = |error| Denial::Spec { pool: path.clone(), error };
                pool.spec.check().map_err(error)?;
            }
            ask_for_build(pool);
        }
        self.edit.pools.push(path.clone());
        Ok(())
    }

    /// Asks for the latest of the earlier revisions, together with its image.
    pub(super) fn pool_rollback(&mut self, path: &PoolPath) -> Result<(), Denial> {
        self.require_pool(path)?;
        let history = self.node.images.get(path).map(|status| status.history.as_slice());
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
        let status = self.node.images.get(path);
        let has_failed =
            status.is_some_and(|status| matches!(status.build, BuildState::Failed { .. }));
        if let Some(pool) = self.edit.desired.pools.get_mut(path).filter(|_| has_failed) {
            pool.build_generation += 1;
        }
    }

    /// Starts stopped instances before it makes new ones, and stops the newest first.
    pub(super) fn pool_scale(&mut self, path: &PoolPath, running: u32) -> Result<(), Denial> {
        self.require_pool(path)?;
        if running > MAX_CREATE {
            let expected = format!("at most {MAX_CREATE}");
            return Err(Denial::Number { what: "the count", value: running.into(), expected });
        }
        self.retry_failed_build(path);
        let mut by_age: Vec<_> =
            self.edit.desired.instances_in(path).map(|i| (i.created_unix_ms, i.slot, i)).collect();
        by_age.sort_by_key(|(created, slot, _)| (*created, *slot));
        let with = |state: DesiredState| -> Vec<InstancePath> {
            let matching = by_age.iter().filter(|(_, _, i)| i.desired == state);
            matching.map(|(_, _, instance)| instance.path.clone()).collect()
        };
        let (up, down) = (with(DesiredState::Running), with(DesiredState::Stopped));
        let running = running as usize;
        for instance in up.iter().take(running) {
            self.set_desired(instance, DesiredState::Running, DEFAULT_GRACE_MS);
        }
        for instance in up.iter().skip(running) {
            self.set_desired(instance, DesiredState::Stopped, DEFAULT_GRACE_MS);
        }
        let missing = running.saturating_sub(up.len());
        for instance in down.iter().take(missing) {
            self.set_desired(instance, DesiredState::Running, DEFAULT_GRACE_MS);
        }
        let more = missing.saturating_sub(down.len());
        self.create_some(path, more, DesiredState::Running, &[])?;
        self.recount(path);
        Ok(())
    }

    pub(super) fn pool_destroy(&mut self, path: &PoolPath, force: bool) -> Result<(), Denial> {
        if !self.edit.desired.pools.contains_key(path) {
            return Err(Denial::NoSuchPool { path: path.clone() });
        }
        let running: Vec<InstancePath> = self.running_in(path);
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

    pub(super) fn running_in(&self, path: &PoolPath) -> Vec<InstancePath> {
        let instances = self.edit.desired.instances_in(path);
        let running = instances.filter(|i| i.desired == DesiredState::Running);
        running.map(|instance| instance.path.clone()).collect()
    }

    /// Keeps a pool's count what it says: how many of its instances are to run.
    pub(super) fn recount(&mut self, path: &PoolPath) {
        let running = self.running_in(path).len();
        if let Some(pool) = self.edit.desired.pools.get_mut(path) {
            pool.running = u32::try_from(running).unwrap_or(u32::MAX);
        }
    }
}
