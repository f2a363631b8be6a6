//! The store's operations on an open connection, one at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use tokio::sync::watch::Sender;

use crate::compare::check_all;
use crate::key::Prefix;
use crate::lease::Leases;
use crate::sqlite::error::during;
use crate::sqlite::open::open;
use crate::watch::Batch;
use crate::{
    Change, CommitError, Committed, Entry, LeaseId, Listing, Op, OpenError, StoreError,
    Transaction, Version,
};

/// An open store.
#[derive(Debug)]
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    current: Sender<Version>,
    leases: Arc<Leases>,
}

impl Database {
    /// Opens the file; `current` is told its version, now and after every commit.
    pub(super) fn open(
        path: PathBuf,
        busy_timeout: Duration,
        current: Sender<Version>,
        leases: Arc<Leases>,
    ) -> Result<Self, OpenError> {
        let connection = open(&path, busy_timeout)?;
        let mut database = Self { connection, path, current, leases };
        let version = database.version()?;
        database.current.send_replace(version);
        Ok(database)
    }

    pub(super) fn get(&mut self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT key, value, create_version, mod_version, lease FROM kv WHERE key = ?1",
            )
            .and_then(|mut query| query.query_row([key], entry).optional())
            .map_err(during("get a key", &self.path))
    }

    pub(super) fn list(&mut self, prefix: &Prefix) -> Result<Listing, StoreError> {
        let fail = during("list a prefix", &self.path);
        // One transaction, so that the version is that of the entries.
        let transaction = self.connection.transaction().map_err(fail)?;
        let version = History::of(&transaction, &self.path)?.version;
        let entries = transaction
            .prepare_cached(
                "SELECT key, value, create_version, mod_version, lease FROM kv
                 WHERE key >= ?1 AND key < ?2 ORDER BY key",
            )
            .and_then(|mut query| {
                query.query_map([prefix.start(), &prefix.end()], entry)?.collect()
            })
            .map_err(fail)?;
        Ok(Listing { version, entries })
    }

    pub(super) fn commit(&mut self, transaction: &Transaction) -> Result<Committed, CommitError> {
        let fail = during("commit", &self.path);
        let write = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(fail)?;
        let history = History::of(&write, &self.path)?;
        check_all(&transaction.compares, |key| history.mod_version(key))?;
        transaction.leases().try_for_each(|lease| self.leases.require(lease))?;
        let version = apply_all(&write, history.version, &transaction.ops).map_err(fail)?;
        if version > history.version {
            write.commit().map_err(fail)?;
            self.current.send_replace(version);
        }
        Ok(Committed { version })
    }

    pub(super) fn grant(&mut self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.connection
            .prepare_cached("INSERT INTO lease (ttl_ms) VALUES (?1) RETURNING id")
            .and_then(|mut query| query.query_row([millis(ttl)], |row| row.get(0)))
            .map(LeaseId::new)
            .map_err(during("grant a lease", &self.path))
    }

    /// The leases that have not ended, and how long each lasts.
    pub(super) fn leases(&mut self) -> Result<Vec<(LeaseId, Duration)>, StoreError> {
        let lease = |row: &Row<'_>| {
            Ok((row.get(0).map(LeaseId::new)?, row.get(1).map(Duration::from_millis)?))
        };
        self.connection
            .prepare("SELECT id, ttl_ms FROM lease")
            .and_then(|mut query| query.query_map([], lease)?.collect())
            .map_err(during("read the leases", &self.path))
    }

    pub(super) fn revoke(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        self.leases.require(lease)?;
        self.end(lease)
    }

    /// Ends a lease unless it was renewed.
    pub(super) fn expire(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        match self.leases.require(lease) {
            Ok(()) => Ok(()),
            Err(_) => self.end(lease),
        }
    }

    fn end(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        let fail = during("end a lease", &self.path);
        let write = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(fail)?;
        let history = History::of(&write, &self.path)?;
        let keys: Vec<String> = write
            .prepare_cached("SELECT key FROM kv WHERE lease = ?1")
            .and_then(|mut query| query.query_map([lease.get()], |row| row.get(0))?.collect())
            .map_err(fail)?;
        let ops: Vec<Op> = keys.into_iter().map(|key| Op::Delete { key }).collect();
        let version = apply_all(&write, history.version, &ops).map_err(fail)?;
        write.execute("DELETE FROM lease WHERE id = ?1", [lease.get()]).map_err(fail)?;
        write.commit().map_err(fail)?;
        self.current.send_replace(version);
        self.leases.end(lease);
        Ok(())
    }

    pub(super) fn read_log(
        &mut self,
        prefix: &Prefix,
        after: Version,
    ) -> Result<Batch, StoreError> {
        let fail = during("read the log", &self.path);
        let transaction = self.connection.transaction().map_err(fail)?;
        let history = History::of(&transaction, &self.path)?;
        let mut batch = Batch::begin(after, history.compacted, history.version)?;
        let mut query = transaction
            .prepare_cached(
                "SELECT key, value, create_version, version, lease FROM log
                 WHERE version > ?1 AND key >= ?2 AND key < ?3 ORDER BY version, key",
            )
            .map_err(fail)?;
        let mut rows =
            query.query(params![after.get(), prefix.start(), prefix.end()]).map_err(fail)?;
        while let Some(row) = rows.next().map_err(fail)? {
            let (version, change) = change(row).map_err(fail)?;
            if !batch.push(version, change) {
                break;
            }
        }
        Ok(batch)
    }

    pub(super) fn version(&mut self) -> Result<Version, StoreError> {
        meta(&self.connection, "version").map_err(during("read the version", &self.path))
    }

    pub(super) fn compact(&mut self, keep: u64) -> Result<Version, StoreError> {
        let fail = during("compact", &self.path);
        let write = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(fail)?;
        let history = History::of(&write, &self.path)?;
        let compacted = history.compacted.max(history.version.minus(keep));
        write
            .execute("DELETE FROM log WHERE version <= ?1", [compacted.get()])
            .and_then(|_| set_meta(&write, "compacted", compacted))
            .map_err(fail)?;
        write.commit().map_err(fail)?;
        Ok(compacted)
    }
}

/// The store's past as a transaction sees it.
struct History<'a> {
    connection: &'a Connection,
    path: &'a Path,
    version: Version,
    compacted: Version,
}

impl<'a> History<'a> {
    fn of(connection: &'a Connection, path: &'a Path) -> Result<Self, StoreError> {
        let fail = during("read the version", path);
        let version = meta(connection, "version").map_err(fail)?;
        let compacted = meta(connection, "compacted").map_err(fail)?;
        Ok(Self { connection, path, version, compacted })
    }

    fn mod_version(&self, key: &str) -> Result<Option<Version>, StoreError> {
        self.connection
            .prepare_cached("SELECT mod_version FROM kv WHERE key = ?1")
            .and_then(|mut query| query.query_row([key], |row| version(row, 0)).optional())
            .map_err(during("compare a key", self.path))
    }
}

/// Applies the operations as the version after this one, which is the present one if they change
/// nothing.
fn apply_all(connection: &Connection, before: Version, ops: &[Op]) -> rusqlite::Result<Version> {
    let version = before.next();
    let mut has_changed = false;
    for op in ops {
        has_changed |= apply(connection, version, op)?;
    }
    if !has_changed {
        return Ok(before);
    }
    set_meta(connection, "version", version)?;
    Ok(version)
}

/// Applies one operation and answers whether it changed anything.
fn apply(connection: &Connection, version: Version, op: &Op) -> rusqlite::Result<bool> {
    let (created, lease): (Option<(u64, &[u8])>, _) = match op {
        Op::Put { key, value, lease } => {
            let lease = lease.map(LeaseId::get);
            let create_version = connection
                .prepare_cached(
                    "INSERT INTO kv (key, value, create_version, mod_version, lease)
                     VALUES (?1, ?2, ?3, ?3, ?4)
                     ON CONFLICT (key) DO UPDATE
                     SET value = excluded.value, mod_version = excluded.mod_version,
                         lease = excluded.lease
                     RETURNING create_version",
                )?
                .query_row(params![key, value, version.get(), lease], |row| row.get(0))?;
            (Some((create_version, value)), lease)
        }
        Op::Delete { key } => {
            if connection.prepare_cached("DELETE FROM kv WHERE key = ?1")?.execute([key])? == 0 {
                return Ok(false);
            }
            (None, None)
        }
    };
    let (create_version, value) = created.unzip();
    connection
        .prepare_cached(
            "INSERT INTO log (version, key, create_version, value, lease)
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![version.get(), op.key(), create_version, value, lease])?;
    Ok(true)
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis().try_into().unwrap_or(i64::MAX)
}

fn meta(connection: &Connection, name: &str) -> rusqlite::Result<Version> {
    connection
        .prepare_cached("SELECT value FROM meta WHERE name = ?1")?
        .query_row([name], |row| version(row, 0))
}

fn set_meta(connection: &Connection, name: &str, version: Version) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE meta SET value = ?2 WHERE name = ?1")?
        .execute(params![name, version.get()])?;
    Ok(())
}

fn version(row: &Row<'_>, column: usize) -> rusqlite::Result<Version> {
    row.get(column).map(Version::new)
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: row.get(0)?,
        value: row.get(1)?,
        create_version: version(row, 2)?,
        mod_version: version(row, 3)?,
        lease: row.get::<_, Option<u64>>(4)?.map(LeaseId::new),
    })
}

fn change(row: &Row<'_>) -> rusqlite::Result<(Version, Change)> {
    let is_deletion = row.get_ref(1)? == rusqlite::types::ValueRef::Null;
    let change =
        if is_deletion { Change::Delete { key: row.get(0)? } } else { Change::Put(entry(row)?) };
    Ok((version(row, 3)?, change))
}

#[cfg(test)]
mod tests;
