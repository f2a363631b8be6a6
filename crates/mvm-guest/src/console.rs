//! Where the agent says what it does: the kernel's log as PID 1, standard error otherwise.
//!
//! A line in the kernel's log reaches the console, in order with the kernel's own lines, and the
//! host can ask for it over the protocol. It never fails: there is nobody to tell.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::OnceLock;

use mvm_core::guest::POWER_OFF_WORDS;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// Sends what is said from now on to the kernel's log.
pub(crate) fn use_kernel_log() {
    // The default admits ten lines in five seconds, fewer than a boot may say.
    let _ = std::fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KERNEL_LOG.set(file);
    }
}

/// Says that something was done.
pub(crate) fn note(text: &str) {
    line(5, text);
}

/// Says that something failed; shown on the console even with `quiet`.
pub(crate) fn complain(text: &str) {
    line(3, text);
}

/// Says on the console what a kernel says that switches the machine off.
pub(crate) fn say_power_off() {
    if let Some(mut log) = KERNEL_LOG.get() {
        let _ = log.write_all(format!("<0>{POWER_OFF_WORDS}\n").as_bytes());
    }
}

fn line(level: u8, text: &str) {
    let _ = match KERNEL_LOG.get() {
        Some(mut log) => log.write_all(format!("<{level}>mvm-guest: {text}\n").as_bytes()),
        None => std::io::stderr().write_all(format!("mvm-guest: {text}\n").as_bytes()),
    };
}
