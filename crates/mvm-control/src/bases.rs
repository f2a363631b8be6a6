//! The call that makes a pool's base and waits for it. Asking is a request like any other, and the node makes the base;
//! both go on if the caller leaves.

use std::sync::Arc;

use mvm_core::admit::Request;
use mvm_core::mirror::Mirror;
use mvm_core::name::PoolPath;
use mvm_core::record::Purpose;
use mvm_wire::{ApiError, ErrorCode};

use crate::{Control, admission};

/// Makes a pool's base, or makes it anew. The one before serves until then.
pub(crate) async fn warm_up(control: &Arc<Control>, pool: &PoolPath) -> Result<(), ApiError> {
    let request = Request::PoolWarmUp { path: pool.clone() };
    let accepted = admission::submit(control, request).await?;
    let asked = accepted.pools.first().map_or(0, |target| target.base_generation);
    let mut state = control.state.follow();
    let is_over = |mirror: &Arc<Mirror>| {
        !mirror.desired.pools.contains_key(pool) || carried_out(mirror, pool) >= asked
    };
    let mirror = match state.wait_for(is_over).await {
        Ok(mirror) => mirror.clone(),
        Err(_) => return Err(ApiError::new(ErrorCode::Internal, "the agent is ending")),
    };
    if !mirror.desired.pools.contains_key(pool) {
        let message = format!("pool {pool} was removed");
        return Err(ApiError::new(ErrorCode::Conflict, message));
    }
    match failure(&mirror, pool) {
        None => Ok(()),
        Some(error) => {
            let message = format!("pool {pool} gets no base: {error}");
            Err(ApiError::new(ErrorCode::Conflict, message).hint(format!(
                "boot one with `mvm instance create {pool} --start --cold`, and see `mvm why`"
            )))
        }
    }
}

/// The last request for a base that was carried out, and of which nothing is left over.
pub(crate) fn carried_out(mirror: &Mirror, pool: &PoolPath) -> u64 {
    let made = mirror.observed.pools.get(pool).map_or(0, |status| status.base_generation);
    let asked = mirror.desired.pools.get(pool).map_or(0, |record| record.base_generation);
    let is_left = mirror.desired.instances_in(pool).any(|it| it.purpose == Purpose::Base);
    if is_left { made.min(asked.saturating_sub(1)) } else { made }
}

/// Why the last request for a base that was carried out came to nothing, if it did.
pub(crate) fn failure(mirror: &Mirror, pool: &PoolPath) -> Option<String> {
    mirror.observed.pools.get(pool).and_then(|status| status.base_failure.clone())
}
