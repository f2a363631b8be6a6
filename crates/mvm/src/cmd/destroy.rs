//! `mvm rm`, `mvm instance destroy`.

use clap::Args;
use mvm_core::admit::Request;

use super::Selection;
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::wait::Goal;

/// Remove instances with their disks and addresses.
///
/// Instances that run are refused, unless --force stops them first. What was on their disks is
/// lost. A pool that `mvm run` made goes with its last instance.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm rm i-3f2a
  mvm rm -f web db
  mvm rm demo/hello --all --force
  mvm instance destroy demo/hello/i-3f2a9c01")]
pub(crate) struct Destroy {
    #[command(flatten)]
    selection: Selection,
    /// Stop those that run first.
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Destroy {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Self { selection, force, wait } = self;
        let request = |selector, all| Request::InstanceDestroy { selector, all, force };
        selection.carry_out(context, Goal::Gone { tenant: None }, &wait, request).await
    }
}
