//! Wakes what rests when a neighbour of its tenant sends it a packet, unless its pool's policy says otherwise.
//!
//! The network looks out for packets; an instance is woken as it is by everything else that needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mvm_core::lifecycle::Phase;
use mvm_core::name::InstancePath;
use mvm_core::net::InstanceNetwork;
use mvm_core::record::DesiredState;
use tokio::time::sleep;

use crate::node::{Node, chain};
use crate::wake;
use mvm_core::mirror::Mirror;

/// How often it is looked whether what the network looks out with is still there.
const INTERVAL: Duration = Duration::from_secs(10);

/// Runs until the agent is told to end.
pub(crate) async fn run(node: Arc<Node>) {
    let mut state = node.state.follow();
    let mut watched = BTreeMap::new();
    let mut is_due = false;
    loop {
        let wanted = resting(&state.borrow_and_update());
        if is_due || wanted != watched {
            let places: BTreeSet<InstanceNetwork> = wanted.keys().copied().collect();
            let result = node.host.network.watch_resting(&places).await;
            let problem = result.err().map(|error| chain(&error));
            node.set_problem("looking out for neighbours of what rests", problem);
            watched = wanted;
            is_due = false;
        }
        let is_any = !watched.is_empty();
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return;
            },
            visited = node.host.network.visited() => if let Some(path) = watched.get(&visited) {
                wake(&node, path).await;
            },
            () = sleep(INTERVAL), if is_any => is_due = true,
        }
    }
}

/// What rests and may be woken, by its place.
fn resting(mirror: &Mirror) -> BTreeMap<InstanceNetwork, InstancePath> {
    let records = mirror.desired.instances.values();
    let resting = records.filter(|record| {
        let is_to_rest = matches!(record.desired, DesiredState::Warm | DesiredState::Sleeping);
        // What stands by is nobody's neighbour yet.
        is_to_rest
            && record.purpose.is_use()
            && matches!(
                mirror.status(&record.path).phase,
                Phase::Warm { .. } | Phase::Sleeping { .. }
            )
    });
    let may_be_woken = resting.filter(|record| {
        let pool = mirror.desired.pools.get(&record.path.pool);
        pool.is_some_and(|pool| !pool.spec.sleep_policy.ignore_neighbours)
    });
    may_be_woken
        .filter_map(|record| Some((mirror.desired.network_of(record)?, record.path.clone())))
        .collect()
}

async fn wake(node: &Node, path: &InstancePath) {
    tracing::info!(instance = %path, "a neighbour sent it a packet: it is woken");
    let refusal = wake::wake(node, path).await.err();
    let what = format!("waking {path}, which a neighbour needs");
    node.set_problem(&what, refusal.map(|error| error.to_string()));
}
