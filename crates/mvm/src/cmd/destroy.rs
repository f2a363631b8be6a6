//! `mvm rm`, `mvm instance destroy`.

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::Result;
use crate::request::{WaitArgs, carry_out};
use crate::wait::Goal;

/// Remove instances with their disks and addresses.
///
/// Instances that run are refused, unless --force stops them first. What was on their disks is
/// lost.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm rm i-3f2a
  mvm rm demo/hello --all --force
  mvm instance destroy demo/hello/i-3f2a9c01")]
pub(crate) struct Destroy {
    /// TENANT/POOL/INSTANCE, a prefix of an id, TENANT/POOL or TENANT.
    selector: Selector,
    /// Allow more than one instance.
    #[arg(long)]
    all: bool,
    /// Stop those that run first.
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Destroy {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Self { selector, all, force, wait } = self;
        let request = Request::InstanceDestroy { selector, all, force };
        let goal = Goal::Gone { tenant: None };
        carry_out(context, request, goal, &wait).await?.print_instances(context)
    }
}
