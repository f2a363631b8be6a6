//! `mvm kill`.

use clap::Args;
use mvm_core::admit::Request;

use super::Selection;
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::wait::Goal;

/// Cut the power of instances.
///
/// The guest is not asked to shut down, as by `mvm stop --force`: what it had not yet written to its
/// disks is lost. The disks and addresses are kept, and `mvm start` boots it again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm kill web
  mvm kill i-3f2a i-90b1")]
pub(crate) struct Kill {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Kill {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let request = |selector, all| Request::InstanceStop { selector, all, grace_ms: 0 };
        self.selection.carry_out(context, Goal::Stopped, &self.wait, request).await
    }
}
