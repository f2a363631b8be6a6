//! The file of a [`SqliteStore`]: what it survives, what it refuses, and what it says then.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mvm_store::{
    ManualClock, OpenError, Settings, SqliteStore, Store, StoreError, Transaction, Version,
};
use rusqlite::Connection;
use tempfile::TempDir;

fn database() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mvm.db");
    (directory, path)
}

async fn filled(path: &Path, entries: u32) {
    let store = SqliteStore::open(path).await.unwrap();
    for number in 0..entries {
        let put = Transaction::new().put(format!("k/{number:03}"), vec![b'v'; 500]);
        store.commit(put).await.unwrap();
    }
}

async fn refusal(path: &Path) -> OpenError {
    SqliteStore::open(path).await.map(drop).expect_err("the file was accepted")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn a_reopened_store_has_its_entries_its_version_and_its_history() {
    let (_directory, path) = database();
    filled(&path, 5).await;
    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(store.version().await.unwrap(), Version::new(5));
    assert_eq!(store.list("k/").await.unwrap().entries.len(), 5);
    let mut watch = store.watch("", Version::new(3)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().version, Version::new(4));
    store.compact(1).await.unwrap();
    drop(store);

    let store = SqliteStore::open(&path).await.unwrap();
    let error = store.watch("", Version::new(3)).await.unwrap_err();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error:?}");
    let next = store.commit(Transaction::new().put("k/000", "")).await.unwrap();
    assert_eq!(next.version, Version::new(6));
}

#[tokio::test]
async fn a_reopened_store_has_its_leases_whose_time_starts_anew() {
    const TTL: Duration = Duration::from_secs(10);
    let (_directory, path) = database();
    let clock = Arc::new(ManualClock::default());
    let open = || {
        let settings = Settings { clock: clock.clone(), ..Settings::default() };
        SqliteStore::open_with(&path, settings)
    };
    let store = open().await.unwrap();
    let revoked = store.grant(TTL).await.unwrap();
    store.revoke(revoked).await.unwrap();
    let (lease, longer) = (store.grant(TTL).await.unwrap(), store.grant(TTL * 2).await.unwrap());
    let both = Transaction::new().put_leased("a", "", lease).put_leased("b", "", longer);
    let put = store.commit(both).await.unwrap().version;
    clock.advance(TTL - Duration::from_secs(1));
    drop(store);
    clock.advance(TTL);

    let store = open().await.unwrap();
    assert!(store.keep_alive(revoked).await.is_err());
    assert_eq!(store.get("a").await.unwrap().unwrap().lease, Some(lease));
    clock.advance(TTL - Duration::from_secs(1));
    store.keep_alive(lease).await.unwrap();
    clock.advance(TTL);
    let mut watch = store.watch("", put).await.unwrap();
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "a");
    store.keep_alive(longer).await.unwrap();
    drop(store);

    let store = open().await.unwrap();
    assert!(store.keep_alive(lease).await.is_err());
    assert!(store.grant(TTL).await.unwrap() > longer, "a name is never given again");
    clock.advance(TTL * 2);
    let mut watch = store.watch("", watch.seen_through()).await.unwrap();
    assert_eq!(watch.next().await.unwrap().changes[0].key(), "b");
}

#[tokio::test]
async fn a_store_of_the_schema_before_this_opens_with_all_that_it_has() {
    let (_directory, path) = database();
    filled(&path, 5).await;
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch(
            "DROP INDEX kv_of_lease;
             ALTER TABLE kv DROP COLUMN lease;
             ALTER TABLE log DROP COLUMN lease;
             DROP TABLE lease;
             ALTER TABLE kv RENAME COLUMN create_version TO create_revision;
             ALTER TABLE kv RENAME COLUMN mod_version TO mod_revision;
             ALTER TABLE log RENAME COLUMN create_version TO create_revision;
             ALTER TABLE log RENAME COLUMN version TO revision;
             UPDATE meta SET name = 'revision' WHERE name = 'version';
             UPDATE meta SET value = 1 WHERE name = 'schema_version'",
        )
        .unwrap();
    drop(connection);

    let store = SqliteStore::open(&path).await.unwrap();
    let entries = store.list("").await.unwrap().entries;
    assert_eq!(entries.len(), 5);
    assert!(entries.iter().all(|entry| entry.lease.is_none() && entry.value.len() == 500));
    let mut watch = store.watch("", Version::new(3)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().version, Version::new(4));
    let lease = store.grant(Duration::from_secs(1)).await.unwrap();
    let put = Transaction::new().put_leased("k/000", "", lease);
    assert_eq!(store.commit(put).await.unwrap().version, Version::new(6));
    store.revoke(lease).await.unwrap();
    assert_eq!(store.get("k/000").await.unwrap(), None);
}

#[tokio::test]
async fn only_the_owner_can_read_the_files() {
    let (directory, path) = database();
    let store = SqliteStore::open(&path).await.unwrap();
    store.commit(Transaction::new().put("a", "")).await.unwrap();
    let mut files = 0;
    for file in fs::read_dir(directory.path()).unwrap() {
        let file = file.unwrap().path();
        assert_eq!(mode(&file), 0o600, "{}", file.display());
        files += 1;
    }
    assert_eq!(files, 3, "the database, its log and its index");
    drop(store);

    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    SqliteStore::open(&path).await.unwrap();
    assert_eq!(mode(&path), 0o600);
}

#[tokio::test]
async fn damage_is_refused_with_the_file_and_the_way_to_mend_it() {
    let (_directory, path) = database();
    filled(&path, 100).await;
    let whole = fs::read(&path).unwrap();
    let mut garbled = whole.clone();
    for page in garbled.chunks_mut(4096).skip(1) {
        page[..64].fill(0xa5);
    }
    let mut garbled_header = whole.clone();
    garbled_header[..16].fill(b'x');
    let cut = |len: usize| whole[..len].to_vec();

    for (what, bytes) in [
        ("pages", garbled),
        ("header", garbled_header),
        ("half", cut(whole.len() / 2)),
        ("one page", cut(4096)),
        ("less than a header", cut(50)),
        ("all but the last byte", cut(whole.len() - 1)),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = refusal(&path).await;
        assert!(matches!(error, OpenError::Store(StoreError::Damaged { .. })), "{what}: {error:?}");
        let message = error.to_string();
        assert!(message.contains(path.to_str().unwrap()), "{what}: {message}");
        assert!(message.contains("restore it from a backup"), "{what}: {message}");
        assert!(fs::read(&path).unwrap() == bytes, "{what}: a refused file was changed");
    }

    fs::write(&path, &whole).unwrap();
    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(store.list("").await.unwrap().entries.len(), 100);
}

#[tokio::test]
async fn a_newer_schema_is_refused_with_both_versions_and_the_fix() {
    let (_directory, path) = database();
    filled(&path, 1).await;
    let connection = Connection::open(&path).unwrap();
    connection.execute("UPDATE meta SET value = 41 WHERE name = 'schema_version'", []).unwrap();
    drop(connection);

    let error = refusal(&path).await;
    assert!(matches!(error, OpenError::NewerSchema { found: 41, known: 2, .. }), "{error:?}");
    let message = error.to_string();
    for part in [path.to_str().unwrap(), "schema 41", "up to 2", "run the mvm that wrote it"] {
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test]
async fn a_newer_schema_one_version_ahead_is_refused_before_anything_is_touched() {
    let (directory, path) = database();
    filled(&path, 3).await;
    let newer = Connection::open(&path).unwrap();
    newer
        .execute_batch(
            "ALTER TABLE kv ADD COLUMN next INTEGER;
             UPDATE meta SET value = value + 1 WHERE name = 'schema_version'",
        )
        .unwrap();
    // As after a crash of the newer mvm, what it wrote last is in the log beside the file.
    let (_killed, copy) = database();
    let log = |path: &Path| path.with_extension("db-wal");
    fs::copy(&path, &copy).unwrap();
    fs::copy(log(&path), log(&copy)).unwrap();
    drop(newer);

    for path in [path, copy] {
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let state = || (fs::read(&path).unwrap(), fs::read(log(&path)).ok(), mode(&path));
        let before = state();
        let error = refusal(&path).await;
        assert!(matches!(error, OpenError::NewerSchema { found: 3, known: 2, .. }), "{error:?}");
        assert!(state() == before, "a refused file was changed");
        let newer = Connection::open(&path).unwrap();
        let count = "SELECT count(next IS NULL) FROM kv";
        assert_eq!(newer.query_row(count, [], |row| row.get::<_, u32>(0)).unwrap(), 3);
    }
    drop(directory);
}

#[tokio::test]
async fn a_database_that_another_program_holds_is_refused_with_its_name_and_opened_later() {
    let (_directory, path) = database();
    filled(&path, 1).await;
    let other = Connection::open(&path).unwrap();
    other.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    let error = refusal(&path).await;
    assert!(matches!(error, OpenError::Store(StoreError::Busy { .. })), "{error:?}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    drop(other);
    SqliteStore::open(&path).await.unwrap();
}

#[tokio::test]
async fn a_database_of_something_else_is_refused_and_left_alone() {
    let (_directory, path) = database();
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("CREATE TABLE meta (name TEXT, value TEXT)").unwrap();
    drop(connection);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let before = fs::read(&path).unwrap();

    let error = refusal(&path).await;
    assert!(matches!(error, OpenError::NotAStore { .. }), "{error:?}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(fs::read(&path).unwrap() == before, "a refused file was changed");
    assert_eq!(mode(&path), 0o644, "the mode of a refused file was changed");
}

#[tokio::test]
async fn a_path_that_cannot_be_a_file_is_an_error_that_names_it() {
    let (directory, _) = database();
    for path in [directory.path().to_owned(), directory.path().join("missing/mvm.db")] {
        let error = refusal(&path).await;
        assert!(matches!(error, OpenError::File { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[tokio::test]
async fn dropping_the_store_finishes_what_was_queued() {
    let (_directory, path) = database();
    let store = SqliteStore::open(&path).await.unwrap();
    {
        // Polled once, the transaction is queued; nobody waits for the answer.
        let mut commit = std::pin::pin!(store.commit(Transaction::new().put("a", "queued")));
        std::future::poll_fn(|context| {
            let _ = commit.as_mut().poll(context);
            std::task::Poll::Ready(())
        })
        .await;
    }
    drop(store);
    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"queued");
}

#[tokio::test]
async fn an_open_store_keeps_its_lock_on_the_file() {
    let (_directory, path) = database();
    let _first = SqliteStore::open(&path).await.unwrap();
    // A process loses its locks on a file when it closes any descriptor of it.
    let second = SqliteStore::open(&path).await.unwrap();
    second.commit(Transaction::new().put("a", "")).await.unwrap();
    drop(second);

    let inode = format!(":{} ", fs::metadata(&path).unwrap().ino());
    let pid = format!(" {} ", std::process::id());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    assert!(locks.lines().any(|lock| lock.contains(&inode) && lock.contains(&pid)), "{locks}");
}
