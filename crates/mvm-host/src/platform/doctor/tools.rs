//! Checks of the programs that mvm runs, and of the kernel that it boots.

use super::Check;
use crate::bootstrap::packages::{PackageManager, Program, Step};
use crate::platform::facts::{Facts, Firecracker, GuestKernel, Qemu};
use crate::vmm::firecracker::MINIMUM_VERSION;

/// The oldest QEMU whose snapshots and `microvm` machine are known to work.
const MIN_QEMU: (u32, u32) = (7, 2);
const BOOTSTRAP: &str = "sudo mvm bootstrap";
const IMPORT: &str = "sudo mvm bootstrap --kernel VMLINUZ --modules /lib/modules/RELEASE";

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![
        qemu(facts),
        firecracker(facts),
        program("mkfs.erofs", Program::MkfsErofs, facts),
        program("mke2fs", Program::Mke2fs, facts),
        program("nft", Program::Nft, facts),
        program("depmod", Program::Depmod, facts),
        mmdebstrap(facts),
        apt(facts),
        guest_kernel(facts),
    ]
}

fn qemu(facts: &Facts) -> Check {
    match &facts.qemu {
        Qemu::Installed { version: (major, minor) } if (*major, *minor) >= MIN_QEMU => {
            Check::ok("qemu", format!("{} {major}.{minor}", Program::Qemu.executable()))
        }
        Qemu::Installed { version: (major, minor) } => Check::fail(
            "qemu",
            format!("version {major}.{minor} is too old: {}.{} is needed", MIN_QEMU.0, MIN_QEMU.1),
            upgrade(facts),
        ),
        Qemu::Broken { problem } => Check::fail("qemu", problem, upgrade(facts)),
        Qemu::Missing => program("qemu", Program::Qemu, facts),
    }
}

/// Nothing is amiss without it.
fn firecracker(facts: &Facts) -> Check {
    match &facts.firecracker {
        Firecracker::Installed { version } => {
            Check::ok("firecracker", format!("version {version}, with its jailer"))
        }
        Firecracker::Missing => Check::ok("firecracker", "not installed; QEMU is used"),
        Firecracker::Unfit { problem } => Check::warn(
            "firecracker",
            problem,
            format!("sudo mvm bootstrap --firecracker {MINIMUM_VERSION}; QEMU is used until then"),
        ),
    }
}

/// Installing is what `mvm bootstrap` does where it can; elsewhere the user types it.
fn install(program: Program, facts: &Facts) -> String {
    match facts.package_manager {
        Some(PackageManager::Apt) => BOOTSTRAP.to_owned(),
        Some(manager) => {
            let step = Step::Install(vec![program.package(manager)]);
            format!("sudo {}", step.command(manager).join(" "))
        }
        None => format!("install the package that has {}", program.executable()),
    }
}

fn upgrade(facts: &Facts) -> String {
    match facts.package_manager {
        // It is installed, so bootstrap would leave it alone.
        Some(PackageManager::Apt) => format!(
            "sudo apt-get update && sudo apt-get install --no-install-recommends {}",
            Program::Qemu.package(PackageManager::Apt)
        ),
        Some(PackageManager::Dnf) => {
            format!("sudo dnf upgrade -y {}", Program::Qemu.package(PackageManager::Dnf))
        }
        Some(PackageManager::Pacman) => {
            format!("sudo pacman -Syu {}", Program::Qemu.package(PackageManager::Pacman))
        }
        None => format!("install QEMU {}.{} or later", MIN_QEMU.0, MIN_QEMU.1),
    }
}

fn program(name: &'static str, program: Program, facts: &Facts) -> Check {
    match facts.missing.contains(&program) {
        false => Check::ok(name, "installed"),
        true => Check::fail(name, "not installed", install(program, facts)),
    }
}

/// Nothing but images of Debian systems needs it.
fn mmdebstrap(facts: &Facts) -> Check {
    let (name, program) = ("mmdebstrap", Program::Mmdebstrap);
    match facts.missing.contains(&program) {
        false => Check::ok(name, "installed"),
        true => Check::warn(
            name,
            "not installed: Debian systems (`--debian`) cannot be made",
            install(program, facts),
        ),
    }
}

fn apt(facts: &Facts) -> Check {
    match facts.package_manager {
        Some(PackageManager::Apt) => Check::ok("apt", "packages and guest kernels can be fetched"),
        Some(PackageManager::Dnf | PackageManager::Pacman) | None => Check::warn(
            "apt",
            "no `apt-get`: guest kernels cannot be fetched, only imported",
            IMPORT,
        ),
    }
}

fn guest_kernel(facts: &Facts) -> Check {
    let fix = match facts.package_manager {
        Some(PackageManager::Apt) => BOOTSTRAP,
        Some(PackageManager::Dnf | PackageManager::Pacman) | None => IMPORT,
    };
    match &facts.guest_kernel {
        GuestKernel::Installed { id, lacks_modules: true } => Check::warn(
            "guest-kernel",
            format!("{id} was stored by an earlier mvm: guests cannot load its modules"),
            format!("{fix}, then `mvm pool build` for pools that are there"),
        ),
        GuestKernel::Installed { id, .. } => Check::ok("guest-kernel", id),
        GuestKernel::Missing => Check::fail("guest-kernel", "none fetched yet", fix),
        GuestKernel::Damaged { problem } => Check::fail("guest-kernel", problem, fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::doctor::Verdict;
    use crate::platform::facts::tests::facts;

    #[track_caller]
    fn assert_fails(check: Check, fix: &str) {
        assert_eq!((check.verdict, check.fix.as_deref()), (Verdict::Fail, Some(fix)), "{check:?}");
    }

    #[test]
    fn each_missing_program_is_a_check_that_bootstrap_mends() {
        let facts = Facts { missing: Program::ALL.to_vec(), qemu: Qemu::Missing, ..facts() };
        for name in ["qemu", "mkfs.erofs", "mke2fs", "nft", "depmod"] {
            let check = checks(&facts).into_iter().find(|check| check.name == name);
            assert_fails(check.unwrap(), "sudo mvm bootstrap");
        }
        let optional = mmdebstrap(&facts);
        let expected = (Verdict::Warn, Some("sudo mvm bootstrap"));
        assert_eq!((optional.verdict, optional.fix.as_deref()), expected);
    }

    #[test]
    fn other_distributions_get_their_own_command() {
        let missing = vec![Program::Nft];
        let package_manager = Some(PackageManager::Pacman);
        let facts = Facts { missing, package_manager, ..facts() };
        let fix = "sudo pacman -S --needed --noconfirm nftables";
        assert_fails(program("nft", Program::Nft, &facts), fix);
    }

    #[test]
    fn an_old_qemu_is_upgraded_and_a_newer_one_is_fine() {
        let with = |version| qemu(&Facts { qemu: Qemu::Installed { version }, ..facts() });
        for version in [(7, 2), (7, 10), (10, 0)] {
            assert_eq!(with(version).verdict, Verdict::Ok, "{version:?}");
        }
        for version in [(7, 1), (6, 9)] {
            let check = with(version);
            assert_eq!(check.verdict, Verdict::Fail, "{version:?}");
            assert!(check.fix.unwrap().contains("apt-get install"), "{version:?}");
        }
    }

    #[test]
    fn a_broken_qemu_says_what_it_said() {
        let problem = "error while loading shared libraries".to_owned();
        let check = qemu(&Facts { qemu: Qemu::Broken { problem: problem.clone() }, ..facts() });
        assert_eq!((check.verdict, check.detail), (Verdict::Fail, problem));
    }

    #[test]
    fn a_firecracker_that_cannot_be_used_is_a_warning_and_none_is_not() {
        let with = |firecracker| self::firecracker(&Facts { firecracker, ..facts() });
        assert_eq!(with(Firecracker::Missing).verdict, Verdict::Ok);
        let unfit = with(Firecracker::Unfit { problem: "no jailer".into() });
        assert_eq!((unfit.verdict, unfit.detail.as_str()), (Verdict::Warn, "no jailer"));
        let version = crate::vmm::firecracker::FirecrackerVersion(1, 15, 1);
        let installed = with(Firecracker::Installed { version });
        assert_eq!(installed.detail, "version 1.15.1, with its jailer");
    }

    #[test]
    fn a_guest_kernel_is_fetched_with_apt_and_imported_without() {
        let facts = Facts { guest_kernel: GuestKernel::Missing, ..facts() };
        assert_fails(guest_kernel(&facts), BOOTSTRAP);
        let facts = Facts { package_manager: None, ..facts };
        assert_fails(guest_kernel(&facts), IMPORT);
        assert_eq!(apt(&facts).verdict, Verdict::Warn);
    }

    #[test]
    fn a_guest_kernel_without_its_modules_is_a_warning() {
        let with = |lacks_modules| {
            let kernel = GuestKernel::Installed { id: "k-1".into(), lacks_modules };
            guest_kernel(&Facts { guest_kernel: kernel, ..facts() }).verdict
        };
        assert_eq!((with(false), with(true)), (Verdict::Ok, Verdict::Warn));
    }
}
