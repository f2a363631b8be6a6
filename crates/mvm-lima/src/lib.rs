//! `mvm` on a computer that cannot run it: every command is handed over to the `mvm` inside a Lima
//! virtual machine.
//!
//! ```text
//!  mvm ARGS  ──exec──>  limactl shell VM sudo env … mvm ARGS
//! ```
//!
//! The program *becomes* `limactl` (`exec`), so that the terminal, standard input, signals and the
//! exit code are the forwarded command's own, and no argument is parsed here. `bootstrap` is the
//! exception: it makes the machine first.
//!
//! On macOS this is all there is of mvm, so nothing here may need Linux. On Linux it is used if
//! `MVM_LIMA` names a machine, and else Lima is never looked for. It decides nothing about what is
//! forwarded and keeps no state.

mod arguments;
mod bootstrap;
mod machine;

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

pub use arguments::OPTIONS_WITH_VALUES;

/// Names the Lima machine; empty means none.
pub const VARIABLE: &str = "MVM_LIMA";
/// Lima's command.
const LIMACTL: &str = "limactl";
/// The machine's name on macOS.
const DEFAULT_NAME: &str = "mvm";
/// The exit code for an agent that cannot be reached.
const UNREACHABLE: i32 = 7;
/// The exit code for what makes no sense.
const USAGE: i32 = 2;
/// The exit code for everything else that fails.
const FAILURE: i32 = 1;

/// What kind of computer this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// It runs microVMs itself.
    Linux,
    /// It runs them in a Lima machine.
    Other,
}

impl Platform {
    /// The one that this program was built for.
    pub const HERE: Self = if cfg!(target_os = "linux") { Self::Linux } else { Self::Other };
}

/// Why a command was not handed over.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("`{LIMACTL}` is not installed, and microVMs run in a Lima machine here")]
    NoLima,
    #[error("there is no Lima machine `{name}`")]
    NoMachine { name: String },
    #[error("`{name}` is not a Lima machine's name")]
    Name { name: String },
    #[error("cannot run `{program}`")]
    Run { program: String, source: io::Error },
    #[error("`{LIMACTL} {step}` failed ({status})")]
    Step { step: String, status: ExitStatus },
    #[error("there is no mvm for Linux in {}", looked.join(" or "))]
    NoBinary { looked: Vec<String> },
    #[error("{} is not a program for Linux on x86-64 or arm64", path.display())]
    NotLinux { path: PathBuf },
    #[error("cannot use {}", path.display())]
    File { path: PathBuf, source: io::Error },
}

impl Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NoLima => Some("`brew install lima`, then `mvm bootstrap`".to_owned()),
            Self::NoMachine { .. } => Some("`mvm bootstrap` makes it".to_owned()),
            Self::NoBinary { .. } | Self::NotLinux { .. } => {
                let variable = bootstrap::BINARY_VARIABLE;
                Some(format!("name it: `{variable}=/path/to/mvm mvm bootstrap`"))
            }
            Self::Name { .. } => {
                Some(format!("set {VARIABLE} to a name that `limactl list` shows"))
            }
            Self::Step { .. } => Some("`limactl list` shows the machine's state".to_owned()),
            Self::Run { .. } | Self::File { .. } => None,
        }
    }

    fn exit_code(&self) -> i32 {
        match self {
            Self::NoLima | Self::NoMachine { .. } => UNREACHABLE,
            Self::Name { .. } => USAGE,
            _ => FAILURE,
        }
    }
}

/// The machine that commands go to, or `None` if they run here. `named` is the value of
/// [`VARIABLE`], which is honoured everywhere; only where nothing else can run microVMs there is a
/// machine without being named.
pub fn machine(platform: Platform, named: Option<OsString>) -> Option<String> {
    match (named, platform) {
        (Some(name), _) => Some(name.to_string_lossy().into_owned()).filter(|n| !n.is_empty()),
        (None, Platform::Linux) => None,
        (None, Platform::Other) => Some(DEFAULT_NAME.to_owned()),
    }
}

/// Hands this process over to the machine. Returns the exit code if that fails, with a message on
/// standard error.
#[allow(clippy::print_stderr)] // there is nobody else to say it
pub fn hand_over(name: &str) -> i32 {
    let Err(error) = try_hand_over(name);
    let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
    eprintln!("error: {error}{}", source.unwrap_or_default());
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
    error.exit_code()
}

fn try_hand_over(name: &str) -> Result<std::convert::Infallible, Error> {
    if !machine::is_name(name) {
        return Err(Error::Name { name: name.to_owned() });
    }
    let typed: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments::makes_machine(&typed) {
        bootstrap::ensure_machine(name)?;
    } else if !machine::exists(name) {
        return Err(if is_installed()? {
            Error::NoMachine { name: name.to_owned() }
        } else {
            Error::NoLima
        });
    }
    let forward = arguments::Forward {
        name,
        typed: &typed,
        variables: arguments::passed_on(std::env::vars_os()),
        workdir: machine::workdir(std::env::current_dir().ok(), std::env::home_dir()),
    };
    let error = limactl().args(forward.arguments()).exec();
    Err(run_failed(error))
}

#[allow(clippy::disallowed_methods)] // this is the place that starts Lima's command
fn limactl() -> Command {
    Command::new(LIMACTL)
}

fn is_installed() -> Result<bool, Error> {
    match limactl().arg("--version").output() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(run_failed(error)),
    }
}

fn run_failed(source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::NoLima,
        _ => Error::Run { program: LIMACTL.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_has_a_machine_only_if_it_is_named() {
        let named = |name: &str| Some(OsString::from(name));
        assert_eq!(machine(Platform::Linux, None), None);
        assert_eq!(machine(Platform::Linux, named("")), None);
        assert_eq!(machine(Platform::Linux, named("lab")).as_deref(), Some("lab"));
        assert_eq!(machine(Platform::Other, None).as_deref(), Some("mvm"));
        assert_eq!(machine(Platform::Other, named("lab")).as_deref(), Some("lab"));
        assert_eq!(machine(Platform::Other, named("")), None);
    }
}
