//! What the embedded stores can be told when they are opened.

use std::sync::Arc;

use crate::{Clock, Limits, SystemClock};

/// How an embedded store behaves; the default is right but for tests and simulations.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What one transaction may hold.
    pub limits: Limits,
    /// What leases are counted by.
    pub clock: Arc<dyn Clock>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { limits: Limits::EMBEDDED, clock: Arc::new(SystemClock::default()) }
    }
}
