//! The node daemon: admission, reconcile loop, instance actors and the API server.

use std::path::PathBuf;

use mvm_core::vmm::{Accel, VmmKind};

/// What the agent is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeOptions {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// The VMM to use; chosen from what the machine has if absent.
    pub vmm: Option<VmmKind>,
    /// The accelerator to use; chosen from what the machine has if absent.
    pub accel: Option<Accel>,
}

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
#[error("this build has no agent")]
pub struct ServeError;

/// Serves until the agent is told to stop.
///
/// # Errors
/// The agent cannot serve.
pub async fn serve(_options: ServeOptions) -> Result<(), ServeError> {
    Err(ServeError)
}
