//! Faults of simulated backends: what is held does not go on until it is let go.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::watch;

/// What is held; clones hold the same.
#[derive(Debug, Clone)]
pub(crate) struct Held<K>(Arc<watch::Sender<BTreeSet<K>>>);

impl<K> Default for Held<K> {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(BTreeSet::new())))
    }
}

impl<K: Ord> Held<K> {
    /// Holds up everything that is done to this from now on, or lets it go.
    pub(crate) fn hold(&self, what: K, is_held: bool) {
        self.0.send_modify(|held| {
            if is_held {
                held.insert(what);
            } else {
                held.remove(&what);
            }
        });
    }

    /// Waits while this is held.
    pub(crate) async fn pass(&self, what: &K) {
        // The sender lives in `self`.
        let _ = self.0.subscribe().wait_for(|held| !held.contains(what)).await;
    }
}
