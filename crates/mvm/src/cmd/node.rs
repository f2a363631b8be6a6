//! `mvm node`.

use clap::{Args, Subcommand};
use mvm_agent::{AgentError, LockError};
use mvm_core::vmm::VmmKind;
use mvm_host::net::{self, Orphan, OrphanKind};

use super::record;
use crate::cli::Context;
use crate::error::{Error, Result};
use crate::output::node;
use crate::output::table::table;
use crate::wait::now_unix_ms;

/// Examine and mend this node.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node info
  mvm node record show desired/pool/demo/hello
  mvm node claim --state-dir /srv/copy")]
pub(crate) struct Node {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Info(Info),
    Claim(Claim),
    Orphans(Orphans),
    Record(record::Record),
}

/// Show the node: its agent, its capacity and what is wrong with it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node info
  mvm node info -o json")]
struct Info {}

/// Make a copied state directory one of its own.
///
/// Commands refuse a copy of a state directory that is still there: its records name microVMs and networks
/// that are the original's. This stops every instance in the copy's records, lets go of their
/// processes without touching them, and gives its tenants other networks wherever the original
/// has theirs. Sleeping instances may be woken in both.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cp -a --sparse=always /srv/mvm /srv/copy
  mvm node claim --state-dir /srv/copy")]
struct Claim {}

/// List what state directories that are gone have left on this machine, or remove it.
///
/// A state directory that was deleted by hand leaves bridges, taps, firewall rules and perhaps
/// microVMs behind. Only what is provably of a state directory that no longer exists is listed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node orphans
  mvm node orphans --prune")]
struct Orphans {
    /// Remove it.
    #[arg(long)]
    prune: bool,
}

impl Node {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::Info(Info {}) => {
                let view = context.client.node().await?;
                context.ui.data(&view, || node::info(&view, now_unix_ms()))
            }
            Verb::Claim(Claim {}) => claim(context).await,
            Verb::Orphans(Orphans { prune }) => orphans(context, prune).await,
            Verb::Record(noun) => noun.run(context).await,
        }
    }
}

async fn claim(context: &Context) -> Result<()> {
    let is_simulated = context.client.wanted().vmm == Some(VmmKind::Sim);
    if !is_simulated && !rustix::process::geteuid().is_root() {
        return Err(Error::NeedsRoot { what: "claiming a state directory".to_owned() });
    }
    let state_dir = context.state_dir();
    let claimed = mvm_agent::claim(state_dir, is_simulated).await.map_err(|error| match error {
        AgentError::Lock(error @ LockError::Held { .. }) => Error::AgentRuns(error),
        error => Error::Host(Box::new(error)),
    })?;
    for note in &claimed.notes {
        context.ui.remark(note);
    }
    let (dir, of) = (state_dir.display(), claimed.copied_from.display());
    context.ui.remark(&format!("{dir} is a state directory of its own now, apart from {of}"));
    Ok(())
}

async fn orphans(context: &Context, prune: bool) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NeedsRoot { what: "looking for leftovers".to_owned() });
    }
    let found = match prune {
        true => net::prune_orphans().await,
        false => net::orphans().await,
    };
    let found = found.map_err(|error| Error::Host(Box::new(error)))?;
    context.ui.data(&found, || {
        let row = |orphan: &Orphan| {
            let kind = match orphan.kind {
                OrphanKind::Process => "microVM process",
                OrphanKind::Tap => "tap",
                OrphanKind::Bridge => "bridge",
                OrphanKind::Firewall => "firewall table",
                OrphanKind::Claim => "net id",
            };
            [kind.to_owned(), orphan.name.clone(), orphan.state_dir.display().to_string()]
        };
        table(["KIND", "NAME", "LEFT BY"], found.iter().map(row))
    })?;
    match (found.len(), prune) {
        (0, _) => context.ui.remark("nothing is left of state directories that are gone"),
        (_, true) => context.ui.remark("removed"),
        (_, false) => context.ui.remark("`mvm node orphans --prune` removes them"),
    }
    Ok(())
}
