//! Watches: the history as a stream.
//!
//! A watch reads its backend's log and is only woken by new revisions, so that the log is its one
//! buffer: a slow watcher costs no memory, and falls behind the compaction instead.

use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch::Receiver;

use crate::key::Prefix;
use crate::{Entry, Revision, StoreError};

/// A watch reads at most this many revisions at once…
const BATCH_REVISIONS: usize = 256;
/// …and stops after the revision that exceeds this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// What a revision did to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key was created or replaced.
    Put(Entry),
    /// The key was removed.
    Delete {
        /// The key.
        key: String,
    },
}

impl Change {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Put(entry) => entry.key.len() + entry.value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// Everything that one revision changed below the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The revision.
    pub revision: Revision,
    /// Its changes in the order of their keys; never empty.
    pub changes: Vec<Change>,
}

/// The history below a prefix, one whole revision after another.
pub struct Watch {
    prefix: Prefix,
    read_through: Revision,
    ready: VecDeque<WatchEvent>,
    log: Arc<dyn Log>,
    current: Receiver<Revision>,
}

/// A backend's history.
#[async_trait]
pub(crate) trait Log: Send + Sync {
    /// The changes below `prefix` after a revision, as many as a [`Batch`] takes.
    async fn read(&self, prefix: &Prefix, after: Revision) -> Result<Batch, StoreError>;
}

/// A bounded piece of history; it grows by whole revisions.
#[derive(Debug)]
pub(crate) struct Batch {
    events: Vec<WatchEvent>,
    bytes: usize,
    read_through: Revision,
}

impl Batch {
    /// A piece of history that begins after a revision, provided that the store, which is at
    /// `current` and has forgotten everything up to `compacted`, knows that history.
    pub(crate) fn begin(
        after: Revision,
        compacted: Revision,
        current: Revision,
    ) -> Result<Self, StoreError> {
        if after < compacted {
            return Err(StoreError::Compacted { requested: after, oldest: compacted });
        }
        if after > current {
            return Err(StoreError::AheadOfStore { requested: after, current });
        }
        Ok(Self { events: Vec::new(), bytes: 0, read_through: current })
    }

    /// Adds the next change in the order of revisions and keys. Answers `false`, without adding it,
    /// if it opens a revision for which there is no room: the caller stops reading then.
    pub(crate) fn push(&mut self, revision: Revision, change: Change) -> bool {
        let bytes = change.bytes();
        let is_full = self.bytes > BATCH_BYTES || self.events.len() == BATCH_REVISIONS;
        match self.events.last_mut() {
            Some(event) if event.revision == revision => event.changes.push(change),
            Some(event) if is_full => {
                self.read_through = event.revision;
                return false;
            }
            _ => self.events.push(WatchEvent { revision, changes: vec![change] }),
        }
        self.bytes += bytes;
        true
    }
}

impl Watch {
    /// A watch on a backend's log, woken by its current revision.
    pub(crate) async fn open(
        log: Arc<dyn Log>,
        current: Receiver<Revision>,
        prefix: Prefix,
        after: Revision,
    ) -> Result<Self, StoreError> {
        let mut watch = Self { prefix, read_through: after, ready: VecDeque::new(), log, current };
        watch.read().await?;
        Ok(watch)
    }

    /// Waits for the next revision that changes something below the prefix. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if the watcher was so slow that the history it has yet to see is
    /// forgotten; every later call says so again. [`StoreError::Closed`] once the store is gone.
    /// Otherwise the backend failed, and a later call tries again.
    pub async fn next(&mut self) -> Result<WatchEvent, StoreError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            if *self.current.borrow_and_update() > self.read_through {
                self.read().await?;
            } else {
                self.current.changed().await.map_err(|_| StoreError::Closed)?;
            }
        }
    }

    /// The revision through which everything below the prefix was delivered. It moves on with the
    /// whole store, also while nothing changes below the prefix: a new watch after it goes on where
    /// this one stands.
    pub fn seen_through(&self) -> Revision {
        match self.ready.front() {
            Some(event) => event.revision.minus(1),
            None => self.read_through,
        }
    }

    async fn read(&mut self) -> Result<(), StoreError> {
        let batch = self.log.read(&self.prefix, self.read_through).await?;
        self.read_through = batch.read_through;
        self.ready.extend(batch.events);
        Ok(())
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("prefix", &self.prefix)
            .field("read_through", &self.read_through)
            .finish_non_exhaustive()
    }
}
