//! Whether the other end of a connection is still there.

use std::future::{Future, pending};
use std::pin::Pin;

/// Notices that the other end of a connection was closed, even behind data that nobody has read.
pub trait HangUp: Send + Sync {
    /// Waits until the other end is closed.
    fn wait(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// Of a connection whose end can only be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct NeverHangsUp;

impl HangUp for NeverHangsUp {
    fn wait(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(pending())
    }
}
