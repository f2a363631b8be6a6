//! The options that say what the main process is, of every verb that makes a pool.

use std::collections::BTreeMap;

use clap::Args;
use mvm_core::init::InitMode;
use mvm_core::main_process::ProcessSpec;

/// What the main process is, as far as it is not the image's own.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ProcessArgs {
    /// The program to run instead of the image's entrypoint and command; empty for none.
    #[arg(long, value_name = "PROGRAM", help_heading = "Main process")]
    entrypoint: Option<String>,
    /// Set a variable in the process's environment, NAME alone to this command's own value; may be
    /// repeated.
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    #[arg(help_heading = "Main process")]
    env: Vec<(String, String)>,
    /// The user to run as: NAME, UID or either with :GROUP; the image's if absent.
    #[arg(short, long, value_name = "USER", help_heading = "Main process")]
    user: Option<String>,
    /// The directory to start in, made if it is missing; the image's if absent.
    #[arg(short, long, value_name = "DIR", help_heading = "Main process")]
    workdir: Option<String>,
    /// The signal that asks the process to end, such as SIGINT; the image's if absent.
    #[arg(long, value_name = "SIGNAL", help_heading = "Main process")]
    stop_signal: Option<String>,
    /// Whether the program is process 1: `program` in a process namespace of its own, as containers'
    /// supervisors insist on, `system` of the whole machine, as systemd does, or `none`; decided by
    /// its name if absent. The guest agent reaps orphans and forwards signals in any case.
    #[arg(long, value_name = "KIND", help_heading = "Main process")]
    init: Option<InitMode>,
}

impl ProcessArgs {
    /// The main process with this command, which is the image's if empty.
    pub(crate) fn into_spec(self, command: Vec<String>) -> ProcessSpec {
        let entrypoint = self.entrypoint.map(|program| match program.as_str() {
            "" => Vec::new(),
            _ => vec![program],
        });
        ProcessSpec {
            entrypoint,
            command: Some(command).filter(|command| !command.is_empty()),
            env: self.env.into_iter().collect::<BTreeMap<_, _>>(),
            user: self.user,
            workdir: self.workdir,
            stop_signal: self.stop_signal,
            init: self.init,
            ..ProcessSpec::default()
        }
    }
}

/// Parses `NAME=VALUE`, or the `NAME` of a variable that this command has itself.
pub(crate) fn variable(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        None if !text.is_empty() => match std::env::var(text) {
            Ok(value) => Ok((text.to_owned(), value)),
            Err(_) => Err("expected NAME=VALUE, or the name of a variable that is set here"),
        },
        _ => Err("expected NAME=VALUE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_entrypoint_is_none_and_no_command_is_the_images() {
        let args = ProcessArgs { entrypoint: Some(String::new()), ..ProcessArgs::default() };
        let spec = args.into_spec(vec!["sh".to_owned()]);
        assert_eq!(spec.entrypoint, Some(vec![]));
        assert_eq!(spec.command, Some(vec!["sh".to_owned()]));
        assert_eq!(ProcessArgs::default().into_spec(Vec::new()), ProcessSpec::default());
    }

    #[test]
    fn a_variable_has_a_name_and_a_value() {
        assert_eq!(variable("A=b=c").unwrap(), ("A".into(), "b=c".into()));
        assert_eq!(variable("A=").unwrap(), ("A".into(), String::new()));
        assert!(variable("NO_SUCH_VARIABLE").is_err());
        assert_eq!(variable("PATH").unwrap().1, std::env::var("PATH").unwrap());
        assert!(variable("=b").is_err());
    }
}
