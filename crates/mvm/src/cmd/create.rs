//! `mvm instance create`.

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::disk::DiskMount;
use mvm_core::name::PoolPath;

use crate::cli::Context;
use crate::error::Result;
use crate::request::{WaitArgs, carry_out};
use crate::wait::Goal;

/// Make instances of a pool.
///
/// Each one gets an id and an address for life. They are stopped unless --start is given. The paths
/// of the new instances are printed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance create demo/hello --start
  mvm instance create demo/hello --count 10
  mvm instance create demo/hello --start --cold
  mvm instance create demo/hello --start --disk-attach data:/srv/data")]
pub(crate) struct Create {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    pool: PoolPath,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Start them at once.
    #[arg(long)]
    start: bool,
    /// Give them a data disk besides the pool's, mounted on PATH; with :ro it is only read.
    #[arg(long, value_name = "NAME:/PATH[:ro]")]
    disk_attach: Vec<DiskMount>,
    /// Boot them, although their pool has a base.
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Create {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Self { pool, count, start, disk_attach: disks, cold, wait } = self;
        let request = Request::InstanceCreate { pool, count, start, disks, cold };
        carry_out(context, request, Goal::Settled, &wait).await?.print_instances(context)
    }
}
