//! `mvm attach`, `mvm instance attach`.

use clap::Args;
use mvm_core::name::{InstancePath, Selector};
use mvm_wire::{Call, Connection, Reply};

use super::exec;
use crate::cli::Context;
use crate::client::unexpected;
use crate::detach_keys::DetachKeys;
use crate::error::{Error, Result, exit};
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
  mvm attach -it i-3f2a                  # for `mvm run -it`; Ctrl-P Ctrl-Q leaves it again

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
        let outcome = follow(connection, ways).await;
        if matches!(outcome, Err(Error::HungUp) | Ok(Outcome::Detached)) {
            context.ui.remark(&format!("detached: {path} goes on"));
        }
        outcome.map(exit_code)
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

impl Ways {
    /// What `mvm attach` needs for the same ways, with a blank behind it.
    pub(crate) fn flags(&self) -> &'static str {
        match (self.has_stdin, self.has_terminal) {
            (true, true) => "-it ",
            (true, false) => "-i ",
            (false, true) => "-t ",
            (false, false) => "",
        }
    }
}

/// Follows the main process to its end, or until the detach keys are typed.
///
/// # Errors
/// It could not be started, the connection to it was lost, or the person hung up, which leaves it
/// running.
pub(crate) async fn follow(connection: Connection, ways: Ways) -> Result<Outcome> {
    let Ways { has_stdin, has_terminal, detach_keys } = ways;
    let keys = (has_stdin && has_terminal).then_some(detach_keys);
    exec::carry(connection, has_stdin, has_terminal, keys).await
}

/// What a command that has followed a main process ends with.
pub(crate) fn exit_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Exited(status) => exec::exit_code(status),
        Outcome::Detached => exit::OK,
    }
}
