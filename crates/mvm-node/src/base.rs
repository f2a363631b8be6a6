//! A pool's base: the snapshot that its new instances begin with instead of booting. The pool's record names
//! it, and [`crate::shared`] keeps it as long as that is so.

use mvm_core::name::{InstancePath, PoolPath, SnapshotId};
use mvm_core::record::{self, Base, PoolStatus};
use mvm_core::stored::versioned;
use mvm_store::{StoreError, encode};
use mvm_wire::ApiError;
use mvm_wire::door::{base_failed, base_gone};

use crate::capture;
use crate::node::{Node, chain};

/// Saves an instance that has booted as its pool's base. The one before serves until then.
pub(crate) async fn make(node: &Node, instance: &InstancePath) -> Result<(), ApiError> {
    let snapshot = node.shared.hold();
    let made = save(node, instance, &snapshot).await;
    // From now on it is the pool's record that keeps it, if that names it.
    node.shared.let_go(&snapshot);
    made
}

async fn save(node: &Node, instance: &InstancePath, snapshot: &SnapshotId) -> Result<(), ApiError> {
    let pool = &instance.pool;
    let mirror = node.state.now();
    let spec = mirror.desired.instances.get(instance).map(|record| record.spec.clone());
    let revision = mirror.status(instance).revision.clone();
    let (spec, revision) = spec.zip(revision).ok_or_else(|| base_gone(pool))?;
    let captured =
        capture::capture(node, instance, snapshot).await.ok_or_else(|| base_gone(pool))?;
    captured.map_err(|error| base_failed(pool, &error))?;
    let made_unix_ms = node.clock.now_ms();
    let base = Base { id: snapshot.clone(), revision, spec, made_unix_ms, given_up: None };
    tracing::info!(%pool, base = %base.id, "its base is made");
    name_it(node, pool, base).await
}

/// Makes the base the pool's, durably.
async fn name_it(node: &Node, pool: &PoolPath, base: Base) -> Result<(), ApiError> {
    let named = node.state.change(async |mirror| {
        if !mirror.desired.pools.contains_key(pool) {
            return Ok((vec![], false));
        }
        let status = mirror.observed.pools.get(pool).cloned().unwrap_or_default();
        let status = PoolStatus { base: Some(base), ..status };
        Ok::<_, StoreError>((
            vec![encode(record::pool_status_key(pool), &versioned(&status))?],
            true,
        ))
    });
    match named.await {
        Ok(true) => Ok(()),
        Ok(false) => Err(base_gone(pool)),
        Err(error) => Err(ApiError::internal(&error)),
    }
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
