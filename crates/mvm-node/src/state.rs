//! What the node knows: its own records, and the document that it was given, as one [`Mirror`].

use std::sync::Arc;

use mvm_core::document::NodeDocument;
use mvm_core::mirror::Mirror;
use mvm_core::record::{self, BuildState, PoolStatus};
use mvm_core::stored::versioned;
use mvm_host::space::Reserve;
use mvm_store::{
    ChangeError, CommitError, Fold, Infallible, Mirrored, Op, Part, Room, Store, StoreError, encode,
};
use tokio::sync::watch;

/// The node's own records.
const OWN: Part = Part { scope: "node", prefixes: &[record::OBSERVED, record::LOCAL] };

/// The node's records and its document.
pub(crate) struct State {
    mirrored: Mirrored<Mirror>,
    reserve: Reserve,
}

impl State {
    /// Reads everything. A build that an earlier agent was in the middle of is nobody's any more.
    pub(crate) async fn load(
        store: Arc<dyn Store>,
        reserve: Reserve,
        document: &NodeDocument,
    ) -> Result<Self, CommitError> {
        let fold = Fold {
            apply: Mirror::apply,
            note_version: |mirror, version| mirror.version = version.get(),
        };
        let spare = reserve.clone();
        let give_up = Box::new(move || spare.give_up());
        let mirrored = Mirrored::load(store, OWN, fold, give_up).await?;
        mirrored.modify(|mirror| mirror.set_document(document));
        let state = Self { mirrored, reserve };
        let mut abandoned = Vec::new();
        for (path, status) in &state.now().observed.pools {
            if matches!(status.build, BuildState::Building { .. }) {
                let status = PoolStatus { build: BuildState::Idle, ..status.clone() };
                abandoned.push(encode(record::pool_status_key(path), &versioned(&status))?);
            }
        }
        state.write(abandoned).await?;
        Ok(state)
    }

    /// The present state.
    pub(crate) fn now(&self) -> Arc<Mirror> {
        self.mirrored.now()
    }

    /// The present state and each later one (the latest, when several came at once).
    pub(crate) fn follow(&self) -> watch::Receiver<Arc<Mirror>> {
        self.mirrored.follow()
    }

    /// From now on this is what the node is given.
    pub(crate) fn set_document(&self, document: &NodeDocument) {
        self.mirrored.modify(|mirror| mirror.set_document(document));
    }

    /// Changes records as one transaction: `change` sees the present state and says what to write.
    pub(crate) async fn change<T, E, F>(
        &self,
        change: impl Fn(Arc<Mirror>) -> F,
    ) -> Result<T, ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, T), E>>,
    {
        Ok(self.mirrored.change(Room::Reserved, change).await?.1)
    }

    /// Writes records whatever the present state is.
    pub(crate) async fn write(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        self.mirrored.write(ops).await
    }

    /// Removes what the node decided by itself and is settled.
    pub(crate) async fn forget_settled(&self) -> Result<(), CommitError> {
        if self.now().settled_local().is_empty() {
            return Ok(());
        }
        let forget = async |mirror: Arc<Mirror>| {
            let keys = mirror.settled_local().into_iter();
            Ok::<_, Infallible>((keys.map(|key| Op::Delete { key }).collect(), ()))
        };
        match self.change(forget).await {
            Ok(()) => Ok(()),
            Err(ChangeError::Store(error)) => Err(error),
            Err(ChangeError::Refused(never)) => match never {},
        }
    }

    /// Sets space aside for changes on a full filesystem, unless it is.
    pub(crate) fn ensure_reserve(&self) -> std::io::Result<()> {
        self.reserve.ensure()
    }

    /// The node's own records whose keys begin with this, as stored.
    pub(crate) async fn raw(&self, beginning: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut records = self.mirrored.raw(beginning).await?;
        records.retain(|(key, _)| OWN.prefixes.iter().any(|own| key.starts_with(own)));
        Ok(records)
    }
}
