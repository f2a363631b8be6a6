//! The sleep policy of a pool, who is left alone by it, and what it asks for.

use super::{DEFAULT_GRACE_MS, Denial, Draft};
use crate::name::{PoolPath, Selector};
use crate::record::{DEFAULT_HOOKS_MS, DesiredState};
use crate::sleep_policy::{Rest, RestAction, Rested, SleepPolicy};

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

    /// Whoever asked for something else meanwhile is heard, and not the policy.
    pub(super) fn instance_rest(&mut self, action: &RestAction) {
        let RestAction { instance: path, rest, reason } = action;
        let desired = match rest {
            Rest::Warm => DesiredState::Warm,
            Rest::Sleep => DesiredState::Sleeping,
        };
        let pool = self.edit.desired.pools.get(&path.pool);
        let is_active = pool.is_some_and(|pool| pool.spec.sleep_policy.is_active());
        let may_rest = self.edit.desired.instances.get(path).is_some_and(|instance| {
            instance.desired.is_up() && instance.desired != desired && !instance.pinned
        });
        if !is_active || !may_rest || self.node.ended.contains(path) {
            return;
        }
        if desired == DesiredState::Sleeping {
            self.ask_to_sleep(path, DEFAULT_HOOKS_MS);
        }
        self.set_desired(path, desired, DEFAULT_GRACE_MS);
        if let Some(instance) = self.edit.desired.instances.get_mut(path) {
            instance.rested = Some(Rested { rest: *rest, reason: *reason, at_unix_ms: self.now });
        }
        self.recount(&path.pool);
    }
}
