//! The agent's view of the store: every record, parsed, mirrored in memory.
//!
//! The agent is the store's only writer (it holds the state directory's lock), so the mirror is
//! exact: a change is committed first and mirrored after. Readers take a snapshot and never wait.
//! A record that does not parse is kept aside, by key: its object is not touched until it is mended.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_core::lifecycle::InstanceStatus;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_core::record::{self, BuildState, Desired, Observed, PoolStatus};
use mvm_host::space::Reserve;
use mvm_store::{CommitError, Op, Revision, Store, StoreError, Transaction, encode};
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, watch};

/// Revisions that the store's history keeps for watchers.
const HISTORY: u64 = 1_000;

/// Everything that the store holds, at one revision.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mirror {
    /// The store's revision.
    pub(crate) revision: Revision,
    /// What was asked for.
    pub(crate) desired: Desired,
    /// What is there.
    pub(crate) observed: Observed,
    /// Keys of records that do not parse, with the reason.
    pub(crate) bad: BTreeMap<String, String>,
}

/// Which object a key names.
enum Key {
    Tenant(TenantName),
    Pool(PoolPath),
    Instance(InstancePath),
    Disk(DiskPath),
    PoolStatus(PoolPath),
    InstanceStatus(InstancePath),
    DiskStatus(DiskPath),
}

impl Key {
    fn parse(key: &str) -> Result<Self, String> {
        let (half, rest) = key.split_once('/').ok_or("the key has no kind")?;
        let (kind, path) = rest.split_once('/').ok_or("the key has no name")?;
        let bad = |error: mvm_core::name::NameError| error.to_string();
        match (half, kind) {
            ("desired", "tenant") => Ok(Self::Tenant(path.parse().map_err(bad)?)),
            ("desired", "pool") => Ok(Self::Pool(path.parse().map_err(bad)?)),
            ("desired", "instance") => Ok(Self::Instance(path.parse().map_err(bad)?)),
            ("desired", "disk") => Ok(Self::Disk(path.parse().map_err(bad)?)),
            ("observed", "disk") => Ok(Self::DiskStatus(path.parse().map_err(bad)?)),
            ("observed", "pool") => Ok(Self::PoolStatus(path.parse().map_err(bad)?)),
            ("observed", "instance") => Ok(Self::InstanceStatus(path.parse().map_err(bad)?)),
            _ => Err(format!("`{half}/{kind}` is not a kind of record")),
        }
    }
}

impl Mirror {
    /// Takes over one record, or its removal.
    fn apply(&mut self, key: &str, value: Option<&[u8]>) {
        match self.try_apply(key, value) {
            Ok(()) => {
                self.bad.remove(key);
            }
            Err(reason) => {
                let _ = self.try_apply(key, None);
                self.bad.insert(key.to_owned(), reason);
            }
        }
    }

    fn try_apply(&mut self, key: &str, value: Option<&[u8]>) -> Result<(), String> {
        fn put<K: Ord, V: DeserializeOwned>(
            map: &mut BTreeMap<K, V>,
            key: K,
            value: Option<&[u8]>,
        ) -> Result<(), String> {
            match value {
                None => drop(map.remove(&key)),
                Some(bytes) => {
                    let record = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
                    map.insert(key, record);
                }
            }
            Ok(())
        }
        if value.is_none() && Key::parse(key).is_err() {
            return Ok(());
        }
        match Key::parse(key)? {
            Key::Tenant(name) => put(&mut self.desired.tenants, name, value),
            Key::Pool(path) => put(&mut self.desired.pools, path, value),
            Key::Instance(path) => put(&mut self.desired.instances, path, value),
            Key::Disk(path) => put(&mut self.desired.disks, path, value),
            Key::DiskStatus(path) => put(&mut self.observed.disks, path, value),
            Key::PoolStatus(path) => put(&mut self.observed.pools, path, value),
            Key::InstanceStatus(path) => put(&mut self.observed.instances, path, value),
        }
    }

    /// An instance's status; one that was never acted upon has the default.
    pub(crate) fn status(&self, path: &InstancePath) -> InstanceStatus {
        self.observed.instances.get(path).cloned().unwrap_or_default()
    }

    /// The first record of a tenant that does not parse.
    pub(crate) fn bad_record_of(&self, tenant: &TenantName) -> Option<(&str, &str)> {
        let mut bad = self.bad.iter();
        bad.find(|(key, _)| record::tenant_of_key(key).is_none_or(|owner| owner == *tenant))
            .map(|(key, reason)| (key.as_str(), reason.as_str()))
    }

    /// Whether an instance's observed record does not parse.
    pub(crate) fn is_untouchable(&self, path: &InstancePath) -> bool {
        self.bad.contains_key(&record::instance_status_key(path))
    }
}

/// The store and its mirror.
pub(crate) struct State {
    store: Arc<dyn Store>,
    mirror: watch::Sender<Arc<Mirror>>,
    writing: Mutex<()>,
    reserve: Reserve,
}

/// What a change may use of a filesystem that is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// Nothing.
    Ordinary,
    /// The space that was set aside for it: it says what is, or frees something.
    Reserved,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError<E> {
    /// The change itself was refused.
    #[error("the change was refused")]
    Refused(E),
    /// The store failed.
    #[error("cannot write the state")]
    Store(#[from] CommitError),
}

/// A change that cannot be refused.
pub(crate) type Infallible = std::convert::Infallible;

impl State {
    /// Reads everything. A build that an earlier agent was in the middle of is nobody's any more.
    pub(crate) async fn load(store: Arc<dyn Store>, reserve: Reserve) -> Result<Self, CommitError> {
        match store.compact(HISTORY).await {
            // The history may be long for a while.
            Err(StoreError::DiskFull { .. }) => {}
            compacted => {
                compacted?;
            }
        }
        let listing = store.list("").await?;
        let mut mirror = Mirror { revision: listing.revision, ..Mirror::default() };
        for entry in &listing.entries {
            mirror.apply(&entry.key, Some(&entry.value));
        }
        let mut abandoned = Vec::new();
        for (path, status) in &mirror.observed.pools {
            if matches!(status.build, BuildState::Building { .. }) {
                let status = PoolStatus { build: BuildState::Idle, ..status.clone() };
                abandoned.push(encode(record::pool_status_key(path), &status)?);
            }
        }
        let mirror = watch::Sender::new(Arc::new(mirror));
        let state = Self { store, mirror, writing: Mutex::new(()), reserve };
        state.write(abandoned).await?;
        Ok(state)
    }

    /// The present state.
    pub(crate) fn now(&self) -> Arc<Mirror> {
        self.mirror.borrow().clone()
    }

    /// The present state and each later one (the latest, when several came at once).
    pub(crate) fn follow(&self) -> watch::Receiver<Arc<Mirror>> {
        self.mirror.subscribe()
    }

    /// Changes records as one transaction: `change` sees the present state, which stays as it is
    /// meanwhile, and says what to write.
    pub(crate) async fn change<T, E, F>(
        &self,
        change: impl FnOnce(Arc<Mirror>) -> F,
    ) -> Result<(Revision, T), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, T), E>>,
    {
        self.change_with(Room::Ordinary, change).await
    }

    /// The same on a filesystem that may be full.
    pub(crate) async fn change_with<T, E, F>(
        &self,
        room: Room,
        change: impl FnOnce(Arc<Mirror>) -> F,
    ) -> Result<(Revision, T), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, T), E>>,
    {
        let _writing = self.writing.lock().await;
        let (ops, answer) = change(self.now()).await.map_err(ChangeError::Refused)?;
        let revision = self.now().revision;
        if ops.is_empty() {
            return Ok((revision, answer));
        }
        let mut transaction = Transaction::new().require_unchanged(record::DESIRED, revision);
        for op in &ops {
            transaction = transaction.with(op.clone());
        }
        let committed = match self.store.commit(transaction.clone()).await {
            Err(CommitError::Store(StoreError::DiskFull { .. }))
                if room == Room::Reserved && self.reserve.give_up() =>
            {
                tracing::warn!("the filesystem is full: the reserve of space is given up");
                self.store.commit(transaction).await?
            }
            committed => committed?,
        };
        self.mirror.send_modify(|mirror| {
            // In place unless a reader holds the earlier state.
            let mirror = Arc::make_mut(mirror);
            mirror.revision = committed.revision;
            for op in &ops {
                match op {
                    Op::Put { key, value } => mirror.apply(key, Some(value)),
                    Op::Delete { key } => mirror.apply(key, None),
                }
            }
        });
        if committed.revision.get() % HISTORY == 0 {
            match self.store.compact(HISTORY).await {
                Err(StoreError::DiskFull { .. }) => {}
                compacted => {
                    compacted.map_err(CommitError::from)?;
                }
            }
        }
        Ok((committed.revision, answer))
    }

    /// Records what is observed of an instance.
    pub(crate) async fn put_instance_status(
        &self,
        path: &InstancePath,
        status: &InstanceStatus,
    ) -> Result<(), CommitError> {
        self.write(vec![encode(record::instance_status_key(path), status)?]).await
    }

    /// Writes records whatever the present state is.
    pub(crate) async fn write(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        let change = async |_| Ok::<_, Infallible>((ops, ()));
        match self.change_with(Room::Reserved, change).await {
            Ok(_) => Ok(()),
            Err(ChangeError::Store(error)) => Err(error),
            Err(ChangeError::Refused(never)) => match never {},
        }
    }

    /// Sets space aside for changes on a full filesystem, unless it is.
    pub(crate) fn ensure_reserve(&self) -> std::io::Result<()> {
        self.reserve.ensure()
    }

    /// The records under a prefix, as stored.
    pub(crate) async fn raw(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let entries = self.store.list("").await?.entries.into_iter();
        let matching = entries.filter(|entry| entry.key.starts_with(prefix));
        Ok(matching.map(|entry| (entry.key, entry.value)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use mvm_store::{Committed, Entry, Listing, MemoryStore, Watch};
    use std::path::PathBuf;

    /// A store on a filesystem that is full as long as a file is there.
    struct FullStore(MemoryStore, PathBuf);

    #[async_trait]
    impl Store for FullStore {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.0.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.0.list(prefix).await
        }
        async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
            if self.1.exists() {
                return Err(StoreError::DiskFull { path: self.1.clone() }.into());
            }
            self.0.commit(transaction).await
        }
        async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
            self.0.watch(prefix, after).await
        }
        async fn revision(&self) -> Result<Revision, StoreError> {
            self.0.revision().await
        }
        async fn compact(&self, _keep: u64) -> Result<Revision, StoreError> {
            Err(StoreError::DiskFull { path: self.1.clone() })
        }
    }

    #[tokio::test]
    async fn on_a_full_filesystem_what_is_and_what_frees_space_is_still_written() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(dir.path());
        reserve.ensure().unwrap();
        let store = FullStore(MemoryStore::new(), dir.path().join("reserve"));
        let state = State::load(Arc::new(store), reserve).await.unwrap();
        let put = || vec![Op::Put { key: "stray".to_owned(), value: "x".into() }];
        let refused = state.change(async |_| Ok::<_, Infallible>((put(), ()))).await;
        assert!(matches!(refused, Err(ChangeError::Store(_))));
        assert_eq!(state.now().bad.len(), 0);
        state.write(put()).await.unwrap();
        assert_eq!(state.now().bad.len(), 1);
    }

    #[tokio::test]
    async fn a_record_that_does_not_parse_is_kept_aside_until_it_is_mended() {
        let store = Arc::new(MemoryStore::new());
        let key = "desired/tenant/demo";
        let write = Transaction::new().put(key, "{\"name\": 3").put("stray", "x");
        store.commit(write).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state = State::load(store, Reserve::of(dir.path())).await.unwrap();
        let demo: TenantName = "demo".parse().unwrap();
        assert_eq!(state.now().bad.len(), 2);
        assert!(state.now().bad_record_of(&demo).is_some());
        let mended = r#"{"name":"demo","quota":{},"created_unix_ms":1,
            "network":{"net_id":1,"subnet":"10.240.1.0/24"}}"#;
        let ops = vec![
            Op::Put { key: key.to_owned(), value: mended.into() },
            Op::Delete { key: "stray".to_owned() },
        ];
        state.write(ops).await.unwrap();
        assert!(state.now().bad.is_empty());
        assert!(state.now().desired.tenants.contains_key(&demo));
    }
}
