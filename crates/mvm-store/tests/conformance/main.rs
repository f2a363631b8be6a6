//! What every store does, run on every backend at the limits of the strictest.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod concurrency;
mod model;
mod transactions;
mod typed;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use mvm_store::{Limits, MemoryStore, SqliteStore, Store};
use tempfile::TempDir;

/// An empty store, and the directory that it lives in, if any.
struct Fixture {
    store: Arc<dyn Store>,
    _directory: Option<TempDir>,
}

async fn memory() -> Fixture {
    Fixture { store: Arc::new(MemoryStore::with_limits(Limits::ETCD)), _directory: None }
}

async fn sqlite() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let store =
        SqliteStore::open_with_limits(directory.path().join("mvm.db"), Limits::ETCD).await.unwrap();
    Fixture { store: Arc::new(store), _directory: Some(directory) }
}

/// Fails if a behaviour waits for what never comes.
async fn in_time(behaviour: impl Future<Output = ()>) {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, behaviour).await.expect("the store kept a test waiting");
}

/// Makes a test on each backend of each behaviour, a function that takes an empty store.
macro_rules! on_every_backend {
    ($($behaviour:ident),* $(,)?) => {
        mod on_memory {
            $(#[tokio::test]
            async fn $behaviour() {
                let fixture = crate::memory().await;
                crate::in_time(super::$behaviour(fixture.store)).await;
            })*
        }
        mod on_sqlite {
            $(#[tokio::test]
            async fn $behaviour() {
                let fixture = crate::sqlite().await;
                crate::in_time(super::$behaviour(fixture.store)).await;
            })*
        }
    };
}
pub(crate) use on_every_backend;
