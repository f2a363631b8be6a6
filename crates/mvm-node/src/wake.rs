//! Waking what rests, because somebody needs it: the node's own decision, within the quota of the tenant.

use mvm_core::admit::Denial;
use mvm_core::local;
use mvm_core::mirror::Mirror;
use mvm_core::name::InstancePath;
use mvm_core::record;
use mvm_core::stored::versioned;
use mvm_store::{ChangeError, StoreError, encode};
use mvm_wire::{ApiError, ErrorCode};

use crate::node::{Node, chain};

/// Why an instance is not woken.
enum Obstacle {
    Denied(Denial),
    Encode(StoreError),
}

/// Decides, durably, that an instance is to go on, if it rests.
///
/// # Errors
/// Its tenant's quota, the node or its disks do not allow it, or the decision cannot be written down.
pub(crate) async fn wake(node: &Node, path: &InstancePath) -> Result<(), ApiError> {
    let capacity = node.config.capacity;
    let decide = async |mirror: std::sync::Arc<Mirror>| {
        let decided =
            local::wake(&mirror.desired, capacity, &|path| mirror.is_finished(path), path);
        let decided = decided.map_err(Obstacle::Denied)?;
        let Some(intent) = decided else { return Ok((vec![], false)) };
        let op = encode(record::local_key(path), &versioned(&intent)).map_err(Obstacle::Encode)?;
        Ok((vec![op], true))
    };
    match node.state.change(decide).await {
        Ok(is_woken) => {
            if is_woken {
                tracing::info!(instance = %path, "woken on demand");
                node.poke();
            }
            Ok(())
        }
        Err(ChangeError::Refused(Obstacle::Denied(denial))) => Err(denied(path, &denial)),
        Err(ChangeError::Refused(Obstacle::Encode(error))) => Err(ApiError::internal(&error)),
        Err(ChangeError::Store(error)) => Err(ApiError::internal(&error)),
    }
}

fn denied(path: &InstancePath, denial: &Denial) -> ApiError {
    let code = match denial {
        Denial::OverLimit(_) => ErrorCode::OverLimit,
        _ => ErrorCode::Conflict,
    };
    let hint = denial.hint();
    ApiError { code, message: format!("{path} rests and cannot be woken: {}", chain(denial)), hint }
}
