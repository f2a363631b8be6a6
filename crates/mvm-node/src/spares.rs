//! Says how many instances are to stand by: as many as each pool wants, each as a new one would be. Control,
//! which gives them their ids and places, makes and removes them.
//!
//! One that is taken is replaced in the background, and one that ended is after a while. When the
//! machine runs short of memory, none stand by, and none are made that it would run short with.

use std::collections::BTreeMap;

use mvm_core::admit::{spare_fits, spares_of};
use mvm_core::mirror::Mirror;
use mvm_core::name::PoolPath;
use mvm_core::record::{Existence, InstanceRecord, PoolRecord};
use mvm_core::sleep_policy::HostMemory;

/// How long one that ended is left to its restart policy before another one replaces it, in milliseconds.
const REPLACE_AFTER_MS: u64 = 60_000;

/// How many instances of each pool are to stand by where others do; and when time alone changes that, in
/// milliseconds since the Unix epoch.
pub(crate) fn needed(
    mirror: &Mirror,
    memory: Option<HostMemory>,
    now: u64,
) -> (BTreeMap<PoolPath, u32>, Option<u64>) {
    let mut needed = BTreeMap::new();
    let mut due: Option<u64> = None;
    for pool in mirror.desired.pools.values() {
        let spares = spares_of(&mirror.desired, &pool.path).count();
        if pool.existence == Existence::Removed || (pool.spec.ready == 0 && spares == 0) {
            continue;
        }
        let present = u32::try_from(spares).unwrap_or(u32::MAX);
        let count = bounded(wanted(mirror, pool), present, pool, memory);
        if differs(mirror, pool, count, now, &mut due) {
            needed.insert(pool.path.clone(), count);
        }
    }
    (needed, due)
}

/// How many instances of a pool are to stand by: none without a base.
fn wanted(mirror: &Mirror, pool: &PoolRecord) -> u32 {
    let status = mirror.observed.pools.get(&pool.path);
    let base = status.and_then(|status| status.base_for(&pool.spec));
    if base.is_some() { pool.spec.ready } else { 0 }
}

/// As many of those that are wanted as the machine's memory allows.
fn bounded(wanted: u32, present: u32, pool: &PoolRecord, memory: Option<HostMemory>) -> u32 {
    let more = u64::from(wanted.saturating_sub(present)) * u64::from(pool.spec.mem_mib);
    match memory {
        Some(memory) if memory.is_short() => 0,
        Some(memory) if !memory.has_room_for(more) => wanted.min(present),
        _ => wanted,
    }
}

/// Whether those that stand by are others than wanted; those that ended count as such after a while.
fn differs(
    mirror: &Mirror,
    pool: &PoolRecord,
    count: u32,
    now: u64,
    due: &mut Option<u64>,
) -> bool {
    let status = mirror.observed.pools.get(&pool.path);
    let mut is_good = |spare: &InstanceRecord| {
        let observed = mirror.observed.instances.get(&spare.path);
        let ended = observed.filter(|status| status.has_ended());
        let until = ended.map(|status| {
            let died = status.last_death.as_ref().map_or(0, |death| death.at_unix_ms);
            died.saturating_add(REPLACE_AFTER_MS)
        });
        if let Some(until) = until.filter(|until| *until > now) {
            *due = Some(due.map_or(until, |due| due.min(until)));
        }
        spare_fits(spare, &pool.spec, status) && until.is_none_or(|until| until > now)
    };
    let spares = spares_of(&mirror.desired, &pool.path);
    let (good, bad): (Vec<_>, Vec<_>) = spares.partition(|spare| is_good(spare));
    good.len() != count as usize || !bad.is_empty()
}
