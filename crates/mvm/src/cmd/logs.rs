//! `mvm logs`, `mvm instance logs`.

use clap::{Args, ValueEnum};
use mvm_core::frame::KIND_STDOUT;
use mvm_core::name::Selector;
use mvm_wire::{Call, ConnectionError, Item, LogKind, Reply};
use tokio::io::AsyncWriteExt;

use crate::cli::Context;
use crate::client::unexpected;
use crate::error::{Error, Result};

/// Which log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Source {
    /// The serial console, kept on the host, also of an instance that has ended.
    Console,
    /// The guest kernel's messages, from the guest.
    Kernel,
    /// What the VMM itself printed.
    Vmm,
}

/// Show a log of an instance.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm logs demo/hello
  mvm logs i-3f2a -f --tail 20
  mvm logs i-3f2a --source kernel")]
pub(crate) struct Logs {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
    /// Go on with what comes later, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// Which log.
    #[arg(long, value_enum, default_value = "console")]
    source: Source,
    /// Only the last lines.
    #[arg(long, value_name = "LINES")]
    tail: Option<u32>,
}

impl Logs {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let kind = match self.source {
            Source::Console => LogKind::Console,
            Source::Kernel => LogKind::Kernel,
            Source::Vmm => LogKind::Vmm,
        };
        let Self { selector, follow, tail, .. } = self;
        let call = Call::Logs { selector, kind, follow, tail };
        let mut connection = context.client.start(&call).await?;
        let mut stdout = tokio::io::stdout();
        loop {
            match connection.read.next().await?.ok_or(ConnectionError::HungUp)? {
                Item::Data { kind: KIND_STDOUT, bytes } => {
                    stdout.write_all(&bytes).await.map_err(Error::output)?;
                    stdout.flush().await.map_err(Error::output)?;
                }
                Item::Data { .. } => {}
                message @ Item::Message(_) => match message.parse()? {
                    Reply::Done => return Ok(()),
                    Reply::Error(error) => return Err(error.into()),
                    other => return Err(unexpected(&other)),
                },
            }
        }
    }
}
