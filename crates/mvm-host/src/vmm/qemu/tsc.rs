//! The frequency of this machine's time stamp counter.
//!
//! In software emulation a guest sees the host's counter, and measures its frequency against an
//! emulated timer; on a busy host that fails and the guest hangs without a clock. So it is measured
//! here and told to the guest's kernel.

use std::time::{Duration, Instant};

/// How long the counter is watched: the two readings err by less than a microsecond, so by less
/// than 20 parts in a million.
const WATCHED: Duration = Duration::from_millis(50);

/// The counter's frequency in kHz, or `None` on a machine without one.
pub(super) async fn measure_khz() -> Option<u64> {
    let first = reading()?;
    tokio::task::spawn_blocking(|| std::thread::sleep(WATCHED)).await.ok()?;
    let second = reading()?;
    let elapsed = second.at.duration_since(first.at).as_nanos();
    let ticks = u128::from(second.ticks.checked_sub(first.ticks)?);
    u64::try_from(ticks * 1_000_000 / elapsed.max(1)).ok().filter(|khz| *khz > 0)
}

struct Reading {
    at: Instant,
    ticks: u64,
}

/// Reads clock and counter together: of several attempts the one least disturbed counts.
fn reading() -> Option<Reading> {
    (0..16)
        .filter_map(|_| {
            let before = Instant::now();
            let ticks = counter()?;
            let width = before.elapsed();
            Some((width, Reading { at: before + width / 2, ticks }))
        })
        .min_by_key(|(width, _)| *width)
        .map(|(_, reading)| reading)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn counter() -> Option<u64> {
    // SAFETY: the instruction exists on every 64-bit x86 and only reads a register.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    #[tokio::test]
    async fn two_measurements_agree_and_are_a_processor_s_frequency() {
        let (one, two) = (measure_khz().await.unwrap(), measure_khz().await.unwrap());
        assert!((400_000..10_000_000).contains(&one), "{one}");
        assert!(one.abs_diff(two) < one / 1000, "{one} {two}");
    }
}
