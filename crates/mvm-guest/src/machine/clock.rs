//! The wall clock and the random numbers: what a sleeping guest misses.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;

use mvm_core::guest::GuestError;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::failure::refused;

/// `_IO('R', 0x07)` of `<linux/random.h>`: use what was mixed in from the next number on.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Steps the wall clock.
pub(super) fn step_to(unix_ns: u64) -> Result<(), GuestError> {
    let time = Timespec {
        tv_sec: (unix_ns / 1_000_000_000) as i64,
        tv_nsec: (unix_ns % 1_000_000_000) as _,
    };
    clock_settime(ClockId::Realtime, time).map_err(|error| refused("cannot set the clock", error))
}

/// Mixes bytes into the kernel's random numbers, as far as the kernel lets.
pub(super) fn stir_entropy(bytes: &[u8]) {
    if let Ok(mut file) = OpenOptions::new().write(true).open("/dev/urandom") {
        let _ = file.write_all(bytes);
        // SAFETY: a request without an argument, on an open descriptor.
        unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG) };
    }
}
