//! What control asks of itself: steps of something that a person asked for, and what a node needs. They take the
//! same path as requests, so that nothing is reserved twice or beyond a quota.

use super::{Denial, Draft, Edit, NodeFacts, check_result};
use crate::name::{InstancePath, PoolPath, RequestId, RevisionId, SnapshotId};
use crate::record::{Desired, ForkRecord};

/// A request of control's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnRequest {
    /// Makes the instances that stand by be so many, all of them as a new one would be now.
    Spares {
        /// Their pool.
        pool: PoolPath,
        /// How many.
        count: u32,
    },
    /// Has an instance saved for forks of it.
    BeginFork {
        /// What the forks are known by until they are there.
        id: RequestId,
        /// The instance.
        source: InstancePath,
        /// How many forks.
        count: u32,
    },
    /// Makes the forks of an instance that was saved.
    MakeForks {
        /// What they are known by.
        id: RequestId,
        /// What was saved.
        snapshot: SnapshotId,
        /// The revision that the instance runs.
        revision: RevisionId,
    },
}

impl OwnRequest {
    /// The pool that it is about.
    pub fn pool<'a>(&'a self, desired: &'a Desired) -> Option<&'a PoolPath> {
        match self {
            Self::Spares { pool, .. } => Some(pool),
            Self::BeginFork { source, .. } => Some(&source.pool),
            Self::MakeForks { id, .. } => desired.forks.get(id).map(|fork| &fork.source.pool),
        }
    }
}

/// Decides a request of control's own.
///
/// # Errors
/// The request is denied; nothing is to be changed.
pub fn admit_own(
    desired: &Desired,
    node: &NodeFacts,
    request: &OwnRequest,
    entropy: &mut dyn FnMut() -> u32,
    now: u64,
) -> Result<Edit, Denial> {
    let is_finished = |path: &InstancePath| node.is_finished(desired, path);
    let check = |edit: &Edit| check_result(desired, &edit.desired, node.capacity, &is_finished);
    let mut draft = Draft::of(desired, node, entropy, now);
    match request {
        OwnRequest::Spares { pool, count } => draft.pool_spares(pool, *count)?,
        OwnRequest::BeginFork { id, source, count } => {
            // Before it is saved for nothing; ids are drawn later.
            let (snapshot, revision) = (SnapshotId::from_bits(0), RevisionId::from_digest([0; 8]));
            let mut ids = 0..;
            let mut any_id = || ids.next().unwrap_or_default();
            let mut made = Draft::of(desired, node, &mut any_id, now);
            made.instance_fork(source, &snapshot, &revision, *count)?;
            check(&made.edit)?;
            let (source, count) = (source.clone(), *count);
            let fork = ForkRecord { source, count, created_unix_ms: now };
            draft.edit.desired.forks.insert(id.clone(), fork);
        }
        OwnRequest::MakeForks { id, snapshot, revision } => {
            if let Some(ForkRecord { source, count, .. }) = draft.edit.desired.forks.remove(id) {
                draft.instance_fork(&source, snapshot, revision, count)?;
            }
        }
    }
    check(&draft.edit)?;
    Ok(draft.edit)
}
