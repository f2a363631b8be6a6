//! Saving an instance for others to begin from: with a copy of its disk, and it goes on.

use std::time::Duration;

use mvm_core::lifecycle::{Outcome, Phase};
use mvm_core::name::{InstancePath, RevisionId, SnapshotId};
use mvm_core::record::DesiredState;
use mvm_wire::{ApiError, ErrorCode};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::actor::Message;
use crate::node::{InstanceHandle, Node};

/// How long an agent has to spawn the actors of the instances that it finds.
const ACTOR_LIMIT: Duration = Duration::from_secs(10);
/// How often one is looked for.
const ACTOR_POLL: Duration = Duration::from_millis(10);
/// How often it is looked whether an instance that is to start still may.
const WAITING_POLL: Duration = Duration::from_millis(100);

/// Waits until an instance that starts, or is about to, can be forked, as an exec does; also until one
/// that falls asleep has.
pub(crate) async fn settled(node: &Node, source: &InstancePath) {
    let mut state = node.state.follow();
    loop {
        let mirror = state.borrow_and_update().clone();
        let desired = mirror.desired.instances.get(source).map(|record| record.desired);
        let is_coming = desired.is_some_and(DesiredState::is_alive)
            && match mirror.status(source).phase {
                Phase::Starting { .. }
                | Phase::Suspending { .. }
                | Phase::Stopping { outcome: Outcome::Asleep, .. }
                | Phase::Releasing { outcome: Outcome::Asleep, .. } => true,
                // The next round starts it, if nothing is in its way.
                Phase::Created => !node.waiting().borrow().contains_key(source),
                // The next round puts it to sleep, likewise.
                Phase::Running { .. } | Phase::Warm { .. } => {
                    desired == Some(DesiredState::Sleeping)
                        && !node.waiting().borrow().contains_key(source)
                }
                _ => false,
            };
        if !is_coming {
            return;
        }
        // What it waits for is not part of the state that is followed.
        drop(timeout(WAITING_POLL, state.changed()).await);
    }
}

/// Saves an instance as a snapshot that others begin from: kept until it is let go of, and as long as a record
/// names it. Tells which revision the instance runs.
pub(crate) async fn capture_held(
    node: &Node,
    source: &InstancePath,
) -> Result<(SnapshotId, RevisionId), ApiError> {
    let gone = || ApiError::new(ErrorCode::Conflict, format!("{source} is being destroyed"));
    let revision = node.state.now().status(source).revision.clone();
    let snapshot = node.shared.hold();
    let captured = match capture(node, source, &snapshot).await {
        None => Err(gone()),
        Some(Err(error)) => {
            Err(ApiError::new(ErrorCode::Conflict, format!("{source} cannot be forked: {error}"))
                .hint(format!("see `mvm why {}`", source.id)))
        }
        Some(Ok(())) => revision.ok_or_else(gone),
    };
    match captured {
        Ok(revision) => Ok((snapshot, revision)),
        Err(error) => {
            // No record needs it.
            node.shared.let_go(&snapshot);
            Err(error)
        }
    }
}

/// Saves an instance as a snapshot that others begin from, or says why not; nothing if the instance
/// is gone.
pub(crate) async fn capture(
    node: &Node,
    source: &InstancePath,
    snapshot: &SnapshotId,
) -> Option<Result<(), String>> {
    let handle = actor_of(node, source).await?;
    let (done, captured) = oneshot::channel();
    let capture = Message::Capture(node.shared.dir(snapshot), done);
    handle.mailbox.send(Box::new(capture)).await.ok()?;
    captured.await.ok()
}

/// The actor of an instance, which an agent that has just started is about to spawn; none if the
/// instance is gone.
async fn actor_of(node: &Node, source: &InstancePath) -> Option<InstanceHandle> {
    let deadline = Instant::now() + ACTOR_LIMIT;
    loop {
        if let Some(handle) = node.instance(source) {
            return Some(handle);
        }
        let mirror = node.state.now();
        let record = mirror.desired.instances.get(source);
        let is_kept = record.is_some_and(|record| record.desired != DesiredState::Destroyed);
        if !is_kept || Instant::now() >= deadline {
            return None;
        }
        sleep(ACTOR_POLL).await;
    }
}
