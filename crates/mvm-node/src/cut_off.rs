//! Running microVMs that have lost their taps: whoever deleted one cut the guest off, and only a restart gives
//! it another.
//!
//! The loop looks; what lists and explains instances asks what was found last.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use mvm_core::lifecycle::{InstanceStatus, Phase};
use mvm_core::mirror::Mirror;
use mvm_core::name::InstancePath;
use mvm_core::net::InstanceNetwork;
use mvm_core::vmm::VmHandle;
use mvm_host::net::NetworkError;

use crate::node::Node;

/// What was found last: each microVM that has no tap.
#[derive(Debug, Default)]
pub(crate) struct CutOff(Mutex<BTreeMap<InstancePath, VmHandle>>);

impl CutOff {
    /// What there is to say of each instance whose present microVM is cut off.
    pub(crate) fn problems(&self, mirror: &Mirror) -> BTreeMap<InstancePath, String> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_present =
            |path: &InstancePath, vm: &VmHandle| mirror.status(path).vm.as_ref() == Some(vm);
        let present = found.iter().filter(|(path, vm)| is_present(path, vm));
        present.map(|(path, _)| (path.clone(), problem(path))).collect()
    }

    fn replace(&self, now: BTreeMap<InstancePath, VmHandle>) -> Vec<InstancePath> {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *found, now);
        before.into_keys().filter(|path| !found.contains_key(path)).collect()
    }
}

fn problem(path: &InstancePath) -> String {
    format!("its tap was deleted, so it has no network until it is restarted: `mvm restart {path}`")
}

/// Looks for microVMs that are cut off, and returns their instances' places.
pub(crate) async fn look(node: &Node) -> Result<Vec<InstanceNetwork>, NetworkError> {
    let mirror = node.state.now();
    let running: Vec<(InstancePath, VmHandle, InstanceNetwork)> = mirror
        .desired
        .instances
        .values()
        .filter_map(|record| {
            let status = mirror.status(&record.path);
            let vm = settled_vm(status)?.clone();
            Some((record.path.clone(), vm, mirror.desired.network_of(record)?))
        })
        .collect();
    let places: Vec<InstanceNetwork> = running.iter().map(|(_, _, place)| *place).collect();
    let lost = node.host.network.cut_off(&places).await?;
    // One that has ended since, or is on its way, had its tap removed with good reason.
    let after = node.state.now();
    let is_present =
        |path: &InstancePath, vm: &VmHandle| settled_vm(after.status(path)) == Some(vm);
    let found: Vec<_> = running
        .into_iter()
        .filter(|(path, vm, place)| lost.contains(place) && is_present(path, vm))
        .collect();
    for (path, _, _) in &found {
        node.set_problem(&format!("network of {path}"), Some(problem(path)));
    }
    let places = found.iter().map(|(_, _, place)| *place).collect();
    let now = found.into_iter().map(|(path, vm, _)| (path, vm)).collect();
    for path in node.cut_off.replace(now) {
        node.set_problem(&format!("network of {path}"), None);
    }
    node.announce();
    Ok(places)
}

/// The microVM of an instance that has been connected and is not about to end.
fn settled_vm(status: &InstanceStatus) -> Option<&VmHandle> {
    match status.phase {
        Phase::Running { .. } | Phase::Warm { .. } => status.vm.as_ref(),
        _ => None,
    }
}
