//! A store with injected faults, for tests and simulations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream;
use tokio::sync::watch;

use crate::{
    CommitError, Committed, Entry, LeaseId, Limits, Listing, Store, StoreError, Transaction,
    Version, Watch, WatchBatch,
};

/// What goes wrong with a commit.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It fails with this, and does not take place.
    Refused(StoreError),
    /// It is not answered, and does not take place.
    Lost,
    /// It takes place, and is not answered.
    Unacknowledged,
    /// It is not answered, and takes place [later](FaultyStore::deliver_late), if it still can.
    Late,
}

/// Another store, with faults.
pub struct FaultyStore {
    store: Arc<dyn Store>,
    faults: Mutex<Faults>,
    is_held: watch::Sender<bool>,
    /// Counts how often all watches broke.
    breaks: watch::Sender<u64>,
}

#[derive(Default)]
struct Faults {
    /// With the beginning of a key that the commit changes.
    coming: Vec<(String, Fault)>,
    late: Vec<Transaction>,
    is_cut_off: bool,
}

impl Faults {
    fn next(&mut self, transaction: &Transaction) -> Option<Fault> {
        let is_of = |(beginning, _): &(String, Fault)| {
            transaction.ops.iter().any(|op| op.key().starts_with(beginning))
        };
        let next = self.coming.iter().position(is_of)?;
        Some(self.coming.remove(next).1)
    }
}

impl FaultyStore {
    /// The store, without a fault for now.
    pub fn new(store: Arc<dyn Store>) -> Self {
        let (is_held, breaks) = (watch::Sender::default(), watch::Sender::default());
        Self { store, faults: Mutex::default(), is_held, breaks }
    }

    /// The next commit that has no fault yet has this one.
    pub fn inject(&self, fault: Fault) {
        self.inject_at("", fault);
    }

    /// The same for the next commit that changes a key that begins with this.
    pub fn inject_at(&self, beginning: &str, fault: Fault) {
        self.faults().coming.push((beginning.to_owned(), fault));
    }

    /// Whether commits wait until they no longer have to.
    pub fn hold(&self, is_held: bool) {
        self.is_held.send_replace(is_held);
    }

    /// Whether everything but the watches fails at once. A commit that is under way, or has a fault
    /// of its own, is as if it had been sent before.
    pub fn cut_off(&self, is_cut_off: bool) {
        self.faults().is_cut_off = is_cut_off;
    }

    /// All watches fail.
    pub fn break_watches(&self) {
        self.breaks.send_modify(|breaks| *breaks += 1);
    }

    /// The transactions that are [`Late`](Fault::Late) take place now, and say how that went.
    pub async fn deliver_late(&self) -> Vec<Result<Committed, CommitError>> {
        let late = std::mem::take(&mut self.faults().late);
        let mut outcomes = Vec::new();
        for transaction in late {
            outcomes.push(self.store.commit(transaction).await);
        }
        outcomes
    }

    fn reach(&self) -> Result<&dyn Store, StoreError> {
        match self.faults().is_cut_off {
            true => Err(no_answer()),
            false => Ok(&*self.store),
        }
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_answer() -> StoreError {
    let source = Arc::new(std::io::Error::other("there is no answer"));
    StoreError::Backend { operation: "reach the other side", path: "faulty".into(), source }
}

#[async_trait]
impl Store for FaultyStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.reach()?.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.reach()?.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
        let fault = self.faults().next(&transaction);
        let reached = self.reach().map(drop);
        // Without a sender there is nobody to wait for.
        let _ = self.is_held.subscribe().wait_for(|is_held| !is_held).await;
        match fault {
            None => {
                reached?;
                self.store.commit(transaction).await
            }
            Some(Fault::Refused(error)) => Err(error.into()),
            Some(Fault::Lost) => Err(no_answer().into()),
            Some(Fault::Unacknowledged) => {
                self.store.commit(transaction).await?;
                Err(no_answer().into())
            }
            Some(Fault::Late) => {
                self.faults().late.push(transaction);
                Err(no_answer().into())
            }
        }
    }

    async fn watch(&self, prefix: &str, after: Version) -> Result<Watch, StoreError> {
        let watch = self.reach()?.watch(prefix, after).await?;
        let state = (watch, self.breaks.subscribe());
        let batches = stream::unfold(state, |(mut watch, mut breaks)| async {
            let batch = tokio::select! {
                biased;
                _ = breaks.changed() => Err(no_answer()),
                event = watch.next() => event.map(|event| {
                    WatchBatch { events: vec![event], through: watch.seen_through() }
                }),
            };
            Some((batch, (watch, breaks)))
        });
        Ok(Watch::new(after, batches))
    }

    async fn version(&self) -> Result<Version, StoreError> {
        self.reach()?.version().await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.reach()?.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.reach()?.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.reach()?.revoke(lease).await
    }

    fn limits(&self) -> Limits {
        self.store.limits()
    }

    async fn compact(&self, keep: u64) -> Result<Version, StoreError> {
        self.reach()?.compact(keep).await
    }
}
