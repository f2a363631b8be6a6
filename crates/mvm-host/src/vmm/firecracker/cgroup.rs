//! The cgroup of one Firecracker, which the driver makes and removes.
//!
//! Only a machine whose controllers are all in version 2 has one; elsewhere the jail does without.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use mvm_core::name::InstanceId;

use super::super::VmSpec;

const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup that holds those of all instances. Each is in one that is named for its user, because
/// nodes that share a machine may have instances of the same name.
const PARENT: &str = "mvm";
/// Memory of Firecracker itself in MiB, on top of its guest's, which counts twice: what is saved of
/// it may be written to a filesystem in memory.
const OVERHEAD_MIB: u64 = 128;
/// Threads of Firecracker besides those of the vCPUs, with room.
const OTHER_THREADS: u32 = 32;

/// Whether the machine's controllers are in version 2, and those that are needed are there.
fn is_available() -> bool {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"));
    let has = |name| {
        let list = controllers.as_deref().unwrap_or_default();
        list.split_ascii_whitespace().any(|controller| controller == name)
    };
    // A container's own root is not the machine's, and has processes, which forbids children.
    let is_machine_root = !Path::new(ROOT).join("cgroup.type").exists();
    has("memory") && has("pids") && is_machine_root
}

/// The files of its limits, with their values.
fn limits(spec: &VmSpec) -> [(&'static str, u64); 2] {
    let bytes = (2 * u64::from(spec.mem_mib) + OVERHEAD_MIB) << 20;
    [("memory.max", bytes), ("pids.max", u64::from(spec.vcpus + OTHER_THREADS))]
}

/// A cgroup that was made for a microVM that starts; removed again unless that is completed.
#[derive(Debug)]
pub(super) struct Cgroup {
    uid: u32,
    id: InstanceId,
    dir: File,
    is_complete: bool,
}

impl Cgroup {
    /// Makes it anew, with its limits; none where there is no version 2.
    ///
    /// The jailer would do it, too, and write into the root's list of controllers each time, which waits
    /// until every cgroup of the machine that was removed lately is gone, and then move.
    pub(super) fn make(spec: &VmSpec) -> io::Result<Option<Self>> {
        if !is_available() {
            return Ok(None);
        }
        remove(spec.uid, &spec.id);
        let mut dir = PathBuf::from(ROOT);
        for name in [PARENT, &spec.uid.to_string(), spec.id.as_str()] {
            enable_controllers(&dir)?;
            dir.push(name);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let opened = File::open(&dir)?;
        let made = Self { uid: spec.uid, id: spec.id.clone(), dir: opened, is_complete: false };
        for (file, value) in limits(spec) {
            fs::write(dir.join(file), value.to_string())?;
        }
        Ok(Some(made))
    }

    /// Its directory, for a process to be made in it.
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// It is in use: it stays.
    pub(super) fn complete(mut self) {
        self.is_complete = true;
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.is_complete {
            remove(self.uid, &self.id);
        }
    }
}

/// Lets the cgroups in this one have limits.
fn enable_controllers(dir: &Path) -> io::Result<()> {
    let path = dir.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&path)?;
    let is_enabled = |name| enabled.split_ascii_whitespace().any(|it| it == name);
    match is_enabled("memory") && is_enabled("pids") {
        true => Ok(()),
        false => fs::write(path, "+memory +pids"),
    }
}

/// What a process lacks of it: being in it, and the limits, as the kernel has them.
pub(super) fn lacks(proc: &Path, spec: &VmSpec) -> Vec<String> {
    let own = format!("/{PARENT}/{}/{}", spec.uid, spec.id);
    let groups = fs::read_to_string(proc.join("cgroup")).unwrap_or_default();
    if groups.lines().all(|line| line.strip_prefix("0::") != Some(&own)) {
        return vec!["a cgroup of its own (version 2)".to_owned()];
    }
    let dir = Path::new(ROOT).join(own.trim_start_matches('/'));
    let has = |file: &str, value: u64| {
        let text = fs::read_to_string(dir.join(file));
        text.is_ok_and(|text| text.trim() == value.to_string())
    };
    let missing = limits(spec).into_iter().filter(|(file, value)| !has(file, *value));
    missing.map(|(file, _)| format!("a limit in {file}")).collect()
}

/// Removes an instance's cgroup, whose processes have ended. Not finding it is no error; one that
/// the kernel still holds is found by the next start.
pub(super) fn remove(uid: u32, id: &InstanceId) {
    let parent = Path::new(ROOT).join(PARENT).join(uid.to_string());
    for path in [parent.join(id.as_str()), parent] {
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a cgroup");
            }
            _ => {}
        }
    }
}
