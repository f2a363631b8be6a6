//! `mvm why`, `mvm instance why`.

use clap::Args;
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::Result;
use crate::output::instances;
use crate::wait::now_unix_ms;

/// Explain why an instance is in its state.
///
/// Tells its desired state, what it waits for, how its last run ended, and the last lines of
/// its console.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm why i-3f2a
  mvm instance why demo/hello")]
pub(crate) struct Why {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
}

impl Why {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let why = context.client.why(self.selector).await?;
        context.ui.data(&why, || instances::why(&why, now_unix_ms()))
    }
}
