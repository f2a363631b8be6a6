//! The operating system around us: its distribution, what it runs in, and its kernel's features.

use std::fs;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

/// What the system runs in, as far as it can be told from inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Environment {
    /// A machine, real or virtual, of its own.
    Machine,
    /// A container, which shares the kernel of its host.
    Container,
    /// The Windows Subsystem for Linux.
    Wsl,
}

/// Which version of control groups holds the controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroup {
    /// One unified hierarchy.
    V2,
    /// A hierarchy for each controller, beside a unified one without controllers.
    Hybrid,
    /// A hierarchy for each controller.
    V1,
    /// None is mounted.
    Absent,
}

/// Whether the kernel has a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFeature {
    /// It is built in or loaded.
    Present,
    /// Its module can be loaded.
    Loadable,
    /// The kernel was built without it, or its module is not installed.
    Absent,
    /// The system does not tell.
    Unknown,
}

/// The kernel gives its first PID namespace this fixed number.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// The distribution's name for people, out of `os-release`.
pub(super) fn distribution(os_release: &str) -> Option<String> {
    let value = |key: &str| {
        let value = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.map(|text| text.trim().trim_matches(['"', '\'']).to_owned()).filter(|v| !v.is_empty())
    };
    value("PRETTY_NAME").or_else(|| value("NAME")).or_else(|| value("ID"))
}

pub(super) fn read_distribution() -> Option<String> {
    ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|path| distribution(&fs::read_to_string(path).ok()?))
}

/// What tells containers and WSL from machines.
pub(super) struct EnvironmentSigns {
    /// `/proc/version`.
    pub(super) version: String,
    /// A file that container engines put into their containers exists.
    pub(super) has_container_file: bool,
    /// `/run/systemd/container`, which systemd writes in containers and leaves out elsewhere.
    pub(super) systemd_container: Option<String>,
    /// Whether process ids are those of the kernel itself, as on a machine. Machines that are made
    /// from container images keep the files of a container.
    pub(super) is_initial_pid_namespace: bool,
}

impl EnvironmentSigns {
    pub(super) fn read() -> Self {
        let files = ["/.dockerenv", "/run/.containerenv"];
        Self {
            version: fs::read_to_string("/proc/version").unwrap_or_default(),
            has_container_file: files.iter().any(|path| Path::new(path).exists()),
            systemd_container: fs::read_to_string("/run/systemd/container").ok(),
            is_initial_pid_namespace: fs::read_link("/proc/self/ns/pid")
                .is_ok_and(|link| link == Path::new(INITIAL_PID_NAMESPACE)),
        }
    }

    pub(super) fn environment(&self) -> Environment {
        // WSL sets itself up as a container of systemd's, with PID namespaces of its own.
        let named = self.systemd_container.as_deref().map(str::trim).unwrap_or_default();
        let has_sign = self.has_container_file || !matches!(named, "" | "wsl");
        if has_sign && !self.is_initial_pid_namespace {
            Environment::Container
        } else if self.version.to_ascii_lowercase().contains("microsoft") {
            Environment::Wsl
        } else {
            Environment::Machine
        }
    }
}

/// The version of control groups under a mount point such as `/sys/fs/cgroup`.
pub(super) fn cgroup(root: &Path) -> Cgroup {
    if root.join("cgroup.controllers").exists() {
        Cgroup::V2
    } else if root.join("unified/cgroup.controllers").exists() {
        Cgroup::Hybrid
    } else if root.join("cpu").exists() || root.join("memory").exists() {
        Cgroup::V1
    } else {
        Cgroup::Absent
    }
}

/// What a kernel says of its features.
pub(super) struct KernelFiles {
    /// Names under `/sys/module`.
    pub(super) loaded: Vec<String>,
    /// `modules.builtin` of the running kernel.
    pub(super) builtin: Option<String>,
    /// `modules.dep` of the running kernel.
    pub(super) loadable: Option<String>,
    /// The configuration that the kernel was built with.
    pub(super) config: Option<String>,
}

impl KernelFiles {
    pub(super) fn read() -> Self {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        let modules = Path::new("/lib/modules").join(release.as_ref());
        let names = fs::read_dir("/sys/module").into_iter().flatten().flatten();
        Self {
            loaded: names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
            builtin: fs::read_to_string(modules.join("modules.builtin")).ok(),
            loadable: fs::read_to_string(modules.join("modules.dep")).ok(),
            config: running_config().or_else(|| {
                fs::read_to_string(Path::new("/boot").join(format!("config-{release}"))).ok()
            }),
        }
    }

    /// Whether the kernel has the feature of this module and configuration option.
    pub(super) fn feature(&self, module: &str, option: &str) -> KernelFeature {
        let lists = |list: &Option<String>| {
            list.as_ref().is_some_and(|text| text.lines().any(|line| names_module(line, module)))
        };
        let configured = |value: &str| {
            let wanted = format!("{option}={value}");
            self.config.as_ref().is_some_and(|text| text.lines().any(|line| line == wanted))
        };
        if self.loaded.iter().any(|name| name == module) || lists(&self.builtin) || configured("y")
        {
            KernelFeature::Present
        } else if lists(&self.loadable) {
            KernelFeature::Loadable
        } else if self.loadable.is_some() || (self.config.is_some() && !configured("m")) {
            KernelFeature::Absent
        } else {
            KernelFeature::Unknown
        }
    }
}

fn running_config() -> Option<String> {
    let mut text = String::new();
    GzDecoder::new(fs::File::open("/proc/config.gz").ok()?).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Whether a line such as `kernel/net/bridge/bridge.ko.xz: …` is about this module. File names have
/// dashes where module names have underscores, or not.
fn names_module(line: &str, module: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split_once(".ko").is_some_and(|(name, _)| name.replace('-', "_") == module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_is_named_for_people() {
        let debian = "ID=debian\nNAME=\"Debian GNU/Linux\"\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n";
        assert_eq!(distribution(debian).as_deref(), Some("Debian GNU/Linux 12"));
        assert_eq!(distribution("ID_LIKE=x\nID='void'\n").as_deref(), Some("void"));
        assert_eq!(distribution("PRETTY_NAME=\"\"\n"), None);
    }

    fn signs(version: &str, file: bool, systemd: Option<&str>) -> EnvironmentSigns {
        EnvironmentSigns {
            version: version.to_owned(),
            has_container_file: file,
            systemd_container: systemd.map(str::to_owned),
            is_initial_pid_namespace: false,
        }
    }

    #[test]
    fn containers_and_wsl_are_told_from_machines() {
        let (linux, wsl) = ("Linux version 6.1.0", "Linux version 5.15-microsoft-standard-WSL2");
        for (version, file, systemd, expected) in [
            (linux, false, None, Environment::Machine),
            (linux, true, None, Environment::Container),
            (linux, false, Some("lxc\n"), Environment::Container),
            (wsl, false, None, Environment::Wsl),
            (wsl, false, Some("wsl\n"), Environment::Wsl),
            (wsl, true, None, Environment::Container),
        ] {
            assert_eq!(signs(version, file, systemd).environment(), expected, "{version} {file}");
        }
    }

    #[test]
    fn a_machine_made_from_a_container_image_is_a_machine() {
        let signs = signs("Linux version 6.1.0", true, Some("docker"));
        let signs = EnvironmentSigns { is_initial_pid_namespace: true, ..signs };
        assert_eq!(signs.environment(), Environment::Machine);
    }

    #[test]
    fn cgroup_versions_are_told_by_their_files() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::Absent);
        fs::create_dir_all(dir.path().join("memory")).unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::V1);
        fs::create_dir_all(dir.path().join("unified")).unwrap();
        fs::write(dir.path().join("unified/cgroup.controllers"), "").unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::Hybrid);
        fs::write(dir.path().join("cgroup.controllers"), "cpu memory").unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::V2);
    }

    fn files() -> KernelFiles {
        KernelFiles { loaded: Vec::new(), builtin: None, loadable: None, config: None }
    }

    fn bridge(files: &KernelFiles) -> KernelFeature {
        files.feature("bridge", "CONFIG_BRIDGE")
    }

    #[test]
    fn a_loaded_or_built_in_feature_is_present() {
        let loaded = KernelFiles { loaded: vec!["bridge".into()], ..files() };
        let list = "kernel/fs/ext4/ext4.ko\nkernel/net/bridge/bridge.ko\n";
        let builtin = KernelFiles { builtin: Some(list.into()), ..files() };
        let config = KernelFiles { config: Some("CONFIG_BRIDGE=y\n".into()), ..files() };
        for files in [loaded, builtin, config] {
            assert_eq!(bridge(&files), KernelFeature::Present);
        }
    }

    #[test]
    fn an_installed_module_is_loadable_and_a_missing_one_is_absent() {
        let dep = "kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz\n\
                   kernel/net/netfilter/nf-tables.ko:\n";
        let files = KernelFiles { loadable: Some(dep.into()), ..files() };
        assert_eq!(bridge(&files), KernelFeature::Loadable);
        assert_eq!(files.feature("nf_tables", "CONFIG_NF_TABLES"), KernelFeature::Loadable);
        // `stp` is only mentioned as what `bridge` needs.
        assert_eq!(files.feature("stp", "CONFIG_STP"), KernelFeature::Absent);
    }

    #[test]
    fn without_any_list_nothing_is_claimed() {
        assert_eq!(bridge(&files()), KernelFeature::Unknown);
        let module = KernelFiles { config: Some("CONFIG_BRIDGE=m\n".into()), ..files() };
        assert_eq!(bridge(&module), KernelFeature::Unknown);
        let without = "# CONFIG_BRIDGE is not set\nCONFIG_BRIDGE_NF=y\n";
        let without = KernelFiles { config: Some(without.into()), ..files() };
        assert_eq!(bridge(&without), KernelFeature::Absent);
    }
}
