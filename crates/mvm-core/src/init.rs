//! Which programs are process 1, and of what.
//!
//! The guest agent is process 1 of a microVM, collects orphans and forwards signals, so that most
//! programs need not care. Two kinds do: a program that boots a whole system, and a supervisor
//! that was written to be a container's first process and refuses to be any other. They are known by
//! their names, and by those of what a link leads to.

use std::fmt;
use std::str::FromStr;

/// Directories whose `init` boots the machine; anywhere else the name is one of many programs'.
const SYSTEM_DIRS: [&str; 4] = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"];
/// Programs that boot a system, by their file names.
const SYSTEMS: [&str; 4] = ["systemd", "openrc-init", "runit-init", "runit"];
/// Programs that are written to be a container's first process, by their file names. `init` is
/// s6-overlay's, and what people call their own.
const FIRST: [&str; 9] = [
    "init",
    "tini",
    "tini-static",
    "docker-init",
    "dumb-init",
    "catatonit",
    "my_init",
    "s6-svscan",
    "pid1",
];

/// Whether a main process is process 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InitMode {
    /// It is an ordinary process under the guest agent.
    None,
    /// It is process 1 of a process namespace, as in a container: it sees itself and what it starts,
    /// and its end is that of all of them.
    Program,
    /// It is the machine's process 1, with the guest agent beside it: it boots a system, and ends by
    /// switching the machine off.
    System,
}

impl FromStr for InitMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "program" => Ok(Self::Program),
            "system" => Ok(Self::System),
            _ => Err(format!(
                "`{text}` is not a kind of init: expected none, program or system (the guest agent \
                 collects orphans and forwards signals whatever it is)"
            )),
        }
    }
}

impl fmt::Display for InitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Program => "program",
            Self::System => "system",
        })
    }
}

crate::serde_as_text!(InitMode);

impl InitMode {
    /// What a command is by its name, for those who say nothing about it.
    pub fn of<T: AsRef<str>>(argv: &[T]) -> Self {
        let Some(program) = argv.first().map(AsRef::as_ref) else { return Self::None };
        let (dir, name) = match program.rsplit_once('/') {
            Some((dir, name)) => (Some(dir), name),
            None => (None, program),
        };
        let is_system = SYSTEMS.contains(&name)
            || (name == "init" && dir.is_none_or(|dir| SYSTEM_DIRS.contains(&dir)))
            || (name == "busybox" && argv.get(1).is_some_and(|applet| applet.as_ref() == "init"));
        if is_system {
            Self::System
        } else if FIRST.contains(&name) {
            Self::Program
        } else {
            Self::None
        }
    }

    /// What a program is by all of its names: a link's, those of the links that it leads to, and at last
    /// the file's.
    pub fn behind<T: AsRef<str>>(names: &[T]) -> Self {
        let kinds = || names.iter().map(|name| (name.as_ref(), Self::of(&[name])));
        // Of many programs `init` is but a nickname: any other name says more, the last one most.
        let is_named =
            |(name, kind): &(&str, Self)| *kind != Self::None && !name.ends_with("/init");
        let named = kinds().rev().find(is_named).map(|(_, kind)| kind);
        named.or_else(|| kinds().map(|(_, kind)| kind).max()).unwrap_or(Self::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_boot_a_system_are_the_machines_process_1() {
        for command in [
            "/sbin/init",
            "/usr/sbin/init --unit=rescue.target",
            "init",
            "/lib/systemd/systemd --log-target=console",
            "systemd",
            "runit",
            "/usr/sbin/runit-init",
            "/sbin/openrc-init",
            "/bin/busybox init",
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            assert_eq!(InitMode::of(&words), InitMode::System, "{command}");
        }
    }

    #[test]
    fn supervisors_of_containers_are_process_1_of_a_namespace_and_others_are_not() {
        for command in ["/init", "/app/init run", "./init", "tini -- nginx", "/usr/bin/dumb-init a"]
        {
            let words: Vec<&str> = command.split(' ').collect();
            assert_eq!(InitMode::of(&words), InitMode::Program, "{command}");
        }
        for command in
            ["/entry /sbin/init", "sh -c init", "/bin/busybox sh", "/init/run", "runsvdir"]
        {
            let words: Vec<&str> = command.split(' ').collect();
            assert_eq!(InitMode::of(&words), InitMode::None, "{command}");
        }
        assert_eq!(InitMode::of::<&str>(&[]), InitMode::None);
    }

    #[test]
    fn behind_a_link_the_most_telling_name_counts() {
        for (names, mode) in [
            ("/init /lib/systemd/systemd", InitMode::System),
            ("/sbin/init /usr/bin/tini", InitMode::Program),
            ("/sbin/init /bin/busybox", InitMode::System),
            ("/entry /sbin/init /lib/sysvinit/init", InitMode::System),
            ("/init /etc/s6/init", InitMode::Program),
            ("/bin/sh /bin/dash", InitMode::None),
        ] {
            let words: Vec<&str> = names.split(' ').collect();
            assert_eq!(InitMode::behind(&words), mode, "{names}");
        }
    }

    #[test]
    fn a_mode_is_written_as_it_is_read() {
        for mode in [InitMode::None, InitMode::Program, InitMode::System] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("nginx".parse::<InitMode>().unwrap_err().contains("expected none, program or"));
    }
}
