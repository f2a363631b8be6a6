//! Opening the file: its mode, its health, its settings.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::sqlite::error::during;
use crate::sqlite::schema::{MIGRATIONS, migrate, recognise};
use crate::{OpenError, StoreError};

/// Only the owner reads and writes; SQLite gives the files beside it the same mode.
const MODE: u32 = 0o600;

/// A connection to a healthy file with the schema of this build.
pub(super) fn open(path: &Path, busy_timeout: Duration) -> Result<Connection, OpenError> {
    let cannot_open = |source| OpenError::File { path: path.to_owned(), source };
    ensure_file(path).map_err(cannot_open)?;
    let has_log = std::fs::metadata(log_of(path)).is_ok_and(|log| log.len() > 0);
    let fail = during("open the file", path);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(fail)?;
    connection.busy_timeout(busy_timeout).map_err(fail)?;
    // What is refused stays as it is, with the log that whoever wrote it left behind.
    let keeps_log = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    connection.set_db_config(keeps_log, has_log).map_err(fail)?;
    check_health(&connection, path)?;
    if !has_log {
        check_length(&connection, path)?;
    }
    recognise(&connection, path, MIGRATIONS)?;
    // Only now is it certain that the file is the store's to change.
    connection.set_db_config(keeps_log, false).map_err(fail)?;
    std::fs::set_permissions(path, Permissions::from_mode(MODE)).map_err(cannot_open)?;
    configure(&connection).map_err(fail)?;
    migrate(&mut connection, path, MIGRATIONS)?;
    Ok(connection)
}

/// Creates the file if it is missing. A file that exists is never opened here: to close it would
/// take away the locks that a connection of this process may have on it.
fn ensure_file(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(MODE).open(path) {
        Ok(_) => {
            // The name is as durable as the transactions that the file will hold.
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if std::fs::metadata(path)?.is_file() {
                return Ok(());
            }
            Err(io::Error::other("it is not a regular file"))
        }
        Err(error) => Err(error),
    }
}

fn check_health(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let verdict: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(during("check the file", path))?;
    if verdict == "ok" {
        return Ok(());
    }
    Err(StoreError::Damaged { path: path.to_owned(), detail: verdict })
}

/// SQLite reads what is missing of the last page as zeroes. A crash while the log is carried over may
/// leave a part of a page, but then there is the log.
fn check_length(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let page: u64 = connection
        .query_row("PRAGMA page_size", [], |row| row.get(0))
        .map_err(during("check the file", path))?;
    let cannot_open = |source| OpenError::File { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(cannot_open)?.len();
    if bytes.is_multiple_of(page) {
        return Ok(());
    }
    let detail = format!("it ends in the middle of a page, after {bytes} bytes");
    Err(StoreError::Damaged { path: path.to_owned(), detail }.into())
}

/// The write-ahead log beside the file.
fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         -- Space that one large transaction took is given back.
         PRAGMA journal_size_limit = 33554432;
         PRAGMA trusted_schema = OFF;",
    )
}
