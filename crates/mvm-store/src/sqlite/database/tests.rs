//! Failures that need a hand on the connection.

use super::*;

fn open_in(directory: &tempfile::TempDir) -> Database {
    let path = directory.path().join("mvm.db");
    let leases = Leases::new(Arc::new(crate::ManualClock::default()));
    Database::open(path, Duration::ZERO, Sender::new(Version::ZERO), leases).unwrap()
}

fn put(key: &str, bytes: usize) -> Transaction {
    Transaction::new().put(key, vec![7; bytes])
}

#[test]
fn a_full_disk_changes_nothing_and_the_store_goes_on_when_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let mut database = open_in(&directory);
    let small = database.commit(&put("small", 10)).unwrap();
    let pages: u64 =
        database.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    let limit_pages = |database: &Database, pages: u64| {
        database
            .connection
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
            .unwrap();
    };

    limit_pages(&database, pages + 4);
    let error = database.commit(&put("small", 0).put("large", vec![7; 100_000])).unwrap_err();
    assert!(matches!(error, CommitError::Store(StoreError::DiskFull { .. })), "{error:?}");
    assert!(error.to_string().contains("mvm.db"), "{error}");
    assert_eq!(database.version().unwrap(), small.version);
    assert_eq!(database.get("small").unwrap().unwrap().value.len(), 10);
    assert_eq!(*database.current.borrow(), small.version);

    limit_pages(&database, pages + 1000);
    let large = database.commit(&put("large", 100_000)).unwrap();
    assert_eq!(large.version, small.version.next());
}

#[test]
fn a_file_locked_by_another_process_is_busy_and_free_again_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let mut database = open_in(&directory);
    let other = Connection::open(&database.path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();

    let error = database.commit(&put("a", 1)).unwrap_err();
    assert!(matches!(error, CommitError::Store(StoreError::Busy { .. })), "{error:?}");
    assert!(error.to_string().contains("mvm.db"), "{error}");
    assert_eq!(database.get("a").unwrap(), None);

    other.execute_batch("ROLLBACK").unwrap();
    database.commit(&put("a", 1)).unwrap();
}

#[test]
fn commits_are_flushed_to_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let database = open_in(&directory);
    let setting = |name: &str| -> String {
        let query = format!("SELECT CAST({name} AS TEXT) FROM pragma_{name}");
        database.connection.query_row(&query, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(setting("journal_mode"), "wal");
    const FULL: &str = "2";
    assert_eq!(setting("synchronous"), FULL);
}

#[test]
fn reading_the_log_takes_its_index_and_no_scan() {
    let directory = tempfile::tempdir().unwrap();
    let database = open_in(&directory);
    let plan: Vec<String> = database
        .connection
        .prepare(
            "EXPLAIN QUERY PLAN SELECT value FROM log
             WHERE version > 1 AND key >= 'a' AND key < 'b' ORDER BY version, key",
        )
        .and_then(|mut query| query.query_map([], |row| row.get(3))?.collect())
        .unwrap();
    assert_eq!(plan.len(), 1, "{plan:?}");
    assert!(plan[0].contains("(version>?)"), "{plan:?}");
}

#[test]
fn a_row_that_the_schema_does_not_allow_is_damage() {
    let directory = tempfile::tempdir().unwrap();
    let mut database = open_in(&directory);
    database.connection.execute("UPDATE meta SET value = -1", []).unwrap();

    let error = database.version().unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");

    database.connection.execute("DELETE FROM meta WHERE name = 'version'", []).unwrap();
    let error = database.commit(&put("a", 1)).unwrap_err();
    assert!(matches!(error, CommitError::Store(StoreError::Damaged { .. })), "{error:?}");
}
