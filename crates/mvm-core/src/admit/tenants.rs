//! Tenants: created with a network of their own, removed with everything in it.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;

use super::{DEFAULT_GRACE_MS, Denial, Draft};
use crate::name::{DiskPath, InstancePath, PoolPath, TenantName};
use crate::net::{NET_ID_MAX, NetId, TenantNetwork, check_subnet};
use crate::record::{Existence, InstanceRecord, TenantRecord};
use crate::spec::Quota;

impl Draft<'_> {
    pub(super) fn tenant_create(
        &mut self,
        name: &TenantName,
        quota: Quota,
        subnet: Option<Ipv4Net>,
    ) -> Result<(), Denial> {
        match self.edit.desired.tenants.get(name).map(|tenant| tenant.existence) {
            Some(Existence::Kept) => {
                return Err(Denial::Exists { object: format!("tenant {name}") });
            }
            Some(Existence::Removed) => {
                return Err(Denial::BeingRemoved { object: format!("tenant {name}") });
            }
            None => {}
        }
        let network = self.choose_network(subnet)?;
        let record = TenantRecord {
            name: name.clone(),
            quota,
            network,
            created_unix_ms: self.now,
            existence: Existence::Kept,
        };
        self.edit.desired.tenants.insert(name.clone(), record);
        Ok(())
    }

    pub(super) fn tenant_update(
        &mut self,
        name: &TenantName,
        change: &Quota,
        lift: &[String],
    ) -> Result<(), Denial> {
        self.require_tenant(name)?;
        if let Some(tenant) = self.edit.desired.tenants.get_mut(name) {
            for limit in lift {
                let field = tenant.quota.by_name(limit);
                *field.ok_or_else(|| Denial::NoSuchLimit { name: limit.clone() })? = None;
            }
            tenant.quota.merge(change);
        }
        Ok(())
    }

    pub(super) fn tenant_move(&mut self, name: &TenantName, subnet: Ipv4Net) -> Result<(), Denial> {
        self.require_tenant(name)?;
        let instances = || self.edit.desired.instances_of(name);
        let is_up = |it: &&InstanceRecord| it.desired.is_up() || self.node.is_up(&it.path);
        let up: Vec<InstancePath> = instances().filter(is_up).map(|it| it.path.clone()).collect();
        if !up.is_empty() {
            return Err(Denial::SubnetInUse { name: name.clone(), instances: up });
        }
        let last = instances().map(|instance| instance.slot).max();
        let Some(mut tenant) = self.edit.desired.tenants.remove(name) else { return Ok(()) };
        // Not in the way of itself: the subnets may overlap.
        let free = self.choose_network(Some(subnet))?;
        let net_id = tenant.network.net_id;
        let is_lost = self.node.foreign_net_ids.contains(&net_id);
        let network = if is_lost { free } else { TenantNetwork { net_id, subnet } };
        if last.is_some_and(|last| last > network.last_slot()) {
            return Err(Denial::SubnetTooSmall { name: name.clone(), subnet });
        }
        tenant.network = network;
        self.edit.desired.tenants.insert(name.clone(), tenant);
        Ok(())
    }

    pub(super) fn tenant_destroy(&mut self, name: &TenantName, force: bool) -> Result<(), Denial> {
        let desired = &self.edit.desired;
        if !desired.tenants.contains_key(name) {
            return Err(Denial::NoSuchTenant { name: name.clone() });
        }
        let pools: Vec<PoolPath> = desired
            .pools_of(name)
            .filter(|pool| force || pool.existence == Existence::Kept)
            .map(|pool| pool.path.clone())
            .collect();
        if !force && !pools.is_empty() {
            return Err(Denial::StillHasPools { name: name.clone(), pools });
        }
        let disks: Vec<DiskPath> = desired
            .disks_of(name)
            .filter(|disk| force || disk.existence == Existence::Kept)
            .map(|disk| disk.path.clone())
            .collect();
        if !force && !disks.is_empty() {
            return Err(Denial::StillHasDisks { name: name.clone(), disks });
        }
        for pool in &pools {
            self.remove_pool(pool, DEFAULT_GRACE_MS);
        }
        for disk in &disks {
            self.remove_disk(disk);
        }
        if let Some(tenant) = self.edit.desired.tenants.get_mut(name) {
            tenant.existence = Existence::Removed;
        }
        Ok(())
    }

    fn choose_network(&self, subnet: Option<Ipv4Net>) -> Result<TenantNetwork, Denial> {
        if let Some(subnet) = subnet {
            check_subnet(subnet).map_err(Denial::Subnet)?;
            if let Some(other) = self.overlap(subnet) {
                return Err(Denial::SubnetOverlaps { subnet, other });
            }
        }
        let mut taken: BTreeSet<NetId> =
            self.edit.desired.tenants.values().map(|tenant| tenant.network.net_id).collect();
        taken.extend(&self.node.foreign_net_ids);
        (1..=NET_ID_MAX)
            .map(NetId)
            .filter(|net_id| !taken.contains(net_id))
            .map(|net_id| {
                let subnet = subnet.unwrap_or_else(|| TenantNetwork::default_subnet(net_id));
                TenantNetwork { net_id, subnet }
            })
            .find(|network| subnet.is_some() || self.overlap(network.subnet).is_none())
            .ok_or(Denial::NoNetwork)
    }

    /// What a subnet overlaps, in words.
    fn overlap(&self, subnet: Ipv4Net) -> Option<String> {
        let overlaps = |other: &Ipv4Net| subnet.contains(other) || other.contains(&subnet);
        let tenants = self.edit.desired.tenants.values();
        let tenant = tenants
            .filter(|tenant| overlaps(&tenant.network.subnet))
            .map(|tenant| format!("{} of tenant {}", tenant.network.subnet, tenant.name));
        let foreign = self.node.foreign_subnets.iter().filter(|other| overlaps(other));
        let foreign = foreign.map(|other| format!("{other}, which this machine uses itself"));
        tenant.chain(foreign).next()
    }
}
