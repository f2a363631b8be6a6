//! `mvm instance info`.

use clap::Args;
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::output::instances;
use crate::wait::now_unix_ms;

/// Show one instance in full.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance info i-3f2a
  mvm instance info demo/hello -o json")]
pub(crate) struct Info {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
}

impl Info {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let views = context.client.instances(self.selector.clone()).await?;
        match views.as_slice() {
            [view] => context.ui.data(view, || instances::info(view, now_unix_ms())),
            [] => Err(Error::no_instance(&self.selector)),
            views => Err(Error::ambiguous(&self.selector, views.iter().map(|view| &view.path))),
        }
    }
}
