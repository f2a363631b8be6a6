//! Checks of the machine itself: system, CPU, disk and memory.

use super::{AS_ROOT, Check, device_fix};
use crate::platform::choose::choose;
use crate::platform::facts::{Facts, Privilege};
use crate::platform::kvm::{CpuExtension, KvmVerdict};
use crate::platform::system::{Cgroup, Environment};

/// Architectures that have guest kernels and a tested QEMU machine.
const TESTED_ARCH: &str = "x86_64";
const OTHER_ARCH: &str = "aarch64";
/// Below this no image can be built: a base, a kernel and some layers.
const MIN_DISK_MIB: u64 = 1024;
/// Below this a handful of images fills the disk.
const GOOD_DISK_MIB: u64 = 5 * 1024;
/// Below this the host's reserve leaves no room for a guest.
const MIN_MEM_MIB: u64 = 768;
/// Below this only few guests fit.
const GOOD_MEM_MIB: u64 = 2048;

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![
        os(facts),
        root(facts),
        kvm(facts),
        vmm(facts),
        state_dir(facts),
        disk(facts),
        memory(facts),
        cgroup(facts),
    ]
}

fn os(facts: &Facts) -> Check {
    let distribution = facts.distribution.as_deref().unwrap_or("Linux");
    let detail = format!("{distribution}, {}", facts.arch);
    match (facts.arch.as_str(), facts.environment) {
        (TESTED_ARCH, Environment::Machine) => Check::ok("os", detail),
        (TESTED_ARCH, Environment::Wsl) => Check::ok("os", format!("{detail}, in WSL")),
        (TESTED_ARCH | OTHER_ARCH, Environment::Container) => Check::warn(
            "os",
            format!("{detail}, in a container: networks and devices may be out of reach"),
            "run mvm on the container's host, or give the container --privileged --network host",
        ),
        (OTHER_ARCH, _) => Check::warn(
            "os",
            format!("{detail}: not tested on this architecture"),
            format!("for what is tested, use a machine with {TESTED_ARCH}"),
        ),
        _ => Check::fail(
            "os",
            format!("{detail}: mvm has no guests for this architecture"),
            format!("use a machine with {TESTED_ARCH}"),
        ),
    }
}

fn root(facts: &Facts) -> Check {
    match facts.privilege {
        Privilege::Root => Check::ok("root", "the agent can make bridges, taps and firewall rules"),
        Privilege::User => Check::warn(
            "root",
            "not root, as the agent must be to make bridges, taps and firewall rules",
            AS_ROOT,
        ),
    }
}

fn kvm(facts: &Facts) -> Check {
    let verdict = facts.kvm.verdict();
    let detail = verdict.to_string();
    let load = |module| Check::warn("kvm", detail.clone(), format!("sudo modprobe {module}"));
    match (verdict, facts.kvm.extension) {
        (KvmVerdict::Usable, _) => Check::ok("kvm", detail),
        (KvmVerdict::NotOpenable { .. }, _) => {
            Check::warn("kvm", detail, device_fix(facts, "/dev/kvm"))
        }
        (KvmVerdict::Absent, CpuExtension::Vmx) => load("kvm_intel"),
        (KvmVerdict::Absent, CpuExtension::Svm) => load("kvm_amd"),
        // No command helps: guests run in software until the machine is another one.
        (KvmVerdict::Absent, CpuExtension::Absent | CpuExtension::NotAnnounced) => Check::warn(
            "kvm",
            detail,
            "switch on virtualization in the firmware, or nested virtualization in the hypervisor",
        ),
        (KvmVerdict::Unusable { .. }, _) => Check::warn(
            "kvm",
            detail,
            "use a machine with hardware virtualization; to try it anyway: --accel kvm",
        ),
    }
}

fn vmm(facts: &Facts) -> Check {
    match choose(None, None, facts) {
        Ok(choice) => {
            Check::ok("vmm", format!("{} with {}: {}", choice.vmm, choice.accel, choice.why))
        }
        Err(error) => Check::fail("vmm", error.to_string(), "mvm bootstrap"),
    }
}

fn state_dir(facts: &Facts) -> Check {
    let state = &facts.state_dir;
    match &state.problem {
        None => Check::ok("state-dir", format!("{} is writable", state.path.display())),
        Some(problem) => Check::fail(
            "state-dir",
            format!("{}: {problem}", state.path.display()),
            match facts.privilege {
                Privilege::User => AS_ROOT.to_owned(),
                Privilege::Root => {
                    format!("install -d -m 0700 {}", quoted(&state.path.display().to_string()))
                }
            },
        ),
    }
}

fn disk(facts: &Facts) -> Check {
    let Some(free) = facts.state_dir.free_mib else {
        return Check::warn("disk", "free space cannot be told", "df -h");
    };
    let fix = "free some, or keep mvm's state on a larger disk: --state-dir DIR";
    let detail = format!("{free} MiB free for {}", facts.state_dir.path.display());
    match free {
        0..MIN_DISK_MIB => Check::fail("disk", format!("{detail}: too little for an image"), fix),
        MIN_DISK_MIB..GOOD_DISK_MIB => {
            Check::warn("disk", format!("{detail}: few images fit"), fix)
        }
        _ => Check::ok("disk", detail),
    }
}

fn memory(facts: &Facts) -> Check {
    let Some(total) = facts.mem_mib else {
        return Check::warn("memory", "the amount cannot be told", "sudo mount -t proc proc /proc");
    };
    let fix = "use a machine with more memory, or guests with less (`mem_mib`)";
    let detail = format!("{total} MiB");
    match total {
        0..MIN_MEM_MIB => Check::fail("memory", format!("{detail}: no room for a guest"), fix),
        MIN_MEM_MIB..GOOD_MEM_MIB => {
            Check::warn("memory", format!("{detail}: few guests fit"), fix)
        }
        _ => Check::ok("memory", detail),
    }
}

fn cgroup(facts: &Facts) -> Check {
    Check::ok(
        "cgroup",
        match facts.cgroup {
            Cgroup::V2 => "version 2",
            Cgroup::Hybrid => "version 1, with version 2 for naming only",
            Cgroup::V1 => "version 1",
            Cgroup::Absent => "none mounted",
        },
    )
}

/// As an argument of a shell command.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::doctor::Verdict;
    use crate::platform::facts::tests::facts;
    use crate::platform::kvm::{Device, Probe};

    #[track_caller]
    fn assert_check(check: Check, verdict: Verdict, fix: &str) {
        assert_eq!(check.verdict, verdict, "{check:?}");
        assert!(check.fix.as_deref().unwrap_or_default().contains(fix), "{check:?}");
    }

    #[test]
    fn a_missing_kvm_is_a_module_away_if_the_cpu_has_it() {
        let on = |extension| {
            let mut facts = facts();
            facts.kvm.device = Device::Absent;
            facts.kvm.extension = extension;
            kvm(&facts)
        };
        assert_check(on(CpuExtension::Vmx), Verdict::Warn, "sudo modprobe kvm_intel");
        assert_check(on(CpuExtension::Svm), Verdict::Warn, "sudo modprobe kvm_amd");
        assert_check(on(CpuExtension::Absent), Verdict::Warn, "firmware");
    }

    #[test]
    fn a_kvm_that_may_not_be_opened_is_tried_as_root_first() {
        let mut facts = facts();
        facts.kvm.device = Device::NotOpenable { problem: "permission denied".into() };
        assert_check(kvm(&facts), Verdict::Warn, "--device /dev/kvm");
        facts.privilege = Privilege::User;
        assert_check(kvm(&facts), Verdict::Warn, "sudo mvm doctor");
    }

    #[test]
    fn an_emulated_kvm_warns_and_the_choice_says_why() {
        let mut facts = facts();
        let probe = Probe::Finished { guest_us: 160_000, host_us: 50, refused_msr: None };
        facts.kvm.probe = Some(probe);
        assert_check(kvm(&facts), Verdict::Warn, "--accel kvm");
        let choice = vmm(&facts);
        assert_eq!(choice.verdict, Verdict::Ok);
        assert!(choice.detail.starts_with("qemu with tcg: "), "{choice:?}");
        assert!(choice.detail.contains("3200 times slower"), "{choice:?}");
    }

    #[test]
    fn a_user_is_told_that_the_agent_needs_root() {
        let facts = Facts { privilege: Privilege::User, ..facts() };
        assert_check(root(&facts), Verdict::Warn, "sudo");
    }

    #[test]
    fn containers_and_other_architectures_are_told_apart() {
        let on = |arch: &str, environment| {
            os(&Facts { arch: arch.into(), environment, ..facts() }).verdict
        };
        assert_eq!(on("x86_64", Environment::Wsl), Verdict::Ok);
        assert_eq!(on("x86_64", Environment::Container), Verdict::Warn);
        assert_eq!(on("aarch64", Environment::Machine), Verdict::Warn);
        assert_eq!(on("riscv64", Environment::Machine), Verdict::Fail);
        assert_eq!(on("riscv64", Environment::Container), Verdict::Fail);
    }

    #[test]
    fn little_disk_warns_and_too_little_fails() {
        let with = |free_mib| {
            let mut facts = facts();
            facts.state_dir.free_mib = free_mib;
            disk(&facts).verdict
        };
        assert_eq!(with(Some(MIN_DISK_MIB - 1)), Verdict::Fail);
        assert_eq!(with(Some(MIN_DISK_MIB)), Verdict::Warn);
        assert_eq!(with(Some(GOOD_DISK_MIB)), Verdict::Ok);
        assert_eq!(with(None), Verdict::Warn);
    }

    #[test]
    fn little_memory_warns_and_too_little_fails() {
        let with = |mem_mib| memory(&Facts { mem_mib, ..facts() }).verdict;
        assert_eq!(with(Some(MIN_MEM_MIB - 1)), Verdict::Fail);
        assert_eq!(with(Some(MIN_MEM_MIB)), Verdict::Warn);
        assert_eq!(with(Some(GOOD_MEM_MIB)), Verdict::Ok);
        assert_eq!(with(None), Verdict::Warn);
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_is_made_by_a_command_that_survives_spaces() {
        let mut facts = facts();
        facts.state_dir.path = "/srv/it's mine".into();
        facts.state_dir.problem = Some("read-only".into());
        assert_check(state_dir(&facts), Verdict::Fail, r"install -d -m 0700 '/srv/it'\''s mine'");
    }
}
