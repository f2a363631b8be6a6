//! The root filesystem: a read-only image shared by many guests, under a writable layer of its own.
//!
//! ```text
//!  /dev/vda  EROFS ──> lower ─┐
//!  /dev/vdb  ext4  ──> upper ─┴─> overlay ──> /
//! ```

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use crate::machine::takes_discards;

const IMAGE: &str = "/dev/vda";
const LAYER: &str = "/dev/vdb";
const LOWER: &str = "/mnt/lower";
const RW: &str = "/mnt/rw";
const ROOT: &str = "/mnt/root";
const OVERLAY: &CStr = c"lowerdir=/mnt/lower,upperdir=/mnt/rw/upper,workdir=/mnt/rw/work";
/// How long a disk may take to appear after its driver was loaded.
const DISK_DEADLINE: Duration = Duration::from_secs(10);

/// Mounts the root and enters it. The writable layer has no path from there: what is returned is
/// the way to it.
pub(super) fn mount_root() -> Result<OwnedFd, String> {
    for device in [IMAGE, LAYER] {
        wait_for(device)?;
    }
    for dir in [LOWER, RW, ROOT] {
        at(dir, fs::create_dir_all(dir))?;
    }
    at(IMAGE, mount(IMAGE, LOWER, "erofs", MountFlags::RDONLY, None))?;
    // What is deleted is given back to the host.
    let options = takes_discards("vdb").then_some(c"discard");
    at(LAYER, mount(LAYER, RW, "ext4", MountFlags::NOATIME, options))?;
    for dir in ["/mnt/rw/upper", "/mnt/rw/work"] {
        at(dir, fs::create_dir_all(dir))?;
    }
    at("overlay", mount("overlay", ROOT, "overlay", MountFlags::NOATIME, OVERLAY))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let writable = at(RW, openat(CWD, RW, flags, Mode::empty()))?;
    for dir in ["/dev", "/proc", "/sys"] {
        let target = format!("{ROOT}{dir}");
        at(&target, fs::create_dir_all(&target))?;
        at(&target, mount_move(dir, &target))?;
    }
    at(ROOT, chdir(ROOT))?;
    at(ROOT, mount_move(".", "/"))?;
    at(ROOT, chroot("."))?;
    at("/", chdir("/"))?;
    Ok(writable)
}

/// Waits for a disk whose driver was loaded.
pub(super) fn wait_for(device: &str) -> Result<(), String> {
    let deadline = Instant::now() + DISK_DEADLINE;
    loop {
        match File::open(device) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(format!("{device}: {error}")),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn at<T, E: Into<io::Error>>(object: &str, result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| format!("{object}: {}", error.into()))
}
