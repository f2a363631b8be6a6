//! Waiting for what is to become true.

use std::time::{Duration, Instant};

/// How long anything that boots may take: a loaded machine without KVM takes its time.
pub const LIMIT: Duration = Duration::from_secs(120);

/// How often a predicate is asked.
const POLL: Duration = Duration::from_millis(20);

/// Waits until `look` finds something, and returns it.
///
/// # Panics
/// It found nothing within the limit.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", limit.as_secs());
        std::thread::sleep(POLL);
    }
}
