//! What control does to its records because a node reports something. Nothing of it can be denied: it says what
//! is so.

use std::collections::BTreeSet;

use imbl::OrdMap;

use super::{Draft, NodeFacts};
use crate::document::Gone;
use crate::local::LocalIntent;
use crate::name::{InstancePath, PoolPath};
use crate::record::{Desired, DesiredState, Existence};

/// Takes over what a node decided by itself, as far as nobody has asked for something else.
pub fn take_over(desired: &Desired, local: &OrdMap<InstancePath, LocalIntent>) -> Desired {
    let facts = NodeFacts::default();
    let mut entropy = || 0;
    let mut draft = Draft::of(desired, &facts, &mut entropy, 0);
    let mut pools: BTreeSet<&PoolPath> = BTreeSet::new();
    for (path, intent) in local {
        let Some(record) = desired.instances.get(path).filter(|it| intent.holds(it)) else {
            continue;
        };
        draft.edit.desired.instances.insert(path.clone(), intent.over(record));
        pools.insert(&path.pool);
    }
    pools.into_iter().for_each(|pool| draft.recount(pool));
    draft.edit.desired
}

/// Forgets what was to go and is gone. What something else still needs stays until that is gone.
pub fn forget(desired: &Desired, gone: &Gone) -> Desired {
    let mut after = desired.clone();
    for (path, at) in &gone.instances {
        let record = after.instances.get(path);
        if record
            .is_some_and(|it| it.desired == DesiredState::Destroyed && it.created_unix_ms == *at)
        {
            after.instances.remove(path);
        }
    }
    for (path, at) in &gone.disks {
        let record = after.disks.get(path);
        if record.is_some_and(|it| it.existence == Existence::Removed && it.created_unix_ms == *at)
        {
            after.disks.remove(path);
        }
    }
    for (path, at) in &gone.pools {
        let record = after.pools.get(path);
        let is_gone = record
            .is_some_and(|it| it.existence == Existence::Removed && it.created_unix_ms == *at);
        if is_gone && after.instances_in(path).next().is_none() {
            after.pools.remove(path);
        }
    }
    for (name, at) in &gone.tenants {
        let record = after.tenants.get(name);
        let is_gone = record
            .is_some_and(|it| it.existence == Existence::Removed && it.created_unix_ms == *at);
        let is_needed = after.pools_of(name).next().is_some()
            || after.instances_of(name).next().is_some()
            || after.disks_of(name).next().is_some();
        if is_gone && !is_needed {
            after.tenants.remove(name);
        }
    }
    after
}
