//! The sleep policy of a pool, and which instances it leaves alone. What it does is its node's decision:
//! [`crate::local`].

use super::{Denial, Draft};
use crate::name::{PoolPath, Selector};
use crate::sleep_policy::SleepPolicy;

impl Draft<'_> {
    pub(super) fn pool_policy(
        &mut self,
        path: &PoolPath,
        policy: &SleepPolicy,
    ) -> Result<(), Denial> {
        self.change_spec(path, |spec| spec.sleep_policy = policy.clone())
    }

    pub(super) fn instance_pin(
        &mut self,
        selector: &Selector,
        all: bool,
        pinned: bool,
    ) -> Result<(), Denial> {
        for path in self.select(selector, all)? {
            if let Some(instance) = self.edit.desired.instances.get_mut(&path) {
                instance.pinned = pinned;
            }
            self.concerns(&path);
        }
        Ok(())
    }
}
