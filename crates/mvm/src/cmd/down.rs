//! `mvm down`.

use std::path::PathBuf;

use clap::Args;
use mvm_core::admit::Request;

use crate::cli::Context;
use crate::document;
use crate::error::Result;
use crate::request::{WaitArgs, finish, submit};
use crate::wait::Goal;

/// Remove what a document describes.
///
/// Its pools go with all their instances, running ones included, and so does the tenant unless it
/// has other pools. What was on the instances' disks is lost. What is gone already is no error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm down examples/hello.toml
  cat fleet.yaml | mvm down -")]
pub(crate) struct Down {
    /// The document; - is standard input.
    file: PathBuf,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Down {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let document = document::read(&self.file)?;
        let name = document.tenant.clone();
        let submitted = submit(context, Request::Remove { document }).await?;
        // A tenant with other pools stays.
        let tenants = context.client.tenants(None).await?;
        let tenant = tenants.into_iter().find(|view| view.name == name && view.removing);
        let goal = Goal::Gone { tenant: tenant.map(|view| view.name) };
        let outcome = finish(context, submitted, &goal, &self.wait).await?;
        context.ui.data(&outcome, || outcome.concerns.pools.join("\n"))
    }
}
