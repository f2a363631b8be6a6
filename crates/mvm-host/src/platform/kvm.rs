//! Whether the machine's KVM runs ordinary guests: the verdict on what was found.
//!
//! A `/dev/kvm` that opens and makes VMs proves little. Inside some clouds' guests it is emulated
//! in software for guests with kernels of their own kind: there an ordinary kernel crawls or dies.
//! So the verdict rests on a tiny guest that was run by `kvm_probe`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much slower than the host a counted loop in the guest may be. Hardware runs both alike; an
/// emulator needs a thousand times longer.
const MAX_SLOWDOWN: u64 = 50;
/// Time that entering and leaving the guest may take in addition, in microseconds: nested
/// virtualization makes that slow, but not the loop.
const ENTRY_ALLOWANCE_US: u64 = 20_000;

/// The device file, from the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// There is none.
    Absent,
    /// It exists but this process cannot open it.
    NotOpenable {
        /// Why.
        problem: String,
    },
    /// It opens for reading and writing.
    Opens,
}

/// The CPU's virtualization extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuExtension {
    /// Intel's.
    Vmx,
    /// AMD's.
    Svm,
    /// None is visible.
    Absent,
    /// This architecture does not announce it as a CPU flag.
    NotAnnounced,
}

/// What happened when a tiny guest was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Probe {
    /// The guest went through real and long mode to its end.
    Finished {
        /// CPU time that the guest's counted loop took, in microseconds.
        guest_us: u64,
        /// CPU time that the same loop took on the host, in microseconds.
        host_us: u64,
        /// A model-specific register that KVM offers to guests but refuses to set.
        refused_msr: Option<u32>,
    },
    /// The guest did not get to its end in time.
    Stalled {
        /// The last stage that it reached.
        reached: Stage,
        /// CPU time that it had, in milliseconds.
        ran_ms: u64,
        /// Time that it was given, in milliseconds.
        limit_ms: u64,
    },
    /// The guest did something else than it should.
    Crashed {
        /// The last stage that it reached.
        reached: Stage,
        /// How it ended.
        exit: String,
    },
    /// KVM refused a step before the guest ran.
    Refused {
        /// The step.
        step: String,
        /// Why.
        problem: String,
    },
    /// A VM with a CPU was made; on this architecture no guest is run in it.
    Created,
}

/// How far the tiny guest came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// It did not begin.
    Start,
    /// It ran in real mode.
    RealMode,
    /// It switched to long mode.
    LongMode,
    /// It counted.
    Loop,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Start => "its start",
            Self::RealMode => "real mode",
            Self::LongMode => "long mode",
            Self::Loop => "the end of its loop",
        })
    }
}

impl Probe {
    /// Whether a second run would say the same. On a machine that was too busy to give the guest
    /// CPU time, it may not.
    pub fn is_conclusive(&self) -> bool {
        match self {
            Self::Stalled { ran_ms, limit_ms, .. } => *ran_ms >= limit_ms / 2,
            _ => true,
        }
    }

    /// What keeps an ordinary guest from running.
    fn obstacles(&self) -> Vec<String> {
        match self {
            Self::Created => Vec::new(),
            Self::Finished { guest_us, host_us, refused_msr } => {
                let mut obstacles = Vec::new();
                if *guest_us > host_us.saturating_mul(MAX_SLOWDOWN) + ENTRY_ALLOWANCE_US {
                    let slowdown = guest_us / (*host_us).max(1);
                    obstacles
                        .push(format!("a test guest ran {slowdown} times slower than the host"));
                }
                if let Some(msr) = refused_msr {
                    obstacles.push(format!("KVM refuses to set MSR {msr:#x}, which it offers"));
                }
                obstacles
            }
            Self::Stalled { reached, ran_ms, limit_ms } => vec![format!(
                "a test guest did not end within {limit_ms} ms ({ran_ms} ms of CPU time) and \
                 reached {reached} only"
            )],
            Self::Crashed { reached, exit } => {
                vec![format!("a test guest that reached {reached} ended with {exit}")]
            }
            Self::Refused { step, problem } => vec![format!("KVM refuses to {step}: {problem}")],
        }
    }
}

/// What was found out about KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmFacts {
    /// `/dev/kvm`.
    pub device: Device,
    /// The CPU's virtualization extension.
    pub extension: CpuExtension,
    /// What a tiny guest did, if one could be tried.
    pub probe: Option<Probe>,
}

/// Whether microVMs can use KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmVerdict {
    /// There is no `/dev/kvm`.
    Absent,
    /// This process may not open it.
    NotOpenable {
        /// Why.
        problem: String,
    },
    /// It opens, but cannot run an ordinary guest.
    Unusable {
        /// Why.
        reason: String,
    },
    /// It ran a guest at the CPU's speed.
    Usable,
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("there is no /dev/kvm"),
            Self::NotOpenable { problem } => write!(f, "/dev/kvm cannot be opened: {problem}"),
            Self::Unusable { reason } => {
                write!(f, "/dev/kvm opens, but cannot run an ordinary guest: {reason}")
            }
            Self::Usable => f.write_str("KVM is usable"),
        }
    }
}

impl KvmFacts {
    /// The verdict.
    pub fn verdict(&self) -> KvmVerdict {
        match &self.device {
            Device::Absent => return KvmVerdict::Absent,
            Device::NotOpenable { problem } => {
                return KvmVerdict::NotOpenable { problem: problem.clone() };
            }
            Device::Opens => {}
        }
        let Some(probe) = &self.probe else {
            return KvmVerdict::Unusable { reason: "no test guest was run".to_owned() };
        };
        let mut obstacles = probe.obstacles();
        if obstacles.is_empty() {
            return KvmVerdict::Usable;
        }
        // Not an obstacle of its own: a hypervisor may hide the flag and still have working KVM.
        if self.extension == CpuExtension::Absent {
            obstacles.push("the CPU shows neither vmx nor svm".to_owned());
        }
        KvmVerdict::Unusable { reason: obstacles.join("; ") }
    }
}

/// The extension that `/proc/cpuinfo` tells of.
pub(super) fn extension_in(cpuinfo: &str) -> CpuExtension {
    let Some(flags) = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")) else {
        return CpuExtension::NotAnnounced;
    };
    let has = |flag| flags.split_ascii_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => CpuExtension::Vmx,
        (_, true) => CpuExtension::Svm,
        _ => CpuExtension::Absent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(extension: CpuExtension, probe: Probe) -> KvmVerdict {
        KvmFacts { device: Device::Opens, extension, probe: Some(probe) }.verdict()
    }

    fn finished(guest_us: u64, host_us: u64, refused_msr: Option<u32>) -> Probe {
        Probe::Finished { guest_us, host_us, refused_msr }
    }

    #[track_caller]
    fn reason(verdict: KvmVerdict) -> String {
        match verdict {
            KvmVerdict::Unusable { reason } => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn hardware_runs_a_guest_at_the_speed_of_the_host() {
        assert_eq!(opened(CpuExtension::Vmx, finished(70, 55, None)), KvmVerdict::Usable);
    }

    #[test]
    fn slow_entry_into_a_nested_guest_is_no_obstacle() {
        assert_eq!(opened(CpuExtension::Svm, finished(15_000, 55, None)), KvmVerdict::Usable);
    }

    #[test]
    fn a_hidden_cpu_flag_alone_is_no_obstacle() {
        assert_eq!(opened(CpuExtension::Absent, finished(70, 55, None)), KvmVerdict::Usable);
        assert_eq!(opened(CpuExtension::NotAnnounced, Probe::Created), KvmVerdict::Usable);
    }

    #[test]
    fn an_emulated_kvm_is_told_with_every_reason() {
        let verdict = opened(CpuExtension::Absent, finished(162_380, 55, Some(0x10a)));
        let expected = "/dev/kvm opens, but cannot run an ordinary guest: a test guest ran 2952 \
                        times slower than the host; KVM refuses to set MSR 0x10a, which it offers; \
                        the CPU shows neither vmx nor svm";
        assert_eq!(verdict.to_string(), expected);
    }

    #[test]
    fn a_refused_register_is_an_obstacle_at_any_speed() {
        let reason = reason(opened(CpuExtension::Vmx, finished(70, 55, Some(0x10a))));
        assert_eq!(reason, "KVM refuses to set MSR 0x10a, which it offers");
    }

    #[test]
    fn stalls_crashes_and_refusals_are_obstacles() {
        let stalled = Probe::Stalled { reached: Stage::RealMode, ran_ms: 690, limit_ms: 700 };
        assert!(reason(opened(CpuExtension::Vmx, stalled)).contains("reached real mode only"));
        let crashed = Probe::Crashed { reached: Stage::LongMode, exit: "Shutdown".into() };
        assert!(reason(opened(CpuExtension::Vmx, crashed)).contains("Shutdown"));
        let refused = Probe::Refused { step: "make a VM".into(), problem: "busy".into() };
        let expected = "KVM refuses to make a VM: busy";
        assert_eq!(reason(opened(CpuExtension::Vmx, refused)), expected);
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_not_judged_by_an_old_probe() {
        let probe = Some(finished(70, 55, None));
        let facts = KvmFacts { device: Device::Absent, extension: CpuExtension::Vmx, probe };
        assert_eq!(facts.verdict(), KvmVerdict::Absent);
        let problem = "permission denied".to_owned();
        let device = Device::NotOpenable { problem: problem.clone() };
        let facts = KvmFacts { device, ..facts };
        assert_eq!(facts.verdict(), KvmVerdict::NotOpenable { problem });
    }

    #[test]
    fn a_stall_on_a_busy_machine_is_not_conclusive() {
        let stalled = |ran_ms| Probe::Stalled { reached: Stage::Start, ran_ms, limit_ms: 700 };
        assert!(!stalled(100).is_conclusive());
        assert!(stalled(650).is_conclusive());
        assert!(finished(1, 1, None).is_conclusive());
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert_eq!(extension_in("flags\t\t: fpu vmx de\n"), CpuExtension::Vmx);
        assert_eq!(extension_in("x: svm\nflags\t\t: fpu svm\n"), CpuExtension::Svm);
        let hidden = "model name: svm\nflags\t\t: fpu svm_lock vmx2\nvmx flags: vnmi\n";
        assert_eq!(extension_in(hidden), CpuExtension::Absent);
        assert_eq!(extension_in("Features\t: fp asimd\n"), CpuExtension::NotAnnounced);
    }
}
