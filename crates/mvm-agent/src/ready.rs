//! Keeps a VMM's process waiting for each sleeping instance whose pool's policy asks for that.
//!
//! What there is is compared with what there is to be; the instance's actor makes or ends it. A process
//! that died is replaced, and so is one of an earlier agent.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::lifecycle::Phase;
use mvm_core::name::InstancePath;
use mvm_core::record::{DesiredState, Existence, InstanceRecord};
use tokio::time::{sleep, timeout};

use crate::actor::Message;
use crate::node::Node;
use crate::state::Mirror;

/// How often it is looked whether those that wait are still there.
const INTERVAL: Duration = Duration::from_secs(10);
/// Pause between two looks: what was asked for just now is still being made.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs until the agent is told to end.
pub(crate) async fn run(node: Arc<Node>) {
    let mut state = node.state.follow();
    let mut before = BTreeSet::new();
    loop {
        let (wanted, unwanted) = asleep(&state.borrow_and_update(), &before);
        let missing = wanted.iter().filter(|path| !node.host.vmm.is_ready(&path.id));
        let orders =
            missing.map(|path| (path, true)).chain(unwanted.iter().map(|path| (path, false)));
        for (path, is_wanted) in orders {
            if let Some(handle) = node.instance(path) {
                // The mailbox is closed only when the actor has ended.
                let _ = handle.mailbox.send(Message::KeepVmm(is_wanted)).await;
            }
        }
        before = wanted;
        if !before.is_empty() {
            sleep(PAUSE).await;
            // A change brings the next look, and time alone does.
            drop(timeout(INTERVAL, state.changed()).await);
        } else if state.changed().await.is_err() {
            return;
        }
    }
}

/// The sleeping instances that a process is to wait for, and those of `before` that none is to wait for.
fn asleep(
    mirror: &Mirror,
    before: &BTreeSet<InstancePath>,
) -> (BTreeSet<InstancePath>, BTreeSet<InstancePath>) {
    let pools = mirror.desired.pools.values();
    let pools: BTreeSet<_> = pools
        .filter(|pool| pool.existence == Existence::Kept && pool.spec.sleep_policy.keep_vmm)
        .map(|pool| &pool.path)
        .collect();
    let (mut wanted, mut unwanted) = (BTreeSet::new(), BTreeSet::new());
    if pools.is_empty() && before.is_empty() {
        return (wanted, unwanted);
    }
    for InstanceRecord { path, desired, .. } in mirror.desired.instances.values() {
        let is_kept = pools.contains(&path.pool);
        let is_asleep = || matches!(mirror.status(path).phase, Phase::Sleeping { .. });
        match is_wanted(*desired, is_asleep, is_kept) {
            Some(true) => drop(wanted.insert(path.clone())),
            Some(false) if before.contains(path) => drop(unwanted.insert(path.clone())),
            _ => {}
        }
    }
    (wanted, unwanted)
}

/// Whether a process is to wait for an instance; `None` leaves it as it is: a wake that was asked for takes
/// what waits, and whatever else follows a sleep ends it.
fn is_wanted(
    desired: DesiredState,
    is_asleep: impl FnOnce() -> bool,
    is_kept: bool,
) -> Option<bool> {
    (desired == DesiredState::Sleeping && is_asleep()).then_some(is_kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_wake_that_was_asked_for_is_left_to_it() {
        let (yes, no) = (|| true, || false);
        assert_eq!(is_wanted(DesiredState::Sleeping, yes, true), Some(true));
        assert_eq!(is_wanted(DesiredState::Sleeping, yes, false), Some(false));
        for desired in [DesiredState::Running, DesiredState::Warm, DesiredState::Stopped] {
            assert_eq!(is_wanted(desired, yes, true), None);
            assert_eq!(is_wanted(desired, yes, false), None);
        }
        assert_eq!(is_wanted(DesiredState::Sleeping, no, true), None);
    }
}
