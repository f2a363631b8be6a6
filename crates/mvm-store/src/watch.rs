//! Watches: the history as a stream.
//!
//! A watch reads its backend's log and is only woken by new versions, so that the log is its one
//! buffer: a slow watcher costs no memory, and falls behind the compaction instead.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::watch::Receiver;

use crate::key::Prefix;
use crate::{Entry, StoreError, Version};

/// A watch reads at most this many versions at once…
const BATCH_VERSIONS: usize = 256;
/// …and stops after the version that exceeds this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// What a version did to a key.
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

/// Everything that one version changed below the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The version.
    pub version: Version,
    /// Its changes in the order of their keys; never empty.
    pub changes: Vec<Change>,
}

/// The history below a prefix, one whole version after another: a [`Stream`] that goes on until it
/// fails.
///
/// Its first error is its end: [`StoreError::Compacted`] if the watcher was so slow that the history
/// it has yet to see is forgotten, [`StoreError::Closed`] if the store is gone, another if the backend
/// failed. The watcher goes on with a new watch: after [`seen_through`](Self::seen_through), or after
/// a new listing if the error [calls for that](StoreError::calls_for_relist).
pub struct Watch {
    read_through: Version,
    ready: VecDeque<WatchEvent>,
    source: BoxStream<'static, Result<WatchBatch, StoreError>>,
    ended: Option<StoreError>,
}

/// A piece of history, as a backend reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WatchBatch {
    /// What changed below the prefix, in the order of versions.
    pub events: Vec<WatchEvent>,
    /// The version that the piece goes up to, also if nothing below the prefix changed in it.
    pub through: Version,
}

/// A backend's history.
#[async_trait]
pub(crate) trait Log: Send + Sync {
    /// The changes below `prefix` after a version, as many as a [`Batch`] takes.
    async fn read(&self, prefix: &Prefix, after: Version) -> Result<Batch, StoreError>;
}

/// A bounded piece of history; it grows by whole versions.
#[derive(Debug)]
pub(crate) struct Batch {
    batch: WatchBatch,
    bytes: usize,
}

impl Batch {
    /// A piece of history that begins after a version, provided that the store, which is at
    /// `current` and has forgotten everything up to `compacted`, knows that history.
    pub(crate) fn begin(
        after: Version,
        compacted: Version,
        current: Version,
    ) -> Result<Self, StoreError> {
        if after < compacted {
            return Err(StoreError::Compacted { requested: after, oldest: compacted });
        }
        if after > current {
            return Err(StoreError::AheadOfStore { requested: after, current });
        }
        Ok(Self { batch: WatchBatch { events: Vec::new(), through: current }, bytes: 0 })
    }

    /// Adds the next change in the order of versions and keys. Answers `false`, without adding it,
    /// if it opens a version for which there is no room: the caller stops reading then.
    pub(crate) fn push(&mut self, version: Version, change: Change) -> bool {
        let bytes = change.bytes();
        let WatchBatch { events, through } = &mut self.batch;
        let is_full = self.bytes > BATCH_BYTES || events.len() == BATCH_VERSIONS;
        match events.last_mut() {
            Some(event) if event.version == version => event.changes.push(change),
            Some(event) if is_full => {
                *through = event.version;
                return false;
            }
            _ => events.push(WatchEvent { version, changes: vec![change] }),
        }
        self.bytes += bytes;
        true
    }
}

/// Where a watch stands in a backend's log.
struct Reader {
    log: Arc<dyn Log>,
    current: Receiver<Version>,
    prefix: Prefix,
    through: Version,
}

impl Reader {
    async fn read(&mut self) -> Result<WatchBatch, StoreError> {
        let Batch { batch, .. } = self.log.read(&self.prefix, self.through).await?;
        self.through = batch.through;
        Ok(batch)
    }

    /// Waits until there is more, and reads it.
    async fn read_more(&mut self) -> Result<WatchBatch, StoreError> {
        while *self.current.borrow_and_update() <= self.through {
            self.current.changed().await.map_err(|_| StoreError::Closed)?;
        }
        self.read().await
    }
}

impl Watch {
    /// A watch that tells what `source` reads after a version. It is over when `source` fails or
    /// ends.
    pub fn new(
        after: Version,
        source: impl Stream<Item = Result<WatchBatch, StoreError>> + Send + 'static,
    ) -> Self {
        Self { read_through: after, ready: VecDeque::new(), source: source.boxed(), ended: None }
    }

    /// A watch on a backend's log, woken by its current version.
    pub(crate) async fn open(
        log: Arc<dyn Log>,
        current: Receiver<Version>,
        prefix: Prefix,
        after: Version,
    ) -> Result<Self, StoreError> {
        let mut reader = Reader { log, current, prefix, through: after };
        let first = reader.read().await?;
        let rest = stream::unfold(reader, |mut reader| async {
            let batch = reader.read_more().await;
            Some((batch, reader))
        });
        let mut watch = Self::new(after, rest);
        watch.accept(first);
        Ok(watch)
    }

    /// Waits for the next version that changes something below the prefix. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// The watch has ended; every later call says so again.
    pub async fn next(&mut self) -> Result<WatchEvent, StoreError> {
        let next = std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context));
        match next.await {
            Some(event) => event,
            None => Err(self.ended.clone().unwrap_or(StoreError::Closed)),
        }
    }

    /// The version through which everything below the prefix was delivered. It moves on with the
    /// whole store, also while nothing changes below the prefix: a new watch after it goes on where
    /// this one stands.
    pub fn seen_through(&self) -> Version {
        match self.ready.front() {
            Some(event) => event.version.minus(1),
            None => self.read_through,
        }
    }

    fn accept(&mut self, batch: WatchBatch) {
        self.read_through = batch.through;
        self.ready.extend(batch.events);
    }
}

impl Stream for Watch {
    type Item = Result<WatchEvent, StoreError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.ended.is_some() {
                return Poll::Ready(None);
            }
            match ready!(self.source.poll_next_unpin(context)) {
                Some(Ok(batch)) => self.accept(batch),
                over => {
                    let error = over.and_then(Result::err).unwrap_or(StoreError::Closed);
                    self.ended = Some(error.clone());
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("read_through", &self.read_through)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
