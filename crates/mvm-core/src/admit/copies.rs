//! A copied state directory that becomes one of its own: nothing of it runs, and its tenants' networks are
//! ones that nobody else on the machine has.

use ipnet::Ipv4Net;

use super::{DEFAULT_GRACE_MS, Denial, Draft, Edit, NodeFacts};
use crate::name::{InstancePath, PoolPath, TenantName};
use crate::net::{NetId, TENANT_SUPERNET, TenantNetwork};
use crate::record::{Desired, DesiredState, Purpose};

/// What a copy's desired documents are to be, with what changed as notes.
///
/// What ran in the original is stopped here; what slept may be woken. Addresses stay wherever
/// nobody has them.
///
/// # Errors
/// The machine has no network left.
pub fn make_own(desired: &Desired, node: &NodeFacts, now: u64) -> Result<Edit, Denial> {
    let mut no_ids = || 0;
    let mut draft = Draft::of(desired, node, &mut no_ids, now);
    draft.stop_all();
    // What was saved for them is the original's.
    draft.edit.desired.forks.clear();
    draft.renumber_taken()?;
    Ok(draft.edit)
}

impl Draft<'_> {
    fn stop_all(&mut self) {
        let up: Vec<(InstancePath, DesiredState, bool)> = self
            .edit
            .desired
            .instances
            .values()
            .filter(|instance| instance.desired.is_up() || instance.purpose != Purpose::Use)
            .map(|it| (it.path.clone(), it.desired, it.purpose == Purpose::Use))
            .collect();
        for (path, before, is_use) in up {
            // What was made for a base, or stands by, is made anew when it is needed.
            let state = if is_use { DesiredState::Stopped } else { DesiredState::Destroyed };
            if before != DesiredState::Destroyed {
                self.set_desired(&path, state, DEFAULT_GRACE_MS);
            }
            if is_use {
                self.note(format!("{path} is stopped: what runs is the original's"));
            }
        }
        let pools: Vec<PoolPath> = self.edit.desired.pools.keys().cloned().collect();
        for pool in pools {
            self.recount(&pool);
        }
    }

    /// Gives each tenant another network whose own somebody else has.
    fn renumber_taken(&mut self) -> Result<(), Denial> {
        let taken: Vec<(TenantName, TenantNetwork)> = self
            .edit
            .desired
            .tenants
            .values()
            .map(|tenant| (tenant.name.clone(), tenant.network))
            .filter(|(_, network)| self.is_taken(*network))
            .collect();
        for (name, before) in taken {
            let network = self.free_network(before)?;
            if let Some(tenant) = self.edit.desired.tenants.get_mut(&name) {
                tenant.network = network;
            }
            self.note(format!("tenant {name} has the subnet {} now", network.subnet));
        }
        Ok(())
    }

    fn is_taken(&self, network: TenantNetwork) -> bool {
        let overlaps = |other: &Ipv4Net| overlap(network.subnet, *other);
        self.node.foreign_net_ids.contains(&network.net_id)
            || self.node.foreign_subnets.iter().any(overlaps)
    }

    /// A network as large as another one, that neither the machine nor a tenant of this node has.
    fn free_network(&self, before: TenantNetwork) -> Result<TenantNetwork, Denial> {
        let tenants = || self.edit.desired.tenants.values().map(|tenant| tenant.network);
        let is_free = |subnet: Ipv4Net| {
            let mut used = tenants().map(|it| it.subnet).chain(self.node.foreign_subnets.clone());
            !used.any(|other| overlap(subnet, other))
        };
        let net_id = (1..=NetId::COUNT)
            .map(NetId)
            .filter(|id| !self.node.foreign_net_ids.contains(id))
            .find(|id| tenants().all(|tenant| tenant.net_id != *id))
            .ok_or(Denial::NoNetwork)?;
        // Its own comes first: another agent may well have a tenant of its number elsewhere.
        let supernet: Option<Ipv4Net> = TENANT_SUPERNET.parse().ok();
        let subnets = supernet.and_then(|net| net.subnets(before.subnet.prefix_len()).ok());
        let usual = TenantNetwork::default_subnet(net_id);
        let usual = (usual.prefix_len() == before.subnet.prefix_len()).then_some(usual);
        let candidates = usual.into_iter().chain(subnets.into_iter().flatten());
        let subnet = candidates.into_iter().find(|subnet| is_free(*subnet));
        Ok(TenantNetwork { net_id, subnet: subnet.ok_or(Denial::NoNetwork)? })
    }
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}
