//! `mvm node`.

use clap::{Args, Subcommand};

use super::record;
use crate::cli::Context;
use crate::error::Result;
use crate::output::node;
use crate::wait::now_unix_ms;

/// Examine and mend this node.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node info
  mvm node record show desired/pool/demo/hello")]
pub(crate) struct Node {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Info(Info),
    Record(record::Record),
}

/// Show the node: its agent, its capacity and what is wrong with it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node info
  mvm node info -o json")]
struct Info {}

impl Node {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::Info(Info {}) => {
                let view = context.client.node().await?;
                context.ui.data(&view, || node::info(&view, now_unix_ms()))
            }
            Verb::Record(noun) => noun.run(context).await,
        }
    }
}
