//! `mvm restart`, `mvm instance restart`.

use clap::Args;
use mvm_core::admit::Request;

use super::{GraceArgs, Selection};
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::wait::Goal;

/// Stop and start instances.
///
/// Instances that do not run are started. Disks and addresses are kept, and so are the image and all
/// else that an instance was made with: `mvm pool info` says how to renew it after a changed spec.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm restart demo/hello
  mvm restart demo --all --grace 2")]
pub(crate) struct Restart {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    grace: GraceArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Restart {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let grace_ms = self.grace.as_millis();
        let request = |selector, all| Request::InstanceRestart { selector, all, grace_ms };
        self.selection.carry_out(context, Goal::Running, &self.wait, request).await
    }
}
