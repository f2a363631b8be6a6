//! An instance's main process: what its image says, overridden by what its pool says.
//!
//! The agent resolves it at each boot and hands it to the guest agent, which starts it once per
//! boot. The rules are those that people know from containers: a command replaces the image's
//! `cmd`, an entrypoint replaces the image's entrypoint and `cmd`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::guest::{MainProgram, TerminalSize};
use crate::image::ImageConfig;
use crate::init::InitMode;

/// The signal that asks a main process to end, unless its image names another: SIGTERM.
const DEFAULT_STOP_SIGNAL: i32 = 15;
/// The highest real-time signal of Linux.
const SIGRTMAX: i32 = 64;
/// The lowest real-time signal, as the C library counts: the kernel's first two are its own.
const SIGRTMIN: i32 = 34;
/// The longest argument, or variable with its name and `=`, in bytes: Linux's `MAX_ARG_STRLEN` less
/// the zero at the end.
const LONGEST_TEXT: usize = 128 * 1024 - 1;
/// The most that all of them together can have, in bytes, however large the stack is: three quarters
/// of Linux's `_STK_LIM`. With the usual stack of 8 MiB it is 2 MiB, which the guest's kernel tells.
const MOST_TEXT: usize = 6 * 1024 * 1024;
/// The most that a pool can say of its main process, in bytes of JSON: it is stored with the pool
/// and with each instance.
const LARGEST_SPEC: usize = 768 * 1024;
/// The variable that says that one is in a container, which a microVM is not. Images of systemd have
/// it, and a system that believes it leaves out half of its boot.
const IN_CONTAINER: &str = "container";
/// Where a program is looked for if no variable says it, as the guest agent does.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The names of the signals from 1 on, without `SIG`.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// What a pool says about the main process of its instances; what it leaves open is the image's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessSpec {
    /// The program and its first arguments, instead of the image's entrypoint and `cmd`.
    pub entrypoint: Option<Vec<String>>,
    /// The arguments (the program, if there is no entrypoint), instead of the image's `cmd`.
    pub command: Option<Vec<String>>,
    /// Variables that are added to, or replace, the image's.
    pub env: BTreeMap<String, String>,
    /// `NAME`, `UID` or either with `:GROUP`.
    pub user: Option<String>,
    /// Where the process starts; an absolute path, made if it is missing.
    pub workdir: Option<String>,
    /// The name or number of the signal that asks the process to end.
    pub stop_signal: Option<String>,
    /// Whether the program is process 1, and of what; told by its name if absent.
    pub init: Option<InitMode>,
    /// Whether standard input stays open for those who attach; else it is empty.
    pub stdin: bool,
    /// Whether the process has a terminal.
    pub tty: bool,
}

/// What runs in an instance besides the guest agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MainProcess {
    /// Nothing: the guest waits for `exec`.
    Nothing,
    /// One program, whose end is the instance's end.
    Program(Box<MainProgram>),
    /// A program that is process 1 of the machine, with what it is given. It is root's, and ends
    /// with the machine.
    Init(Box<MainProgram>),
}

/// Why there is no telling what to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProcessError {
    /// A signal that does not exist.
    #[error("`{signal}` is not a signal: expected a name such as SIGTERM, or 1 to {SIGRTMAX}")]
    Signal {
        /// What was given.
        signal: String,
    },
    /// A working directory that depends on where one is.
    #[error("working directory `{path}` is not absolute")]
    Workdir {
        /// What was given.
        path: String,
    },
    /// A variable that cannot exist.
    #[error("`{name}` cannot name an environment variable")]
    Variable {
        /// What was given.
        name: String,
    },
    /// An init that cannot be named on a kernel's command line.
    #[error("init `{path}` is not a name, or an absolute path, of plain characters")]
    Init {
        /// What the image or the pool says.
        path: String,
    },
    /// A text that is longer than Linux takes.
    #[error("{what} has {len} bytes, but Linux takes at most {LONGEST_TEXT}")]
    TooLong {
        /// What.
        what: String,
        /// Its length in bytes.
        len: usize,
    },
    /// More text than Linux takes.
    #[error(
        "arguments and variables have {len} bytes together, but Linux takes at most {MOST_TEXT}"
    )]
    TooMuch {
        /// Their length in bytes.
        len: usize,
    },
    /// More text than is stored with a pool.
    #[error(
        "the main process's arguments and variables take {len} bytes, but a pool can hold at most \
         {LARGEST_SPEC}: put them into the image or onto a data disk"
    )]
    TooLarge {
        /// What they take in bytes.
        len: usize,
    },
    /// A text that no program can be given.
    #[error("{field} contains a NUL character")]
    Nul {
        /// Where.
        field: &'static str,
    },
}

impl ProcessSpec {
    /// Whether it leaves everything to the image.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it names a program, whatever the image says.
    pub fn names_program(&self) -> bool {
        let is_given = |words: &Option<Vec<String>>| words.as_ref().is_some_and(|w| !w.is_empty());
        is_given(&self.entrypoint) || is_given(&self.command)
    }

    /// Checks what does not depend on the image.
    ///
    /// # Errors
    /// Names what makes no sense.
    pub fn check(&self) -> Result<(), ProcessError> {
        let words = |words: &Option<Vec<String>>| words.iter().flatten().any(|w| w.contains('\0'));
        let word = |word: &Option<String>| word.as_ref().is_some_and(|word| word.contains('\0'));
        for (field, is_bad) in [
            ("entrypoint", words(&self.entrypoint)),
            ("command", words(&self.command)),
            ("env", self.env.values().any(|value| value.contains('\0'))),
            ("user", word(&self.user)),
            ("workdir", word(&self.workdir)),
        ] {
            if is_bad {
                return Err(ProcessError::Nul { field });
            }
        }
        let len = serde_json::to_string(self).map_or(0, |text| text.len());
        if len > LARGEST_SPEC {
            return Err(ProcessError::TooLarge { len });
        }
        if let Some(name) = self.env.keys().find(|name| !is_variable(name)) {
            return Err(ProcessError::Variable { name: name.clone() });
        }
        if let Some(path) = self.workdir.as_ref().filter(|path| !path.starts_with('/')) {
            return Err(ProcessError::Workdir { path: path.clone() });
        }
        self.stop_signal.as_deref().map_or(Ok(()), |signal| parse_signal(signal).map(drop))
    }
}

/// What runs in an instance of this image and pool.
///
/// # Errors
/// The image or the pool asks for something that makes no sense.
pub fn resolve(image: &ImageConfig, spec: &ProcessSpec) -> Result<MainProcess, ProcessError> {
    spec.check()?;
    let argv = command(image, spec);
    let by_name = || match &image.init {
        Some(_) if !spec.names_program() => InitMode::System,
        _ => InitMode::of(&argv),
    };
    let mode = spec.init.or_else(|| behind_link(image, spec, &argv)).unwrap_or_else(by_name);
    if argv.is_empty() {
        return Ok(MainProcess::Nothing);
    }
    let stop_signal = spec.stop_signal.as_deref().or(image.stop_signal.as_deref());
    let mut program = MainProgram {
        argv,
        env: environment(image, spec),
        user: spec.user.clone().or_else(|| Some(image.user.clone()).filter(|u| !u.is_empty())),
        cwd: named_directory(image, spec).unwrap_or_else(|| "/".to_owned()),
        stop_signal: stop_signal.map_or(Ok(DEFAULT_STOP_SIGNAL), parse_signal)?,
        stdin: spec.stdin,
        terminal: spec.tty.then(TerminalSize::default),
        is_first: mode == InitMode::Program,
    };
    if mode == InitMode::System {
        let path = &program.argv[0];
        let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\'');
        if !path.chars().all(is_plain) || (path.contains('/') && !path.starts_with('/')) {
            return Err(ProcessError::Init { path: path.clone() });
        }
        program.env.retain(|(name, _)| name != IN_CONTAINER);
        (program.user, program.stdin, program.terminal) = (None, false, None);
        check_size(&program.argv, &program.env)?;
        return Ok(MainProcess::Init(Box::new(program)));
    }
    check_size(&program.argv, &program.env)?;
    Ok(MainProcess::Program(Box::new(program)))
}

/// What a command is if it is a link of the image that leads to an init under another name.
fn behind_link(image: &ImageConfig, spec: &ProcessSpec, argv: &[String]) -> Option<InitMode> {
    let program = argv.first()?;
    if image.init_links.is_empty() || program.contains('/') {
        return image.init_links.get(program).copied();
    }
    let env = environment(image, spec);
    let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.as_str());
    let mut dirs = path.unwrap_or(DEFAULT_PATH).split(':');
    dirs.find_map(|dir| image.init_links.get(&format!("{dir}/{program}")).copied())
}

/// The program and its arguments; empty for none.
fn command(image: &ImageConfig, spec: &ProcessSpec) -> Vec<String> {
    let (entrypoint, image_cmd) = match &spec.entrypoint {
        Some(entrypoint) => (entrypoint.as_slice(), &[][..]),
        None => (image.entrypoint.as_slice(), image.cmd.as_slice()),
    };
    let command = spec.command.as_deref().unwrap_or(image_cmd);
    let argv: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    match &image.init {
        // Found in an image that says nothing of a program, or that says something else first.
        Some(init) if !spec.names_program() && argv.first() != Some(init) => match spec.init {
            None | Some(InitMode::System) => vec![init.clone()],
            Some(InitMode::None | InitMode::Program) => argv,
        },
        _ => argv,
    }
}

/// The directory that a pool, or else its image, names.
pub fn named_directory(image: &ImageConfig, spec: &ProcessSpec) -> Option<String> {
    match spec.workdir.as_deref().unwrap_or(&image.working_dir) {
        "" => None,
        absolute if absolute.starts_with('/') => Some(absolute.to_owned()),
        relative => Some(format!("/{relative}")),
    }
}

/// Checks that a program can be given all of this.
///
/// # Errors
/// Names the text that is too long, or how much too much there is.
pub fn check_size(argv: &[String], env: &[(String, String)]) -> Result<(), ProcessError> {
    let mut total = 0;
    let mut add = |len: usize, what: &dyn Fn() -> String| {
        // Each has a zero at its end and a pointer to it.
        total += len + 1 + size_of::<u64>();
        match len > LONGEST_TEXT {
            true => Err(ProcessError::TooLong { what: what(), len }),
            false => Ok(()),
        }
    };
    for (number, word) in argv.iter().enumerate() {
        add(word.len(), &|| format!("argument {number}"))?;
    }
    for (name, value) in env {
        add(name.len() + 1 + value.len(), &|| format!("variable {}", shortened(name)))?;
    }
    match total > MOST_TEXT {
        true => Err(ProcessError::TooMuch { len: total }),
        false => Ok(()),
    }
}

/// The beginning of a name that may itself be what is too long.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// The variables that an image and a pool give to programs; the pool's replace the image's.
pub fn environment(image: &ImageConfig, spec: &ProcessSpec) -> Vec<(String, String)> {
    let pairs = image.env.iter().filter_map(|pair| pair.split_once('='));
    let mut env: Vec<(String, String)> = Vec::new();
    let overrides = spec.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in pairs.chain(overrides).filter(|(name, _)| is_variable(name)) {
        match env.iter_mut().find(|(known, _)| known == name) {
            Some(known) => value.clone_into(&mut known.1),
            None => env.push((name.to_owned(), value.to_owned())),
        }
    }
    env
}

/// A signal's Linux number from its name (with or without `SIG`, real-time ones as `RTMIN+N` or
/// `RTMAX-N`) or number.
///
/// # Errors
/// There is no such signal.
pub fn parse_signal(text: &str) -> Result<i32, ProcessError> {
    let unknown = || ProcessError::Signal { signal: text.to_owned() };
    let number = |text: &str| text.parse::<i32>().ok().filter(|_| !text.starts_with('+'));
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let signal = if let Some(number) = number(name) {
        Some(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        let more = if rest.is_empty() { Some(0) } else { rest.strip_prefix('+').and_then(number) };
        more.map(|more| SIGRTMIN.saturating_add(more))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        let less = if rest.is_empty() { Some(0) } else { rest.strip_prefix('-').and_then(number) };
        less.map(|less| SIGRTMAX.saturating_sub(less)).filter(|signal| *signal >= SIGRTMIN)
    } else {
        SIGNALS.iter().zip(1..).find(|(known, _)| **known == name).map(|(_, number)| number)
    };
    signal.filter(|signal| (1..=SIGRTMAX).contains(signal)).ok_or_else(unknown)
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

#[cfg(test)]
mod tests;
