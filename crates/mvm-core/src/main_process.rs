//! An instance's main process: what its image says, overridden by what its pool says.
//!
//! The agent resolves it at each boot and hands it to the guest agent, which starts it once per
//! boot. The rules are those that people know from containers: a command replaces the image's
//! `cmd`, an entrypoint replaces the image's entrypoint and `cmd`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::guest::{MainProgram, TerminalSize};
use crate::image::ImageConfig;

/// The signal that asks a main process to end, unless its image names another: SIGTERM.
const DEFAULT_STOP_SIGNAL: i32 = 15;
/// The highest real-time signal of Linux.
const SIGRTMAX: i32 = 64;
/// The lowest real-time signal, as the C library counts: the kernel's first two are its own.
const SIGRTMIN: i32 = 34;
/// The names of the signals from 1 on, without `SIG`.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// What a pool says about the main process of its instances; what it leaves open is the image's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    /// The image's own init, which is process 1.
    Init {
        /// The program.
        path: String,
    },
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
    #[error("init `{path}` is not an absolute path without spaces")]
    Init {
        /// What the image says.
        path: String,
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
    if !spec.names_program()
        && let Some(path) = &image.init
    {
        return match path.starts_with('/')
            && !path.contains(|c: char| c.is_whitespace() || c == '"')
        {
            true => Ok(MainProcess::Init { path: path.clone() }),
            false => Err(ProcessError::Init { path: path.clone() }),
        };
    }
    let (entrypoint, image_cmd) = match &spec.entrypoint {
        Some(entrypoint) => (entrypoint.as_slice(), &[][..]),
        None => (image.entrypoint.as_slice(), image.cmd.as_slice()),
    };
    let command = spec.command.as_deref().unwrap_or(image_cmd);
    let argv: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    if argv.is_empty() {
        return Ok(MainProcess::Nothing);
    }
    let stop_signal = spec.stop_signal.as_deref().or(image.stop_signal.as_deref());
    Ok(MainProcess::Program(Box::new(MainProgram {
        argv,
        env: environment(image, spec),
        user: spec.user.clone().or_else(|| Some(image.user.clone()).filter(|u| !u.is_empty())),
        cwd: match spec.workdir.as_deref().unwrap_or(&image.working_dir) {
            absolute if absolute.starts_with('/') => absolute.to_owned(),
            relative => format!("/{relative}"),
        },
        stop_signal: stop_signal.map_or(Ok(DEFAULT_STOP_SIGNAL), parse_signal)?,
        stdin: spec.stdin,
        terminal: spec.tty.then(TerminalSize::default),
    })))
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
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn program(image: &ImageConfig, spec: &ProcessSpec) -> MainProgram {
        match resolve(image, spec).unwrap() {
            MainProcess::Program(program) => *program,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_command_replaces_cmd_and_an_entrypoint_replaces_both() {
        for (entrypoint, cmd, new_entrypoint, new_command, argv) in [
            ("", "sh", None, None, "sh"),
            ("/entry -x", "run", None, None, "/entry -x run"),
            ("/entry -x", "run", None, Some("other a"), "/entry -x other a"),
            ("/entry -x", "run", None, Some(""), "/entry -x"),
            ("/entry -x", "run", Some("/mine"), None, "/mine"),
            ("/entry -x", "run", Some("/mine"), Some("a"), "/mine a"),
            ("/entry -x", "run", Some(""), Some("a b"), "a b"),
            ("", "", None, Some("a"), "a"),
        ] {
            let image = ImageConfig {
                entrypoint: words(entrypoint),
                cmd: words(cmd),
                ..ImageConfig::default()
            };
            let spec = ProcessSpec {
                entrypoint: new_entrypoint.map(words),
                command: new_command.map(words),
                ..ProcessSpec::default()
            };
            assert_eq!(program(&image, &spec).argv, words(argv), "{entrypoint} {cmd} {spec:?}");
        }
    }

    #[test]
    fn an_image_without_a_program_only_waits() {
        let spec = ProcessSpec { user: Some("nobody".into()), ..ProcessSpec::default() };
        assert_eq!(resolve(&ImageConfig::default(), &spec).unwrap(), MainProcess::Nothing);
    }

    #[test]
    fn an_init_is_process_1_unless_a_program_is_named() {
        let image = ImageConfig {
            init: Some("/sbin/init".into()),
            cmd: words("ignored"),
            ..ImageConfig::default()
        };
        let init = MainProcess::Init { path: "/sbin/init".into() };
        assert_eq!(resolve(&image, &ProcessSpec::default()).unwrap(), init);
        let spec = ProcessSpec { command: Some(words("sh")), ..ProcessSpec::default() };
        assert_eq!(program(&image, &spec).argv, ["sh"]);
    }

    #[test]
    fn the_pools_variables_user_and_directory_go_before_the_images() {
        let image = ImageConfig {
            cmd: words("app"),
            env: ["A=1", "B=x=y", "A=2", "broken", "=no"].map(str::to_owned).to_vec(),
            user: "app:staff".into(),
            working_dir: "srv".into(),
            stop_signal: Some("SIGQUIT".into()),
            ..ImageConfig::default()
        };
        let plain = program(&image, &ProcessSpec::default());
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(plain.env, [pair("A", "2"), pair("B", "x=y")]);
        assert_eq!((plain.user.as_deref(), plain.cwd.as_str()), (Some("app:staff"), "/srv"));
        assert_eq!(plain.stop_signal, 3);
        let spec = ProcessSpec {
            env: BTreeMap::from([("B".into(), "z".into()), ("C".into(), String::new())]),
            user: Some("0".into()),
            workdir: Some("/tmp".into()),
            stop_signal: Some("int".into()),
            ..ProcessSpec::default()
        };
        let mine = program(&image, &spec);
        assert_eq!(mine.env, [pair("A", "2"), pair("B", "z"), pair("C", "")]);
        assert_eq!((mine.user.as_deref(), mine.cwd.as_str()), (Some("0"), "/tmp"));
        assert_eq!(mine.stop_signal, 2);
        let bare = ImageConfig { cmd: words("app"), ..ImageConfig::default() };
        let bare = program(&bare, &ProcessSpec::default());
        assert_eq!((bare.user, bare.cwd.as_str(), bare.stop_signal), (None, "/", 15));
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGSYS", 31),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "-1", "+9", "SIGFOO", "RTMIN+99", "RTMAX-40", "RTMIN3", "SIG"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refusal = |spec: ProcessSpec| spec.check().unwrap_err().to_string();
        let spec = ProcessSpec::default();
        let workdir = refusal(ProcessSpec { workdir: Some("srv".into()), ..spec.clone() });
        assert_eq!(workdir, "working directory `srv` is not absolute");
        let env = BTreeMap::from([("A=B".to_owned(), String::new())]);
        let variable = refusal(ProcessSpec { env, ..spec.clone() });
        assert_eq!(variable, "`A=B` cannot name an environment variable");
        let command = Some(vec!["a\0b".to_owned()]);
        assert_eq!(refusal(ProcessSpec { command, ..spec }), "command contains a NUL character");
    }
}
