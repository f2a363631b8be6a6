//! The host's tools that mvm runs, and how to install the missing ones.
//!
//! On machines with `apt` they are installed; for others the command is given for the user to run.

use super::{BootstrapError, apt};
use crate::image::progress::{OnProgress, Progress};
use crate::process::find_program;

/// A package manager of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackageManager {
    /// Debian, Ubuntu and their relatives.
    Apt,
    /// Fedora and its relatives.
    Dnf,
    /// Arch and its relatives.
    Pacman,
}

impl PackageManager {
    /// The package manager of this machine, if it is a known one.
    pub fn detect() -> Option<Self> {
        let known = [(Self::Apt, "apt-get"), (Self::Dnf, "dnf"), (Self::Pacman, "pacman")];
        known.into_iter().find(|(_, program)| find_program(program).is_some()).map(|(m, _)| m)
    }
}

/// A program that mvm runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Boots microVMs.
    Qemu,
    /// Makes root filesystems.
    MkfsErofs,
    /// Makes writable layers.
    Mke2fs,
    /// Sets the firewall.
    Nft,
    /// Lists what kernel modules need and offer, for those that guests may load.
    Depmod,
    /// Makes Debian systems, for the images that are one.
    Mmdebstrap,
}

impl Program {
    /// Every program that mvm needs, whatever the images.
    pub const NEEDED: [Self; 5] =
        [Self::Qemu, Self::MkfsErofs, Self::Mke2fs, Self::Nft, Self::Depmod];
    /// Those, and what some images need.
    pub const ALL: [Self; 6] =
        [Self::Qemu, Self::MkfsErofs, Self::Mke2fs, Self::Nft, Self::Depmod, Self::Mmdebstrap];

    /// The name of the executable.
    pub fn executable(self) -> &'static str {
        match self {
            Self::Qemu if cfg!(target_arch = "aarch64") => "qemu-system-aarch64",
            Self::Qemu => "qemu-system-x86_64",
            Self::MkfsErofs => "mkfs.erofs",
            Self::Mke2fs => "mke2fs",
            Self::Nft => "nft",
            Self::Depmod => "depmod",
            Self::Mmdebstrap => "mmdebstrap",
        }
    }

    /// The package that holds it.
    pub fn package(self, manager: PackageManager) -> &'static str {
        match (self, manager) {
            (Self::Qemu, PackageManager::Apt) if cfg!(target_arch = "aarch64") => "qemu-system-arm",
            (Self::Qemu, PackageManager::Apt) => "qemu-system-x86",
            (Self::Qemu, PackageManager::Dnf) if cfg!(target_arch = "aarch64") => {
                "qemu-system-aarch64-core"
            }
            (Self::Qemu, PackageManager::Dnf) => "qemu-system-x86-core",
            (Self::Qemu, PackageManager::Pacman) if cfg!(target_arch = "aarch64") => {
                "qemu-system-aarch64"
            }
            (Self::Qemu, PackageManager::Pacman) => "qemu-system-x86",
            (Self::MkfsErofs, _) => "erofs-utils",
            (Self::Mke2fs, _) => "e2fsprogs",
            (Self::Nft, _) => "nftables",
            (Self::Depmod, _) => "kmod",
            (Self::Mmdebstrap, _) => "mmdebstrap",
        }
    }
}

/// Those of these programs that this machine lacks.
pub fn missing_programs(wanted: &[Program]) -> Vec<Program> {
    let lacks = |program: &Program| find_program(program.executable()).is_none();
    wanted.iter().copied().filter(lacks).collect()
}

/// Whether the package lists know the wanted packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackageLists {
    /// They do.
    Complete,
    /// There are none yet, or they lack a wanted package.
    Stale,
}

/// One thing to do to install packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Refresh the package lists.
    Refresh,
    /// Install these packages.
    Install(Vec<&'static str>),
}

impl Step {
    /// The command that a user would type, as its arguments.
    pub fn command(&self, manager: PackageManager) -> Vec<&'static str> {
        match (manager, self) {
            (PackageManager::Apt, Self::Refresh) => vec!["apt-get", "update"],
            (PackageManager::Dnf, Self::Refresh) => vec!["dnf", "makecache"],
            (PackageManager::Pacman, Self::Refresh) => vec!["pacman", "-Sy"],
            (_, Self::Install(packages)) => {
                let start: &[&str] = match manager {
                    // Recommended packages of QEMU are a desktop's worth of libraries.
                    PackageManager::Apt => &["apt-get", "install", "-y", "--no-install-recommends"],
                    PackageManager::Dnf => {
                        &["dnf", "install", "-y", "--setopt=install_weak_deps=False"]
                    }
                    PackageManager::Pacman => &["pacman", "-S", "--needed", "--noconfirm"],
                };
                [start, packages].concat()
            }
        }
    }
}

/// What to do so that the missing programs are there: nothing if none is missing.
pub fn plan(manager: PackageManager, missing: &[Program], lists: PackageLists) -> Vec<Step> {
    let mut packages: Vec<_> = missing.iter().map(|program| program.package(manager)).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Vec::new();
    }
    let refresh = (lists == PackageLists::Stale).then_some(Step::Refresh);
    refresh.into_iter().chain([Step::Install(packages)]).collect()
}

/// What [`ensure_installed`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackagesReport {
    /// Programs that were there.
    pub already_there: Vec<Program>,
    /// Packages that were installed now.
    pub installed: Vec<&'static str>,
}

/// Installs the packages of those of these programs that are missing.
///
/// # Errors
/// The installation fails, or this machine's package manager is not one that mvm drives: then the
/// error has the command to run.
pub async fn ensure_installed(
    wanted: &[Program],
    progress: OnProgress<'_>,
) -> Result<PackagesReport, BootstrapError> {
    let missing = missing_programs(wanted);
    let there = |program: &Program| !missing.contains(program);
    let already_there = wanted.iter().copied().filter(there).collect();
    if missing.is_empty() {
        return Ok(PackagesReport { already_there, installed: Vec::new() });
    }
    let manager = PackageManager::detect();
    if manager != Some(PackageManager::Apt) {
        return Err(by_hand(manager, &missing));
    }
    let mut installed = Vec::new();
    for step in plan(PackageManager::Apt, &missing, lists_for(&missing).await?) {
        match step {
            Step::Refresh => apt::update(progress).await?,
            Step::Install(packages) => {
                install(&packages, progress).await?;
                installed.extend(packages);
            }
        }
    }
    match missing_programs(wanted) {
        still if still.is_empty() => Ok(PackagesReport { already_there, installed }),
        still => Err(by_hand(manager, &still)),
    }
}

async fn lists_for(missing: &[Program]) -> Result<PackageLists, BootstrapError> {
    for program in missing {
        if apt::candidate(program.package(PackageManager::Apt)).await?.is_none() {
            return Ok(PackageLists::Stale);
        }
    }
    Ok(PackageLists::Complete)
}

async fn install(packages: &[&str], progress: OnProgress<'_>) -> Result<(), BootstrapError> {
    progress(Progress::Began(format!("installing {}", packages.join(", "))));
    let options = ["Dpkg::Options::=--force-confdef", "Dpkg::Options::=--force-confold"];
    let tool = apt::apt_get()
        .env("APT_LISTCHANGES_FRONTEND", "none")
        .env("NEEDRESTART_SUSPEND", "1")
        .args(options.iter().flat_map(|option| ["-o", option]))
        .args(["install", "-y", "--no-install-recommends", "--"])
        .args(packages);
    let report = |line: &str| {
        if let Some(percent) = apt::percent(line) {
            progress(Progress::Percent(percent));
        }
    };
    tool.run_with(report).await?;
    progress(Progress::Ended);
    Ok(())
}

/// What to say where a program is missed that nobody may be asked about: `mvm bootstrap` asks.
pub(crate) fn not_installed(program: Program) -> BootstrapError {
    match PackageManager::detect() {
        Some(PackageManager::Apt) => BootstrapError::InstallByHand {
            programs: program.executable().to_owned(),
            command: "mvm bootstrap".to_owned(),
        },
        manager => by_hand(manager, &[program]),
    }
}

fn by_hand(manager: Option<PackageManager>, missing: &[Program]) -> BootstrapError {
    let names: Vec<_> = missing.iter().map(|program| program.executable()).collect();
    let command = match manager {
        Some(manager) => {
            let steps = plan(manager, missing, PackageLists::Complete);
            let commands: Vec<_> = steps.iter().map(|s| s.command(manager).join(" ")).collect();
            commands.join(" && ")
        }
        None => format!("your package manager, to install {}", names.join(", ")),
    };
    BootstrapError::InstallByHand { programs: names.join(", "), command }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_missing_means_nothing_to_do() {
        for lists in [PackageLists::Complete, PackageLists::Stale] {
            assert_eq!(plan(PackageManager::Apt, &[], lists), []);
        }
    }

    #[test]
    fn only_what_is_missing_is_installed() {
        let steps =
            plan(PackageManager::Apt, &[Program::Nft, Program::MkfsErofs], PackageLists::Complete);
        assert_eq!(steps, [Step::Install(vec!["erofs-utils", "nftables"])]);
        let expected = "apt-get install -y --no-install-recommends erofs-utils nftables";
        assert_eq!(steps[0].command(PackageManager::Apt).join(" "), expected);
    }

    #[test]
    fn stale_lists_are_refreshed_first() {
        let steps = plan(PackageManager::Apt, &[Program::Nft], PackageLists::Stale);
        assert_eq!(steps, [Step::Refresh, Step::Install(vec!["nftables"])]);
    }

    #[test]
    fn other_distributions_get_a_command_to_run() {
        let error = by_hand(Some(PackageManager::Pacman), &[Program::Nft]);
        let expected = "nft not installed; run: pacman -S --needed --noconfirm nftables";
        assert_eq!(error.to_string(), expected);
    }
}
