//! `mvm fork`, `mvm instance fork`.

use clap::Args;
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::Result;
use crate::request::{WaitArgs, carry_out_fork};

/// Make new instances that begin where another one is.
///
/// A fork has the source's memory and a copy of its disk, and its own name, address, machine id and
/// random numbers. The source, which runs, stands still or sleeps, goes on as before. What the forks
/// have in common with it they share: each costs what it writes. The paths of the new instances are
/// printed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm fork demo/hello
  mvm fork i-3f2a -n 10")]
pub(crate) struct Fork {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL if it has one instance.
    selector: Selector,
    /// How many.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    count: u32,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Fork {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Self { selector, count, wait } = self;
        carry_out_fork(context, selector, count, &wait).await?.print_instances(context)
    }
}
