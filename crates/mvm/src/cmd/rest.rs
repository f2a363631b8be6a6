//! `mvm sleep`, `mvm wake`, `mvm warm`, and the same below `mvm instance`.

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::record::DEFAULT_HOOKS_MS;

use super::Selection;
use crate::cli::Context;
use crate::error::Result;
use crate::request::WaitArgs;
use crate::units::Seconds;
use crate::wait::Goal;

/// Put instances to sleep.
///
/// A sleeping instance has no process and takes no memory; its programs, its disk and its address
/// are kept, and it goes on where it was with `mvm wake`, or when it is needed (`mvm exec`, `ssh`,
/// `cp`). The guest prepares first: it runs the programs in /etc/mvm/hooks/pre-sleep.d and writes
/// out its disks. Open execs end.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm sleep demo/hello
  mvm sleep i-3f2a --force
  mvm sleep demo --all")]
pub(crate) struct Sleep {
    #[command(flatten)]
    selection: Selection,
    /// How long the guest's own preparations may take.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(DEFAULT_HOOKS_MS / 1000))]
    hooks: Seconds,
    /// Do not let the guest prepare: also one that does not answer is put to sleep.
    #[arg(long, conflicts_with = "hooks")]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Sleep {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let hooks_ms = if self.force { 0 } else { self.hooks.as_millis() };
        let request = |selector, all| Request::InstanceSleep { selector, all, hooks_ms };
        self.selection.carry_out(context, Goal::Sleeping, &self.wait, request).await
    }
}

/// Let sleeping and warm instances go on.
///
/// The clock is right, the random numbers are fresh, and the programs in
/// /etc/mvm/hooks/post-wake.d have run when the verb returns. One that is stopped is started.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm wake demo/hello
  mvm wake i-3f2a
  mvm wake demo --all")]
pub(crate) struct Wake {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Wake {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let request = |selector, all| Request::InstanceStart { selector, all };
        self.selection.carry_out(context, Goal::Running, &self.wait, request).await
    }
}

/// Stop the vCPUs of instances and keep their memory.
///
/// A warm instance costs no processor time and goes on at once with `mvm resume` (or `wake`), or
/// when it is needed. Its memory stays where it is: `mvm sleep` gives that back, too.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm warm demo/hello
  mvm warm demo --all")]
pub(crate) struct Warm {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Warm {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let request = |selector, all| Request::InstanceWarm { selector, all };
        self.selection.carry_out(context, Goal::Warm, &self.wait, request).await
    }
}
