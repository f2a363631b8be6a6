//! `mvm start`, `mvm instance start`.

use clap::Args;
use mvm_core::admit::Request;

use super::Selection;
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::wait::Goal;

/// Start instances.
///
/// An instance that runs already stays as it is. The verb waits until the guests answer; if one
/// cannot be started, it says why, and mvm goes on trying in the background.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm start demo/hello
  mvm start i-3f2a
  mvm start demo --all --timeout 5m")]
pub(crate) struct Start {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Start {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let request = |selector, all| Request::InstanceStart { selector, all };
        self.selection.carry_out(context, Goal::Running, &self.wait, request).await
    }
}
