//! The machine's network as the node needs it: mended once after the start and before any instance starts,
//! then a bridge for each tenant that comes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_core::name::TenantName;
use mvm_core::net::TenantNetwork;
use mvm_core::record::{self, Desired, Existence, InstanceRecord, TenantRecord};

use crate::node::{Node, chain};
use crate::ssh;
use crate::workers::{Work, Workers};

/// What has been made of the network since the node's start.
#[derive(Default)]
pub(crate) struct Made(Mutex<State>);

#[derive(Default)]
struct State {
    /// Whether the machine's network has been compared with the expected one.
    is_ensured: bool,
    /// Tenants that have a bridge.
    bridged: BTreeSet<TenantNetwork>,
    /// Tenants whose names are served.
    served: BTreeSet<TenantNetwork>,
}

impl Made {
    /// Whether an instance may start: its tenant's network is there, or it has none.
    pub(crate) fn is_there_for(&self, desired: &Desired, record: &InstanceRecord) -> bool {
        let Some(network) = desired.network_of(record) else { return true };
        let state = self.state();
        state.is_ensured && state.bridged.contains(&network.tenant)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins what is missing.
pub(crate) fn ensure(node: &Arc<Node>, workers: &mut Workers, desired: &Desired) {
    if !node.network.state().is_ensured {
        // What is on its way would be taken for a stray, or not be mended.
        if !workers.is_busy_with_tenants() {
            let node = node.clone();
            workers.begin(Work::Network, || async move { ensure_machine(&node).await });
        }
        return;
    }
    remove_former(node, workers, desired);
    for tenant in desired.tenants.values().filter(|t| t.existence == Existence::Kept) {
        if !node.network.state().bridged.contains(&tenant.network) {
            let (node, tenant) = (node.clone(), tenant.clone());
            let work = Work::Tenant(tenant.name.clone());
            workers.begin(work, || async move { add_tenant(&node, &tenant).await });
        }
    }
    serve_names(node, workers, desired);
}

/// Mends the machine's network. What belongs to a tenant or instance whose desired record does not parse
/// is not known and would be removed, so that waits until the record is mended.
async fn ensure_machine(node: &Node) {
    let what = "network";
    let mirror = node.state.now();
    let has_network = |key: &&String| record::has_network(key);
    if let Some(key) = mirror.bad.keys().find(has_network) {
        let problem = format!("left as it is, and no instance starts, until `{key}` is mended");
        return node.set_problem(what, Some(problem));
    }
    let ensured = match mirror.expected_network() {
        Ok(expected) => {
            let ensured = node.host.network.ensure(&expected).await;
            ensured.map_err(|error| chain(&error))
        }
        Err(conflict) => Err(chain(&conflict)),
    };
    if ensured.is_ok() {
        node.network.state().is_ensured = true;
        node.poke();
    }
    node.set_problem(what, ensured.err());
}

/// Makes a tenant's bridge and key.
async fn add_tenant(node: &Node, tenant: &TenantRecord) {
    let what = format!("network of tenant {}", tenant.name);
    match node.host.network.add_tenant(tenant.network).await {
        Ok(()) => {
            node.set_problem(&what, None);
            let what = format!("the SSH key of tenant {}", tenant.name);
            let made = ssh::ensure_key(&node.config.state_dir, &tenant.name);
            node.set_problem(&what, made.err().map(|error| chain(&error)));
            node.network.state().bridged.insert(tenant.network);
            node.poke();
        }
        Err(error) => node.set_problem(&what, Some(chain(&error))),
    }
}

/// Removes the networks of tenants that have others by now, which have nothing running in them.
fn remove_former(node: &Arc<Node>, workers: &mut Workers, desired: &Desired) {
    let tenants = || desired.tenants.values();
    let present: BTreeSet<_> = tenants().map(|tenant| tenant.network).collect();
    let bridged = node.network.state().bridged.clone();
    for former in bridged.into_iter().filter(|network| !present.contains(network)) {
        match tenants().find(|tenant| tenant.network.net_id == former.net_id) {
            Some(tenant) => {
                let node = node.clone();
                let work = Work::Tenant(tenant.name.clone());
                workers.begin(work, || async move { remove_one_former(&node, former).await });
            }
            // A tenant that is gone has had it removed with itself.
            None => drop(node.network.state().bridged.remove(&former)),
        }
    }
}

async fn remove_one_former(node: &Node, former: TenantNetwork) {
    let removed = node.host.network.remove_tenant(former).await;
    let what = format!("removing the former subnet {}", former.subnet);
    node.set_problem(&what, removed.err().map(|error| chain(&error)));
    let mut state = node.network.state();
    state.bridged.remove(&former);
    // What sleeps has rules, too.
    state.is_ensured = false;
    drop(state);
    node.poke();
}

/// Makes each tenant's gateway answer questions for names.
fn serve_names(node: &Arc<Node>, workers: &mut Workers, desired: &Desired) {
    let wanted: BTreeSet<TenantNetwork> = {
        let state = node.network.state();
        let tenants = desired.tenants.values().map(|tenant| tenant.network);
        tenants.filter(|network| state.bridged.contains(network)).collect()
    };
    if node.network.state().served == wanted {
        return;
    }
    let node = node.clone();
    workers.begin(Work::Names, || async move {
        let served = node.host.network.serve_names(&wanted).await;
        if served.is_ok() {
            node.network.state().served = wanted;
            // There may be others by now.
            node.poke();
        }
        node.set_problem("names in guests", served.err().map(|error| chain(&error)));
    });
}

/// Removes the key and the network of a tenant that goes.
pub(crate) async fn remove_tenant(node: &Node, record: &TenantRecord) {
    let tenant = &record.name;
    let what = format!("removing the SSH key of tenant {tenant}");
    if let Err(error) = ssh::remove_key(&node.config.state_dir, tenant) {
        return node.set_problem(&what, Some(chain(&error)));
    }
    node.set_problem(&what, None);
    let what = format!("removing the network of tenant {tenant}");
    if let Err(error) = node.host.network.remove_tenant(record.network).await {
        return node.set_problem(&what, Some(chain(&error)));
    }
    node.set_problem(&what, None);
    note_tenant_gone(node, tenant, record.created_unix_ms);
}

fn note_tenant_gone(node: &Node, tenant: &TenantName, made: u64) {
    node.note_gone(|gone| {
        gone.tenants.insert(tenant.clone(), made);
    });
}
