//! The store in memory, for tests and simulated fleets. It forgets everything when it is dropped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch::Sender;

use crate::compare::check_all;
use crate::key::{Prefix, check_key};
use crate::lease::{Holder, Leases};
use crate::watch::{Batch, Log};
use crate::{
    Change, CommitError, Committed, Entry, LeaseId, Limits, Listing, Op, Settings, Store,
    StoreError, Transaction, Version, Watch, WatchEvent,
};

/// A store in memory. Clones share their content.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    current: Sender<Version>,
    limits: Limits,
    leases: Arc<Leases>,
}

#[derive(Debug, Default)]
struct State {
    version: Version,
    last_lease: u64,
    compacted: Version,
    entries: BTreeMap<String, Entry>,
    log: VecDeque<WatchEvent>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::with(Settings::default())
    }

    /// An empty store with these settings.
    pub fn with(settings: Settings) -> Self {
        let Settings { limits, clock } = settings;
        let (state, current, leases) = (Mutex::default(), Sender::default(), Leases::new(clock));
        Self { shared: Arc::new(Shared { state, current, limits, leases }) }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        check_key(key)?;
        Ok(self.shared.lock().entries.get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = Prefix::parse(prefix)?;
        let state = self.shared.lock();
        let entries = state
            .entries
            .range(prefix.start().to_owned()..prefix.end())
            .map(|(_, entry)| entry.clone())
            .collect();
        Ok(Listing { version: state.version, entries })
    }

    async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
        transaction.validate(&self.shared.limits)?;
        let mut state = self.shared.lock();
        check_all(&transaction.compares, |key| {
            Ok(state.entries.get(key).map(|entry| entry.mod_version))
        })?;
        transaction.leases().try_for_each(|lease| self.shared.leases.require(lease))?;
        Ok(Committed { version: self.shared.apply(&mut state, transaction.ops) })
    }

    async fn watch(&self, prefix: &str, after: Version) -> Result<Watch, StoreError> {
        let prefix = Prefix::parse(prefix)?;
        let current = self.shared.current.subscribe();
        let history = History(Arc::downgrade(&self.shared));
        Watch::open(Arc::new(history), current, prefix, after).await
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(self.shared.lock().version)
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let mut state = self.shared.lock();
        state.last_lease += 1;
        let lease = LeaseId::new(state.last_lease);
        let holder = History(Arc::downgrade(&self.shared));
        self.shared.leases.begin(lease, ttl, holder);
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.leases.renew(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut state = self.shared.lock();
        self.shared.leases.require(lease)?;
        self.shared.end(&mut state, lease);
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.shared.limits
    }

    async fn compact(&self, keep: u64) -> Result<Version, StoreError> {
        let mut state = self.shared.lock();
        let compacted = state.compacted.max(state.version.minus(keep));
        state.compacted = compacted;
        let forgotten = state.log.partition_point(|event| event.version <= compacted);
        state.log.drain(..forgotten);
        Ok(compacted)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is changed only by code that cannot panic, so a poisoned lock is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, state: &mut State, ops: Vec<Op>) -> Version {
        let before = state.version;
        state.apply(ops);
        if state.version > before {
            // Sent under the lock, so that watchers never see the version go backwards.
            self.current.send_replace(state.version);
        }
        state.version
    }

    /// Ends a lease and its keys.
    fn end(&self, state: &mut State, lease: LeaseId) {
        let leased = state.entries.values().filter(|entry| entry.lease == Some(lease));
        let ops = leased.map(|entry| Op::Delete { key: entry.key.clone() }).collect();
        self.apply(state, ops);
        self.leases.end(lease);
    }
}

/// What a watch holds: it does not keep the store alive.
struct History(Weak<Shared>);

#[async_trait]
impl Log for History {
    async fn read(&self, prefix: &Prefix, after: Version) -> Result<Batch, StoreError> {
        let shared = self.0.upgrade().ok_or(StoreError::Closed)?;
        let state = shared.lock();
        let mut batch = Batch::begin(after, state.compacted, state.version)?;
        'history: for event in state.log_after(after) {
            for change in event.changes.iter().filter(|change| prefix.covers(change.key())) {
                if !batch.push(event.version, change.clone()) {
                    break 'history;
                }
            }
        }
        Ok(batch)
    }
}

#[async_trait]
impl Holder for History {
    async fn expire(&self, lease: LeaseId) -> Result<(), StoreError> {
        let shared = self.0.upgrade().ok_or(StoreError::Closed)?;
        let mut state = shared.lock();
        if shared.leases.require(lease).is_err() {
            shared.end(&mut state, lease);
        }
        Ok(())
    }
}

impl State {
    fn log_after(&self, after: Version) -> impl Iterator<Item = &WatchEvent> {
        let known = self.log.partition_point(|event| event.version <= after);
        self.log.range(known..)
    }

    /// Applies the operations as the next version, or none if they change nothing.
    fn apply(&mut self, ops: Vec<Op>) {
        let version = self.version.next();
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let create_version =
                        self.entries.get(&key).map_or(version, |entry| entry.create_version);
                    let mod_version = version;
                    let entry =
                        Entry { key: key.clone(), value, create_version, mod_version, lease };
                    changes.push(Change::Put(entry.clone()));
                    self.entries.insert(key, entry);
                }
                Op::Delete { key } => {
                    if self.entries.remove(&key).is_some() {
                        changes.push(Change::Delete { key });
                    }
                }
            }
        }
        if changes.is_empty() {
            return;
        }
        changes.sort_by(|a, b| a.key().cmp(b.key()));
        self.version = version;
        self.log.push_back(WatchEvent { version, changes });
    }
}
