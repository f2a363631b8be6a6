//! The command line as a whole: global options, verbs, and the way from arguments to an exit code.

mod foreign;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::rc::Rc;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};
use mvm_core::name::TenantName;
use mvm_core::vmm::{Accel, VmmKind};

use crate::client::{Client, Wanted};
use crate::cmd;
use crate::complete;
use crate::error::{Error, Result, exit};
use crate::log;
use crate::output::{Format, Ui, raw};
use mvm_host::state_dir::StateDir;

/// Where everything is kept unless the command line says otherwise.
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/mvm";
const GLOBAL: &str = "Global options";

const AFTER_HELP: &str = "\
Examples:
  mvm run --rm builtin -- uname -sr
  mvm up examples/hello.toml
  mvm ps
  mvm exec demo/hello -- uname -sr
  mvm down examples/hello.toml

An instance is addressed as TENANT/POOL/INSTANCE, by a unique prefix of its id such as
i-3f, and where one or several will do also as TENANT/POOL or TENANT.

Exit codes:
  0  done                          6    not done within --timeout
  1  failed                        7    the agent cannot be reached or started
  2  usage or document error       124  exec: the program ran into --timeout
  3  the object does not exist     126  exec: the program may not be run
  4  denied by a limit or --scope  127  exec: the program does not exist
  5  conflict with the state       130  interrupted
`mvm exec`, `mvm run` and `mvm attach` otherwise end with the program's own exit code, or
128 + the signal that ended it.";

/// Runs fleets of microVMs for many tenants on machines you own.
///
/// Each tenant has its own network and limits, a pool describes a group of like instances, and an
/// instance is one microVM. A node's agent keeps everything in its desired state; the first command
/// that needs it starts it in the background.
#[derive(Debug, Parser)]
#[command(name = "mvm", version, after_help = AFTER_HELP, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// How data is printed.
    #[arg(short = 'o', long, global = true, value_enum, default_value = "table")]
    #[arg(value_name = "FORMAT", help_heading = GLOBAL)]
    output: Format,
    /// Where the agent keeps everything.
    #[arg(long, global = true, env = "MVM_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    #[arg(value_name = "DIR", help_heading = GLOBAL)]
    state_dir: PathBuf,
    /// The VMM that runs microVMs; chosen by what the machine has if absent. A pool's own: `--on`.
    #[arg(long, global = true, env = "MVM_VMM", value_name = "VMM", help_heading = GLOBAL)]
    vmm: Option<VmmKind>,
    /// What executes guests: kvm or tcg; chosen by what the machine has if absent.
    #[arg(long, global = true, env = "MVM_ACCEL", value_name = "ACCEL", help_heading = GLOBAL)]
    accel: Option<Accel>,
    /// Ask for nothing outside of this tenant: the agent refuses it.
    #[arg(long, global = true, env = "MVM_SCOPE", value_name = "TENANT", help_heading = GLOBAL)]
    scope: Option<TenantName>,
    /// What is logged on standard error: error, warn, info, debug, trace.
    #[arg(long, global = true, env = "MVM_LOG", value_name = "LEVEL", help_heading = GLOBAL)]
    log: Option<String>,
    /// Do not colour messages; NO_COLOR does the same.
    #[arg(long, global = true, help_heading = GLOBAL)]
    no_color: bool,
}

impl Cli {
    /// How data is printed.
    pub(crate) fn format(&self) -> Format {
        self.global.output
    }
}

impl Global {
    fn wanted(&self) -> Wanted {
        Wanted { vmm: self.vmm, accel: self.accel }
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    Up(cmd::up::Up),
    Down(cmd::down::Down),
    Run(Box<cmd::run::Run>),
    Attach(cmd::attach::Attach),
    Ps(cmd::list::Ps),
    Exec(cmd::exec::Exec),
    Cp(cmd::cp::Cp),
    Forward(cmd::forward::Forward),
    Ssh(cmd::ssh::Ssh),
    SshConfig(cmd::ssh_config::SshConfig),
    Logs(cmd::logs::Logs),
    Why(cmd::why::Why),
    Stats(cmd::stats::Stats),
    Start(cmd::start::Start),
    Stop(cmd::stop::Stop),
    Kill(cmd::kill::Kill),
    Restart(cmd::restart::Restart),
    Sleep(cmd::rest::Sleep),
    #[command(visible_alias = "resume")]
    Wake(cmd::rest::Wake),
    Warm(cmd::rest::Warm),
    Fork(cmd::fork::Fork),
    Rm(cmd::destroy::Destroy),
    Tenant(cmd::tenant::Tenant),
    Pool(cmd::pool::Pool),
    Image(cmd::image::Image),
    Instance(cmd::instance::Instance),
    Disk(cmd::disk::Disk),
    Node(cmd::node::Node),
    Net(cmd::net::Net),
    Agent(cmd::agent::Agent),
    Bootstrap(cmd::bootstrap::Bootstrap),
    Doctor(cmd::doctor::Doctor),
    Completions(cmd::completions::Completions),
    Man(cmd::man::Man),
    Version(cmd::version::Version),
}

/// What a verb works with.
pub(crate) struct Context {
    /// The way to the agent.
    pub(crate) client: Client,
    /// The terminal.
    pub(crate) ui: Rc<Ui>,
}

impl Context {
    /// The (absolute) state directory.
    pub(crate) fn state_dir(&self) -> &StateDir {
        self.client.state_dir()
    }
}

/// Runs the program and returns its exit code.
pub(crate) fn main() -> i32 {
    complete::answer();
    let cli = match parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and whoever reads them may have gone.
            let _ = match help_for_missing_verb(&error) {
                Some(help) => print_help(&help),
                None => error.print(),
            };
            return error.exit_code();
        }
    };
    let ui = Rc::new(Ui::standard(cli.format(), cli.global.no_color));
    let code = match run(cli, Rc::clone(&ui)) {
        Ok(code) => code,
        Err(error) => {
            if !error.is_silent() {
                ui.error(&error);
            }
            error.exit_code()
        }
    };
    code.into()
}

/// What was typed.
///
/// # Errors
/// It is nothing that can be run, or help was asked for.
pub(crate) fn parse(words: Vec<OsString>) -> std::result::Result<Cli, clap::Error> {
    Cli::try_parse_from(&words).map_err(|mut error| {
        let words = words.iter().map(|word| word.to_string_lossy().into_owned());
        show_own_usage(&mut error, words);
        foreign::advise(&mut error);
        error
    })
}

/// The help of `mvm`, or of a noun, that was typed without a verb: what can be typed next says more
/// than that something is missing.
fn help_for_missing_verb(error: &clap::Error) -> Option<StyledStr> {
    if error.kind() != ErrorKind::MissingSubcommand {
        return None;
    }
    let Some(ContextValue::String(typed)) = error.get(ContextKind::InvalidSubcommand) else {
        return None;
    };
    let mut command = Cli::command();
    command.build();
    let mut noun = &mut command;
    for word in typed.split(' ').skip(1) {
        noun = noun.find_subcommand_mut(word)?;
    }
    Some(noun.render_help())
}

/// Shows an error with the usage of the verb that was typed. The usage that comes with the error
/// has every global option in it that the environment sets.
fn show_own_usage(error: &mut clap::Error, words: impl Iterator<Item = String>) {
    if error.get(ContextKind::Usage).is_none() {
        return;
    }
    let mut command = Cli::command();
    command.build();
    let mut verb = &mut command;
    for word in words.skip(1) {
        if verb.find_subcommand(&word).is_none() {
            continue;
        }
        let Some(sub) = verb.find_subcommand_mut(&word) else { return };
        verb = sub;
    }
    error.insert(ContextKind::Usage, ContextValue::StyledStr(verb.render_usage()));
}

fn print_help(help: &StyledStr) -> std::io::Result<()> {
    let mut stderr = raw::stderr();
    match stderr.is_terminal() && !is_colour_unwanted() {
        true => write!(stderr, "{}", help.ansi()),
        false => write!(stderr, "{help}"),
    }
}

pub(crate) fn is_colour_unwanted() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Runs a verb and returns its exit code.
///
/// # Errors
/// The verb failed.
pub(crate) fn run(cli: Cli, ui: Rc<Ui>) -> Result<u8> {
    let Cli { global, verb } = cli;
    let serve = match &verb {
        Verb::Completions(verb) => return verb.run(&ui),
        Verb::Man(verb) => return verb.run(&ui),
        Verb::Version(verb) => return verb.run(&ui),
        Verb::Agent(verb) => verb.as_serve(),
        _ => None,
    };
    if let Some(filter) = global.log.as_deref().or(serve.map(|_| "info")) {
        log::to_stderr(filter)?;
    }
    let state_dir = std::path::absolute(&global.state_dir).map_err(|source| Error::Read {
        what: format!("the working directory, for --state-dir {}", global.state_dir.display()),
        source,
    })?;
    if let Some(serve) = serve {
        return cmd::agent::serve(serve, state_dir, global.wanted());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|source| Error::Read { what: "the system's events".to_owned(), source })?;
    let result = runtime.block_on(ask(Cli { global, verb }, state_dir, ui));
    // A thread of the runtime may be blocked in a write that nobody reads.
    runtime.shutdown_background();
    result
}

/// Runs a verb that works with the agent of this (absolute) state directory.
pub(crate) async fn ask(cli: Cli, state_dir: PathBuf, ui: Rc<Ui>) -> Result<u8> {
    let Cli { global, verb } = cli;
    let wanted = global.wanted();
    let client = Client::new(state_dir.into(), wanted, global.log, global.scope, Rc::clone(&ui));
    dispatch(verb, &Context { client, ui }).await
}

async fn dispatch(verb: Verb, context: &Context) -> Result<u8> {
    match verb {
        Verb::Up(verb) => verb.run(context).await,
        Verb::Down(verb) => verb.run(context).await,
        Verb::Run(verb) => return verb.run(context).await,
        Verb::Attach(verb) => return verb.run(context).await,
        Verb::Ps(verb) => verb.run(context).await,
        Verb::Exec(verb) => return verb.run(context).await,
        Verb::Cp(verb) => return verb.run(context).await,
        Verb::Ssh(verb) => return verb.run(context).await,
        Verb::SshConfig(verb) => verb.run(context).await,
        Verb::Forward(verb) => return verb.run(context).await,
        Verb::Logs(verb) => verb.run(context).await,
        Verb::Why(verb) => verb.run(context).await,
        Verb::Stats(verb) => verb.run(context).await,
        Verb::Start(verb) => verb.run(context).await,
        Verb::Stop(verb) => verb.run(context).await,
        Verb::Kill(verb) => verb.run(context).await,
        Verb::Restart(verb) => verb.run(context).await,
        Verb::Sleep(verb) => verb.run(context).await,
        Verb::Wake(verb) => verb.run(context).await,
        Verb::Warm(verb) => verb.run(context).await,
        Verb::Fork(verb) => verb.run(context).await,
        Verb::Rm(verb) => verb.run(context).await,
        Verb::Tenant(noun) => noun.run(context).await,
        Verb::Pool(noun) => noun.run(context).await,
        Verb::Image(noun) => noun.run(context).await,
        Verb::Instance(noun) => return noun.run(context).await,
        Verb::Disk(noun) => noun.run(context).await,
        Verb::Node(noun) => noun.run(context).await,
        Verb::Net(noun) => noun.run(context).await,
        Verb::Agent(noun) => noun.run(context).await,
        Verb::Bootstrap(verb) => verb.run(context).await,
        Verb::Doctor(verb) => verb.run(context).await,
        Verb::Completions(verb) => verb.run(&context.ui).map(drop),
        Verb::Man(verb) => verb.run(&context.ui).map(drop),
        Verb::Version(verb) => verb.run(&context.ui).map(drop),
    }?;
    Ok(exit::OK)
}

#[cfg(test)]
mod tests;
