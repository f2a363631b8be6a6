//! Wakes what rests when a neighbour of its tenant sends it a packet, unless its pool's policy says otherwise.
//!
//! The network looks out for packets; an instance is woken as it is by everything else that needs it.

use std::collections::BTreeMap;

use mvm_core::lifecycle::Phase;
use mvm_core::mirror::Mirror;
use mvm_core::name::InstancePath;
use mvm_core::net::InstanceNetwork;
use mvm_core::record::DesiredState;

use crate::node::Node;
use crate::wake;

/// What rests and may be woken, by its place.
pub(crate) fn resting(mirror: &Mirror) -> BTreeMap<InstanceNetwork, InstancePath> {
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

/// Wakes what a neighbour needs.
pub(crate) async fn wake(node: &Node, path: &InstancePath) {
    tracing::info!(instance = %path, "a neighbour sent it a packet: it is woken");
    let refusal = wake::wake(node, path).await.err();
    let what = format!("waking {path}, which a neighbour needs");
    node.set_problem(&what, refusal.map(|error| error.to_string()));
}
