//! `mvm doctor`: what is well on this machine, what is in the way, and what to type about it.
//!
//! A pure function of the facts. The order and names of the checks are stable, for programs; each
//! check that fails has a fix.

mod host;
mod network;
mod tools;

use serde::Serialize;

use super::facts::{Facts, Os, Privilege};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is in the way.
    Ok,
    /// mvm works, but not as well as it could or not for everything.
    Warn,
    /// mvm cannot run microVMs until this is mended.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// A stable name, for programs and for people to talk about.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What mends it, as a command to type where there is one.
    pub fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, detail: detail.into(), fix: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }
}

/// What to type when a check could see no more because the command did not run as root.
const AS_ROOT: &str = "sudo mvm doctor";

/// What makes a device file usable: as root, only a container or a policy stands in the way.
fn device_fix(facts: &Facts, device: &str) -> String {
    match facts.privilege {
        Privilege::User => AS_ROOT.to_owned(),
        Privilege::Root => format!("start this container with --device {device}"),
    }
}

/// Judges the machine.
pub fn doctor(facts: &Facts) -> Vec<Check> {
    if facts.os == Os::MacOs {
        return vec![Check::fail(
            "os",
            "macOS has no KVM, taps or nftables: mvm runs inside a Linux VM made by Lima here",
            "limactl start template://debian-12 && limactl shell debian-12",
        )];
    }
    [host::checks(facts), tools::checks(facts), network::checks(facts)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::facts::tests::facts;

    /// A change of these names breaks programs that read them.
    const NAMES: [&str; 25] = [
        "os",
        "root",
        "kvm",
        "vmm",
        "state-dir",
        "disk",
        "memory",
        "cgroup",
        "qemu",
        "firecracker",
        "mkfs.erofs",
        "mke2fs",
        "nft",
        "depmod",
        "mmdebstrap",
        "apt",
        "guest-kernel",
        "tun",
        "bridge",
        "nf_tables",
        "ip-forward",
        "firewall",
        "names",
        "subnets",
        "leftovers",
    ];

    #[test]
    fn a_good_machine_has_nothing_to_mend() {
        for check in doctor(&facts()) {
            assert_eq!((check.verdict, &check.fix), (Verdict::Ok, &None), "{check:?}");
        }
    }

    #[test]
    fn names_and_order_are_stable() {
        let names: Vec<_> = doctor(&facts()).iter().map(|check| check.name).collect();
        assert_eq!(names, NAMES);
    }

    #[test]
    fn macos_is_told_where_mvm_runs() {
        let checks = doctor(&Facts { os: Os::MacOs, ..facts() });
        assert_eq!(checks.len(), 1);
        assert!(checks[0].detail.contains("Lima"));
    }

    #[test]
    fn programs_get_words() {
        let check = Check::warn("kvm", "slow", "do this");
        let expected = serde_json::json!({
            "name": "kvm", "verdict": "warn", "detail": "slow", "fix": "do this",
        });
        assert_eq!(serde_json::to_value(check).unwrap(), expected);
    }
}
