//! Compare-and-swap, atomicity, versions and limits.

use std::sync::Arc;

use mvm_store::{
    CommitError, Compare, Conflict, Found, Limits, Store, StoreError, Transaction, Version,
    scope_key,
};

crate::on_every_backend!(
    an_empty_store_is_at_version_zero,
    a_put_is_read_back_with_its_versions,
    a_deletion_ends_the_life_of_a_key,
    a_listing_is_ordered_and_bounded_by_its_prefix,
    a_transaction_is_one_version,
    a_transaction_without_effect_takes_no_version,
    a_swap_succeeds_only_at_the_compared_version,
    a_creation_succeeds_only_once,
    a_failed_compare_leaves_everything_as_it_was,
    a_decision_on_a_scope_holds_until_somebody_bumps_it,
    a_transaction_may_be_as_large_as_its_limits,
    limits_and_grammar_are_enforced_before_anything_happens,
);

fn conflict(result: Result<mvm_store::Committed, CommitError>) -> Conflict {
    match result {
        Err(CommitError::Conflict(conflict)) => conflict,
        other => panic!("expected a conflict, got {other:?}"),
    }
}

async fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    let listing = store.list(prefix).await.unwrap();
    listing.entries.into_iter().map(|entry| entry.key).collect()
}

async fn an_empty_store_is_at_version_zero(store: Arc<dyn Store>) {
    assert_eq!(store.version().await.unwrap(), Version::ZERO);
    assert_eq!(store.get("a").await.unwrap(), None);
    let listing = store.list("").await.unwrap();
    assert_eq!((listing.version, listing.entries.len()), (Version::ZERO, 0));
}

async fn a_put_is_read_back_with_its_versions(store: Arc<dyn Store>) {
    let first = store.commit(Transaction::new().put("a", "one")).await.unwrap().version;
    store.commit(Transaction::new().put("b", "other")).await.unwrap();
    let third = store.commit(Transaction::new().put("a", [0u8, 255])).await.unwrap().version;

    assert_eq!((first, third), (Version::new(1), Version::new(3)));
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!(entry.key, "a");
    assert_eq!(entry.value, [0, 255]);
    assert_eq!((entry.create_version, entry.mod_version), (first, third));
    assert_eq!(store.version().await.unwrap(), third);
}

async fn a_deletion_ends_the_life_of_a_key(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put("a", "one")).await.unwrap();
    store.commit(Transaction::new().delete("a")).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);

    let again = store.commit(Transaction::new().put("a", "")).await.unwrap().version;
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!((entry.create_version, entry.mod_version), (again, again));
    assert!(entry.value.is_empty());
}

async fn a_listing_is_ordered_and_bounded_by_its_prefix(store: Arc<dyn Store>) {
    let all = ["t/a", "t/a-b", "t/a/1", "t/a/2/x", "t/a0", "t/b/1", "u"];
    for key in all.iter().rev() {
        store.commit(Transaction::new().put(*key, "")).await.unwrap();
    }
    assert_eq!(keys(&*store, "").await, all);
    assert_eq!(keys(&*store, "t/a/").await, ["t/a/1", "t/a/2/x"]);
    assert_eq!(keys(&*store, "u/").await, [""; 0]);
    assert_eq!(store.list("u/").await.unwrap().version, Version::new(all.len() as u64));
    assert!(matches!(store.list("t/a").await, Err(StoreError::InvalidKey { .. })));
}

async fn a_transaction_is_one_version(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put("old", "")).await.unwrap();
    let both = Transaction::new().put("b", "").put("a", "").delete("old");
    let version = store.commit(both).await.unwrap().version;
    assert_eq!(version, Version::new(2));
    let listing = store.list("").await.unwrap();
    let found: Vec<_> = listing.entries.iter().map(|e| (e.key.as_str(), e.mod_version)).collect();
    assert_eq!(found, [("a", version), ("b", version)]);
}

async fn a_transaction_without_effect_takes_no_version(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put("a", "")).await.unwrap();
    for idle in [
        Transaction::new(),
        Transaction::new().require_absent("b"),
        Transaction::new().delete("b").delete("c"),
    ] {
        assert_eq!(store.commit(idle).await.unwrap().version, Version::new(1));
    }
    // The same bytes again are a change nevertheless: somebody wrote them now.
    let same = store.commit(Transaction::new().put("a", "")).await.unwrap();
    assert_eq!(same.version, Version::new(2));
}

async fn a_swap_succeeds_only_at_the_compared_version(store: Arc<dyn Store>) {
    let one = store.commit(Transaction::new().put("a", "one")).await.unwrap().version;
    let swap = |version, value: &str| {
        store.commit(Transaction::new().require_version("a", version).put("a", value))
    };
    let two = swap(one, "two").await.unwrap().version;

    let failed = conflict(swap(one, "three").await);
    assert_eq!(failed.compare, Compare::ModVersion { key: "a".to_owned(), version: one });
    assert_eq!(failed.found, Found::ChangedAt(two));
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"two");

    store.commit(Transaction::new().require_version("a", two).delete("a")).await.unwrap();
    assert_eq!(conflict(swap(two, "four").await).found, Found::Absent);
    assert_eq!(store.get("a").await.unwrap(), None);
}

async fn a_creation_succeeds_only_once(store: Arc<dyn Store>) {
    let create = || store.commit(Transaction::new().require_absent("a").put("a", ""));
    let one = create().await.unwrap().version;
    assert_eq!(conflict(create().await).found, Found::ChangedAt(one));
}

async fn a_failed_compare_leaves_everything_as_it_was(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put("a", "1").put("b", "1")).await.unwrap();
    let before = store.list("").await.unwrap();
    let failed = conflict(
        store
            .commit(
                Transaction::new()
                    .require_version("a", Version::new(1))
                    .require_absent("c")
                    .require_absent("b")
                    .put("a", "2")
                    .put("c", "2")
                    .delete("b"),
            )
            .await,
    );
    assert_eq!(failed.compare, Compare::Absent { key: "b".to_owned() });
    assert_eq!(store.list("").await.unwrap(), before);
    let mut watch = store.watch("", before.version).await.unwrap();
    store.commit(Transaction::new().put("d", "")).await.unwrap();
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "d");
}

async fn a_decision_on_a_scope_holds_until_somebody_bumps_it(store: Arc<dyn Store>) {
    let seen = async || {
        let entry = store.get(&scope_key("pool")).await.unwrap();
        entry.map(|entry| entry.mod_version)
    };
    let decide = |since| Transaction::new().require_scope("pool", since).bump("pool", "");
    assert_eq!(seen().await, None, "nobody ever did");
    let one = store.commit(decide(None).put("pool/a", "")).await.unwrap().version;
    let late = store.commit(decide(None).put("pool/b", "")).await;
    assert_eq!(conflict(late).found, Found::ChangedAt(one));

    // Deletions are changes, although no entry is left to show them; what is forgotten is no matter.
    let since = seen().await;
    store.commit(Transaction::new().put("elsewhere", "")).await.unwrap();
    let deletion = Transaction::new().delete("pool/a").bump("pool", "somebody");
    let deleted = store.commit(deletion).await.unwrap().version;
    store.compact(0).await.unwrap();
    let late = store.commit(decide(since).put("pool/c", "")).await;
    assert_eq!(conflict(late).found, Found::ChangedAt(deleted));
    assert_eq!(keys(&*store, "pool/").await, [""; 0]);

    store.commit(decide(seen().await).put("pool/c", "")).await.unwrap();
    assert_eq!(keys(&*store, "pool/").await, ["pool/c"]);
}

async fn a_transaction_may_be_as_large_as_its_limits(store: Arc<dyn Store>) {
    let Limits { items, value_bytes, .. } = store.limits();
    let mut many = Transaction::new();
    for number in 0..items {
        many = many.require_absent(format!("k/{number}")).put(format!("k/{number}"), "");
    }
    assert_eq!(store.commit(many).await.unwrap().version, Version::new(1));
    assert_eq!(store.list("k/").await.unwrap().entries.len(), items);
    store.commit(Transaction::new().put("large", vec![0; value_bytes])).await.unwrap();
}

async fn limits_and_grammar_are_enforced_before_anything_happens(store: Arc<dyn Store>) {
    let refused = |transaction: Transaction| async {
        match store.commit(transaction.put("witness", "")).await {
            Err(CommitError::Store(error)) => error,
            other => panic!("expected a refusal, got {other:?}"),
        }
    };
    let limits = store.limits();
    let error = refused(Transaction::new().put("a", vec![0; limits.value_bytes + 1])).await;
    assert!(matches!(error, StoreError::ValueTooLarge { .. }), "{error:?}");

    let mut heavy = Transaction::new();
    for number in 0..=limits.bytes / limits.value_bytes {
        heavy = heavy.put(format!("heavy/{number}"), vec![0; limits.value_bytes]);
    }
    let error = refused(heavy).await;
    assert!(matches!(error, StoreError::TransactionTooLarge { .. }), "{error:?}");

    let (mut long, mut careful) = (Transaction::new(), Transaction::new());
    for number in 0..limits.items {
        long = long.delete(format!("long/{number}"));
        careful = careful.require_absent(format!("long/{number}"));
    }
    let error = refused(long).await;
    assert_eq!(error.to_string(), "a transaction has 129 operations, more than 128");
    let error = refused(careful.require_absent("one more")).await;
    assert_eq!(error.to_string(), "a transaction has 129 compares, more than 128");

    let error = refused(Transaction::new().put("a", "").delete("a")).await;
    assert!(matches!(error, StoreError::DuplicateKey { .. }), "{error:?}");
    for bad in ["", "a/", "/a", "a//b", "a b"] {
        let error = refused(Transaction::new().delete(bad)).await;
        assert!(matches!(error, StoreError::InvalidKey { .. }), "{bad:?}: {error:?}");
        assert!(store.get(bad).await.is_err(), "{bad:?}");
    }
    let error = refused(Transaction::new().require_absent("a/")).await;
    assert!(matches!(error, StoreError::InvalidKey { .. }), "{error:?}");

    assert_eq!(store.version().await.unwrap(), Version::ZERO);
}
