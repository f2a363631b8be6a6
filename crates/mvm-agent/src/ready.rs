//! Keeps a VMM's process waiting for each sleeping instance whose pool's policy asks for that.
//!
//! What there is is compared with what there is to be; the instance's actor makes or ends it. A process
//! that died is replaced, and so is one of an earlier agent.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::lifecycle::Phase;
use mvm_core::name::InstancePath;
use mvm_core::record::{DesiredState, Existence};
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
        let wanted = wanted(&state.borrow_and_update());
        let missing = wanted.iter().filter(|path| !node.host.vmm.is_ready(&path.id));
        // Also one that is being made at the moment.
        let too_many = before.difference(&wanted);
        let orders = missing.map(|path| (path, true)).chain(too_many.map(|path| (path, false)));
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

/// The sleeping instances that a process is to wait for.
fn wanted(mirror: &Mirror) -> BTreeSet<InstancePath> {
    let pools = mirror.desired.pools.values();
    let pools: BTreeSet<_> = pools
        .filter(|pool| pool.existence == Existence::Kept && pool.spec.sleep_policy.keep_vmm)
        .map(|pool| &pool.path)
        .collect();
    if pools.is_empty() {
        return BTreeSet::new();
    }
    let records = mirror.desired.instances.values();
    let asleep = records.filter(|record| {
        record.desired == DesiredState::Sleeping
            && pools.contains(&record.path.pool)
            && matches!(mirror.status(&record.path).phase, Phase::Sleeping { .. })
    });
    asleep.map(|record| record.path.clone()).collect()
}
