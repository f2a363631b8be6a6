//! Tenants: created with a network of their own, removed with everything in it.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;

use super::{DEFAULT_GRACE_MS, Denial, Draft};
use crate::name::{DiskPath, PoolPath, TenantName};
use crate::net::{NET_ID_MAX, NetId, TenantNetwork, check_subnet};
use crate::record::{Existence, TenantRecord};
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
