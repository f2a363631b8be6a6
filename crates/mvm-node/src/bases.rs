//! A pool's base: the snapshot that its new instances begin with instead of booting.
//!
//! It is asked for together with an instance that is made for it and that nobody else uses, so that nothing of
//! anybody's work is in what every later instance begins with. Once that runs, it is saved, which the pool's record
//! then names; [`crate::shared`] keeps the snapshot as long as that is so. What came of the request is durable, and
//! control removes the instance then. An agent that ends in the middle leaves the next one to begin again.

use std::sync::Arc;

use mvm_core::lifecycle::State;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath, SnapshotId};
use mvm_core::record::{
    self, Base, BuildState, DesiredState, Existence, InstanceRecord, PoolRecord, Purpose,
};
use mvm_core::stored::versioned;
use mvm_store::{StoreError, encode};

use crate::capture;
use crate::node::{Node, WRITE_RETRY, chain};
use crate::workers::{Work, Workers};

/// What is to be done about a base that was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Nothing yet.
    Wait,
    /// This instance is to be saved.
    Save(InstancePath),
    /// There will be none, for this reason.
    GiveUp(String),
}

/// Goes on with the bases that were asked for.
pub(crate) fn begin(node: &Arc<Node>, workers: &mut Workers, mirror: &Mirror) {
    let pools = mirror.desired.pools.values();
    for pool in pools.filter(|pool| is_asked_for(mirror, pool)) {
        let step = next_step(mirror, pool);
        if step == Step::Wait {
            continue;
        }
        let (node, generation, path) = (node.clone(), pool.base_generation, pool.path.clone());
        workers.begin(Work::Base(path.clone()), || async move {
            let made = match step {
                Step::Wait => return,
                Step::Save(instance) => save(&node, &instance).await,
                Step::GiveUp(error) => Err(error),
            };
            conclude(&node, &path, generation, made).await;
        });
    }
}

/// The instances whose base is made, or given up: nobody needs them any more.
pub(crate) fn left_over(mirror: &Mirror) -> impl Iterator<Item = InstancePath> {
    let records = mirror.desired.instances.values().filter(|record| is_for_base(record));
    let left = records.filter(|record| {
        mirror.desired.pools.get(&record.path.pool).is_none_or(|pool| !is_asked_for(mirror, pool))
    });
    left.map(|record| record.path.clone())
}

fn is_for_base(record: &InstanceRecord) -> bool {
    record.purpose == Purpose::Base && record.desired != DesiredState::Destroyed
}

fn is_asked_for(mirror: &Mirror, pool: &PoolRecord) -> bool {
    let made = mirror.observed.pools.get(&pool.path).map_or(0, |status| status.base_generation);
    pool.base_generation > made && pool.existence == Existence::Kept
}

fn next_step(mirror: &Mirror, pool: &PoolRecord) -> Step {
    let mut instances = mirror.desired.instances_in(&pool.path);
    let Some(record) = instances.find(|record| is_for_base(record)) else {
        return Step::GiveUp("the instance that was made for it was removed".to_owned());
    };
    let status = mirror.status(&record.path);
    if status.state() == State::Running && status.activity().is_none() {
        return Step::Save(record.path.clone());
    }
    if let Some(death) = &status.last_death {
        return Step::GiveUp(format!("the instance that boots for it ended: {}", death.cause));
    }
    let image = mirror.observed.pools.get(&pool.path).cloned().unwrap_or_default();
    match (&image.revision, &image.build) {
        (None, BuildState::Failed { error, .. })
            if image.build_generation >= pool.build_generation =>
        {
            Step::GiveUp(format!("its image cannot be built: {error}"))
        }
        _ => Step::Wait,
    }
}

/// Saves an instance that has booted.
async fn save(node: &Node, instance: &InstancePath) -> Result<Base, String> {
    let gone = || "the instance that was made for it is being removed".to_owned();
    let mirror = node.state.now();
    let spec = mirror.desired.instances.get(instance).map(|record| record.spec.clone());
    let revision = mirror.status(instance).revision.clone();
    let (spec, revision) = spec.zip(revision).ok_or_else(gone)?;
    let id = node.shared.hold();
    match capture::capture(node, instance, &id).await.unwrap_or_else(|| Err(gone())) {
        Ok(()) => {
            let made_unix_ms = node.clock.now_ms();
            Ok(Base { id, revision, spec, made_unix_ms, given_up: None })
        }
        Err(error) => {
            node.shared.let_go(&id);
            Err(error)
        }
    }
}

/// Makes what came of a request durable, and the base the pool's. One that came to nothing because another request
/// took its place is that one's.
async fn conclude(node: &Node, pool: &PoolPath, generation: u64, made: Result<Base, String>) {
    match &made {
        Ok(base) => tracing::info!(%pool, base = %base.id, "its base is made"),
        Err(error) => tracing::warn!(%pool, error, "it gets no base"),
    }
    loop {
        let written = node.state.change(async |mirror| {
            let asked = mirror.desired.pools.get(pool).map(|record| record.base_generation);
            if asked.is_none_or(|asked| asked > generation && made.is_err()) {
                return Ok((vec![], ()));
            }
            let status = mirror.observed.pools.get(pool).cloned().unwrap_or_default();
            let status = status.with_base(generation, made.clone());
            let op = encode(record::pool_status_key(pool), &versioned(&status))?;
            Ok::<_, StoreError>((vec![op], ()))
        });
        let error = written.await.err().map(|error| chain(&error));
        let is_written = error.is_none();
        node.set_problem(&format!("recording the base of pool {pool}"), error);
        if is_written {
            break;
        }
        tokio::time::sleep(WRITE_RETRY).await;
    }
    // From now on it is the pool's record that keeps it, if that names it.
    if let Ok(base) = made {
        node.shared.let_go(&base.id);
    }
    // The instance that it was made of goes with the next round.
    node.poke();
}

/// Whether a snapshot is a pool's base, as opposed to one that an instance was forked with.
pub(crate) fn is_base(node: &Node, pool: &PoolPath, id: &SnapshotId) -> bool {
    let mirror = node.state.now();
    let base = mirror.observed.pools.get(pool).and_then(|status| status.base.as_ref());
    base.is_some_and(|base| base.id == *id)
}

/// Has no more instances begin with a base that one could not begin with.
pub(crate) async fn give_up(node: &Node, pool: &PoolPath, id: &SnapshotId, reason: &str) {
    let given_up = node.state.change(async |mirror| {
        let Some(status) = mirror.observed.pools.get(pool) else { return Ok((vec![], ())) };
        let without = status.clone().without_base(id, reason);
        let is_new = without != *status && mirror.desired.pools.contains_key(pool);
        let op = encode(record::pool_status_key(pool), &versioned(&without))?;
        Ok::<_, StoreError>((if is_new { vec![op] } else { vec![] }, ()))
    });
    let given_up = given_up.await.map_err(|error| chain(&error));
    node.set_problem(&format!("giving up the base of pool {pool}"), given_up.err());
}
