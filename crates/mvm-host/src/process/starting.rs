//! Processes that are just being started.
//!
//! Until it is its program, a process that this one starts has a copy of every descriptor that is open
//! here, and with them the locks of files that everybody else has closed by then. Who meets such a lock
//! waits for those processes, and then knows who has it.

use std::sync::{PoisonError, RwLock};

static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process, and returns once it is its program.
pub(crate) fn starting<T>(start: impl FnOnce() -> T) -> T {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    start()
}

/// Does something quick while no process is being started.
pub(crate) fn between_starts<T>(work: impl FnOnce() -> T) -> T {
    let _none = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    work()
}
