//! The store in one SQLite file, the embedded default.
//!
//! One thread owns the connection and does all work in the order of its arrival; callers wait for
//! its answer without blocking their runtime. An acknowledged commit is on disk (write-ahead log,
//! `synchronous=FULL`); after a crash the file holds every acknowledged transaction and nothing of
//! any other, except perhaps the whole of the one that was under way.

mod database;
mod error;
mod open;
mod schema;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch::Receiver;

pub use error::OpenError;

use crate::key::{Prefix, check_key};
use crate::lease::{Holder, Leases};
use crate::watch::{Batch, Log};
use crate::{
    CommitError, Committed, Entry, LeaseId, Limits, Listing, Settings, Store, StoreError,
    Transaction, Version, Watch,
};
use database::Database;
use worker::{Jobs, Worker};

/// How long to wait for another process, such as an operator's `sqlite3`, to unlock the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A store in a SQLite file.
///
/// Dropping it finishes the work that is queued, which blocks for as long as that takes, and closes
/// the file; its watches end.
#[derive(Debug)]
pub struct SqliteStore {
    worker: Worker,
    current: Receiver<Version>,
    limits: Limits,
    leases: Arc<Leases>,
}

impl SqliteStore {
    /// Opens the store, or creates it with mode 0600 in a directory that exists. The file is
    /// checked for damage, and an older schema is brought up to date. Each lease's time starts anew.
    ///
    /// # Errors
    /// See [`OpenError`]. What the file holds is as it was before, but for the steps of a migration
    /// that were finished.
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self, OpenError> {
        Self::open_with(path, Settings::default()).await
    }

    /// The same with other settings.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub async fn open_with(
        path: impl Into<PathBuf>,
        settings: Settings,
    ) -> Result<Self, OpenError> {
        let path = path.into();
        let (sender, current) = tokio::sync::watch::channel(Version::ZERO);
        let Settings { limits, clock } = settings;
        let leases = Leases::new(clock);
        let known = leases.clone();
        let open = move || Database::open(path, BUSY_TIMEOUT, sender, known);
        let store = Self { worker: Worker::start(open).await?, current, limits, leases };
        let jobs = store.worker.jobs()?;
        for (lease, ttl) in jobs.run(|database| database.leases()).await?? {
            store.leases.begin(lease, ttl, jobs.clone());
        }
        Ok(store)
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        check_key(key)?;
        let key = key.to_owned();
        self.worker.jobs()?.run(move |database| database.get(&key)).await?
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = Prefix::parse(prefix)?;
        self.worker.jobs()?.run(move |database| database.list(&prefix)).await?
    }

    async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
        transaction.validate(&self.limits)?;
        self.worker.jobs()?.run(move |database| database.commit(&transaction)).await?
    }

    async fn watch(&self, prefix: &str, after: Version) -> Result<Watch, StoreError> {
        let prefix = Prefix::parse(prefix)?;
        let log = Arc::new(self.worker.jobs()?);
        Watch::open(log, self.current.clone(), prefix, after).await
    }

    async fn version(&self) -> Result<Version, StoreError> {
        self.worker.jobs()?.run(|database| database.version()).await?
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let jobs = self.worker.jobs()?;
        let lease = jobs.run(move |database| database.grant(ttl)).await??;
        self.leases.begin(lease, ttl, jobs);
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.leases.renew(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.worker.jobs()?.run(move |database| database.revoke(lease)).await?
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    async fn compact(&self, keep: u64) -> Result<Version, StoreError> {
        self.worker.jobs()?.run(move |database| database.compact(keep)).await?
    }
}

#[async_trait]
impl Holder for Jobs {
    async fn expire(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.run(move |database| database.expire(lease)).await?
    }
}

#[async_trait]
impl Log for Jobs {
    async fn read(&self, prefix: &Prefix, after: Version) -> Result<Batch, StoreError> {
        let prefix = prefix.clone();
        self.run(move |database| database.read_log(&prefix, after)).await?
    }
}
