//! What a store with injected faults does, so that others may rest on it.

use std::sync::Arc;

use mvm_store::{CommitError, Fault, FaultyStore, Store, StoreError, Transaction, Version};

crate::on_every_backend!(
    a_fault_does_what_it_says,
    a_store_that_is_cut_off_fails_and_is_as_it_was_afterwards,
    a_watch_that_broke_is_gone_on_from,
);

async fn a_fault_does_what_it_says(store: Arc<dyn Store>) {
    let store = FaultyStore::new(store);
    let put = |key: &str| store.commit(Transaction::new().require_absent(key).put(key, ""));
    let exists = async |key| store.get(key).await.unwrap().is_some();
    store.inject(Fault::Refused(StoreError::DiskFull { path: "/".into() }));
    store.inject(Fault::Lost);
    store.inject(Fault::Unacknowledged);
    store.inject(Fault::Late);
    let refused = put("refused").await.unwrap_err();
    assert!(matches!(refused, CommitError::Store(StoreError::DiskFull { .. })), "{refused}");
    assert!(!refused.may_have_happened());
    store.inject_at("not/", Fault::Lost);
    for key in ["lost", "unacknowledged", "late"] {
        let error = put(key).await.unwrap_err();
        assert!(error.may_have_happened(), "{error}");
        assert_eq!(exists(key).await, key == "unacknowledged", "{key}");
    }
    put("fine").await.unwrap();
    // What comes late is still checked.
    store.inject(Fault::Late);
    put("later").await.unwrap_err();
    put("later").await.unwrap();
    let outcomes = store.deliver_late().await;
    assert!(outcomes[0].is_ok() && exists("late").await);
    assert!(matches!(outcomes[1], Err(CommitError::Conflict(_))), "{outcomes:?}");
    assert!(store.deliver_late().await.is_empty());
}

async fn a_store_that_is_cut_off_fails_and_is_as_it_was_afterwards(store: Arc<dyn Store>) {
    let store = FaultyStore::new(store);
    store.cut_off(true);
    let error = store.commit(Transaction::new().put("a", "")).await.unwrap_err();
    assert!(error.may_have_happened(), "{error}");
    assert!(store.list("").await.is_err());
    assert!(store.watch("", Version::ZERO).await.is_err());
    store.cut_off(false);
    assert_eq!(store.version().await.unwrap(), Version::ZERO);
}

async fn a_watch_that_broke_is_gone_on_from(store: Arc<dyn Store>) {
    let store = FaultyStore::new(store);
    let mut watch = store.watch("", Version::ZERO).await.unwrap();
    store.commit(Transaction::new().put("a", "")).await.unwrap();
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "a");
    store.break_watches();
    store.commit(Transaction::new().put("b", "")).await.unwrap();
    let error = watch.next().await.unwrap_err();
    assert!(!error.calls_for_relist(), "{error}");
    let mut watch = store.watch("", watch.seen_through()).await.unwrap();
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "b");
}
