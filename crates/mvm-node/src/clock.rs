//! The agent's clock: wall-clock milliseconds that never jump while the agent runs.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::{Duration, Instant};

/// Milliseconds since the Unix epoch at the agent's start, plus monotonic time since: a stepped host
/// clock shortens no grace period and no backoff. With a paused runtime, time is virtual.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin_unix_ms: u64,
    origin: Instant,
}

impl Clock {
    /// A clock that begins with the host's time.
    pub fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::starting_at(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }

    /// A clock that begins with this time, in milliseconds since the Unix epoch.
    pub fn starting_at(origin_unix_ms: u64) -> Self {
        Self { origin_unix_ms, origin: Instant::now() }
    }

    /// Now, in milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        let passed = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.origin_unix_ms.saturating_add(passed)
    }

    /// The instant of a time in milliseconds since the Unix epoch.
    pub(crate) fn instant(&self, unix_ms: u64) -> Instant {
        self.origin + Duration::from_millis(unix_ms.saturating_sub(self.origin_unix_ms))
    }
}

/// The host's wall clock, in nanoseconds since the Unix epoch, for guests.
pub(crate) fn wall_clock_unix_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}
