//! Many writers at once.

use std::sync::Arc;

use mvm_store::{CommitError, Store, Transaction, Version};

crate::on_every_backend!(
    counters_incremented_by_many_tasks_end_at_the_exact_sum,
    of_many_decisions_on_one_scope_exactly_one_wins,
);

const TASKS: u64 = 16;
const INCREMENTS: u64 = 25;

async fn increment(store: &dyn Store) {
    loop {
        let entry = store.get("counter").await.unwrap();
        let transaction = match &entry {
            Some(entry) => Transaction::new().require_version("counter", entry.mod_version),
            None => Transaction::new().require_absent("counter"),
        };
        let count = entry.map_or(0, |entry| parse(&entry.value));
        match store.commit(transaction.put("counter", (count + 1).to_string())).await {
            Ok(_) => return,
            Err(CommitError::Conflict(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

fn parse(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

/// Runs on threads of its own: tasks of a current-thread runtime take turns only where they wait.
fn in_parallel(test: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
    tokio::task::spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build();
        let runtime = runtime.unwrap();
        runtime.block_on(async { tokio::spawn(test).await.unwrap() });
    })
}

async fn counters_incremented_by_many_tasks_end_at_the_exact_sum(store: Arc<dyn Store>) {
    in_parallel(async move {
        let mut watch = store.watch("", Version::ZERO).await.unwrap();
        let tasks: Vec<_> = (0..TASKS)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move {
                    for _ in 0..INCREMENTS {
                        increment(&*store).await;
                    }
                })
            })
            .collect();
        // Meanwhile a watcher sees every value once, in order.
        for expected in 1..=TASKS * INCREMENTS {
            let event = watch.next().await.unwrap();
            assert_eq!(event.version, Version::new(expected));
            let [mvm_store::Change::Put(entry)] = event.changes.as_slice() else {
                panic!("{event:?}")
            };
            assert_eq!(parse(&entry.value), expected);
        }
        for task in tasks {
            task.await.unwrap();
        }
        let counter = store.get("counter").await.unwrap().unwrap();
        assert_eq!(parse(&counter.value), TASKS * INCREMENTS);
        assert_eq!(counter.create_version, Version::new(1));
    })
    .await
    .unwrap();
}

async fn of_many_decisions_on_one_scope_exactly_one_wins(store: Arc<dyn Store>) {
    in_parallel(async move {
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let store = store.clone();
                tokio::spawn(async move {
                    let guarded = Transaction::new().require_scope("pool", None);
                    store.commit(guarded.bump("pool", "").put(format!("pool/{task}"), "")).await
                })
            })
            .collect();
        let mut winners = 0;
        for task in tasks {
            match task.await.unwrap() {
                Ok(_) => winners += 1,
                Err(error) => assert!(error.conflict().is_some(), "{error}"),
            }
        }
        assert_eq!(winners, 1);
        assert_eq!(store.list("pool/").await.unwrap().entries.len(), 1);
    })
    .await
    .unwrap();
}
