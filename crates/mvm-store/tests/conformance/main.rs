//! What every store does, run on every backend at the limits of the strictest.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod concurrency;
mod faults;
mod leases;
mod mirrored;
mod model;
mod transactions;
mod typed;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use mvm_store::{Limits, ManualClock, MemoryStore, Settings, SqliteStore, Store};
use tempfile::TempDir;

/// An empty store, and the clock that it counts leases by.
struct Given {
    store: Arc<dyn Store>,
    clock: Arc<ManualClock>,
}

impl From<Given> for Arc<dyn Store> {
    fn from(given: Given) -> Self {
        given.store
    }
}

/// What a test is given, and the directory that it lives in, if any.
struct Fixture {
    given: Given,
    _directory: Option<TempDir>,
}

fn settings() -> (Settings, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    (Settings { limits: Limits::ETCD, clock: clock.clone() }, clock)
}

async fn memory() -> Fixture {
    let (settings, clock) = settings();
    let store = Arc::new(MemoryStore::with(settings));
    Fixture { given: Given { store, clock }, _directory: None }
}

async fn sqlite() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let (settings, clock) = settings();
    let path = directory.path().join("mvm.db");
    let store = Arc::new(SqliteStore::open_with(path, settings).await.unwrap());
    Fixture { given: Given { store, clock }, _directory: Some(directory) }
}

/// Fails if a behaviour waits for what never comes.
async fn in_time(behaviour: impl Future<Output = ()>) {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, behaviour).await.expect("the store kept a test waiting");
}

/// Makes a test on each backend of each behaviour, a function that takes an empty store, or
/// [`Given`] with it.
macro_rules! on_every_backend {
    ($($behaviour:ident),* $(,)?) => {
        mod on_memory {
            $(#[tokio::test]
            async fn $behaviour() {
                let fixture = crate::memory().await;
                crate::in_time(super::$behaviour(fixture.given.into())).await;
            })*
        }
        mod on_sqlite {
            $(#[tokio::test]
            async fn $behaviour() {
                let fixture = crate::sqlite().await;
                crate::in_time(super::$behaviour(fixture.given.into())).await;
            })*
        }
    };
}
pub(crate) use on_every_backend;
