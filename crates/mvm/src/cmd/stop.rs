//! `mvm stop`, `mvm instance stop`.

use clap::Args;
use mvm_core::admit::Request;

use super::{GraceArgs, Selection};
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::wait::Goal;

/// Stop instances.
///
/// The guest is asked to shut down and ended by force after a while. Its disk and its address are
/// kept: `mvm start` boots it again. One that sleeps gives its memory up; one that falls asleep is shut
/// down instead.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm stop demo/hello
  mvm stop i-3f2a --grace 30
  mvm stop demo --all --force")]
pub(crate) struct Stop {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    grace: GraceArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Stop {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let grace_ms = self.grace.as_millis();
        let request = |selector, all| Request::InstanceStop { selector, all, grace_ms };
        self.selection.carry_out(context, Goal::Stopped, &self.wait, request).await
    }
}
