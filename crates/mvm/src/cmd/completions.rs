//! `mvm completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::{Error, Result, exit};
use crate::output::Ui;

/// Print a script that completes mvm's verbs and options in a shell.
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
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "mvm", &mut script);
        let script = String::from_utf8(script)
            .map_err(|error| Error::output(std::io::Error::other(error)))?;
        ui.text(&script)?;
        Ok(exit::OK)
    }
}
