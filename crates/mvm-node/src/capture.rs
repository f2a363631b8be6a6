//! Saving an instance for others to begin from: with a copy of its disk, and it goes on.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::lifecycle::{Outcome, Phase};
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, RequestId, SnapshotId};
use mvm_core::record::{self, Capture, Captured, Desired, DesiredState};
use mvm_core::stored::versioned;
use mvm_store::{Op, encode};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::actor::Message;
use crate::node::{InstanceHandle, Node};
use crate::workers::{Work, Workers};

/// How long an agent has to spawn the actors of the instances that it finds.
const ACTOR_LIMIT: Duration = Duration::from_secs(10);
/// How often one is looked for.
const ACTOR_POLL: Duration = Duration::from_millis(10);
/// How often it is looked whether an instance that is to start still may.
const WAITING_POLL: Duration = Duration::from_millis(100);

/// Saves what forks wait for, and forgets what was saved for those that wait no more.
pub(crate) fn begin(node: &Arc<Node>, workers: &mut Workers, mirror: &Mirror, desired: &Desired) {
    let captures = &mirror.observed.captures;
    for (id, fork) in desired.forks.iter().filter(|(id, _)| !captures.contains_key(*id)) {
        let (node, id, source) = (node.clone(), id.clone(), fork.source.clone());
        workers.begin(Work::Capture(id.clone()), || save(node, id, source));
    }
    let over = captures.iter().filter(|(id, _)| !mirror.desired.forks.contains_key(*id));
    let over: Vec<Op> = over
        .map(|(id, capture)| Op::Delete {
            key: record::capture_key(&capture.source.pool.tenant, id),
        })
        .collect();
    if !over.is_empty() {
        let node = node.clone();
        workers.begin(Work::Captures, || async move {
            node.write_at_last("forgetting what was saved for forks", Ok(over)).await;
        });
    }
}

/// Saves an instance for forks, once it has settled, and records what came of it.
async fn save(node: Arc<Node>, id: RequestId, source: InstancePath) {
    settled(&node, &source).await;
    let revision = node.state.now().status(&source).revision.clone();
    let snapshot = node.shared.hold();
    let gone = || "it is being destroyed".to_owned();
    let saved = capture(&node, &source, &snapshot).await.unwrap_or_else(|| Err(gone()));
    let outcome = match saved.and_then(|()| revision.ok_or_else(gone)) {
        Ok(revision) => Captured::Saved { snapshot: snapshot.clone(), revision },
        Err(error) => Captured::Failed { error },
    };
    let key = record::capture_key(&source.pool.tenant, &id);
    let op = encode(key, &versioned(&Capture { source, outcome }));
    node.write_at_last("recording what is saved for forks", op.map(|op| vec![op])).await;
    // From now on it is that record which keeps it, and then those of the forks.
    node.shared.let_go(&snapshot);
}

/// Waits until an instance that starts, or is about to, can be forked, as an exec does; also until one
/// that falls asleep has.
async fn settled(node: &Node, source: &InstancePath) {
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
