//! `mvm attach`, `mvm instance attach`.

use clap::Args;
use mvm_core::name::{InstancePath, Selector};
use mvm_wire::{Call, Connection, Reply};

use super::exec;
use crate::cli::Context;
use crate::client::unexpected;
use crate::detach_keys::DetachKeys;
use crate::error::{Error, Result};
use crate::exec::Outcome;

/// Attach to an instance's main process.
///
/// What it writes from now on is shown, Ctrl-C goes to it, and its exit code is passed on. A second
/// Ctrl-C within two seconds leaves it running. What it wrote before is in `mvm logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm attach default/builtin-3f2a
  echo hello | mvm attach i-3f2a -i

Standard input reaches a process that was started with it, such as by `mvm run -i`.")]
pub(crate) struct Attach {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
    /// Pass standard input on to the process.
    #[arg(short, long)]
    interactive: bool,
    /// Treat this terminal as the process's own: for one that was started with -t.
    #[arg(short, long)]
    tty: bool,
    /// The keys that leave the process running, or `none`.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", requires = "tty")]
    detach_keys: DetachKeys,
}

impl Attach {
    /// Runs the verb; the result is the process's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        if self.tty {
            exec::need_terminal()?;
        }
        let (connection, path) = open(context, self.selector, false).await?;
        let (has_stdin, has_terminal) = (self.interactive, self.tty);
        let ways = Ways { has_stdin, has_terminal, detach_keys: self.detach_keys };
        let code = follow(connection, ways).await;
        if matches!(code, Err(Error::HungUp)) {
            context.ui.remark(&format!("{path} goes on"));
        }
        code
    }
}

/// Opens the connection on which everything that the main process does from now on will come.
pub(crate) async fn open(
    context: &Context,
    selector: Selector,
    wait: bool,
) -> Result<(Connection, InstancePath)> {
    let mut connection = context.client.start(&Call::Attach { selector, wait }).await?;
    match connection.read.message().await? {
        Reply::Attached { instance } => Ok((connection, instance)),
        Reply::Error(error) => Err(error.into()),
        other => Err(unexpected(&other)),
    }
}

/// How this command is connected to a main process.
#[derive(Debug, Clone)]
pub(crate) struct Ways {
    /// Whether standard input is passed on.
    pub(crate) has_stdin: bool,
    /// Whether the process has this command's terminal.
    pub(crate) has_terminal: bool,
    /// The keys that leave it running.
    pub(crate) detach_keys: DetachKeys,
}

/// Follows the main process to its end; the result is its exit code.
///
/// # Errors
/// It could not be started, or the connection to it was lost. A person who leaves it running
/// has hung up.
pub(crate) async fn follow(connection: Connection, ways: Ways) -> Result<u8> {
    let Ways { has_stdin, has_terminal, detach_keys } = ways;
    let keys = (has_stdin && has_terminal).then_some(detach_keys);
    match exec::carry(connection, has_stdin, has_terminal, keys).await? {
        Outcome::Exited(status) => Ok(exec::exit_code(status)),
        Outcome::Detached => Err(Error::HungUp),
    }
}
