//! Which VMM and accelerator run this machine's microVMs, and why: a pure choice.

use mvm_core::vmm::{Accel, VmmKind};

use super::facts::{Facts, Firecracker};
use super::kvm::KvmVerdict;
use super::system::Cgroup;
use crate::vmm::firecracker::{FirecrackerVersion, MINIMUM_VERSION};

/// Why a VMM or accelerator that was asked for cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// Firecracker was asked for, and cannot be used.
    #[error("Firecracker cannot be used: {problem}; use `--vmm qemu`, or none for what works")]
    NoFirecracker {
        /// What is in the way.
        problem: String,
    },
    /// Production was asked for on a machine that lacks what it takes.
    #[error("production needs {}", lacks.join("; and "))]
    NotForProduction {
        /// What it takes.
        lacks: Vec<String>,
    },
    /// KVM was asked for on a machine where it cannot be opened.
    #[error("KVM cannot be used: {verdict}; use `--accel tcg`, or none for the best that works")]
    NoKvm {
        /// What is in the way.
        verdict: String,
    },
}

/// What runs the microVMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The VMM.
    pub vmm: VmmKind,
    /// What executes the guests' instructions.
    pub accel: Accel,
    /// Why, as a sentence fragment for people.
    pub why: String,
}

/// Chooses the VMM and accelerator; what was asked for wins over what seems best.
///
/// # Errors
/// What was asked for cannot work on this machine or in this build.
pub fn choose(
    vmm: Option<VmmKind>,
    accel: Option<Accel>,
    facts: &Facts,
) -> Result<Choice, PlatformError> {
    match vmm {
        Some(VmmKind::Firecracker) => {
            let version = firecracker_version(accel, facts)?;
            let (accel, why) = choose_accel(Some(Accel::Kvm), facts.kvm.verdict())?;
            let why = format!("version {version}, {why}");
            Ok(Choice { vmm: VmmKind::Firecracker, accel, why })
        }
        Some(VmmKind::Sim) => Ok(Choice {
            vmm: VmmKind::Sim,
            accel: accel.unwrap_or(Accel::Tcg),
            why: "requested; nothing real runs".to_owned(),
        }),
        // Not Firecracker, also where it is installed: it has run on emulated processors alone.
        None | Some(VmmKind::Qemu) => qemu(accel, facts),
    }
}

/// Why a VMM that is not the chosen one would run no microVM here, as far as the machine tells.
pub fn obstacle_to(vmm: VmmKind, facts: &Facts) -> Option<String> {
    match (vmm, &facts.firecracker, facts.kvm.verdict()) {
        (VmmKind::Firecracker, Firecracker::Installed { .. }, KvmVerdict::Usable) => None,
        (VmmKind::Firecracker, Firecracker::Installed { .. }, kvm) => Some(kvm.to_string()),
        (VmmKind::Firecracker, Firecracker::Missing, _) => Some(not_installed()),
        (VmmKind::Firecracker, Firecracker::Unfit { problem }, _) => Some(problem.clone()),
        // Whether QEMU is there is seen when it is started.
        (VmmKind::Qemu | VmmKind::Sim, ..) => None,
    }
}

/// Whether microVMs can be walled off here as production has to be, as far as the machine tells.
///
/// # Errors
/// Everything that is in the way.
pub fn for_production(choice: &Choice, facts: &Facts) -> Result<(), PlatformError> {
    let kvm = facts.kvm.verdict();
    let lacks: Vec<String> = [
        (choice.vmm == VmmKind::Firecracker, format!("Firecracker, and {} was chosen", choice.vmm)),
        (kvm == KvmVerdict::Usable, format!("a KVM that works: {kvm}")),
        (facts.cgroup == Cgroup::V2, "a machine whose cgroups are all version 2".to_owned()),
    ]
    .into_iter()
    .filter_map(|(is_there, what)| (!is_there).then_some(what))
    .collect();
    match lacks.is_empty() {
        true => Ok(()),
        false => Err(PlatformError::NotForProduction { lacks }),
    }
}

fn qemu(accel: Option<Accel>, facts: &Facts) -> Result<Choice, PlatformError> {
    let (accel, why) = choose_accel(accel, facts.kvm.verdict())?;
    Ok(Choice { vmm: VmmKind::Qemu, accel, why })
}

/// The installed Firecracker, if it can run guests on what was asked for.
fn firecracker_version(
    accel: Option<Accel>,
    facts: &Facts,
) -> Result<FirecrackerVersion, PlatformError> {
    let refuse = |problem: &str| Err(PlatformError::NoFirecracker { problem: problem.to_owned() });
    match (&facts.firecracker, accel) {
        (_, Some(Accel::Tcg)) => refuse("it runs on KVM alone, and `tcg` was requested"),
        (Firecracker::Missing, _) => refuse(&not_installed()),
        (Firecracker::Unfit { problem }, _) => refuse(problem),
        (Firecracker::Installed { version }, _) => Ok(*version),
    }
}

fn not_installed() -> String {
    format!("it is not installed (`mvm bootstrap --firecracker {MINIMUM_VERSION}` does that)")
}

fn choose_accel(asked: Option<Accel>, kvm: KvmVerdict) -> Result<(Accel, String), PlatformError> {
    let best = if kvm == KvmVerdict::Usable { Accel::Kvm } else { Accel::Tcg };
    match (asked, &kvm) {
        (Some(Accel::Kvm), KvmVerdict::Absent | KvmVerdict::NotOpenable { .. }) => {
            Err(PlatformError::NoKvm { verdict: kvm.to_string() })
        }
        (Some(Accel::Kvm), KvmVerdict::Unusable { .. }) => {
            Ok((Accel::Kvm, format!("requested, although guests are likely to fail: {kvm}")))
        }
        (Some(Accel::Kvm), KvmVerdict::Usable) => Ok((Accel::Kvm, format!("requested; {kvm}"))),
        (Some(Accel::Tcg), _) => Ok((Accel::Tcg, "requested; guests run in software".to_owned())),
        (None, KvmVerdict::Usable) => Ok((best, kvm.to_string())),
        (None, _) => Ok((best, format!("guests run in software, because {kvm}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::facts::tests::facts;
    use crate::platform::kvm::{Device, Probe};

    fn on(device: Device, guest_us: u64) -> Facts {
        let mut facts = facts();
        facts.kvm.device = device;
        facts.kvm.probe = Some(Probe::Finished { guest_us, host_us: 55, refused_msr: None });
        facts
    }

    fn usable() -> Facts {
        on(Device::Opens, 60)
    }

    fn emulated() -> Facts {
        on(Device::Opens, 200_000)
    }

    #[track_caller]
    fn chosen(vmm: Option<VmmKind>, accel: Option<Accel>, facts: &Facts) -> (VmmKind, Accel) {
        let choice = choose(vmm, accel, facts).unwrap();
        assert!(!choice.why.is_empty());
        (choice.vmm, choice.accel)
    }

    #[test]
    fn what_keeps_a_pool_from_the_other_vmm_is_told() {
        let firecracker = |facts: &Facts| obstacle_to(VmmKind::Firecracker, facts);
        assert_eq!(firecracker(&with_firecracker(usable())), None);
        assert!(firecracker(&with_firecracker(emulated())).is_some());
        let missing = Facts { firecracker: Firecracker::Missing, ..usable() };
        assert!(firecracker(&missing).is_some_and(|why| why.contains("mvm bootstrap")));
        let unfit = Firecracker::Unfit { problem: "too old".to_owned() };
        let unfit = Facts { firecracker: unfit, ..usable() };
        assert_eq!(firecracker(&unfit).as_deref(), Some("too old"));
        assert_eq!(obstacle_to(VmmKind::Qemu, &missing), None);
    }

    #[test]
    fn the_best_that_works_is_the_default() {
        for vmm in [None, Some(VmmKind::Qemu)] {
            assert_eq!(chosen(vmm, None, &usable()), (VmmKind::Qemu, Accel::Kvm));
            assert_eq!(chosen(vmm, None, &emulated()), (VmmKind::Qemu, Accel::Tcg));
            assert_eq!(chosen(vmm, None, &on(Device::Absent, 60)), (VmmKind::Qemu, Accel::Tcg));
        }
    }

    #[test]
    fn a_fallback_says_what_was_in_the_way() {
        let why = choose(None, None, &on(Device::Absent, 60)).unwrap().why;
        assert_eq!(why, "guests run in software, because there is no /dev/kvm");
    }

    #[test]
    fn software_may_be_asked_for_where_kvm_works() {
        assert_eq!(chosen(None, Some(Accel::Tcg), &usable()), (VmmKind::Qemu, Accel::Tcg));
    }

    #[test]
    fn kvm_that_opens_may_be_forced_with_a_warning() {
        let choice = choose(None, Some(Accel::Kvm), &emulated()).unwrap();
        assert_eq!(choice.accel, Accel::Kvm);
        assert!(choice.why.contains("likely to fail"), "{}", choice.why);
        assert!(choice.why.contains("times slower"), "{}", choice.why);
    }

    #[test]
    fn kvm_that_does_not_open_cannot_be_forced() {
        let denied = Device::NotOpenable { problem: "permission denied".into() };
        for (device, expected) in [(Device::Absent, "no /dev/kvm"), (denied, "permission denied")] {
            let error = choose(None, Some(Accel::Kvm), &on(device, 60)).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("--accel tcg"), "{error}");
        }
    }

    fn with_firecracker(facts: Facts) -> Facts {
        let version = FirecrackerVersion(1, 15, 1);
        Facts { firecracker: Firecracker::Installed { version }, ..facts }
    }

    #[test]
    fn an_installed_firecracker_runs_what_is_asked_of_it() {
        let facts = with_firecracker(usable());
        for accel in [None, Some(Accel::Kvm)] {
            let asked = chosen(Some(VmmKind::Firecracker), accel, &facts);
            assert_eq!(asked, (VmmKind::Firecracker, Accel::Kvm));
            assert_eq!(chosen(None, accel, &facts), (VmmKind::Qemu, Accel::Kvm));
        }
    }

    #[test]
    fn firecracker_is_refused_with_what_is_in_the_way_and_what_to_use_instead() {
        let refused = |accel, facts: &Facts| {
            let error = choose(Some(VmmKind::Firecracker), accel, facts).unwrap_err();
            error.to_string()
        };
        let missing = refused(None, &usable());
        assert!(missing.contains("not installed") && missing.contains("--vmm qemu"), "{missing}");
        let there = with_firecracker(usable());
        assert!(refused(Some(Accel::Tcg), &there).contains("KVM alone"));
        let no_kvm = refused(None, &with_firecracker(on(Device::Absent, 60)));
        assert!(no_kvm.contains("no /dev/kvm"), "{no_kvm}");
        let unfit = Firecracker::Unfit { problem: "it has a fault".into() };
        assert!(refused(None, &Facts { firecracker: unfit, ..usable() }).contains("a fault"));
    }

    #[test]
    fn production_takes_firecracker_a_kvm_that_works_and_one_cgroup_hierarchy() {
        let lacks = |vmm, facts: &Facts| match for_production(
            &Choice { vmm, accel: Accel::Kvm, why: String::new() },
            facts,
        ) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(lacks(VmmKind::Firecracker, &usable()), "");
        let qemu = lacks(VmmKind::Qemu, &usable());
        assert_eq!(qemu, "production needs Firecracker, and qemu was chosen");
        assert!(lacks(VmmKind::Firecracker, &emulated()).contains("a KVM that works"));
        let hybrid = Facts { cgroup: Cgroup::Hybrid, ..on(Device::Absent, 60) };
        let all = lacks(VmmKind::Qemu, &hybrid);
        for part in ["Firecracker", "no /dev/kvm", "all version 2"] {
            assert!(all.contains(part), "{part} is not in {all}");
        }
    }

    #[test]
    fn the_simulator_runs_only_when_asked_for_and_needs_no_kvm() {
        let absent = on(Device::Absent, 60);
        for accel in [Accel::Kvm, Accel::Tcg] {
            let choice = chosen(Some(VmmKind::Sim), Some(accel), &absent);
            assert_eq!(choice, (VmmKind::Sim, accel));
        }
        assert_eq!(chosen(Some(VmmKind::Sim), None, &absent).0, VmmKind::Sim);
        for facts in [usable(), emulated(), absent] {
            assert_ne!(chosen(None, None, &facts).0, VmmKind::Sim);
        }
    }
}
