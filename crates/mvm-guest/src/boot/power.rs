//! The machine's end: every process, then the disks, then the power.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount_remount};
use rustix::system::{RebootCommand, reboot};

use crate::console::complain;
use crate::process::{has_children, reap, signal_all};

/// Time for processes to go after SIGKILL: only those that the kernel holds take any.
const KILL_TIME: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// With it the kernel can switch a machine off; without, only reset it.
const ACPI: &str = "/sys/firmware/acpi/tables/DSDT";

/// Ends every process and the machine.
pub(super) fn stop(grace: Duration, writable: Option<OwnedFd>) -> ! {
    for (signal, limit) in [(libc::SIGTERM, grace), (libc::SIGKILL, KILL_TIME)] {
        signal_all(signal);
        if wait_for_all(limit) {
            break;
        }
    }
    rustix::fs::sync();
    let has_acpi = fs::exists(ACPI).unwrap_or(false);
    for path in writable.iter().map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd())).rev() {
        for mount in ["/", &path] {
            if let Err(error) = mount_remount(mount, MountFlags::RDONLY, c"") {
                complain(&format!("cannot make {mount} read-only: {error}"));
            }
        }
    }
    // A kernel that cannot switch the machine off would halt it, and the VMM would never end. A
    // reset ends it too, as microVMs run without reboot.
    let command = if has_acpi { RebootCommand::PowerOff } else { RebootCommand::Restart };
    loop {
        if let Err(error) = reboot(command) {
            complain(&format!("cannot stop the machine: {error}"));
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Reaps until no process is left, or the time is over.
fn wait_for_all(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        while reap().is_some() {}
        if !has_children() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK_AGAIN);
    }
}
