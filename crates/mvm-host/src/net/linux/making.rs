//! Bridges and taps: made, mended and swept away.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, NodeNetwork, TenantNetwork};

use super::super::links::{Link, LinkKind};
use super::super::tap::NewTap;
use super::super::{NetworkError, sysctl};
use super::LinuxNetwork;

impl LinuxNetwork {
    /// Makes bridges and taps as they are to be, and returns what could not be done.
    pub(super) async fn ensure_links(
        &self,
        wanted: &NodeNetwork,
        links: &BTreeMap<String, Link>,
    ) -> Result<Vec<NetworkError>, NetworkError> {
        let mut errors: Vec<_> = sysctl::ip_forward().ensure().err().into_iter().collect();
        let mut addresses: BTreeMap<u32, Vec<Ipv4Net>> = BTreeMap::new();
        for (index, address) in self.links.addresses().await? {
            addresses.entry(index).or_default().push(address);
        }
        for tenant in wanted.tenants() {
            let found = links.get(&tenant.bridge());
            let has = found.and_then(|link| addresses.get(&link.index));
            let has = has.map_or(&[][..], Vec::as_slice);
            let bridge = match self.ensure_bridge(tenant, found, has).await {
                Ok(bridge) => bridge,
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            };
            for instance in wanted.awake().filter(|instance| instance.tenant == *tenant) {
                let found = links.get(&instance.tap());
                errors.extend(self.ensure_tap(instance, found, &bridge).await.err());
            }
        }
        Ok(errors)
    }

    /// Makes a tenant's bridge, or mends it; `addresses` are those that it has.
    pub(super) async fn ensure_bridge(
        &self,
        tenant: &TenantNetwork,
        found: Option<&Link>,
        addresses: &[Ipv4Net],
    ) -> Result<Link, NetworkError> {
        let (name, mac) = (tenant.bridge(), tenant.gateway_mac());
        let bridge = match found {
            Some(link) => {
                self.ownership.check(link)?;
                let settings =
                    LinkKind::Bridge { forwards_link_local: true, runs_spanning_tree: false };
                if link.mac != Some(mac) || link.kind != settings {
                    self.links.reset_bridge(link, mac).await?;
                }
                link.clone()
            }
            None => {
                self.links.add_bridge(&name, mac).await?;
                self.links.found(&name).await?
            }
        };
        if bridge.alias.as_deref() != Some(self.ownership.alias()) {
            self.links.set_alias(&bridge, self.ownership.alias()).await?;
        }
        for setting in sysctl::of_bridge(&name) {
            setting.ensure()?;
        }
        let gateway = tenant.gateway_net();
        for &address in addresses.iter().filter(|address| **address != gateway) {
            self.links.delete_address(&bridge, address).await?;
        }
        if !addresses.contains(&gateway) {
            self.links.add_address(&bridge, gateway).await?;
        }
        if !bridge.is_up {
            self.links.bring_up(&bridge).await?;
        }
        Ok(bridge)
    }

    /// Makes an instance's tap on its bridge, or mends it.
    pub(super) async fn ensure_tap(
        &self,
        instance: &InstanceNetwork,
        found: Option<&Link>,
        bridge: &Link,
    ) -> Result<(), NetworkError> {
        let (name, owner_uid) = (instance.tap(), instance.owner_uid());
        let tap = match found {
            Some(link) => {
                self.ownership.check(link)?;
                if link.kind == (LinkKind::Tap { owner_uid: Some(owner_uid) }) {
                    link.clone()
                } else {
                    self.links.delete(link).await?;
                    self.create_tap(&name, owner_uid).await?
                }
            }
            None => self.create_tap(&name, owner_uid).await?,
        };
        for setting in sysctl::of_tap(&name) {
            setting.ensure()?;
        }
        if tap.controller != Some(bridge.index) {
            self.links.attach(&tap, bridge).await?;
        }
        // Whatever was said while it rested.
        self.links.leave_to_port(bridge, instance.mac()).await?;
        // Never before it is attached: on its own it would lead into the host.
        if !tap.is_up {
            self.links.bring_up(&tap).await?;
        }
        Ok(())
    }

    /// Deletes an instance's tap, if there is one and it is ours.
    pub(super) async fn delete_tap(&self, instance: &InstanceNetwork) -> Result<(), NetworkError> {
        match self.links.get(&instance.tap()).await? {
            Some(tap) if self.ownership.is_ours(&tap)? => self.links.delete(&tap).await,
            _ => Ok(()),
        }
    }

    async fn create_tap(&self, name: &str, owner_uid: u32) -> Result<Link, NetworkError> {
        let failed = |error| NetworkError::system(format!("create the tap {name}"))(error);
        let new = NewTap::create(name, owner_uid).map_err(failed)?;
        let tap = self.links.found(name).await?;
        // Marked before it can outlive us: there is never a tap that nobody owns.
        self.links.set_alias(&tap, self.ownership.alias()).await?;
        new.persist().map_err(failed)?;
        Ok(tap)
    }

    /// Deletes our links that are not to be kept, taps before bridges.
    pub(super) async fn sweep(
        &self,
        links: &BTreeMap<String, Link>,
        is_kept: impl Fn(&Link) -> bool,
    ) -> Vec<NetworkError> {
        let mut errors = Vec::new();
        let (bridges, others): (Vec<_>, Vec<_>) = links
            .values()
            .filter(|link| !is_kept(link))
            .partition(|link| matches!(link.kind, LinkKind::Bridge { .. }));
        for link in others.into_iter().chain(bridges) {
            let deleted = match self.ownership.is_ours(link) {
                Ok(true) => self.links.delete(link).await,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            errors.extend(deleted.err());
        }
        errors
    }
}
