//! The state store: keys and values with one global version, compare-and-swap, watches and leases:
//! what etcd has and SQLite can have.
//!
//! The agent and the coordinator keep their desired state and their records in it. A key is a path
//! of segments (`instances/demo/hello/i-0123abcd`), a value is bytes, and every transaction that
//! changes something takes the next version of the whole store. [`Limits`] says how much one may hold.
//!
//! [`MemoryStore`] serves tests and simulations, [`SqliteStore`] is the embedded default; one
//! conformance suite runs on both, at etcd's limits. [`FaultyStore`] makes another store fail.
//! [`TypedStore`] adds JSON records, and [`Mirrored`] has a part of a store in memory.
//!
//! A commit that fails may have taken place nevertheless
//! ([`may_have_happened`](CommitError::may_have_happened)), and a watch is a hint: who decides on what
//! it told has the transaction compare. [`scope_key`] is for decisions on a whole listing.
//!
//! The store never interprets a value, never retries a conflict, and does not keep a second process
//! out: whoever opens a file-backed store holds a lock of its own.

mod compare;
mod entry;
mod error;
mod faulty;
mod key;
mod lease;
mod limits;
mod memory;
mod mirrored;
mod settings;
mod sqlite;
mod transaction;
mod typed;
mod version;
mod watch;

use std::time::Duration;

use async_trait::async_trait;

pub use compare::{Conflict, Found};
pub use entry::{Entry, Listing};
pub use error::{CommitError, StoreError};
pub use faulty::{Fault, FaultyStore};
pub use key::{KeyError, MAX_KEY_BYTES};
pub use lease::{Clock, LeaseId, ManualClock, SystemClock};
pub use limits::Limits;
pub use memory::MemoryStore;
pub use mirrored::{ChangeError, Fold, GiveUpSpace, Infallible, Mirrored, Part, Room};
pub use settings::Settings;
pub use sqlite::{OpenError, SqliteStore};
pub use transaction::{Committed, Compare, Op, Transaction, scope_key};
pub use typed::{BadRecord, Typed, TypedListing, TypedStore, decode, encode};
pub use version::Version;
pub use watch::{Change, Watch, WatchBatch, WatchEvent};

/// Keys and values with one global version.
///
/// A prefix is either empty, which covers every key, or ends in `/`, which covers every key below
/// it: `tenants/` covers `tenants/demo` and `tenants/demo/pools`, and `tenants/de` is refused.
///
/// Reads see every transaction that was acknowledged before they started. Dropping the future of a
/// [`commit`](Store::commit) does not undo it: it may still take place.
#[async_trait]
pub trait Store: Send + Sync {
    /// The entry of `key`, or `None` if there is none.
    ///
    /// # Errors
    /// The key is malformed, or the backend failed.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// All entries below `prefix` in the order of their keys, and the version that they were read
    /// at: a [`watch`](Store::watch) after that version misses nothing and repeats nothing.
    ///
    /// # Errors
    /// The prefix is malformed, or the backend failed.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Applies all operations as one new version if all compares hold, else nothing.
    ///
    /// A transaction without effect (no operations, or only deletions of absent keys) takes no
    /// version and answers with the current one.
    ///
    /// # Errors
    /// [`CommitError::Conflict`] names the first compare that does not hold. Otherwise the
    /// transaction breaks a limit, or the backend failed.
    async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError>;

    /// Every change below `prefix` in the versions after `after`, which is usually the version of
    /// a listing.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if that part of the history is gone, and
    /// [`StoreError::AheadOfStore`] if `after` is yet to come; both call for a new listing.
    /// Otherwise the prefix is malformed, or the backend failed.
    async fn watch(&self, prefix: &str, after: Version) -> Result<Watch, StoreError>;

    /// The version of the latest transaction; zero in an empty store.
    ///
    /// # Errors
    /// The backend failed.
    async fn version(&self) -> Result<Version, StoreError>;

    /// Grants a lease: the keys that are [put with it](Transaction::put_leased) are deleted, as one
    /// transaction, soon after it was not kept alive for so long. A put without a lease takes the
    /// key off it. A store may make the time longer: etcd counts whole seconds, and a store that was
    /// closed and opened again starts each lease's time anew.
    ///
    /// # Errors
    /// The backend failed.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// The lease's time starts again when this arrives at the store: its holder counts from when it
    /// asked.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLease`] if it has ended; otherwise the backend failed.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends the lease now, and with it its keys, as one transaction.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLease`] if it has ended; otherwise the backend failed.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// What one transaction may hold; more is refused before anything happens.
    fn limits(&self) -> Limits;

    /// Forgets the history before the last `keep` versions and returns the oldest version that a
    /// watch can still start after. Entries are untouched. The history only grows otherwise, so
    /// whoever owns the store calls this now and then.
    ///
    /// # Errors
    /// The backend failed.
    async fn compact(&self, keep: u64) -> Result<Version, StoreError>;
}
