//! Snapshots that instances begin from: a fork's source or a pool's base, kept as long as somebody
//! needs it.
//!
//! The memory of one is loaded once, into memory that nobody can change any more, and is mapped by
//! every VM that begins with it. It is let go when nobody has begun with it for a while: the VMs
//! that map it keep it for themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mvm_core::lifecycle::{InstanceStatus, Phase, StartFrom};
use mvm_core::name::SnapshotId;
use mvm_core::record::Captured;
use mvm_core::snapshot::ImageRef;
use mvm_host::snapshots::{self, SnapshotError};
use mvm_host::state_dir::{LAYER, MEMORY_IMAGE, SnapshotDir, StateDir};
use mvm_host::vmm::MemoryImage;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::effects::EffectError;
use crate::sleep::{RestoreError, blocking};
use mvm_core::mirror::Mirror;

/// How long a memory that nobody begins with stays loaded.
const KEPT_LOADED: Duration = Duration::from_secs(60);

/// The snapshots, by id.
pub(crate) struct SharedSnapshots {
    state_dir: StateDir,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    loaded: BTreeMap<SnapshotId, Loaded>,
    /// Being made, or made and not yet named by a record.
    held: BTreeSet<SnapshotId>,
}

struct Loaded {
    memory: Arc<OnceCell<Arc<MemoryImage>>>,
    used: Instant,
}

impl SharedSnapshots {
    /// Those of this state directory.
    pub(crate) fn new(state_dir: StateDir) -> Self {
        Self { state_dir, state: Mutex::default() }
    }

    /// The directory of a snapshot.
    pub(crate) fn dir(&self, id: &SnapshotId) -> SnapshotDir {
        self.state_dir.snapshot(id)
    }

    /// A fresh id, whose snapshot is kept until it is let go.
    pub(crate) fn hold(&self) -> SnapshotId {
        let mut state = self.state();
        loop {
            let id = SnapshotId::from_bits(getrandom::u32().unwrap_or_default());
            if !self.dir(&id).exists() && state.held.insert(id.clone()) {
                return id;
            }
        }
    }

    /// From now on the snapshot is kept only as long as a record names it.
    pub(crate) fn let_go(&self, id: &SnapshotId) {
        self.state().held.remove(id);
    }

    /// A snapshot's memory, verified and loaded if it is not.
    pub(crate) async fn memory(&self, id: &SnapshotId) -> Result<Arc<MemoryImage>, RestoreError> {
        let cell = {
            let mut state = self.state();
            let used = Instant::now();
            let fresh = || Loaded { memory: Arc::default(), used };
            let loaded = state.loaded.entry(id.clone()).or_insert_with(fresh);
            loaded.used = used;
            loaded.memory.clone()
        };
        let dir = self.dir(id);
        let load = async {
            let loaded = blocking(move || {
                let manifest = snapshots::read(&dir)?;
                snapshots::verify(&dir, &manifest, |name| [MEMORY_IMAGE, LAYER].contains(&name))?;
                Ok::<_, SnapshotError>(MemoryImage::share(&dir.memory_image()))
            });
            let memory = loaded.await??.map_err(RestoreError::Memory)?;
            Ok::<_, RestoreError>(Arc::new(memory))
        };
        cell.get_or_try_init(|| load).await.cloned()
    }

    /// Lets go of memories that nobody begins with, and removes snapshots that nobody needs. What a
    /// record that does not parse needs is not known, so that nothing is removed then.
    pub(crate) fn tidy(&self, mirror: &Mirror) -> Result<(), EffectError> {
        let needed: BTreeSet<SnapshotId> = needed(mirror);
        let gone: Vec<SnapshotId> = {
            let mut state = self.state();
            state.loaded.retain(|_, loaded| loaded.used.elapsed() < KEPT_LOADED);
            if !mirror.bad.is_empty() {
                return Ok(());
            }
            let entries =
                std::fs::read_dir(self.state_dir.snapshots()).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            let ids = names.filter_map(|name| SnapshotDir::finished_name(&name).parse().ok());
            ids.filter(|id| !needed.contains(id) && !state.held.contains(id)).collect()
        };
        for id in gone {
            snapshots::remove(&self.dir(&id))?;
            snapshots::remove(&self.dir(&id).unfinished())?;
        }
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What instances may yet begin with, and what their memories are relative to.
fn needed(mirror: &Mirror) -> BTreeSet<SnapshotId> {
    let bases = mirror.observed.pools.values().filter_map(|status| status.base.as_ref());
    let mut needed: BTreeSet<SnapshotId> = bases.map(|base| base.id.clone()).collect();
    needed.extend(mirror.observed.captures.values().filter_map(|it| match &it.outcome {
        Captured::Saved { snapshot, .. } => Some(snapshot.clone()),
        Captured::Failed { .. } => None,
    }));
    for record in mirror.desired.instances.values() {
        let status = mirror.status(&record.path);
        let has_run = status.boots + status.wakes > 0;
        needed.extend(record.origin.clone().filter(|_| !has_run));
        needed.extend(images(status).cloned());
    }
    needed
}

fn images(status: &InstanceStatus) -> impl Iterator<Item = &SnapshotId> {
    let of_snapshot = status.snapshot.as_ref().map(|snapshot| &snapshot.memory);
    let begun = match &status.phase {
        Phase::Starting { begin: StartFrom::Shared { id }, .. } => Some(id),
        _ => None,
    };
    let images = status.memory.iter().chain(of_snapshot).filter_map(|image| match image {
        ImageRef::Shared { id } => Some(id),
        ImageRef::Own { .. } => None,
    });
    images.chain(begun)
}
