//! Instances that stand by: made ahead of time out of their pool's base, and taken by whoever asks for
//! new ones.

use super::instances::Begin;
use super::{Denial, Draft};
use crate::name::{InstancePath, PoolPath};
use crate::record::{Desired, DesiredState, InstanceRecord, PoolStatus, Purpose};
use crate::spec::PoolSpec;

/// The instances of a pool that stand by, or are about to.
pub fn spares_of<'a>(
    desired: &'a Desired,
    pool: &PoolPath,
) -> impl Iterator<Item = &'a InstanceRecord> {
    let instances = desired.instances_in(pool);
    instances.filter(|i| i.purpose == Purpose::Spare && i.desired != DesiredState::Destroyed)
}

/// Whether an instance that stands by is what a new one would be now.
pub fn spare_fits(spare: &InstanceRecord, spec: &PoolSpec, status: Option<&PoolStatus>) -> bool {
    let base = status.and_then(|status| status.base_for(spec));
    base.is_some_and(|base| {
        spare.origin.as_ref() == Some(&base.id) && spare.spec.makes_same_guest(spec)
    })
}

impl Draft<'_> {
    pub(super) fn pool_ready(&mut self, path: &PoolPath, ready: u32) -> Result<(), Denial> {
        self.change_spec(path, |spec| spec.ready = ready)
    }

    /// Those that do not fit any more go, and then the newest of too many.
    pub(super) fn pool_spares(&mut self, path: &PoolPath, count: u32) -> Result<(), Denial> {
        self.require_pool(path)?;
        let Some(spec) = self.edit.desired.pools.get(path).map(|pool| pool.spec.clone()) else {
            return Err(Denial::NoSuchPool { path: path.clone() });
        };
        let status = self.node.image(path);
        let (mut kept, mut gone) = (Vec::new(), Vec::new());
        for spare in spares_of(&self.edit.desired, path) {
            let is_ended = self.has_ended(&spare.path);
            let to =
                if spare_fits(spare, &spec, status) && !is_ended { &mut kept } else { &mut gone };
            to.push((spare.created_unix_ms, spare.path.clone()));
        }
        kept.sort();
        let wanted = count as usize;
        gone.extend(kept.drain(wanted.min(kept.len())..));
        for (_, spare) in gone {
            self.set_desired(&spare, DesiredState::Destroyed, 0);
        }
        let missing = wanted.saturating_sub(kept.len());
        if missing > 0 && status.is_some_and(|status| status.base_for(&spec).is_some()) {
            self.create_some(path, missing, DesiredState::Warm, &[], Begin::Spare)?;
        }
        Ok(())
    }

    /// Makes instances that stand by into new ones, up to so many; returns how many. Those that
    /// could not go on at once are left.
    pub(super) fn take_spares(
        &mut self,
        pool: &PoolPath,
        count: usize,
        desired: DesiredState,
        spec: &PoolSpec,
    ) -> usize {
        let status = self.node.image(pool);
        let is_ready = |spare: &&InstanceRecord| {
            self.node.is_ready(&spare.path) && spare_fits(spare, spec, status)
        };
        let spares = spares_of(&self.edit.desired, pool).filter(is_ready);
        let taken: Vec<InstancePath> = spares.take(count).map(|spare| spare.path.clone()).collect();
        for path in &taken {
            if let Some(instance) = self.edit.desired.instances.get_mut(path) {
                instance.purpose = Purpose::Use;
                instance.spec = spec.clone();
                instance.created_unix_ms = self.now;
            }
            self.set_desired(path, desired, super::DEFAULT_GRACE_MS);
        }
        taken.len()
    }
}
