//! `mvm stats`, `mvm instance stats`.

use clap::Args;
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::Result;
use crate::output::instances;

/// Show what running instances use.
///
/// On the host: CPU time and memory of the VMM, guest memory included, and disk space. In the
/// guest: memory, disk and load as its kernel sees them. Of instances whose pool has a sleep policy
/// (`mvm pool policy`), for how long nobody has used them; `mvm why` tells what they are used for.
/// With --io instead, since their VMM started: what was read from and written to the host's storage
/// for them (what the page cache had is not read again), how often they have read and written, how
/// often a rate held them back (Firecracker tells), and what they have sent and received over the
/// network. -o json has all of it, and what Firecracker counts besides.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm stats
  mvm stats demo/hello --io
  mvm stats demo/hello -o json")]
pub(crate) struct Stats {
    /// Only these: TENANT, TENANT/POOL or a prefix of an id.
    selector: Option<Selector>,
    /// Show disk and network transfers.
    #[arg(long)]
    io: bool,
}

impl Stats {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let stats = context.client.stats(self.selector.unwrap_or(Selector::All)).await?;
        context.ui.data(&stats, || match self.io {
            true => instances::io_stats(&stats),
            false => instances::stats(&stats),
        })?;
        if stats.is_empty() {
            context.ui.remark("no instance runs: see `mvm ps -a`");
        }
        for view in &stats {
            if let Some(error) = &view.guest_error {
                context.ui.remark(&format!("{}: the guest did not answer: {error}", view.path));
            }
            let kills = view.guest.as_ref().map_or(0, |guest| guest.oom_kills);
            if kills > 0 {
                let path = &view.path;
                context.ui.remark(&format!(
                    "{path}: out of memory: its kernel has killed {kills} programs since it booted"
                ));
            }
        }
        Ok(())
    }
}
