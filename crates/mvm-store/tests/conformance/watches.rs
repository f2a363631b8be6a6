//! Watches: order, replay, whole versions, and what happens to those that fall behind.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt;
use mvm_store::{Change, Store, StoreError, Transaction, Version, Watch};

crate::on_every_backend!(
    a_watch_replays_history_and_goes_on_live,
    a_watch_after_a_listing_misses_nothing_and_repeats_nothing,
    a_version_arrives_whole_and_in_the_order_of_keys,
    a_watch_sees_its_prefix_only,
    a_watch_on_a_quiet_prefix_keeps_up_with_the_store,
    a_long_and_heavy_history_arrives_complete,
    a_watcher_that_falls_behind_the_compaction_is_told_to_list_again,
    compaction_keeps_what_it_was_asked_to_keep,
    a_watch_cannot_start_in_forgotten_history_or_in_the_future,
    a_watch_dropped_in_the_middle_of_waiting_loses_nothing,
    many_watchers_see_the_same_history,
    a_new_watch_goes_on_where_another_stands,
    a_watch_ends_with_its_store,
    a_watch_is_a_stream_whose_error_is_its_end,
);

async fn put(store: &dyn Store, key: &str, value: &str) -> Version {
    store.commit(Transaction::new().put(key, value)).await.unwrap().version
}

/// Succeeds once the watch has seen all of the store's history without anything to tell.
async fn nothing_more(watch: &mut Watch, store: &dyn Store) {
    let current = store.version().await.unwrap();
    let all_seen = async {
        while watch.seen_through() < current {
            let patience = Duration::from_millis(5);
            if let Ok(event) = tokio::time::timeout(patience, watch.next()).await {
                panic!("unexpected {event:?}");
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all_seen).await.expect("the watch stands still");
}

async fn a_watch_replays_history_and_goes_on_live(store: Arc<dyn Store>) {
    let one = put(&*store, "a", "1").await;
    let two = store.commit(Transaction::new().delete("a")).await.unwrap().version;
    let mut watch = store.watch("", Version::ZERO).await.unwrap();

    let event = watch.next().await.unwrap();
    assert_eq!(event.version, one);
    let [Change::Put(entry)] = event.changes.as_slice() else { panic!("{event:?}") };
    assert_eq!((entry.key.as_str(), entry.value.as_slice()), ("a", b"1".as_slice()));
    assert_eq!((entry.create_version, entry.mod_version), (one, one));
    let event = watch.next().await.unwrap();
    assert_eq!(event.version, two);
    assert_eq!(event.changes, [Change::Delete { key: "a".to_owned() }]);

    let waiting = tokio::spawn(async move { watch.next().await.unwrap() });
    let three = put(&*store, "a", "3").await;
    let event = waiting.await.unwrap();
    assert_eq!(event.version, three);
    let [Change::Put(entry)] = event.changes.as_slice() else { panic!("{event:?}") };
    assert_eq!((entry.create_version, entry.mod_version), (three, three));
}

async fn a_watch_after_a_listing_misses_nothing_and_repeats_nothing(store: Arc<dyn Store>) {
    put(&*store, "a", "listed").await;
    let listing = store.list("").await.unwrap();
    let next = put(&*store, "b", "between").await;
    let mut watch = store.watch("", listing.version).await.unwrap();
    let event = watch.next().await.unwrap();
    assert_eq!((event.version, event.changes[0].key()), (next, "b"));
    nothing_more(&mut watch, &*store).await;
}

async fn a_version_arrives_whole_and_in_the_order_of_keys(store: Arc<dyn Store>) {
    put(&*store, "m/gone", "").await;
    let mut watch = store.watch("m/", store.version().await.unwrap()).await.unwrap();
    let several = Transaction::new()
        .put("m/z", "")
        .delete("m/gone")
        .put("m/a", "")
        .delete("m/never-there")
        .put("other", "");
    let version = store.commit(several).await.unwrap().version;
    let event = watch.next().await.unwrap();
    assert_eq!(event.version, version);
    let keys: Vec<_> = event.changes.iter().map(Change::key).collect();
    assert_eq!(keys, ["m/a", "m/gone", "m/z"]);
}

async fn a_watch_sees_its_prefix_only(store: Arc<dyn Store>) {
    let mut watch = store.watch("a/", Version::ZERO).await.unwrap();
    for key in ["a", "a-/x", "a0", "b/a/x"] {
        put(&*store, key, "").await;
    }
    nothing_more(&mut watch, &*store).await;
    let mine = put(&*store, "a/x", "").await;
    assert_eq!(watch.next().await.unwrap().version, mine);
}

async fn a_watch_on_a_quiet_prefix_keeps_up_with_the_store(store: Arc<dyn Store>) {
    let mut watch = store.watch("quiet/", Version::ZERO).await.unwrap();
    for _ in 0..10 {
        put(&*store, "busy", "").await;
        nothing_more(&mut watch, &*store).await;
        store.compact(0).await.unwrap();
    }
    let mine = put(&*store, "quiet/x", "").await;
    assert_eq!(watch.next().await.unwrap().version, mine);
}

async fn a_long_and_heavy_history_arrives_complete(store: Arc<dyn Store>) {
    // More versions and more bytes than a watch reads at once.
    const VERSIONS: u64 = 600;
    for number in 1..=VERSIONS {
        let bytes = if number % 50 == 0 { 400_000 } else { 10 };
        let value = vec![0; bytes];
        store.commit(Transaction::new().put("a", value.clone()).put("b", value)).await.unwrap();
    }
    let mut watch = store.watch("", Version::ZERO).await.unwrap();
    for number in 1..=VERSIONS {
        let event = watch.next().await.unwrap();
        assert_eq!((event.version, event.changes.len()), (Version::new(number), 2));
    }
    nothing_more(&mut watch, &*store).await;
}

async fn a_watcher_that_falls_behind_the_compaction_is_told_to_list_again(store: Arc<dyn Store>) {
    let mut slow = store.watch("", Version::ZERO).await.unwrap();
    for _ in 0..10 {
        put(&*store, "a", "").await;
    }
    let oldest = store.compact(3).await.unwrap();
    assert_eq!(oldest, Version::new(7));
    for _ in 0..2 {
        let error = slow.next().await.unwrap_err();
        assert!(error.calls_for_relist(), "{error:?}");
        assert!(
            matches!(error, StoreError::Compacted { requested: Version::ZERO, oldest: o }
                if o == oldest),
            "{error:?}"
        );
    }
    let listing = store.list("").await.unwrap();
    let mut fresh = store.watch("", listing.version).await.unwrap();
    let next = put(&*store, "a", "").await;
    assert_eq!(fresh.next().await.unwrap().version, next);
}

async fn compaction_keeps_what_it_was_asked_to_keep(store: Arc<dyn Store>) {
    for number in 0..10 {
        put(&*store, &format!("k/{number}"), "").await;
    }
    assert_eq!(store.compact(100).await.unwrap(), Version::ZERO);
    assert_eq!(store.compact(4).await.unwrap(), Version::new(6));
    assert_eq!(store.compact(8).await.unwrap(), Version::new(6), "nothing comes back");
    let mut watch = store.watch("", Version::new(6)).await.unwrap();
    for number in 7..=10 {
        assert_eq!(watch.next().await.unwrap().version, Version::new(number));
    }
    assert_eq!(store.list("").await.unwrap().entries.len(), 10);
    assert_eq!(store.version().await.unwrap(), Version::new(10));
}

async fn a_watch_cannot_start_in_forgotten_history_or_in_the_future(store: Arc<dyn Store>) {
    put(&*store, "a", "").await;
    put(&*store, "a", "").await;
    store.compact(1).await.unwrap();
    let error = store.watch("", Version::ZERO).await.unwrap_err();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error:?}");
    let error = store.watch("", Version::new(3)).await.unwrap_err();
    assert!(matches!(error, StoreError::AheadOfStore { .. }), "{error:?}");
    assert!(error.calls_for_relist());
    store.watch("", Version::new(2)).await.unwrap();
    assert!(store.watch("a", Version::new(2)).await.is_err());
}

async fn a_watch_dropped_in_the_middle_of_waiting_loses_nothing(store: Arc<dyn Store>) {
    const VERSIONS: u64 = 50;
    let mut watch = store.watch("", Version::ZERO).await.unwrap();
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for _ in 0..VERSIONS {
                put(&*store, "a", "").await;
            }
        }
    });
    let mut expected = 1;
    while expected <= VERSIONS {
        let polled_once = {
            let mut next = std::pin::pin!(watch.next());
            std::future::poll_fn(|context| Poll::Ready(next.as_mut().poll(context))).await
        };
        let event = match polled_once {
            Poll::Ready(event) => event,
            Poll::Pending => watch.next().await,
        };
        assert_eq!(event.unwrap().version, Version::new(expected));
        expected += 1;
    }
    writer.await.unwrap();
}

async fn many_watchers_see_the_same_history(store: Arc<dyn Store>) {
    const VERSIONS: u64 = 100;
    let mut readers = Vec::new();
    for _ in 0..8 {
        let mut watch = store.watch("", Version::ZERO).await.unwrap();
        readers.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            while seen.len() < VERSIONS as usize {
                seen.push(watch.next().await.unwrap());
            }
            seen
        }));
    }
    for number in 0..VERSIONS {
        put(&*store, &format!("k/{}", number % 7), &number.to_string()).await;
    }
    let mut histories = Vec::new();
    for reader in readers {
        histories.push(reader.await.unwrap());
    }
    assert!(histories.iter().all(|history| *history == histories[0]));
    let versions: Vec<_> = histories[0].iter().map(|event| event.version.get()).collect();
    assert_eq!(versions, (1..=VERSIONS).collect::<Vec<_>>());
}

async fn a_new_watch_goes_on_where_another_stands(store: Arc<dyn Store>) {
    for key in ["a/1", "b/1", "a/2", "b/2", "b/3", "a/3", "b/4"] {
        put(&*store, key, "").await;
    }
    let mut keys = Vec::new();
    let mut stands_at = Version::ZERO;
    for _ in 0..3 {
        let mut watch = store.watch("a/", stands_at).await.unwrap();
        keys.push(watch.next().await.unwrap().changes[0].key().to_owned());
        stands_at = watch.seen_through();
    }
    assert_eq!(keys, ["a/1", "a/2", "a/3"]);
    assert_eq!(stands_at, store.version().await.unwrap(), "it has nothing more to tell");
}

async fn a_watch_ends_with_its_store(store: Arc<dyn Store>) {
    let mut watch = store.watch("", Version::ZERO).await.unwrap();
    drop(store);
    let error = watch.next().await.unwrap_err();
    assert!(matches!(error, StoreError::Closed), "{error:?}");
}

async fn a_watch_is_a_stream_whose_error_is_its_end(store: Arc<dyn Store>) {
    let watch = store.watch("a/", Version::ZERO).await.unwrap();
    let one = put(&*store, "a/1", "").await;
    put(&*store, "b", "").await;
    let two = put(&*store, "a/2", "").await;
    let told: Vec<_> = watch.take(2).map(|event| event.unwrap().version).collect().await;
    assert_eq!(told, [one, two]);

    let behind = store.watch("a/", Version::ZERO).await.unwrap();
    // What it has read by now is told, and then what it missed.
    put(&*store, "a/3", "").await;
    store.compact(0).await.unwrap();
    let mut told: Vec<_> = behind.collect().await;
    assert!(told.pop().unwrap().unwrap_err().calls_for_relist());
    let told: Vec<_> = told.into_iter().map(|event| event.unwrap().version).collect();
    assert_eq!(told, [one, two]);
}
