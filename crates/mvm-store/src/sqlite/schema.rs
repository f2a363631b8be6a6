//! The tables, and how a file of an older mvm gets them.
//!
//! Schema N is what the first N migrations make. A released migration never changes; a change of
//! the tables is a new one at the end.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use crate::OpenError;
use crate::sqlite::error::during;

/// Marks a SQLite file as a store of mvm: `mvms` in ASCII, as the first migration sets it.
const APPLICATION_ID: u32 = 0x6d76_6d73;

/// The migrations of this build, oldest first.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    PRAGMA application_id = 0x6d766d73;

    CREATE TABLE meta (
        name  TEXT PRIMARY KEY,
        value INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    INSERT INTO meta (name, value) VALUES ('schema_version', 0), ('revision', 0), ('compacted', 0);

    CREATE TABLE kv (
        key             TEXT PRIMARY KEY,
        value           BLOB NOT NULL,
        create_revision INTEGER NOT NULL,
        mod_revision    INTEGER NOT NULL
    ) STRICT;

    -- A deletion has no create_revision and no value.
    CREATE TABLE log (
        revision        INTEGER NOT NULL,
        key             TEXT NOT NULL,
        create_revision INTEGER,
        value           BLOB,
        UNIQUE (revision, key),
        CHECK ((create_revision IS NULL) = (value IS NULL))
    ) STRICT;
",
    "
    -- A lease's id is never given again.
    CREATE TABLE lease (
        id     INTEGER PRIMARY KEY AUTOINCREMENT,
        ttl_ms INTEGER NOT NULL
    ) STRICT;
    ALTER TABLE kv ADD COLUMN lease INTEGER;
    ALTER TABLE log ADD COLUMN lease INTEGER;
    CREATE INDEX kv_of_lease ON kv (lease) WHERE lease IS NOT NULL;

    -- A store has versions; a revision is a pool's image.
    ALTER TABLE kv RENAME COLUMN create_revision TO create_version;
    ALTER TABLE kv RENAME COLUMN mod_revision TO mod_version;
    ALTER TABLE log RENAME COLUMN create_revision TO create_version;
    ALTER TABLE log RENAME COLUMN revision TO version;
    UPDATE meta SET name = 'version' WHERE name = 'revision';
",
];

/// Brings the file to the schema that `migrations` make, one transaction for each step.
pub(super) fn migrate(
    connection: &mut Connection,
    path: &Path,
    migrations: &[&str],
) -> Result<(), OpenError> {
    let fail = during("migrate the schema", path);
    let mut version = recognise(connection, path, migrations)?;
    for migration in &migrations[version..] {
        version += 1;
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fail)?;
        transaction.execute_batch(migration).map_err(fail)?;
        transaction
            .execute("UPDATE meta SET value = ?1 WHERE name = 'schema_version'", [version])
            .map_err(fail)?;
        transaction.commit().map_err(fail)?;
        tracing::info!(store = %path.display(), schema = version, "migrated the store");
    }
    Ok(())
}

/// The schema of the file, zero if nothing was ever written to it. Refuses, without a write, what
/// the migrations cannot have made.
pub(super) fn recognise(
    connection: &Connection,
    path: &Path,
    migrations: &[&str],
) -> Result<usize, OpenError> {
    let fail = during("read the schema", path);
    let number = |query| connection.query_row(query, [], |row| row.get::<_, u32>(0)).map_err(fail);
    let version = match number("PRAGMA application_id")? {
        APPLICATION_ID => number("SELECT value FROM meta WHERE name = 'schema_version'")? as usize,
        0 if number("SELECT count(*) FROM sqlite_schema")? == 0 => 0,
        _ => return Err(OpenError::NotAStore { path: path.to_owned() }),
    };
    if version > migrations.len() {
        let (found, known) = (version as u64, migrations.len() as u64);
        return Err(OpenError::NewerSchema { path: path.to_owned(), found, known });
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/somewhere/mvm.db";
    const NEXT: &str = "ALTER TABLE kv ADD COLUMN next INTEGER";

    fn columns_of_kv(connection: &Connection) -> i64 {
        connection
            .query_row("SELECT count(*) FROM pragma_table_info('kv')", [], |row| row.get(0))
            .unwrap()
    }

    #[test]
    fn an_older_schema_moves_forward_and_keeps_its_rows() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, PATH.as_ref(), MIGRATIONS).unwrap();
        connection.execute("INSERT INTO kv VALUES ('a', x'01', 1, 1, NULL)", []).unwrap();
        let next: Vec<&str> = MIGRATIONS.iter().copied().chain([NEXT]).collect();

        migrate(&mut connection, PATH.as_ref(), &next).unwrap();
        migrate(&mut connection, PATH.as_ref(), &next).unwrap();

        assert_eq!(recognise(&connection, PATH.as_ref(), &next).unwrap(), next.len());
        assert_eq!(columns_of_kv(&connection), 6);
        let rows: i64 =
            connection.query_row("SELECT count(*) FROM kv", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 1);
    }

    #[test]
    fn a_migration_that_fails_leaves_the_schema_before_it() {
        let mut connection = Connection::open_in_memory().unwrap();
        let broken = format!("{NEXT}; ALTER TABLE no_such_table ADD COLUMN x");
        let next: Vec<&str> = MIGRATIONS.iter().copied().chain([broken.as_str()]).collect();

        assert!(migrate(&mut connection, PATH.as_ref(), &next).is_err());

        let version = recognise(&connection, PATH.as_ref(), MIGRATIONS).unwrap();
        assert_eq!(version, MIGRATIONS.len());
        assert_eq!(columns_of_kv(&connection), 5);
    }

    #[test]
    fn a_newer_schema_is_refused_with_both_versions() {
        let mut connection = Connection::open_in_memory().unwrap();
        let next: Vec<&str> = MIGRATIONS.iter().copied().chain([NEXT]).collect();
        migrate(&mut connection, PATH.as_ref(), &next).unwrap();

        let error = migrate(&mut connection, PATH.as_ref(), MIGRATIONS).unwrap_err();

        let (newer, known) = (next.len() as u64, MIGRATIONS.len() as u64);
        assert!(
            matches!(&error, OpenError::NewerSchema { found, known: k, .. }
                if *found == newer && *k == known),
            "{error:?}"
        );
        assert!(error.to_string().contains(PATH), "{error}");
    }
}
