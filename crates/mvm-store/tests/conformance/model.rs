//! Random histories against an independent model that keeps every state the store ever had.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_store::{
    Change, CommitError, Compare, Entry, Op, Revision, Store, StoreError, Transaction,
};
use proptest::prelude::*;

/// `key -> (value, create_revision, mod_revision)`.
type State = BTreeMap<String, (Vec<u8>, u64, u64)>;

/// `states[r]` is the content at revision `r`; what changed is found by comparing neighbours.
struct Model {
    states: Vec<State>,
    compacted: u64,
}

#[derive(Debug, Clone)]
enum Step {
    Commit(Transaction),
    Compact(u64),
    List(String),
    /// Watches from the start of the known history plus so much.
    Watch(String, u64),
}

impl Model {
    fn current(&self) -> u64 {
        self.states.len() as u64 - 1
    }

    fn content(&self) -> &State {
        self.states.last().unwrap()
    }

    fn changes(&self, revision: u64, prefix: &str) -> Vec<Change> {
        let (before, after) =
            (&self.states[revision as usize - 1], &self.states[revision as usize]);
        let mut changes = BTreeMap::new();
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            changes.insert(key, Change::Delete { key: key.clone() });
        }
        for (key, stored) in after.iter().filter(|(_, (_, _, modified))| *modified == revision) {
            changes.insert(key, Change::Put(entry(key, stored)));
        }
        changes.retain(|key, _| key.starts_with(prefix));
        changes.into_values().collect()
    }

    fn holds(&self, compare: &Compare) -> bool {
        let at = |key: &String| self.content().get(key).map(|(_, _, modified)| *modified);
        match compare {
            Compare::ModRevision { key, revision } => at(key) == Some(revision.get()),
            Compare::Absent { key } => at(key).is_none(),
        }
    }

    /// The expected revision, or `None` for a conflict.
    fn commit(&mut self, transaction: &Transaction) -> Option<u64> {
        if !transaction.compares.iter().all(|compare| self.holds(compare)) {
            return None;
        }
        let revision = self.current() + 1;
        let mut next = self.content().clone();
        for op in &transaction.ops {
            match op {
                Op::Put { key, value } => {
                    let created = next.get(key).map_or(revision, |(_, created, _)| *created);
                    next.insert(key.clone(), (value.clone(), created, revision));
                }
                Op::Delete { key } => drop(next.remove(key)),
            }
        }
        if next != *self.content() {
            self.states.push(next);
        }
        Some(self.current())
    }
}

fn entry(key: &str, (value, created, modified): &(Vec<u8>, u64, u64)) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.clone(),
        create_revision: Revision::new(*created),
        mod_revision: Revision::new(*modified),
    }
}

fn keys() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "a/b", "a/b/c", "a/c", "a0", "b/a", "b/b"])
        .prop_map(str::to_owned)
}

fn prefixes() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "a/", "a/b/", "b/", "c/"]).prop_map(str::to_owned)
}

/// Few enough revisions that compares often hold.
fn revisions() -> impl Strategy<Value = Revision> {
    (0..12u64).prop_map(Revision::new)
}

fn compares() -> impl Strategy<Value = Compare> {
    prop_oneof![
        (keys(), revisions()).prop_map(|(key, revision)| Compare::ModRevision { key, revision }),
        keys().prop_map(|key| Compare::Absent { key }),
    ]
}

fn transactions() -> impl Strategy<Value = Transaction> {
    let value = prop::collection::vec(any::<u8>(), 0..3);
    let ops = prop::collection::btree_map(keys(), prop::option::weighted(0.7, value), 0..4);
    let compares = prop::collection::vec(compares(), 0..2);
    (compares, ops).prop_map(|(compares, ops)| {
        let ops = ops.into_iter().map(|(key, value)| match value {
            Some(value) => Op::Put { key, value },
            None => Op::Delete { key },
        });
        Transaction { compares, ops: ops.collect() }
    })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => transactions().prop_map(Step::Commit),
        1 => (0..6u64).prop_map(Step::Compact),
        1 => prefixes().prop_map(Step::List),
        2 => (prefixes(), 0..4u64).prop_map(|(prefix, offset)| Step::Watch(prefix, offset)),
    ]
}

async fn follow(store: Arc<dyn Store>, steps: Vec<Step>) {
    let mut model = Model { states: vec![State::new()], compacted: 0 };
    for step in &steps {
        match step {
            Step::Commit(transaction) => {
                let expected = model.commit(transaction);
                match store.commit(transaction.clone()).await {
                    Ok(committed) => assert_eq!(Some(committed.revision.get()), expected),
                    Err(CommitError::Conflict(conflict)) => {
                        assert_eq!(expected, None, "{conflict}");
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Compact(keep) => {
                model.compacted = model.compacted.max(model.current().saturating_sub(*keep));
                let compacted = store.compact(*keep).await.unwrap();
                assert_eq!(compacted.get(), model.compacted);
            }
            Step::List(prefix) => check_listing(&*store, &model, prefix).await,
            Step::Watch(prefix, offset) => {
                check_history(&*store, &model, prefix, model.compacted + offset).await;
            }
        }
    }
    check_listing(&*store, &model, "").await;
    check_history(&*store, &model, "", model.compacted).await;
    for key in model.content().keys() {
        let expected = entry(key, &model.content()[key]);
        assert_eq!(store.get(key).await.unwrap(), Some(expected));
    }
}

async fn check_listing(store: &dyn Store, model: &Model, prefix: &str) {
    let listing = store.list(prefix).await.unwrap();
    let below = model.content().iter().filter(|(key, _)| key.starts_with(prefix));
    let expected: Vec<_> = below.map(|(key, stored)| entry(key, stored)).collect();
    assert_eq!(listing.entries, expected);
    assert_eq!(listing.revision.get(), model.current());
}

async fn check_history(store: &dyn Store, model: &Model, prefix: &str, after: u64) {
    let mut watch = match store.watch(prefix, Revision::new(after)).await {
        Ok(watch) => watch,
        Err(StoreError::AheadOfStore { .. }) => return assert!(after > model.current()),
        Err(error) => panic!("{error}"),
    };
    for revision in after + 1..=model.current() {
        let changes = model.changes(revision, prefix);
        if !changes.is_empty() {
            let event = watch.next().await.unwrap();
            assert_eq!((event.revision.get(), event.changes), (revision, changes));
        }
    }
    assert_eq!(watch.seen_through().get(), model.current());
}

fn run(steps: Vec<Step>, fixture: impl Future<Output = crate::Fixture>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let crate::Fixture { store, _directory } = fixture.await;
        follow(store, steps).await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_in_memory_follows_the_model(steps in prop::collection::vec(steps(), 1..40)) {
        run(steps, crate::memory());
    }
}

proptest! {
    // Each case makes files and flushes them.
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_in_sqlite_follows_the_model(steps in prop::collection::vec(steps(), 1..40)) {
        run(steps, crate::sqlite());
    }
}
