//! What control knows: its own records, and what its node reports, as one [`Mirror`].

use std::sync::Arc;

use mvm_core::document::{NodeDocument, NodeReport};
use mvm_core::mirror::Mirror;
use mvm_core::record;
use mvm_store::{
    ChangeError, CommitError, Fold, GiveUpSpace, Mirrored, Op, Part, Room, Store, StoreError,
    Version,
};
use tokio::sync::watch;

/// Control's own records.
const OWN: Part = Part { scope: "control", prefixes: &[record::DESIRED, record::REQUEST] };

/// Control's records and its node's report.
pub(crate) struct State {
    mirrored: Mirrored<Mirror>,
}

impl State {
    /// Reads what is desired.
    pub(crate) async fn load(
        store: Arc<dyn Store>,
        give_up_space: GiveUpSpace,
    ) -> Result<Self, CommitError> {
        let fold = Fold {
            apply: Mirror::apply,
            note_version: |mirror, version| mirror.version = version.get(),
        };
        Ok(Self { mirrored: Mirrored::load(store, OWN, fold, give_up_space).await? })
    }

    /// The present state.
    pub(crate) fn now(&self) -> Arc<Mirror> {
        self.mirrored.now()
    }

    /// The present state and each later one (the latest, when several came at once).
    pub(crate) fn follow(&self) -> watch::Receiver<Arc<Mirror>> {
        self.mirrored.follow()
    }

    /// What the node is to have at present.
    pub(crate) fn document(&self) -> NodeDocument {
        let mirror = self.now();
        let own = mirror.bad.iter().filter(|(key, _)| key.starts_with(record::DESIRED));
        NodeDocument {
            epoch: 0,
            generation: mirror.version,
            desired: mirror.desired.clone(),
            bad: own.map(|(key, reason)| (key.clone(), reason.clone())).collect(),
        }
    }

    /// From now on this is what the node has.
    pub(crate) fn set_report(&self, report: &NodeReport) {
        self.mirrored.modify(|mirror| mirror.set_report(report));
    }

    /// Changes records as one transaction: `change` sees the present state and says what to write.
    pub(crate) async fn change<T, E, F>(
        &self,
        room: Room,
        change: impl Fn(Arc<Mirror>) -> F,
    ) -> Result<(Version, T), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, T), E>>,
    {
        self.mirrored.change(room, change).await
    }

    /// Control's own records whose keys begin with this, as stored.
    pub(crate) async fn raw(&self, beginning: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut records = self.mirrored.raw(beginning).await?;
        records.retain(|(key, _)| OWN.prefixes.iter().any(|own| key.starts_with(own)));
        Ok(records)
    }
}
