//! A pool's base: the snapshot that its new instances begin with instead of booting.
//!
//! An instance is made for it that nobody else uses, booted, saved and destroyed, so that nothing
//! of anybody's work is in what every later instance begins with. The pool's record names the base
//! from then on, and [`crate::shared`] keeps it as long as that is so. An agent that ends in the
//! middle leaves the instance, which the next agent destroys.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath, Selector, SnapshotId};
use mvm_core::record::{self, Base, BuildState, PoolStatus, Purpose};
use mvm_store::{StoreError, encode};
use mvm_wire::{ApiError, ErrorCode};
use tokio::time::timeout;

use crate::fork;
use crate::node::{Node, chain};
use crate::state::Mirror;
use crate::submit::{self, internal};

/// How long the removal of the instance that was booted for a base is waited for.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// Makes a pool's base, or makes it anew. The one before serves until then.
pub(crate) async fn warm_up(node: &Arc<Node>, pool: &PoolPath) -> Result<(), ApiError> {
    let request = Request::PoolTemplate { path: pool.clone() };
    let accepted = submit::submit(node, request).await?;
    let Some(template) = accepted.instances.first().map(|target| target.path.clone()) else {
        return Err(gone(pool));
    };
    let snapshot = node.shared.hold();
    let made = make(node, pool, &template, &snapshot).await;
    // From now on it is the pool's record that keeps it, if that names it.
    node.shared.let_go(&snapshot);
    let destroyed = destroy(node, &template).await;
    node.poke();
    // Whoever looks next sees the pool's own instances; what holds its removal up is told there.
    let mut state = node.state.follow();
    let is_gone = |mirror: &Arc<Mirror>| !mirror.desired.instances.contains_key(&template);
    drop(timeout(REMOVAL_LIMIT, state.wait_for(is_gone)).await);
    made.and(destroyed)
}

/// Destroys what was made for the bases that an earlier agent was in the middle of.
pub(crate) async fn end_leftovers(node: &Arc<Node>) {
    let mirror = node.state.now();
    let records = mirror.desired.instances.values();
    let leftover = records.filter(|record| record.purpose == Purpose::Base);
    for record in leftover {
        let what = format!("removing {}, which was made for its pool's base", record.path);
        let refusal = destroy(node, &record.path).await.err();
        node.set_problem(&what, refusal.map(|error| error.to_string()));
    }
}

async fn destroy(node: &Arc<Node>, template: &InstancePath) -> Result<(), ApiError> {
    let selector = Selector::from(template);
    let request = Request::InstanceDestroy { selector, all: false, force: true };
    match submit::submit(node, request).await {
        // Its pool may have been removed, and it with it.
        Err(error) if error.code != ErrorCode::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn make(
    node: &Arc<Node>,
    pool: &PoolPath,
    template: &InstancePath,
    snapshot: &SnapshotId,
) -> Result<(), ApiError> {
    until_running(node, pool, template).await?;
    let spec = node.state.now().desired.instances.get(template).map(|record| record.spec.clone());
    let revision = node.state.now().status(template).revision;
    let (spec, revision) = spec.zip(revision).ok_or_else(|| gone(pool))?;
    let captured = fork::capture(node, template, snapshot).await.ok_or_else(|| gone(pool))?;
    captured.map_err(|error| failed(pool, &error))?;
    let made_unix_ms = node.clock.now_ms();
    let base = Base { id: snapshot.clone(), revision, spec, made_unix_ms, given_up: None };
    tracing::info!(%pool, base = %base.id, "its base is made");
    name_it(node, pool, base).await
}

/// Waits until the guest answers, however long its image takes to build.
async fn until_running(
    node: &Arc<Node>,
    pool: &PoolPath,
    template: &InstancePath,
) -> Result<(), ApiError> {
    let mut state = node.state.follow();
    loop {
        let mirror = state.borrow_and_update().clone();
        if !mirror.desired.instances.contains_key(template) {
            return Err(gone(pool));
        }
        let status = mirror.status(template);
        if status.state() == State::Running && status.activity().is_none() {
            return Ok(());
        }
        if let Some(death) = &status.last_death {
            return Err(failed(
                pool,
                &format!("the instance that boots for it ended: {}", death.cause),
            ));
        }
        let image = mirror.observed.pools.get(pool).cloned().unwrap_or_default();
        let asked = mirror.desired.pools.get(pool).map_or(0, |record| record.build_generation);
        if let (None, BuildState::Failed { error, .. }) = (&image.revision, &image.build)
            && image.build_generation >= asked
        {
            return Err(failed(pool, &format!("its image cannot be built: {error}")));
        }
        if state.changed().await.is_err() {
            return Err(ApiError::new(ErrorCode::Internal, "the agent is ending"));
        }
    }
}

/// Makes the base the pool's, durably.
async fn name_it(node: &Arc<Node>, pool: &PoolPath, base: Base) -> Result<(), ApiError> {
    let named = node.state.change(async |mirror| {
        if !mirror.desired.pools.contains_key(pool) {
            return Ok((vec![], false));
        }
        let status = mirror.observed.pools.get(pool).cloned().unwrap_or_default();
        let status = PoolStatus { base: Some(base), ..status };
        Ok::<_, StoreError>((vec![encode(record::pool_status_key(pool), &status)?], true))
    });
    match named.await {
        Ok((_, true)) => Ok(()),
        Ok((_, false)) => Err(gone(pool)),
        Err(error) => Err(internal(&error)),
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
        let op = encode(record::pool_status_key(pool), &without)?;
        Ok::<_, StoreError>((if is_new { vec![op] } else { vec![] }, ()))
    });
    let given_up = given_up.await.map_err(|error| chain(&error));
    node.set_problem(&format!("giving up the base of pool {pool}"), given_up.err());
}

fn gone(pool: &PoolPath) -> ApiError {
    ApiError::new(
        ErrorCode::Conflict,
        format!("pool {pool}, or what was made for its base, is being removed"),
    )
}

fn failed(pool: &PoolPath, error: &str) -> ApiError {
    let message = format!("pool {pool} gets no base: {error}");
    ApiError::new(ErrorCode::Conflict, message).hint(format!(
        "boot one with `mvm instance create {pool} --start --cold`, and see `mvm why`"
    ))
}
