//! `mvm net`.

use clap::{Args, Subcommand};

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::output::node;

/// Examine tenants' networks.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm net verify")]
pub(crate) struct Net {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Verify(Verify),
}

/// Compare the kernel's bridges, taps and firewall rules with the expected ones.
///
/// It changes nothing. The exit code is 1 if something differs.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm net verify
  mvm net verify -o json")]
struct Verify {}

impl Net {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Verb::Verify(Verify {}) = self.verb;
        let view = context.client.net_verify().await?;
        context.ui.data(&view, || node::verify(&view))?;
        match view.differences.len() {
            0 => Ok(()),
            differences => Err(Error::NetworkDiffers(differences)),
        }
    }
}
