//! What was found on the machine: gathered once by a thin shell, judged by pure functions.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::firewall::{self, Forwarding, InputDrop};
use super::kvm::{self, Device, KvmFacts};
use super::node::meminfo_kib;
use super::probe_cache;
use super::system::{self, Cgroup, Environment, EnvironmentSigns, KernelFeature, KernelFiles};
use crate::bootstrap::KernelStore;
use crate::bootstrap::packages::{PackageManager, Program, missing_programs};
use crate::net::{self, Conflict, Orphan, ResolvConf};
use crate::process::{Tool, find_program};
use crate::state_dir::StateDir;
use crate::vmm::VmmError;
use crate::vmm::firecracker::{self, FirecrackerConfig, FirecrackerVersion, FirecrackerVmm};

/// How long `qemu --version` may take.
const QEMU_LIMIT: Duration = Duration::from_secs(20);

/// An operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Os {
    /// Linux.
    Linux,
    /// macOS, where mvm runs inside a Linux VM.
    MacOs,
}

/// The user that this process acts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// The superuser.
    Root,
    /// Anyone else.
    User,
}

/// What was found of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Qemu {
    /// It is not installed.
    Missing,
    /// It does not tell its version.
    Broken {
        /// What happened instead.
        problem: String,
    },
    /// It is there.
    Installed {
        /// Its major and minor version.
        version: (u32, u32),
    },
}

/// What was found of Firecracker and its jailer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firecracker {
    /// It is not installed, which is no fault: QEMU does as well.
    Missing,
    /// It is there and cannot be used.
    Unfit {
        /// Why.
        problem: String,
    },
    /// It is there.
    Installed {
        /// Its version.
        version: FirecrackerVersion,
    },
}

/// IPv4 forwarding of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpForward {
    /// It is on.
    On,
    /// It is off, and this process may switch it on.
    Off,
    /// It is off, and this process cannot change it.
    Locked,
    /// The kernel does not tell.
    Unknown,
}

/// The directory for mvm's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDirFacts {
    /// Its path.
    pub path: PathBuf,
    /// Why it cannot be written or made, if so.
    pub problem: Option<String>,
    /// Free space for it in MiB, if it can be told.
    pub free_mib: Option<u64>,
}

/// What was found of the guest kernel that new images use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestKernel {
    /// None was fetched yet.
    Missing,
    /// It cannot be used.
    Damaged {
        /// Why.
        problem: String,
    },
    /// It is there.
    Installed {
        /// Its id.
        id: String,
        /// Whether it was stored without the modules that guests may load.
        lacks_modules: bool,
    },
}

/// The machine as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The operating system.
    pub os: Os,
    /// The CPU architecture, as Rust names it.
    pub arch: String,
    /// The distribution's name for people.
    pub distribution: Option<String>,
    /// What the system runs in.
    pub environment: Environment,
    /// The user.
    pub privilege: Privilege,
    /// KVM.
    pub kvm: KvmFacts,
    /// The programs that are not installed.
    pub missing: Vec<Program>,
    /// The machine's package manager, if it is a known one.
    pub package_manager: Option<PackageManager>,
    /// QEMU.
    pub qemu: Qemu,
    /// Firecracker.
    pub firecracker: Firecracker,
    /// `/dev/net/tun`.
    pub tun: Device,
    /// Bridges in the kernel.
    pub bridge: KernelFeature,
    /// nftables in the kernel.
    pub nf_tables: KernelFeature,
    /// IPv4 forwarding.
    pub ip_forward: IpForward,
    /// Other software's firewall.
    pub forwarding: Forwarding,
    /// Other software's chains that keep guests from asking for names.
    pub input_drops: Vec<InputDrop>,
    /// The machine's own resolver.
    pub resolver: ResolvConf,
    /// Tenants' subnets that the machine has come to reach by other links; none where it cannot be told.
    pub route_conflicts: Vec<Conflict>,
    /// What state directories that are gone have left; nothing where it cannot be told.
    pub orphans: Vec<Orphan>,
    /// The state directory.
    pub state_dir: StateDirFacts,
    /// Memory in MiB, if it can be told.
    pub mem_mib: Option<u64>,
    /// Control groups.
    pub cgroup: Cgroup,
    /// The guest kernel.
    pub guest_kernel: GuestKernel,
}

/// Looks at the machine. A fact that cannot be had is a fact of its own, so this never fails.
///
/// The first call after a boot runs a tiny guest, which takes less than a second; the result is
/// kept in the state directory if that exists.
pub async fn gather(state_dir: &StateDir) -> Facts {
    let kernel = KernelFiles::read();
    let forwarding = firewall::gather().await;
    let nf_tables = match &forwarding {
        // Listing them is proof.
        Forwarding::Open | Forwarding::Dropped(_) => KernelFeature::Present,
        Forwarding::Unknown { .. } => kernel.feature("nf_tables", "CONFIG_NF_TABLES"),
    };
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Facts {
        os: if cfg!(target_os = "macos") { Os::MacOs } else { Os::Linux },
        arch: std::env::consts::ARCH.to_owned(),
        distribution: system::read_distribution(),
        environment: EnvironmentSigns::read().environment(),
        privilege: match rustix::process::geteuid().is_root() {
            true => Privilege::Root,
            false => Privilege::User,
        },
        kvm: gather_kvm(state_dir).await,
        missing: missing_programs(&Program::ALL),
        package_manager: PackageManager::detect(),
        qemu: gather_qemu().await,
        firecracker: gather_firecracker(state_dir).await,
        tun: device("/dev/net/tun"),
        bridge: kernel.feature("bridge", "CONFIG_BRIDGE"),
        nf_tables,
        ip_forward: gather_ip_forward(Path::new("/proc/sys/net/ipv4/ip_forward")),
        forwarding,
        input_drops: firewall::input_drops().await,
        resolver: net::read_resolv_conf(Path::new(net::RESOLV_CONF)).unwrap_or_default(),
        route_conflicts: net::route_conflicts().await.unwrap_or_default(),
        orphans: net::orphans().await.unwrap_or_default(),
        state_dir: gather_state_dir(state_dir),
        mem_mib: meminfo_kib(&meminfo, "MemTotal").map(|kib| kib / 1024),
        cgroup: system::cgroup(Path::new("/sys/fs/cgroup")),
        guest_kernel: gather_kernel(state_dir),
    }
}

async fn gather_kvm(state_dir: &StateDir) -> KvmFacts {
    let device = device("/dev/kvm");
    let probe = match device {
        Device::Opens => {
            let state_dir = state_dir.clone();
            tokio::task::spawn_blocking(move || probe_cache::probe(&state_dir)).await.ok()
        }
        Device::Absent | Device::NotOpenable { .. } => None,
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    KvmFacts { device, extension: kvm::extension_in(&cpuinfo), probe }
}

fn device(path: &str) -> Device {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Device::Opens,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Device::Absent,
        Err(error) => Device::NotOpenable { problem: error.to_string() },
    }
}

async fn gather_qemu() -> Qemu {
    let Some(program) = find_program(Program::Qemu.executable()) else {
        return Qemu::Missing;
    };
    match Tool::new(&program).arg("--version").within(QEMU_LIMIT).run().await {
        Ok(text) => match qemu_version(&text) {
            Some(version) => Qemu::Installed { version },
            None => Qemu::Broken {
                problem: format!("it answers `{}`", text.lines().next().unwrap_or_default()),
            },
        },
        Err(error) => Qemu::Broken { problem: error.to_string() },
    }
}

async fn gather_firecracker(state_dir: &StateDir) -> Firecracker {
    match FirecrackerVmm::new(FirecrackerConfig::of(state_dir)).version().await {
        Ok(version) => Firecracker::Installed { version },
        Err(VmmError::MissingProgram { program }) if program == firecracker::PROGRAM => {
            Firecracker::Missing
        }
        Err(error) => Firecracker::Unfit { problem: error.to_string() },
    }
}

/// The version in `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn qemu_version(text: &str) -> Option<(u32, u32)> {
    let (_, after) = text.split_once(" version ")?;
    let mut numbers = after.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn gather_ip_forward(path: &Path) -> IpForward {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim() == "1" => IpForward::On,
        Ok(_) if OpenOptions::new().write(true).open(path).is_ok() => IpForward::Off,
        Ok(_) => IpForward::Locked,
        Err(_) => IpForward::Unknown,
    }
}

/// Judges the directory, or the nearest one above it that exists; nothing is left behind.
fn gather_state_dir(path: &Path) -> StateDirFacts {
    let existing = path.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("."));
    let attempt = tempfile::tempfile_in(existing);
    StateDirFacts {
        path: path.to_owned(),
        problem: attempt.err().map(|error| format!("cannot write to {existing:?}: {error}")),
        free_mib: rustix::fs::statvfs(existing)
            .ok()
            .map(|fs| fs.f_frsize.saturating_mul(fs.f_bavail) >> 20),
    }
}

fn gather_kernel(state_dir: &StateDir) -> GuestKernel {
    match KernelStore::new(state_dir).default_kernel() {
        Ok(Some(kernel)) => GuestKernel::Installed {
            id: kernel.id().as_str().to_owned(),
            lacks_modules: kernel.lacks_modules(),
        },
        Ok(None) => GuestKernel::Missing,
        Err(error) => GuestKernel::Damaged { problem: error.to_string() },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::platform::kvm::{CpuExtension, Probe};

    /// A machine where everything is well.
    pub(in crate::platform) fn facts() -> Facts {
        Facts {
            os: Os::Linux,
            arch: "x86_64".into(),
            distribution: Some("Debian GNU/Linux 12 (bookworm)".into()),
            environment: Environment::Machine,
            privilege: Privilege::Root,
            kvm: KvmFacts {
                device: Device::Opens,
                extension: CpuExtension::Vmx,
                probe: Some(Probe::Finished { guest_us: 60, host_us: 55, refused_msr: None }),
            },
            missing: Vec::new(),
            package_manager: Some(PackageManager::Apt),
            qemu: Qemu::Installed { version: (7, 2) },
            firecracker: Firecracker::Missing,
            tun: Device::Opens,
            bridge: KernelFeature::Present,
            nf_tables: KernelFeature::Present,
            ip_forward: IpForward::On,
            forwarding: Forwarding::Open,
            input_drops: Vec::new(),
            resolver: ResolvConf {
                servers: vec!["192.0.2.53:53".parse().unwrap()],
                ..ResolvConf::default()
            },
            route_conflicts: Vec::new(),
            orphans: Vec::new(),
            state_dir: StateDirFacts {
                path: "/var/lib/mvm".into(),
                problem: None,
                free_mib: Some(100_000),
            },
            mem_mib: Some(8192),
            cgroup: Cgroup::V2,
            guest_kernel: GuestKernel::Installed {
                id: "6.1.0-debian-0123456789ab".into(),
                lacks_modules: false,
            },
        }
    }

    #[test]
    fn the_version_of_qemu_is_found_among_words() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright 2003";
        assert_eq!(qemu_version(debian), Some((7, 2)));
        assert_eq!(qemu_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(qemu_version("QEMU emulator version 11.1-rc2"), Some((11, 1)));
        assert_eq!(qemu_version("qemu: not found"), None);
        assert_eq!(qemu_version("QEMU emulator version next"), None);
    }

    #[test]
    fn a_state_directory_that_does_not_exist_yet_is_judged_by_its_parent_and_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let state = gather_state_dir(&path);
        assert_eq!((state.problem, state.path), (None, path.clone()));
        assert!(state.free_mib.is_some());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_state_directory_below_a_file_cannot_be_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(gather_state_dir(&file.path().join("state")).problem.is_some());
    }

    #[test]
    fn forwarding_is_read_as_the_kernel_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ip_forward");
        assert_eq!(gather_ip_forward(&path), IpForward::Unknown);
        std::fs::write(&path, "1\n").unwrap();
        assert_eq!(gather_ip_forward(&path), IpForward::On);
        std::fs::write(&path, "0\n").unwrap();
        assert_eq!(gather_ip_forward(&path), IpForward::Off);
    }

    #[tokio::test]
    async fn looking_at_this_machine_changes_nothing_outside_the_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::from(&dir.path().join("not-made"));
        let facts = gather(&state).await;
        assert_eq!(facts.arch, std::env::consts::ARCH);
        assert_eq!(facts.guest_kernel, GuestKernel::Missing);
        assert!(facts.mem_mib.is_some());
        assert!(!state.exists());
    }
}
