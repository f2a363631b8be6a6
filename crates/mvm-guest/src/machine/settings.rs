//! What is set in the guest's kernel: the agent's own choice at boot, and then what the host asks for.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use mvm_core::guest::{ErrorKind, GuestError};
use mvm_core::settings::{Settings, sysctl_file};
use rustix::mount::{MountFlags, mount_remount};

use crate::console::complain;
use crate::failure::{failure, invalid};

/// What a kernel that serves one tenant may allow, and what programs of today need.
const DEFAULTS: [(&str, &str); 3] = [
    // Nobody else has a port here that could be taken.
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
    // Databases and search engines refuse to start with the kernel's 65,530.
    ("vm.max_map_count", "262144"),
];
const SYSCTLS: &str = "/proc/sys";
const SHM: &str = "/dev/shm";

/// What the host has asked for so far in this boot. It is set once: what programs change later
/// stays, also when the next agent of the node says the same again.
#[derive(Debug, Default)]
pub(crate) struct Applied(Settings);

/// Sets what the agent chooses itself. A kernel may have been built without one of them.
pub(crate) fn set_defaults() {
    for (name, value) in DEFAULTS {
        if let Err(error) = set(Path::new(SYSCTLS), name, value) {
            complain(&error.message);
        }
    }
}

impl Applied {
    /// Sets what the host asks for, as far as it has not been set.
    pub(super) fn ensure(&mut self, wanted: &Settings) -> Result<(), GuestError> {
        for (name, value) in &wanted.sysctl {
            if self.0.sysctl.get(name) != Some(value) {
                set(Path::new(SYSCTLS), name, value)?;
                self.0.sysctl.insert(name.clone(), value.clone());
            }
        }
        if let Some(mib) = wanted.shm_mib.filter(|mib| self.0.shm_mib != Some(*mib)) {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount_remount(SHM, flags, format!("size={mib}m,mode=1777")).map_err(|error| {
                failure(ErrorKind::System, format!("cannot give {SHM} {mib} MiB: {error}"))
            })?;
            self.0.shm_mib = Some(mib);
        }
        Ok(())
    }
}

fn set(dir: &Path, name: &str, value: &str) -> Result<(), GuestError> {
    let file = sysctl_file(name).ok_or_else(|| invalid(format!("`{name}` is no sysctl")))?;
    let path: PathBuf = dir.join(file);
    // Nothing is made there: a file that is missing is a sysctl that is.
    let written = fs::OpenOptions::new().write(true).open(path);
    written.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|error| {
        match error.kind() {
            io::ErrorKind::NotFound => {
                let text = format!("the guest's kernel has no sysctl {name}");
                failure(ErrorKind::NotFound, text)
            }
            _ => failure(ErrorKind::System, format!("sysctl {name} cannot be `{value}`: {error}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_written_to_its_file_and_what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vm")).unwrap();
        fs::write(dir.path().join("vm/x"), "0").unwrap();
        set(dir.path(), "vm.x", "7").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("vm/x")).unwrap(), "7");
        let error = set(dir.path(), "net.y", "7").unwrap_err();
        assert_eq!(error.message, "the guest's kernel has no sysctl net.y");
        assert_eq!(set(dir.path(), "../x.y", "7").unwrap_err().kind, ErrorKind::Invalid);
        let error = set(dir.path(), "vm.x.z", "7").unwrap_err();
        assert!(error.message.starts_with("sysctl vm.x.z cannot be `7`"), "{error}");
    }
}
