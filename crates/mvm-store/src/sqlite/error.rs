//! What SQLite's errors mean for whoever uses the store.

use std::path::{Path, PathBuf};

use rusqlite::{Error, ErrorCode};

use crate::StoreError;

/// Why a store's file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be created, opened or given its mode.
    #[error("cannot open the store `{path}`")]
    File {
        /// The store's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file was written by a newer mvm.
    #[error(
        "the store `{path}` has schema {found}, and this mvm knows schemas up to {known}; run the \
         mvm that wrote it, or a newer one"
    )]
    NewerSchema {
        /// The store's file.
        path: PathBuf,
        /// The file's schema.
        found: u64,
        /// The newest schema that this build knows.
        known: u64,
    },
    /// The file is a SQLite database of something else.
    #[error("`{path}` is a SQLite database, but not a store of mvm; move it aside")]
    NotAStore {
        /// The file.
        path: PathBuf,
    },
    /// The operating system gives no thread.
    #[error("cannot start the store's thread")]
    Thread(#[source] std::io::Error),
    /// The file is damaged, locked, or has no room around it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Turns SQLite's error of an operation into the store's.
pub(super) fn during<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl Fn(Error) -> StoreError + Copy + 'a {
    move |error| {
        let path = path.to_owned();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => StoreError::DiskFull { path },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { path },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StoreError::Damaged { path, detail: error.to_string() }
            }
            None if is_unexpected_content(&error) => {
                StoreError::Damaged { path, detail: error.to_string() }
            }
            _ => StoreError::Backend { operation, path, source: std::sync::Arc::new(error) },
        }
    }
}

/// Rows are there that the schema does not allow, or are missing that it promises.
fn is_unexpected_content(error: &Error) -> bool {
    matches!(
        error,
        Error::FromSqlConversionFailure(..)
            | Error::IntegralValueOutOfRange(..)
            | Error::InvalidColumnType(..)
            | Error::QueryReturnedNoRows
            | Error::Utf8Error(..)
    )
}
