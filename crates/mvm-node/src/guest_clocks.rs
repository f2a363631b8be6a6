//! Keeps the wall clocks of running guests at the host's.
//!
//! Each guest's clock is compared now and then, and at once when the host's own time has jumped:
//! its clock was set, or the host was suspended. What is done about a difference is decided by
//! [`mvm_core::guest::ClockReading::correction`]. A guest's agent notices by itself when something
//! in the guest sets the clock.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mvm_core::guest::ClockCorrection;
use mvm_core::lifecycle::Phase;
use mvm_core::name::InstancePath;
use mvm_host::guest::SessionError;

use crate::node::{Node, chain};
use crate::sessions::GUEST_TIMEOUT;
use crate::workers::{Work, Workers};

/// How often it is looked whether the host's time has jumped.
const TICK: Duration = Duration::from_secs(1);
/// How many ticks later each guest's clock is compared again.
const TICKS_BETWEEN: u32 = 15;
/// Smallest jump of the host's time that is one, in nanoseconds: 100 ms.
const JUMP_NS: i128 = 100_000_000;

/// When which guest's clock is compared.
pub(crate) struct GuestClocks {
    evenness: Evenness,
    ticks: u32,
    next: tokio::time::Instant,
}

impl GuestClocks {
    /// From now on.
    pub(crate) fn new() -> Self {
        let next = tokio::time::Instant::now() + TICK;
        Self { evenness: Evenness::now(), ticks: 0, next }
    }

    /// Waits until it is time to look.
    pub(crate) async fn due(&self) {
        tokio::time::sleep_until(self.next).await;
    }

    /// Looks whether the host's time has jumped, and has guests' clocks compared if that is due. A guest
    /// that does not answer is not asked a second time meanwhile.
    pub(crate) fn look(&mut self, node: &Arc<Node>, workers: &mut Workers) {
        self.next = tokio::time::Instant::now() + TICK;
        let jump_ms = self.evenness.jump(Evenness::now());
        if let Some(ms) = jump_ms {
            tracing::info!(ms, "the host's time jumped: guests are told");
        }
        self.ticks += 1;
        if jump_ms.is_none() && self.ticks < TICKS_BETWEEN {
            return;
        }
        self.ticks = 0;
        for path in running(node) {
            let node = node.clone();
            let work = Work::Clock(path.clone());
            workers.begin(work, || async move { check(&node, &path, jump_ms.is_some()).await });
        }
    }
}

fn running(node: &Node) -> Vec<InstancePath> {
    let mirror = node.state.now();
    let instances = mirror.observed.instances.iter();
    let running = instances.filter(|(_, status)| matches!(status.phase, Phase::Running { .. }));
    running.map(|(path, _)| path.clone()).collect()
}

/// Compares one guest's clock; a guest without a session is told the time with its next one.
async fn check(node: &Node, path: &InstancePath, host_jumped: bool) {
    let session = node.instance(path).and_then(|handle| handle.session.borrow().clone());
    let Some(session) = session else { return };
    match session.check_clock(host_jumped, GUEST_TIMEOUT).await {
        Ok(ClockCorrection::None) => {}
        Ok(done) => tracing::info!(instance = %path, ?done, "its clock is set right"),
        // An old guest agent cannot be told.
        Err(SessionError::Missing { .. }) => {}
        Err(error) => {
            tracing::debug!(instance = %path, error = chain(&error), "its clock is not known");
        }
    }
}

/// The host's wall clock, less the clock that nobody sets and that stands still in a suspend.
#[derive(Debug, Clone, Copy)]
struct Evenness {
    wall_ns: i128,
    steady: Instant,
}

impl Evenness {
    fn now() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { wall_ns: i128::try_from(wall.as_nanos()).unwrap_or(0), steady: Instant::now() }
    }

    /// By how many milliseconds the wall clock has jumped since, if it has; compares with `now` from
    /// then on.
    fn jump(&mut self, now: Self) -> Option<i64> {
        let passed = now.steady.saturating_duration_since(self.steady).as_nanos();
        let by = now.wall_ns - self.wall_ns - i128::try_from(passed).unwrap_or(0);
        *self = now;
        (by.abs() >= JUMP_NS).then(|| i64::try_from(by / 1_000_000).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_that_does_not_go_on_evenly_is_a_jump() {
        let begin = Evenness::now();
        let after = |wall_ms: i128, steady_ms| Evenness {
            wall_ns: begin.wall_ns + wall_ms * 1_000_000,
            steady: begin.steady + Duration::from_millis(steady_ms),
        };
        let mut seen = begin;
        assert_eq!(seen.jump(after(1000, 1000)), None);
        assert_eq!(seen.jump(after(2050, 2000)), None);
        // The host was suspended for a minute; then all is even again.
        assert_eq!(seen.jump(after(63_050, 3000)), Some(60_000));
        assert_eq!(seen.jump(after(64_050, 4000)), None);
        assert_eq!(seen.jump(after(4_050, 5000)), Some(-61_000));
    }
}
