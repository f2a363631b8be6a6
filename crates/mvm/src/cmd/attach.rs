//! `mvm attach`, `mvm instance attach`.

use clap::Args;
use mvm_core::name::{InstancePath, Selector};
use mvm_wire::{Call, Connection, Reply};

use super::exec::{signals, standard_input};
use crate::cli::Context;
use crate::client::unexpected;
use crate::error::{Error, Result};
use crate::exec::{self, Streams};

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
}

impl Attach {
    /// Runs the verb; the result is the process's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let (connection, _) = open(context, self.selector, false).await?;
        follow(connection, self.interactive).await
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

/// Follows the main process to its end; the result is its exit code.
pub(crate) async fn follow(connection: Connection, is_interactive: bool) -> Result<u8> {
    let signals = signals().map_err(|source| Error::Read { what: "signals".to_owned(), source })?;
    let streams = Streams {
        stdin: is_interactive.then(standard_input),
        signals,
        stdout: tokio::io::stdout(),
        stderr: tokio::io::stderr(),
    };
    let code = exec::attach(connection, streams).await?.shell_code();
    Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}
