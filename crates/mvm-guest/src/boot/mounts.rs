//! The kernel's own filesystems, and those that programs expect to find.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::run_dir;
use crate::console::complain;

/// Where programs have what does not outlive a boot.
const RUN: &str = "/run";

struct Mount {
    filesystem: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: Option<&'static CStr>,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const KERNEL: [Mount; 3] = [
    Mount { filesystem: "proc", target: "/proc", flags: SAFE, options: None },
    Mount { filesystem: "sysfs", target: "/sys", flags: SAFE, options: None },
    Mount {
        filesystem: "devtmpfs",
        target: "/dev",
        flags: MountFlags::NOSUID,
        options: Some(c"mode=0755"),
    },
];

const RUNTIME: [Mount; 4] = [
    Mount {
        filesystem: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: Some(c"gid=5,mode=0620,ptmxmode=0666"),
    },
    Mount {
        filesystem: "tmpfs",
        target: "/dev/shm",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        options: Some(c"mode=1777"),
    },
    Mount {
        filesystem: "tmpfs",
        target: RUN,
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        options: Some(c"mode=0755"),
    },
    Mount { filesystem: "cgroup2", target: "/sys/fs/cgroup", flags: SAFE, options: None },
];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts `/proc`, `/sys` and `/dev`.
pub(super) fn mount_kernel_filesystems() {
    for entry in &KERNEL {
        entry.ensure();
    }
}

/// Mounts what programs expect in a root besides files, and makes `/tmp`. Unless the image has an
/// init, what it has below `/run` is in the new one.
pub(super) fn mount_runtime_filesystems(has_init: bool) {
    let images_own = File::open(RUN);
    for entry in &RUNTIME {
        entry.ensure();
    }
    // What containers and their tools expect of a machine: what is mounted shows everywhere.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    if let Err(error) = mount_change("/", shared) {
        complain(&format!("cannot share what is mounted: {error}"));
    }
    if !has_init && let Ok(images_own) = images_own {
        let covered = format!("/proc/self/fd/{}", images_own.as_raw_fd());
        match run_dir::carry_over(Path::new(&covered), Path::new(RUN)) {
            Ok(0) => {}
            Ok(count) => complain(&format!("{count} files of the image's {RUN} are too large")),
            Err(error) => complain(&format!("cannot carry over the image's {RUN}: {error}")),
        }
    }
    for (target, link) in LINKS {
        if !fs::exists(link).unwrap_or(false)
            && let Err(error) = symlink(target, link)
        {
            complain(&format!("cannot link {link}: {error}"));
        }
    }
    if let Err(error) = ensure_tmp(Path::new("/tmp")) {
        complain(&format!("cannot make /tmp: {error}"));
    }
}

fn ensure_tmp(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o1777))
}

impl Mount {
    fn ensure(&self) {
        let Self { filesystem, target, flags, options } = self;
        // A missing directory shows in the mount's own error.
        let _ = fs::create_dir_all(target);
        match mount(*filesystem, *target, *filesystem, *flags, *options) {
            // The kernel may have mounted it by itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => complain(&format!("cannot mount {filesystem} on {target}: {error}")),
        }
    }
}
