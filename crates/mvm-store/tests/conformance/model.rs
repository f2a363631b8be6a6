//! Random histories against an independent model that keeps every state the store ever had.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mvm_store::{
    Change, CommitError, Compare, Entry, LeaseId, Op, Store, StoreError, Transaction, Version,
};
use proptest::prelude::*;

type State = BTreeMap<String, Entry>;

/// `states[r]` is the content at version `r`; what changed is found by comparing neighbours.
struct Model {
    states: Vec<State>,
    compacted: u64,
    /// The leases in the order in which they were granted, and whether they hold.
    leases: Vec<(LeaseId, bool)>,
}

/// What becomes of a transaction.
#[derive(Debug, PartialEq)]
enum Outcome {
    Committed(u64),
    Conflict,
    NoSuchLease,
}

#[derive(Debug, Clone)]
enum Step {
    /// A lease in it is the number of one that was granted, in order.
    Commit(Transaction),
    Grant,
    Revoke(u64),
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

    fn changes(&self, version: u64, prefix: &str) -> Vec<Change> {
        let (before, after) = (&self.states[version as usize - 1], &self.states[version as usize]);
        let mut changes = BTreeMap::new();
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            changes.insert(key, Change::Delete { key: key.clone() });
        }
        for (key, entry) in after.iter().filter(|(_, e)| e.mod_version.get() == version) {
            changes.insert(key, Change::Put(entry.clone()));
        }
        changes.retain(|key, _| key.starts_with(prefix));
        changes.into_values().collect()
    }

    fn holds(&self, compare: &Compare) -> bool {
        let at = |key: &String| self.content().get(key).map(|entry| entry.mod_version);
        match compare {
            Compare::ModVersion { key, version } => at(key) == Some(*version),
            Compare::Absent { key } => at(key).is_none(),
        }
    }

    /// The lease of this number, and whether it holds.
    fn lease(&self, number: u64) -> (LeaseId, bool) {
        let nobodys = (LeaseId::new(4711), false);
        self.leases.get(number as usize).copied().unwrap_or(nobodys)
    }

    fn commit(&mut self, transaction: &Transaction) -> Outcome {
        if !transaction.compares.iter().all(|compare| self.holds(compare)) {
            return Outcome::Conflict;
        }
        let holds = |lease| self.leases.contains(&(lease, true));
        if !transaction.ops.iter().filter_map(lease_of).all(holds) {
            return Outcome::NoSuchLease;
        }
        self.apply(&transaction.ops);
        Outcome::Committed(self.current())
    }

    /// What a lease that is revoked deletes, if it holds.
    fn revoke(&mut self, number: u64) -> Option<LeaseId> {
        let (lease, true) = self.lease(number) else { return None };
        self.leases[number as usize].1 = false;
        let leased = self.content().values().filter(|entry| entry.lease == Some(lease));
        let ops: Vec<Op> = leased.map(|entry| Op::Delete { key: entry.key.clone() }).collect();
        self.apply(&ops);
        Some(lease)
    }

    fn apply(&mut self, ops: &[Op]) {
        let version = Version::new(self.current() + 1);
        let mut next = self.content().clone();
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let entry = Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_version: next.get(key).map_or(version, |e| e.create_version),
                        mod_version: version,
                        lease: *lease,
                    };
                    next.insert(key.clone(), entry);
                }
                Op::Delete { key } => drop(next.remove(key)),
            }
        }
        if next != *self.content() {
            self.states.push(next);
        }
    }
}

fn lease_of(op: &Op) -> Option<LeaseId> {
    match op {
        Op::Put { lease, .. } => *lease,
        Op::Delete { .. } => None,
    }
}

fn keys() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "a/b", "a/b/c", "a/c", "a0", "b/a", "b/b"])
        .prop_map(str::to_owned)
}

fn prefixes() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "a/", "a/b/", "b/", "c/"]).prop_map(str::to_owned)
}

/// Few enough versions that compares often hold.
fn versions() -> impl Strategy<Value = Version> {
    (0..12u64).prop_map(Version::new)
}

fn compares() -> impl Strategy<Value = Compare> {
    prop_oneof![
        (keys(), versions()).prop_map(|(key, version)| Compare::ModVersion { key, version }),
        keys().prop_map(|key| Compare::Absent { key }),
    ]
}

fn transactions() -> impl Strategy<Value = Transaction> {
    let value = prop::collection::vec(any::<u8>(), 0..3);
    let lease = prop::option::weighted(0.3, (0..3u64).prop_map(LeaseId::new));
    let put = prop::option::weighted(0.7, (value, lease));
    let ops = prop::collection::btree_map(keys(), put, 0..4);
    let compares = prop::collection::vec(compares(), 0..2);
    (compares, ops).prop_map(|(compares, ops)| {
        let ops = ops.into_iter().map(|(key, value)| match value {
            Some((value, lease)) => Op::Put { key, value, lease },
            None => Op::Delete { key },
        });
        Transaction { compares, ops: ops.collect() }
    })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => transactions().prop_map(Step::Commit),
        2 => Just(Step::Grant),
        1 => (0..3u64).prop_map(Step::Revoke),
        1 => (0..6u64).prop_map(Step::Compact),
        1 => prefixes().prop_map(Step::List),
        2 => (prefixes(), 0..4u64).prop_map(|(prefix, offset)| Step::Watch(prefix, offset)),
    ]
}

async fn follow(store: Arc<dyn Store>, steps: Vec<Step>) {
    let mut model = Model { states: vec![State::new()], compacted: 0, leases: vec![] };
    for step in &steps {
        match step {
            Step::Commit(transaction) => {
                let mut transaction = transaction.clone();
                for op in &mut transaction.ops {
                    if let Op::Put { lease: Some(lease), .. } = op {
                        *lease = model.lease(lease.get()).0;
                    }
                }
                let expected = model.commit(&transaction);
                let outcome = match store.commit(transaction).await {
                    Ok(committed) => Outcome::Committed(committed.version.get()),
                    Err(CommitError::Conflict(_)) => Outcome::Conflict,
                    Err(CommitError::Store(StoreError::NoSuchLease { .. })) => Outcome::NoSuchLease,
                    Err(error) => panic!("{error}"),
                };
                assert_eq!(outcome, expected);
            }
            Step::Grant => {
                let lease = store.grant(Duration::from_secs(1)).await.unwrap();
                model.leases.push((lease, true));
            }
            Step::Revoke(number) => {
                let lease = model.lease(*number).0;
                let is_revoked = store.revoke(lease).await.is_ok();
                assert_eq!(model.revoke(*number).is_some(), is_revoked);
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
        assert_eq!(store.get(key).await.unwrap().as_ref(), model.content().get(key));
    }
}

async fn check_listing(store: &dyn Store, model: &Model, prefix: &str) {
    let listing = store.list(prefix).await.unwrap();
    let below = model.content().iter().filter(|(key, _)| key.starts_with(prefix));
    let expected: Vec<_> = below.map(|(_, entry)| entry.clone()).collect();
    assert_eq!(listing.entries, expected);
    assert_eq!(listing.version.get(), model.current());
}

async fn check_history(store: &dyn Store, model: &Model, prefix: &str, after: u64) {
    let mut watch = match store.watch(prefix, Version::new(after)).await {
        Ok(watch) => watch,
        Err(StoreError::AheadOfStore { .. }) => return assert!(after > model.current()),
        Err(error) => panic!("{error}"),
    };
    for version in after + 1..=model.current() {
        let changes = model.changes(version, prefix);
        if !changes.is_empty() {
            let event = watch.next().await.unwrap();
            assert_eq!((event.version.get(), event.changes), (version, changes));
        }
    }
    assert_eq!(watch.seen_through().get(), model.current());
}

fn run(steps: Vec<Step>, fixture: impl Future<Output = crate::Fixture>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let crate::Fixture { given, _directory } = fixture.await;
        follow(given.store, steps).await;
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
