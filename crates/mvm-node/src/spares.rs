//! Says how many instances are to stand by: as many as each pool wants, each as a new one would be. Control,
//! which gives them their ids and places, makes and removes them.
//!
//! One that is taken is replaced in the background, and one that ended is after a while. When the
//! machine runs short of memory, none stand by, and none are made that it would run short with.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::{spare_fits, spares_of};
use mvm_core::lifecycle::InstanceStatus;
use mvm_core::name::InstancePath;
use mvm_core::record::{Existence, PoolRecord};
use mvm_core::sleep_policy::HostMemory;
use tokio::time::{Instant, sleep, timeout};

use crate::node::Node;
use mvm_core::mirror::Mirror;

/// How often the machine's memory is looked at, and what could not be made is tried again.
const INTERVAL: Duration = Duration::from_secs(10);
/// How long one that ended is left to its restart policy before another one replaces it.
const REPLACE_AFTER: Duration = Duration::from_secs(60);
/// Pause between two looks: what was asked for just now is still being made.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs until the agent is told to end.
pub(crate) async fn run(node: Arc<Node>) {
    let mut state = node.state.follow();
    let mut replaced = Instant::now();
    loop {
        let mirror = state.borrow_and_update().clone();
        let is_due = replaced.elapsed() >= REPLACE_AFTER;
        if is_due {
            replaced = Instant::now();
        }
        let mut is_concerned = false;
        let mut needed = BTreeMap::new();
        for pool in mirror.desired.pools.values() {
            let spares = spares_of(&mirror.desired, &pool.path).count();
            if pool.existence == Existence::Removed || (pool.spec.ready == 0 && spares == 0) {
                continue;
            }
            is_concerned = true;
            let present = u32::try_from(spares).unwrap_or(u32::MAX);
            let count = bounded(wanted(&mirror, pool), present, pool, node.host.memory.read());
            if differs(&mirror, pool, count, is_due) {
                needed.insert(pool.path.clone(), count);
            }
        }
        node.set_needs(|needs| needs.spares = needed);
        if is_concerned {
            sleep(PAUSE).await;
            // A change brings the next look, and time alone does.
            drop(timeout(INTERVAL, state.changed()).await);
        } else if state.changed().await.is_err() {
            return;
        }
    }
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

/// Whether those that stand by are others than wanted; those that ended count as such if `is_due`.
fn differs(mirror: &Mirror, pool: &PoolRecord, count: u32, is_due: bool) -> bool {
    let status = mirror.observed.pools.get(&pool.path);
    let spares = spares_of(&mirror.desired, &pool.path);
    let has_ended = |path: &InstancePath| {
        let status = mirror.observed.instances.get(path);
        is_due && status.is_some_and(InstanceStatus::has_ended)
    };
    let (good, bad): (Vec<_>, Vec<_>) =
        spares.partition(|spare| spare_fits(spare, &pool.spec, status) && !has_ended(&spare.path));
    good.len() != count as usize || !bad.is_empty()
}
