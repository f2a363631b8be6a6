//! `mvm completions`.

use clap::Args;
use clap_complete::Shell;

use crate::complete;
use crate::error::{Error, Result, exit};
use crate::output::Ui;

/// Print a script that completes mvm's verbs, options and names in a shell.
///
/// Behind TAB it offers tenants, pools, instances and data disks, as far as an agent runs: none is
/// started for it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm completions bash > /etc/bash_completion.d/mvm
  mvm completions zsh > /usr/local/share/zsh/site-functions/_mvm
  mvm completions fish > ~/.config/fish/completions/mvm.fish")]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    /// Runs the verb.
    pub(crate) fn run(&self, ui: &Ui) -> Result<u8> {
        let script = complete::script(&self.shell.to_string()).map_err(Error::output)?;
        ui.text(&script)?;
        Ok(exit::OK)
    }
}
