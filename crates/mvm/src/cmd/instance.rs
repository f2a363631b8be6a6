//! `mvm instance`.

use clap::{Args, Subcommand};

use super::{
    create, destroy, exec, fork, info, list, logs, policy, rest, restart, start, stats, stop, why,
};
use crate::cli::Context;
use crate::error::{Result, exit};

/// Work with instances: each is one microVM.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance create demo/hello --start
  mvm instance list")]
pub(crate) struct Instance {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Create),
    Start(start::Start),
    Stop(stop::Stop),
    Restart(restart::Restart),
    Sleep(rest::Sleep),
    #[command(visible_alias = "resume")]
    Wake(rest::Wake),
    Warm(rest::Warm),
    Pin(policy::Pin),
    Unpin(policy::Unpin),
    Fork(fork::Fork),
    Destroy(destroy::Destroy),
    List(list::List),
    Info(info::Info),
    Exec(exec::Exec),
    Attach(super::attach::Attach),
    Logs(logs::Logs),
    Stats(stats::Stats),
    Why(why::Why),
}

impl Instance {
    /// Runs the verb; the result is the exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        match self.verb {
            Verb::Create(verb) => verb.run(context).await,
            Verb::Start(verb) => verb.run(context).await,
            Verb::Stop(verb) => verb.run(context).await,
            Verb::Restart(verb) => verb.run(context).await,
            Verb::Sleep(verb) => verb.run(context).await,
            Verb::Wake(verb) => verb.run(context).await,
            Verb::Warm(verb) => verb.run(context).await,
            Verb::Pin(verb) => verb.run(context).await,
            Verb::Unpin(verb) => verb.run(context).await,
            Verb::Fork(verb) => verb.run(context).await,
            Verb::Destroy(verb) => verb.run(context).await,
            Verb::List(verb) => verb.run(context).await,
            Verb::Info(verb) => verb.run(context).await,
            Verb::Exec(verb) => return verb.run(context).await,
            Verb::Attach(verb) => return verb.run(context).await,
            Verb::Logs(verb) => verb.run(context).await,
            Verb::Stats(verb) => verb.run(context).await,
            Verb::Why(verb) => verb.run(context).await,
        }?;
        Ok(exit::OK)
    }
}
