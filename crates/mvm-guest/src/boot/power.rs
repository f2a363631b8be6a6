//! The machine's end: every process, then the disks, then the power.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount_remount};
use rustix::system::{RebootCommand, reboot};

use crate::console::{complain, say_power_off};
use crate::machine::unmount_disks;
use crate::process::{has_children, reap, signal_all};

/// Time for processes to go after SIGKILL: only those that the kernel holds take any.
const KILL_TIME: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The table that describes the machine to the kernel.
const DSDT: &str = "/sys/firmware/acpi/tables/DSDT";
/// The name in it of the sleep state "off".
const SOFT_OFF: &[u8] = b"_S5_";

/// Ends every process and the machine.
pub(super) fn stop(grace: Duration, writable: Option<OwnedFd>) -> ! {
    for (signal, limit) in [(libc::SIGTERM, grace), (libc::SIGKILL, KILL_TIME)] {
        signal_all(signal);
        if wait_for_all(limit) {
            break;
        }
    }
    rustix::fs::sync();
    unmount_disks();
    let can_power_off = can_power_off(&fs::read(DSDT).unwrap_or_default());
    for path in writable.iter().map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd())).rev() {
        for mount in ["/", &path] {
            if let Err(error) = mount_remount(mount, MountFlags::RDONLY, c"") {
                complain(&format!("cannot make {mount} read-only: {error}"));
            }
        }
    }
    // A kernel that cannot switch the machine off would halt it, and the VMM would never end. A
    // reset ends it too, as microVMs run without reboot; the console tells the host what was meant.
    let command = if can_power_off {
        RebootCommand::PowerOff
    } else {
        say_power_off();
        RebootCommand::Restart
    };
    loop {
        if let Err(error) = reboot(command) {
            complain(&format!("cannot stop the machine: {error}"));
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Whether the machine has a soft off: ACPI alone does not mean that, as with Firecracker.
fn can_power_off(dsdt: &[u8]) -> bool {
    dsdt.windows(SOFT_OFF.len()).any(|window| window == SOFT_OFF)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_machine_with_a_soft_off_is_switched_off() {
        assert!(can_power_off(b"DSDT...\x08_S5_\x12"));
        assert!(!can_power_off(b"DSDT...\x08_S4_\x12"));
        assert!(!can_power_off(b""));
    }
}
