//! `mvm agent`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{Args, Subcommand};
use mvm_agent::{AgentError, Isolation, LockError, ServeOptions, SetupError};
use mvm_core::vmm::VmmKind;
use tokio::time::Instant;

use crate::cli::Context;
use crate::client::Wanted;
use crate::error::{Error, Result, exit};
use crate::output::node;
use crate::units::{Mib, Seconds};
use crate::wait::now_unix_ms;

/// How long an agent has to end.
const STOP_LIMIT: Seconds = Seconds(10);
/// How often an agent that is to end is looked for.
const POLL: Duration = Duration::from_millis(20);

/// Work with the node's daemon.
///
/// The agent keeps everything in its desired state. The first command that needs it starts it in
/// the background.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm agent status
  mvm agent stop")]
pub(crate) struct Agent {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(Serve),
    Status(Status),
    Stop(Stop),
}

/// Run the agent in the foreground, as a service manager wants it.
///
/// It logs on standard error, `info` and above unless --log says otherwise. MicroVMs keep running
/// when it ends; the next agent finds them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm agent serve
  mvm agent serve --production
  mvm agent serve --state-dir /srv/mvm --log debug")]
pub(crate) struct Serve {
    /// Memory of this machine that is to stay available: below it, instances that nobody uses, of
    /// pools with a sleep policy, go to sleep early.
    #[arg(long, env = "MVM_KEEP_FREE", value_name = "SIZE", default_value_t = Mib(512))]
    keep_free: Mib,
    /// Run microVMs on Firecracker alone, and only ones that are jailed, filtered by seccomp and limited
    /// by a cgroup; start none that lacks any of it.
    #[arg(long, env = "MVM_PRODUCTION", value_parser = FalseyValueParser::new())]
    production: bool,
    /// A seccomp filter for Firecracker, as its `seccompiler-bin` writes it, in place of its own.
    #[arg(long, env = "MVM_SECCOMP_FILTER", value_name = "PATH")]
    seccomp_filter: Option<PathBuf>,
    /// A template of the processor that guests on Firecracker see, in JSON, as Firecracker's
    /// documentation describes it.
    #[arg(long, env = "MVM_CPU_TEMPLATE", value_name = "PATH")]
    cpu_template: Option<PathBuf>,
    /// Have guests on Firecracker hand back the memory that they free in production, too: elsewhere they
    /// do. Firecracker's documentation has this among what is ready, its list of changes does not.
    #[arg(long, env = "MVM_FREE_PAGE_REPORTING", value_parser = FalseyValueParser::new())]
    free_page_reporting: bool,
}

/// Show the agent.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm agent status
  mvm agent status -o json")]
struct Status {}

/// End the agent; microVMs keep running.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm agent stop")]
struct Stop {}

impl Agent {
    /// The agent itself, which runs without a [`Context`].
    pub(crate) fn as_serve(&self) -> Option<&Serve> {
        match &self.verb {
            Verb::Serve(serve) => Some(serve),
            Verb::Status(_) | Verb::Stop(_) => None,
        }
    }

    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::Serve(_) => Ok(()),
            Verb::Status(Status {}) => {
                let Some(view) = context.client.running_agent().await? else {
                    return Err(Error::NoAgent { state_dir: context.state_dir().to_path_buf() });
                };
                context.ui.data(&view, || node::agent(&view, now_unix_ms()))
            }
            Verb::Stop(Stop {}) => stop(context).await,
        }
    }
}

async fn stop(context: &Context) -> Result<()> {
    let state_dir = context.state_dir().display();
    match context.client.stop_agent().await {
        Ok(()) => {}
        Err(Error::NoAgent { .. }) => {
            context.ui.remark(&format!("no agent runs for {state_dir}"));
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let deadline = Instant::now() + STOP_LIMIT.as_duration();
    // It hangs up first, and holds the directory until everything is written.
    let is_there = async || -> Result<bool> {
        // What cannot be told is not waited for.
        let is_held = || mvm_agent::is_held(context.state_dir()).unwrap_or(false);
        Ok(!context.client.is_absent().await? || is_held())
    };
    while is_there().await? {
        if Instant::now() >= deadline {
            let waiting = vec![format!("the agent for {state_dir} to end")];
            return Err(Error::WaitTimeout { after: STOP_LIMIT, waiting });
        }
        tokio::time::sleep(POLL).await;
    }
    context.ui.remark(&format!("stopped the agent for {state_dir}; microVMs keep running"));
    Ok(())
}

impl Serve {
    fn options(&self, state_dir: PathBuf, wanted: Wanted) -> ServeOptions {
        ServeOptions {
            state_dir,
            vmm: wanted.vmm,
            accel: wanted.accel,
            keep_free_mib: self.keep_free.0,
            isolation: match self.production {
                true => Isolation::Production,
                false => Isolation::Available,
            },
            seccomp_filter: self.seccomp_filter.clone(),
            cpu_template: self.cpu_template.clone(),
            free_page_reporting: !self.production || self.free_page_reporting,
        }
    }
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// It cannot serve.
pub(crate) fn serve(serve: &Serve, state_dir: PathBuf, wanted: Wanted) -> Result<u8> {
    if wanted.vmm != Some(VmmKind::Sim) && !rustix::process::geteuid().is_root() {
        let what = "the agent, which makes microVMs, networks and firewall rules,";
        return Err(Error::NeedsRoot { what: what.to_owned() });
    }
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Serve {
        state_dir: state_dir.clone(),
        source,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(Box::new(error)))?;
    match runtime.block_on(mvm_agent::serve(serve.options(state_dir.clone(), wanted))) {
        Ok(()) => Ok(exit::OK),
        // Told apart for the command that started this agent in the background.
        Err(AgentError::Lock(error @ LockError::Held { .. })) => Err(Error::AgentRuns(error)),
        Err(AgentError::Setup(SetupError::Identity(error))) => Err(Error::StateDir(error)),
        Err(error) => Err(failed(Box::new(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        serve: Serve,
    }

    #[test]
    fn memory_is_handed_back_in_production_only_if_that_is_wanted() {
        for (line, isolation, is_handed_back) in [
            (&["serve"][..], Isolation::Available, true),
            (&["serve", "--free-page-reporting"], Isolation::Available, true),
            (&["serve", "--production"], Isolation::Production, false),
            (&["serve", "--production", "--free-page-reporting"], Isolation::Production, true),
        ] {
            let Line { serve } = Line::try_parse_from(line).unwrap();
            let options = serve.options(PathBuf::new(), Wanted::default());
            assert_eq!(
                (options.isolation, options.free_page_reporting),
                (isolation, is_handed_back),
                "{line:?}"
            );
        }
    }
}
