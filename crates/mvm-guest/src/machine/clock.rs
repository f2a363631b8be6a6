//! The wall clock: what a sleeping guest misses, and what something in the guest makes wrong.
//!
//! The host tells the time; this clock remembers it against a clock that nobody can set. When
//! something in the guest sets the wall clock, the kernel says so at once, and what is far from the
//! host's time is put right, unless an NTP daemon has taken the clock over.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm_core::guest::{ClockReading, GuestError};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    clock_settime, timerfd_create, timerfd_settime,
};

use crate::console::{complain, note};
use crate::failure::refused;

/// How far from the host's time the clock may be set by something in the guest, in nanoseconds.
const FAR_NS: i128 = 500_000_000;
/// How long a program that has set the clock has to tell the kernel that it disciplines it.
const PATIENCE: Duration = Duration::from_millis(500);
/// A time that does not come, in seconds since the Unix epoch: in the year 2242.
const NEVER: i64 = 1 << 33;

/// The wall clock, and what is known of the host's.
#[derive(Debug)]
pub(crate) struct WallClock {
    /// Readable when the wall clock was set; absent where the kernel has no such timer.
    set: Option<OwnedFd>,
    host: Option<HostTime>,
    /// When to look at the clock after it was set.
    look_at: Option<Instant>,
}

/// The host's time at a moment of the clock that nobody can set, both in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct HostTime {
    unix_ns: i128,
    at_ns: i128,
}

impl HostTime {
    /// How far a wall clock that shows this at this moment is ahead of the host's.
    fn ahead(self, unix_ns: i128, at_ns: i128) -> i128 {
        unix_ns - (self.unix_ns + at_ns - self.at_ns)
    }
}

impl Default for WallClock {
    fn default() -> Self {
        let set = watch_for_steps().map_err(|error| {
            complain(&format!("a clock that is set wrong will not be noticed: {error}"));
        });
        Self { set: set.ok(), host: None, look_at: None }
    }
}

impl WallClock {
    /// Steps the clock to the host's time.
    pub(super) fn step_to(&mut self, unix_ns: u64) -> Result<(), GuestError> {
        self.host = Some(HostTime { unix_ns: unix_ns.into(), at_ns: read(ClockId::Boottime) });
        self.look_at = None;
        set_to(unix_ns.into())
    }

    /// Lets the clock gain so much gradually: when it has, it shows the host's time.
    pub(super) fn slew(&mut self, by_ns: i64) -> Result<(), GuestError> {
        let unix_ns = read(ClockId::Realtime) + i128::from(by_ns);
        self.host = Some(HostTime { unix_ns, at_ns: read(ClockId::Boottime) });
        adjust_by(by_ns).map_err(|error| refused("cannot adjust the clock", error))
    }

    /// Becomes readable when the clock was set.
    pub(crate) fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.set.as_ref().map(OwnedFd::as_fd)
    }

    /// The clock was set.
    pub(crate) fn was_set(&mut self, now: Instant) {
        let watched = self.set.as_ref().map(|timer| {
            // It fails with the word that the clock was set, and is readable no more.
            let _ = rustix::io::read(timer, &mut [0u8; 8]);
            arm(timer)
        });
        if let Some(Err(error)) = watched {
            complain(&format!("a clock that is set wrong will not be noticed: {error}"));
            self.set = None;
        }
        self.look_at = now.checked_add(PATIENCE);
    }

    /// When there is something to do.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        self.look_at
    }

    /// Puts the clock right if something in the guest has set it wrong.
    pub(crate) fn settle(&mut self, now: Instant) {
        if self.look_at.is_none_or(|at| now < at) {
            return;
        }
        self.look_at = None;
        let Some(host) = self.host else { return };
        let ahead = host.ahead(read(ClockId::Realtime), read(ClockId::Boottime));
        if ahead.abs() < FAR_NS || is_disciplined() {
            return;
        }
        note(&format!("the clock was set {} ms off the host's: set right", ahead / 1_000_000));
        if let Err(error) = set_to(read(ClockId::Realtime) - ahead) {
            complain(&error.message);
        }
    }
}

/// What the clock shows, and whether a program keeps it right.
pub(super) fn reading() -> ClockReading {
    let unix_ns = u64::try_from(read(ClockId::Realtime)).unwrap_or(0);
    ClockReading { unix_ns, is_disciplined: is_disciplined() }
}

fn watch_for_steps() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
    arm(&timer)?;
    Ok(timer)
}

/// Arms a timer that never expires, but is cancelled when the clock is set.
fn arm(timer: &OwnedFd) -> io::Result<()> {
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    let never = Timespec { tv_sec: NEVER, tv_nsec: 0 };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
    timerfd_settime(timer, flags, &once)?;
    Ok(())
}

fn read(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn set_to(unix_ns: i128) -> Result<(), GuestError> {
    let unix_ns = u64::try_from(unix_ns).unwrap_or(0);
    let time = Timespec {
        tv_sec: (unix_ns / 1_000_000_000) as i64,
        tv_nsec: (unix_ns % 1_000_000_000) as _,
    };
    clock_settime(ClockId::Realtime, time).map_err(|error| refused("cannot set the clock", error))
}

/// Whether a program has told the kernel that it keeps the clock right. Setting the clock by hand
/// takes that back.
fn is_disciplined() -> bool {
    // SAFETY: all zeros is a valid request that changes nothing, and the call fills it.
    unsafe {
        let mut request: libc::timex = std::mem::zeroed();
        libc::adjtimex(&mut request) >= 0 && request.status & libc::STA_UNSYNC == 0
    }
}

fn adjust_by(by_ns: i64) -> io::Result<()> {
    // SAFETY: all zeros and these two fields are a valid request, which the call may fill.
    let state = unsafe {
        let mut request: libc::timex = std::mem::zeroed();
        request.modes = libc::ADJ_OFFSET_SINGLESHOT;
        request.offset = by_ns / 1000;
        libc::adjtimex(&mut request)
    };
    if state < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_time_goes_on_with_the_clock_that_nobody_sets() {
        let host = HostTime { unix_ns: 1_000_000, at_ns: 10 };
        assert_eq!(host.ahead(1_000_090, 100), 0);
        assert_eq!(host.ahead(1_000_000, 100), -90);
        assert_eq!(host.ahead(1_000_100, 100), 10);
    }

    #[test]
    fn a_clock_that_nobody_set_is_left_alone_and_can_be_read() {
        let mut clock = WallClock::default();
        assert!(clock.wants().is_some() && clock.alarm().is_none());
        let now = Instant::now();
        clock.was_set(now);
        assert_eq!(clock.alarm(), Some(now + PATIENCE));
        // No host has told the time: there is nothing to compare with.
        clock.settle(now + PATIENCE);
        assert_eq!(clock.alarm(), None);
        let seconds = i128::from(reading().unix_ns) - read(ClockId::Realtime);
        assert!(seconds.abs() < 60_000_000_000);
    }
}
