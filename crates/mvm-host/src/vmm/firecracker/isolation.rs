//! What walls a running Firecracker off, read back from the kernel: what was asked of a jailer is not
//! yet so. Production refuses a microVM that lacks any of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::VmSpec;
use super::{cgroup, jail};

/// How much has to wall a microVM off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The jail, and whatever else the machine and the Firecracker have.
    #[default]
    Available,
    /// The jail, a seccomp filter, and a cgroup with limits: nothing less.
    Production,
}

/// What a process lacks to be walled off in production.
pub(super) fn lacks(pid: u32, spec: &VmSpec) -> Vec<String> {
    let proc = Path::new("/proc").join(pid.to_string());
    let Ok(status) = fs::read_to_string(proc.join("status")) else {
        return vec!["a process that can be looked at".to_owned()];
    };
    let mut lacks: Vec<String> = lacks_in(&status, spec.uid).map(str::to_owned).collect();
    let inode = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    let root = inode(&proc.join("root"));
    if root.is_none() || root != inode(&jail::root_of(spec)) {
        lacks.push("a root directory of its own".to_owned());
    }
    let network = inode(&proc.join("ns/net"));
    if network.is_none() || network == inode(Path::new("/proc/self/ns/net")) {
        lacks.push("a network namespace of its own".to_owned());
    }
    lacks.extend(cgroup::lacks(&proc, spec));
    lacks
}

/// The same, as far as the kernel's description of the process tells.
fn lacks_in(status: &str, uid: u32) -> impl Iterator<Item = &'static str> {
    let value = |name: &str| -> Vec<&str> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|line| line.split_ascii_whitespace().collect()).unwrap_or_default()
    };
    let own = uid.to_string();
    let is_own = |ids: Vec<&str>| ids.len() == 4 && ids.iter().all(|id| *id == own);
    [
        (is_own(value("Uid")) && is_own(value("Gid")), "a user and a group of its own"),
        (value("CapEff") == ["0000000000000000"], "a process without capabilities"),
        (value("NoNewPrivs") == ["1"], "a process that can gain no privileges"),
        (value("NSpid").len() > 1, "a PID namespace of its own"),
        // Filtered, not merely strict.
        (value("Seccomp") == ["2"], "a seccomp filter"),
    ]
    .into_iter()
    .filter_map(|(is_there, what)| (!is_there).then_some(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALLED_OFF: &str = "\
Name:\tfirecracker
Uid:\t70000\t70000\t70000\t70000
Gid:\t70000\t70000\t70000\t70000
NSpid:\t4711\t1
CapEff:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t1
";

    #[test]
    fn each_wall_that_is_missing_is_named() {
        let lacks = |status: &str| lacks_in(status, 70_000).collect::<Vec<_>>();
        assert_eq!(lacks(WALLED_OFF), [""; 0]);
        for (line, without, what) in [
            ("Uid:\t70000\t70000", "Uid:\t70000\t0", "a user and a group of its own"),
            ("Gid:\t70000", "Gid:\t0", "a user and a group of its own"),
            (
                "CapEff:\t0000000000000000",
                "CapEff:\t0000000000001000",
                "a process without capabilities",
            ),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "a process that can gain no privileges"),
            ("NSpid:\t4711\t1", "NSpid:\t4711", "a PID namespace of its own"),
            ("Seccomp:\t2", "Seccomp:\t0", "a seccomp filter"),
        ] {
            assert_eq!(lacks(&WALLED_OFF.replace(line, without)), [what]);
        }
        assert_eq!(lacks("").len(), 5);
    }
}
