//! Comparing the machine's links and settings with what is expected of them.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, NodeNetwork, TenantNetwork};

use super::conflicts;
use super::links::{Link, LinkKind, Route};
use super::ownership::{Ownership, describe};
use super::sysctl::{self, Sysctl};
use super::{Difference, NetworkError};

/// The machine's links and IPv4 addresses at one moment.
pub(super) struct Machine {
    pub(super) links: BTreeMap<String, Link>,
    /// Addresses with the index of their link.
    pub(super) addresses: Vec<(u32, Ipv4Net)>,
    pub(super) routes: Vec<Route>,
}

impl Machine {
    /// How links, addresses, settings and claims differ from `expected`.
    pub(super) fn differences(
        &self,
        expected: &NodeNetwork,
        ownership: &Ownership,
    ) -> Result<Vec<Difference>, NetworkError> {
        let mut differences = Vec::new();
        if !expected.is_empty() {
            differences.extend(setting(&sysctl::ip_forward())?);
        }
        let mut names = BTreeSet::new();
        for tenant in expected.tenants() {
            names.insert(tenant.bridge());
            if !ownership.claims().is_ours(tenant.net_id)? {
                differences.push(Difference::ClaimMissing { net_id: tenant.net_id.0 });
            }
            if let Some(bridge) = self.find(&tenant.bridge(), ownership, &mut differences)? {
                self.compare_bridge(tenant, bridge, &mut differences)?;
            }
        }
        for instance in expected.awake() {
            names.insert(instance.tap());
            if let Some(tap) = self.find(&instance.tap(), ownership, &mut differences)? {
                self.compare_tap(instance, tap, &mut differences)?;
            }
        }
        let mut ours = BTreeSet::new();
        for link in self.links.values() {
            if ownership.is_ours(link)? {
                ours.insert(link.index);
                if !names.contains(&link.name) {
                    differences.push(Difference::LinkUnexpected { link: link.name.clone() });
                }
            }
        }
        let subnets = expected.tenants().map(|tenant| tenant.subnet);
        let conflicts = conflicts::among(subnets, &self.routes, |link| ours.contains(&link));
        for (subnet, route) in conflicts {
            differences.push(Difference::RouteOverlap { subnet, route });
        }
        Ok(differences)
    }

    fn find(
        &self,
        name: &str,
        ownership: &Ownership,
        differences: &mut Vec<Difference>,
    ) -> Result<Option<&Link>, NetworkError> {
        let Some(link) = self.links.get(name) else {
            differences.push(Difference::LinkMissing { link: name.to_owned() });
            return Ok(None);
        };
        if !ownership.is_ours(link)? || link.alias.as_deref() != Some(ownership.alias()) {
            let owner = describe(link);
            differences.push(Difference::LinkForeign { link: name.to_owned(), owner });
        }
        if !link.is_up {
            differences.push(Difference::LinkDown { link: name.to_owned() });
        }
        Ok(Some(link))
    }

    fn compare_bridge(
        &self,
        tenant: &TenantNetwork,
        bridge: &Link,
        differences: &mut Vec<Difference>,
    ) -> Result<(), NetworkError> {
        let link = || bridge.name.clone();
        let LinkKind::Bridge { forwards_link_local, runs_spanning_tree } = bridge.kind else {
            differences.push(Difference::LinkKind { link: link(), expected: "bridge" });
            return Ok(());
        };
        let as_number = |on: bool| u8::from(on).to_string();
        for (name, expected, found) in [
            ("link-local forwarding", true, forwards_link_local),
            ("spanning tree", false, runs_spanning_tree),
        ] {
            if expected != found {
                differences.push(Difference::Setting {
                    name: format!("{name} of {}", bridge.name),
                    expected: as_number(expected),
                    found: as_number(found),
                });
            }
        }
        let mac = tenant.gateway_mac();
        if bridge.mac != Some(mac) {
            differences.push(Difference::Mac { link: link(), expected: mac });
        }
        let gateway = tenant.gateway_net();
        let mut has: Vec<Ipv4Net> = Vec::new();
        has.extend(self.addresses.iter().filter(|(at, _)| *at == bridge.index).map(|(_, net)| net));
        if !has.contains(&gateway) {
            differences.push(Difference::AddressMissing { link: link(), address: gateway });
        }
        for address in has.into_iter().filter(|address| *address != gateway) {
            differences.push(Difference::AddressUnexpected { link: link(), address });
        }
        for wanted in sysctl::of_bridge(&bridge.name) {
            differences.extend(setting(&wanted)?);
        }
        Ok(())
    }

    fn compare_tap(
        &self,
        instance: &InstanceNetwork,
        tap: &Link,
        differences: &mut Vec<Difference>,
    ) -> Result<(), NetworkError> {
        let LinkKind::Tap { owner_uid } = tap.kind else {
            differences.push(Difference::LinkKind { link: tap.name.clone(), expected: "tap" });
            return Ok(());
        };
        let expected = instance.owner_uid();
        if owner_uid != Some(expected) {
            let (tap, found) = (tap.name.clone(), owner_uid);
            differences.push(Difference::TapOwner { tap, expected, found });
        }
        let bridge = instance.tenant.bridge();
        let bridge_index = self.links.get(&bridge).map(|link| link.index);
        if bridge_index.is_none() || tap.controller != bridge_index {
            differences.push(Difference::NotAttached { tap: tap.name.clone(), bridge });
        }
        for wanted in sysctl::of_tap(&tap.name) {
            differences.extend(setting(&wanted)?);
        }
        Ok(())
    }
}

fn setting(wanted: &Sysctl) -> Result<Option<Difference>, NetworkError> {
    Ok(wanted.read()?.filter(|found| found != wanted.value).map(|found| Difference::Setting {
        name: format!("net/{}", wanted.path).replace('/', "."),
        expected: wanted.value.to_owned(),
        found,
    }))
}
