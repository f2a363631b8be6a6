//! What a shell offers behind TAB: the names that the agent knows, besides verbs and options.
//!
//! The shell runs `mvm` with [`VARIABLE`] set; [`answer`] then prints candidates and ends the
//! process. What an argument takes is told by its type, so a new verb needs nothing here. An agent
//! is asked for at most [`BUDGET`] and never started; without one there are no names, and silence.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, Command, CommandFactory};
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{CompleteEnv, EnvCompleter, Shells};
use mvm_core::disk::DiskMount;
use mvm_core::name::{DiskPath, PoolPath, Selector, TenantName};
use mvm_wire::{Call, Connection, Reply};

use crate::cli::{Cli, DEFAULT_STATE_DIR};
use crate::cmd::ssh::Word;
use mvm_host::state_dir::StateDir;

/// Set by the shell's script to the shell's name when candidates are wanted.
const VARIABLE: &str = "MVM_COMPLETE";
/// How long a person waits at most behind TAB.
const BUDGET: Duration = Duration::from_millis(400);

/// Prints candidates and ends the process, if a shell asks for them.
pub(crate) fn answer() {
    CompleteEnv::with_factory(command).var(VARIABLE).complete();
}

/// The script that makes a shell ask.
///
/// # Errors
/// The shell is not one that can.
pub(crate) fn script(shell: &str) -> std::io::Result<String> {
    let unknown = || std::io::Error::other(format!("there is no completion for `{shell}`"));
    let shells = Shells::builtins();
    let shell: &dyn EnvCompleter = shells.completer(shell).ok_or_else(unknown)?;
    let mut script = Vec::new();
    shell.write_registration(VARIABLE, "mvm", "mvm", "mvm", &mut script)?;
    String::from_utf8(script).map_err(std::io::Error::other)
}

/// The command line, with live names for the arguments that take one.
fn command() -> Command {
    with_names(Cli::command())
}

fn with_names(command: Command) -> Command {
    command.mut_args(with_name).mut_subcommands(with_names)
}

fn with_name(arg: Arg) -> Arg {
    let takes = arg.get_value_parser().type_id();
    let names: fn(&dyn Ask) -> Vec<Name> = match () {
        () if takes == TypeId::of::<TenantName>() => tenants,
        () if takes == TypeId::of::<PoolPath>() => pools,
        () if takes == TypeId::of::<DiskPath>() => disks,
        () if takes == TypeId::of::<DiskMount>() => mounts,
        () if takes == TypeId::of::<Selector>() || takes == TypeId::of::<Word>() => selectors,
        () => return arg,
    };
    let complete = move |typed: &OsStr| {
        let agent = Agent { state_dir: state_dir(std::env::args_os()).into() };
        candidates(names(&agent), &typed.to_string_lossy())
    };
    arg.add(ArgValueCompleter::new(complete))
}

/// A name and what it names.
struct Name {
    text: String,
    help: String,
}

fn candidates(names: Vec<Name>, typed: &str) -> Vec<CompletionCandidate> {
    let matching = names.into_iter().filter(|name| name.text.starts_with(typed));
    matching.map(|name| CompletionCandidate::new(name.text).help(Some(name.help.into()))).collect()
}

/// Who knows the names.
trait Ask {
    fn ask(&self, call: Call) -> Option<Reply>;
}

fn tenants(agent: &dyn Ask) -> Vec<Name> {
    let Some(Reply::Tenants(views)) = agent.ask(Call::Tenants { name: None }) else {
        return Vec::new();
    };
    let name = |text: String| Name { text, help: "tenant".to_owned() };
    views.into_iter().map(|view| name(view.name.to_string())).collect()
}

fn pools(agent: &dyn Ask) -> Vec<Name> {
    let Some(Reply::Pools(views)) = agent.ask(Call::Pools { tenant: None, path: None }) else {
        return Vec::new();
    };
    let name = |text: String| Name { text, help: "pool".to_owned() };
    views.into_iter().map(|view| name(view.path.to_string())).collect()
}

fn disks(agent: &dyn Ask) -> Vec<Name> {
    let Some(Reply::Disks(views)) = agent.ask(Call::Disks { tenant: None, path: None }) else {
        return Vec::new();
    };
    let name = |text: String| Name { text, help: "data disk".to_owned() };
    views.into_iter().map(|view| name(view.path.to_string())).collect()
}

/// Disks as they are attached, up to the path in the guest.
fn mounts(agent: &dyn Ask) -> Vec<Name> {
    let disks = disks(agent).into_iter().filter_map(|disk| {
        let (_, name) = disk.text.split_once('/')?;
        Some(Name { text: format!("{name}:/"), help: disk.text.clone() })
    });
    disks.collect()
}

/// Instances by path and by id, and the pools and tenants that stand for theirs.
fn selectors(agent: &dyn Ask) -> Vec<Name> {
    let Some(Reply::Instances { instances, .. }) =
        agent.ask(Call::Instances { selector: Selector::All })
    else {
        return Vec::new();
    };
    let mut names = Vec::new();
    for view in instances {
        let state = view.state.to_string();
        names.push(Name { text: view.path.to_string(), help: state.clone() });
        names.push(Name { text: view.path.id.to_string(), help: state });
    }
    names.extend(pools(agent));
    names.extend(tenants(agent));
    names
}

/// The agent of a state directory.
struct Agent {
    state_dir: StateDir,
}

impl Ask for Agent {
    fn ask(&self, call: Call) -> Option<Reply> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let socket = self.state_dir.socket();
        let asked = async {
            let stream = mvm_host::unix_socket::connect(&socket).await.ok()?;
            let mut connection = Connection::new(stream);
            connection.write.message(&call).await.ok()?;
            connection.read.reply().await.ok()
        };
        runtime.block_on(async { tokio::time::timeout(BUDGET, asked).await.ok().flatten() })
    }
}

/// The state directory of a command line that is not finished and need not parse.
fn state_dir(words: impl Iterator<Item = OsString>) -> PathBuf {
    const OPTION: &str = "--state-dir";
    let words: Vec<OsString> = words.collect();
    let joined = words.iter().filter_map(|word| word.to_str()?.strip_prefix("--state-dir="));
    let apart = words.windows(2).filter(|pair| pair[0] == OPTION).map(|pair| pair[1].as_os_str());
    let given = joined.map(OsStr::new).chain(apart).last().map(Path::new).map(Path::to_owned);
    given
        .or_else(|| std::env::var_os("MVM_STATE_DIR").map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT_STATE_DIR.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    struct Fake;

    impl Ask for Fake {
        fn ask(&self, call: Call) -> Option<Reply> {
            match call {
                Call::Instances { .. } => {
                    let instances = vec![samples::instance("demo/web/i-00000001")];
                    Some(Reply::Instances { instances, more: false })
                }
                Call::Pools { .. } => Some(Reply::Pools(vec![samples::pool("demo/web")])),
                // As an agent that is too old, or gone by now.
                _ => None,
            }
        }
    }

    fn offered(names: fn(&dyn Ask) -> Vec<Name>, typed: &str) -> Vec<String> {
        let candidates = candidates(names(&Fake), typed);
        candidates.iter().map(|c| c.get_value().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn an_instance_is_offered_by_its_path_its_id_and_its_pool() {
        assert_eq!(offered(selectors, "i-0"), ["i-00000001"]);
        assert_eq!(offered(selectors, "demo/"), ["demo/web/i-00000001", "demo/web"]);
        assert_eq!(offered(pools, "other"), [""; 0]);
        assert_eq!(offered(disks, ""), [""; 0], "no answer is no error");
    }

    #[test]
    fn every_argument_that_takes_a_name_offers_names() {
        let mut offering = 0;
        fn count(command: &Command, offering: &mut usize) {
            let has = |arg: &&Arg| arg.get::<ArgValueCompleter>().is_some();
            *offering += command.get_arguments().filter(has).count();
            command.get_subcommands().for_each(|sub| count(sub, offering));
        }
        count(&command(), &mut offering);
        assert!(offering > 25, "{offering}");
    }

    #[test]
    fn the_state_directory_is_found_in_an_unfinished_command_line() {
        let find = |line: &str| state_dir(line.split(' ').map(OsString::from));
        assert_eq!(find("mvm -- mvm --state-dir /a stop i-"), Path::new("/a"));
        assert_eq!(find("mvm -- mvm --state-dir=/b stop i-"), Path::new("/b"));
    }

    #[test]
    fn there_is_a_script_for_every_shell() {
        for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
            let script = script(shell).unwrap();
            assert!(script.contains(VARIABLE), "{shell}: {script}");
        }
        assert!(script("cmd").is_err());
    }
}
