//! Crashes: a writer killed at any point, and a write-ahead log cut at any point.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;

use mvm_store::{Change, SqliteStore, Store, Transaction, Version};

const KEYS: u64 = 5;
const DATABASE_OF_CHILD: &str = "MVM_STORE_CRASH_DATABASE";
const ACKNOWLEDGED: &str = "acknowledged ";

/// Transaction N puts N into every key; values of several pages make it long enough to be hit.
fn transaction(number: u64) -> Transaction {
    (0..KEYS).fold(Transaction::new(), |transaction, key| {
        transaction.put(format!("k/{key}"), format!("{number:08}").repeat(1000))
    })
}

fn number(value: &[u8]) -> u64 {
    let text = std::str::from_utf8(value).unwrap();
    let number = text[..8].parse().unwrap();
    assert_eq!(text, format!("{number:08}").repeat(1000), "a torn value");
    number
}

/// The number of transactions in the store, after checking that they are whole and in order.
async fn transactions_in(path: &Path) -> u64 {
    let store = SqliteStore::open(path).await.unwrap();
    let count = store.version().await.unwrap().get();
    let listing = store.list("").await.unwrap();
    assert_eq!(listing.entries.len() as u64, if count == 0 { 0 } else { KEYS });
    assert!(listing.entries.iter().all(|entry| number(&entry.value) == count));
    let mut watch = store.watch("", Version::ZERO).await.unwrap();
    for expected in 1..=count {
        let event = watch.next().await.unwrap();
        assert_eq!((event.version.get(), event.changes.len() as u64), (expected, KEYS));
        for change in &event.changes {
            let Change::Put(entry) = change else { panic!("{change:?}") };
            assert_eq!(number(&entry.value), expected);
        }
    }
    count
}

#[tokio::test]
#[ignore = "the writer that a_killed_writer_leaves_exactly_its_acknowledged_transactions starts"]
async fn writer() {
    let Some(path) = std::env::var_os(DATABASE_OF_CHILD) else { return };
    let store = SqliteStore::open(path).await.unwrap();
    let mut next = store.version().await.unwrap().get() + 1;
    loop {
        let committed = store.commit(transaction(next)).await.unwrap();
        let line = format!("{ACKNOWLEDGED}{}\n", committed.version);
        if std::io::stdout().write_all(line.as_bytes()).is_err() {
            return;
        }
        next += 1;
    }
}

/// Runs the writer until it has acknowledged `count` transactions, and returns the last one that it
/// acknowledged before it was killed.
#[allow(clippy::disallowed_methods, reason = "to be killed, the writer is a process of its own")]
fn kill_a_writer_after(count: usize, path: &Path) -> u64 {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--ignored", "--nocapture"])
        .env(DATABASE_OF_CHILD, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let acknowledged = |line: String| Some(line.strip_prefix(ACKNOWLEDGED)?.parse().unwrap());
    let before: Vec<u64> = lines.by_ref().filter_map(acknowledged).take(count).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(before.len(), count, "the writer ended early");
    lines.filter_map(acknowledged).last().or(before.last().copied()).unwrap()
}

#[tokio::test]
async fn a_killed_writer_leaves_exactly_its_acknowledged_transactions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mvm.db");
    for count in [1, 2, 3, 5, 8, 13, 21, 34] {
        let acknowledged = kill_a_writer_after(count, &path);
        let found = transactions_in(&path).await;
        // The transaction under way when the writer died may be there, whole.
        assert!(
            found == acknowledged || found == acknowledged + 1,
            "{acknowledged} transactions were acknowledged, {found} are there"
        );
    }
}

#[tokio::test]
async fn a_write_ahead_log_cut_anywhere_yields_whole_transactions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mvm.db");
    let store = SqliteStore::open(&path).await.unwrap();
    const TRANSACTIONS: u64 = 8;
    for number in 1..=TRANSACTIONS {
        store.commit(transaction(number)).await.unwrap();
    }
    // While the store is open, its log holds all of it: closing would fold it into the database.
    let database = fs::read(&path).unwrap();
    let log = fs::read(directory.path().join("mvm.db-wal")).unwrap();

    let mut counts = Vec::new();
    const CUTS: usize = 40;
    for cut in 0..=CUTS {
        let crashed = tempfile::tempdir().unwrap();
        let path = crashed.path().join("mvm.db");
        fs::write(&path, &database).unwrap();
        let log = &log[..log.len() * cut / CUTS];
        fs::write(crashed.path().join("mvm.db-wal"), log).unwrap();
        counts.push(transactions_in(&path).await);
    }
    assert!(counts.is_sorted(), "{counts:?}");
    assert_eq!(counts.last(), Some(&TRANSACTIONS));
    assert!(counts.contains(&(TRANSACTIONS / 2)), "{counts:?}");
}
