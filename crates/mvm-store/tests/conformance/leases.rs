//! Leases: what goes away with its holder, and what does not.

use std::sync::Arc;
use std::time::Duration;

use mvm_store::{Change, CommitError, LeaseId, Store, StoreError, Transaction, Version, Watch};

use crate::Given;

crate::on_every_backend!(
    a_key_goes_away_with_a_lease_that_is_not_renewed,
    a_lease_that_is_kept_alive_outlasts_one_that_is_not,
    a_lease_that_is_revoked_takes_its_keys_along,
    a_put_decides_which_lease_a_key_has,
    a_lease_that_has_ended_is_refused_before_anything_happens,
    a_lease_without_keys_ends_without_a_version,
);

const TTL: Duration = Duration::from_secs(10);

async fn put(store: &dyn Store, key: &str, lease: Option<LeaseId>) -> Version {
    let transaction = match lease {
        Some(lease) => Transaction::new().put_leased(key, "", lease),
        None => Transaction::new().put(key, ""),
    };
    store.commit(transaction).await.unwrap().version
}

async fn watch(store: &dyn Store) -> Watch {
    store.watch("", store.version().await.unwrap()).await.unwrap()
}

async fn lease_of(store: &dyn Store, key: &str) -> Option<LeaseId> {
    store.get(key).await.unwrap().unwrap().lease
}

fn is_refused(result: Result<(), StoreError>, lease: LeaseId) -> bool {
    matches!(result, Err(StoreError::NoSuchLease { lease: l }) if l == lease)
}

async fn a_key_goes_away_with_a_lease_that_is_not_renewed(Given { store, clock }: Given) {
    let lease = store.grant(TTL).await.unwrap();
    let mut watch = watch(&*store).await;
    put(&*store, "a/held", Some(lease)).await;
    put(&*store, "b/held", Some(lease)).await;
    let last = put(&*store, "b/kept", None).await;
    assert_eq!(lease_of(&*store, "a/held").await, Some(lease));
    assert_eq!(lease_of(&*store, "b/kept").await, None);
    let Change::Put(entry) = &watch.next().await.unwrap().changes[0] else { panic!("a deletion") };
    assert_eq!(entry.lease, Some(lease));
    watch.next().await.unwrap();
    watch.next().await.unwrap();

    clock.advance(TTL);
    let event = watch.next().await.unwrap();
    assert_eq!(event.version.get(), last.get() + 1, "all at once");
    let gone = ["a/held", "b/held"].map(|key| Change::Delete { key: key.to_owned() });
    assert_eq!(event.changes, gone);
    let left = store.list("").await.unwrap().entries;
    assert_eq!(left.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["b/kept"]);
    assert!(is_refused(store.keep_alive(lease).await, lease));
}

async fn a_lease_that_is_kept_alive_outlasts_one_that_is_not(Given { store, clock }: Given) {
    let kept = store.grant(TTL).await.unwrap();
    let other = store.grant(TTL + Duration::from_secs(1)).await.unwrap();
    put(&*store, "kept", Some(kept)).await;
    put(&*store, "other", Some(other)).await;
    let mut watch = watch(&*store).await;
    clock.advance(TTL / 2);
    store.keep_alive(kept).await.unwrap();
    clock.advance(TTL / 2 + Duration::from_secs(1));
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "other");
    store.keep_alive(kept).await.unwrap();
    clock.advance(TTL);
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "kept");
}

async fn a_lease_that_is_revoked_takes_its_keys_along(store: Arc<dyn Store>) {
    let lease = store.grant(TTL).await.unwrap();
    put(&*store, "a", Some(lease)).await;
    let last = put(&*store, "b", Some(lease)).await;
    store.revoke(lease).await.unwrap();
    let listing = store.list("").await.unwrap();
    assert_eq!((listing.version.get(), listing.entries.len()), (last.get() + 1, 0));
    assert!(is_refused(store.revoke(lease).await, lease));
    let next = store.grant(TTL).await.unwrap();
    assert_ne!(next, lease, "a name is never given again");
}

async fn a_put_decides_which_lease_a_key_has(store: Arc<dyn Store>) {
    let one = store.grant(TTL).await.unwrap();
    let two = store.grant(TTL).await.unwrap();
    put(&*store, "freed", Some(one)).await;
    put(&*store, "freed", None).await;
    put(&*store, "moved", Some(one)).await;
    put(&*store, "moved", Some(two)).await;
    put(&*store, "anew", Some(one)).await;
    store.commit(Transaction::new().delete("anew")).await.unwrap();
    put(&*store, "anew", None).await;
    let before = store.list("").await.unwrap();
    store.revoke(one).await.unwrap();
    assert_eq!(store.list("").await.unwrap(), before);
    assert_eq!(lease_of(&*store, "moved").await, Some(two));
}

async fn a_lease_that_has_ended_is_refused_before_anything_happens(Given { store, clock }: Given) {
    let revoked = store.grant(TTL).await.unwrap();
    store.revoke(revoked).await.unwrap();
    let ended = store.grant(TTL).await.unwrap();
    clock.advance(TTL);
    for lease in [revoked, ended, LeaseId::new(4711)] {
        let transaction = Transaction::new().put("a", "").put_leased("b", "", lease);
        match store.commit(transaction).await {
            Err(CommitError::Store(error)) => assert!(is_refused(Err(error), lease)),
            other => panic!("{other:?}"),
        }
        assert!(is_refused(store.keep_alive(lease).await, lease));
    }
    assert_eq!(store.version().await.unwrap(), Version::ZERO);
}

async fn a_lease_without_keys_ends_without_a_version(store: Arc<dyn Store>) {
    let lease = store.grant(TTL).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(store.version().await.unwrap(), Version::ZERO);
}
