//! The argument list that carries a command into the machine, as a pure function.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use crate::VARIABLE;

/// mvm's global options that are followed by a value: what comes after one is no verb.
pub const OPTIONS_WITH_VALUES: [&str; 7] =
    ["-o", "--output", "--state-dir", "--vmm", "--accel", "--scope", "--log"];

/// A command on its way into the machine.
#[derive(Debug)]
pub(crate) struct Forward<'a> {
    /// The machine.
    pub(crate) name: &'a str,
    /// What was typed behind `mvm`.
    pub(crate) typed: &'a [OsString],
    /// Variables that the command is to have there.
    pub(crate) variables: Vec<(OsString, OsString)>,
    /// The directory in which the command runs there.
    pub(crate) workdir: PathBuf,
}

impl Forward<'_> {
    /// The arguments of `limactl`. Lima quotes each of them for the machine's shell, so they arrive
    /// as they are.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut list: Vec<OsString> = vec!["shell".into(), "--workdir".into()];
        list.push(self.workdir.clone().into());
        list.push(self.name.into());
        // Lima's user is not root. In the machine the command runs natively, whatever is set there.
        list.extend(["sudo", "env"].map(OsString::from));
        list.push(format!("{VARIABLE}=").into());
        list.extend(self.variables.iter().map(|(name, value)| {
            let mut assignment = name.clone();
            assignment.push("=");
            assignment.push(value);
            assignment
        }));
        list.push("mvm".into());
        list.extend(self.typed.iter().cloned());
        list
    }
}

/// The variables that mvm listens to, and those of its completion.
pub(crate) fn passed_on(
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let is_ours = |name: &OsStr| {
        let Some(name) = name.to_str() else { return false };
        let ours = name.starts_with("MVM_") || name.starts_with("_CLAP_");
        (ours && name != VARIABLE && name != crate::bootstrap::BINARY_VARIABLE)
            || matches!(name, "NO_COLOR" | "TERM")
    };
    let mut ours: Vec<_> = variables.filter(|(name, _)| is_ours(name)).collect();
    ours.sort();
    ours
}

/// Whether what was typed makes the machine: `bootstrap`, but not its help.
pub(crate) fn makes_machine(typed: &[OsString]) -> bool {
    let asks_for_help = typed.iter().any(|word| word == "-h" || word == "--help");
    verb(typed).is_some_and(|verb| verb == "bootstrap") && !asks_for_help
}

/// The first word that is neither an option nor an option's value.
fn verb(typed: &[OsString]) -> Option<&OsStr> {
    let mut words = typed.iter();
    while let Some(word) = words.next() {
        let text = word.to_str().unwrap_or_default();
        if OPTIONS_WITH_VALUES.contains(&text) {
            words.next();
        } else if !text.starts_with('-') {
            return Some(word);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[&str]) -> Vec<OsString> {
        line.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_command_arrives_word_for_word_with_its_variables_and_directory() {
        let typed = words(&["exec", "demo", "--", "sh", "-c", "echo 'a b' $HOME; \"x\"", ""]);
        let forward = Forward {
            name: "lab",
            typed: &typed,
            variables: vec![("NO_COLOR".into(), "1".into()), ("MVM_LOG".into(), "a b".into())],
            workdir: "/Users/ada/my work".into(),
        };
        let head = [
            "shell",
            "--workdir",
            "/Users/ada/my work",
            "lab",
            "sudo",
            "env",
            "MVM_LIMA=",
            "NO_COLOR=1",
            "MVM_LOG=a b",
            "mvm",
        ];
        assert_eq!(forward.arguments(), [words(&head), typed.clone()].concat());
    }

    #[test]
    fn what_is_no_text_arrives_too() {
        use std::os::unix::ffi::OsStringExt;
        let typed = [OsString::from("up"), OsString::from_vec(vec![b'/', 0xff, b'x'])];
        let forward =
            Forward { name: "lab", typed: &typed, variables: vec![], workdir: "/".into() };
        assert_eq!(forward.arguments().last(), typed.last());
    }

    #[test]
    fn only_variables_that_mvm_listens_to_are_passed_on() {
        let set = ["PATH", "MVM_LIMA", "MVM_LOG", "NO_COLOR", "_CLAP_IFS", "HOME", "MVM_VMM"];
        let set = set.map(|name| (OsString::from(name), OsString::from("x")));
        let names: Vec<OsString> =
            passed_on(set.into_iter()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["MVM_LOG", "MVM_VMM", "NO_COLOR", "_CLAP_IFS"]);
    }

    #[test]
    fn the_machine_is_made_by_bootstrap_and_nothing_else() {
        for (line, makes) in [
            (&["bootstrap"][..], true),
            (&["--log", "debug", "bootstrap", "--yes"], true),
            (&["-o", "json", "bootstrap"], true),
            (&["--state-dir=/x", "bootstrap"], true),
            (&["bootstrap", "--help"], false),
            (&["--state-dir", "bootstrap", "ps"], false),
            (&["exec", "demo", "--", "bootstrap"], false),
            (&[], false),
        ] {
            assert_eq!(makes_machine(&words(line)), makes, "{line:?}");
        }
    }
}
