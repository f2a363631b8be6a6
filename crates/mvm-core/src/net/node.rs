//! All the networks of one node, consistent by construction, and whose they are.
//!
//! Admission and the reconcile loop build a [`NodeNetwork`]; the host's network backend makes the
//! kernel agree with it. Nothing here knows the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use super::{
    FIRST_SLOT, InstanceNetwork, NET_ID_MAX, NetId, Slot, SubnetError, TenantNetwork, check_subnet,
};

/// Offset of the builders' address: the one slot below [`FIRST_SLOT`] that may have a tap.
pub const BUILDER_SLOT: Slot = Slot(FIRST_SLOT - 1);

/// Why a network does not fit into its node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkConflict {
    /// The net id is outside the plan.
    #[error("net id {} is not within 1 to {NET_ID_MAX}", net_id.0)]
    NetId {
        /// As given.
        net_id: NetId,
    },
    /// The subnet cannot be a tenant's.
    #[error("the subnet of net id {} cannot be used", net_id.0)]
    Subnet {
        /// The tenant's number.
        net_id: NetId,
        /// Why.
        #[source]
        source: SubnetError,
    },
    /// One net id would have two subnets.
    #[error("net id {} has the subnet {} and cannot also have {}", old.net_id.0, old.subnet, new.subnet)]
    TwoSubnets {
        /// What the node has.
        old: TenantNetwork,
        /// What was asked for.
        new: TenantNetwork,
    },
    /// Two tenants would share addresses.
    #[error("the subnet {} of net id {} overlaps {} of net id {}", new.subnet, new.net_id.0, old.subnet, old.net_id.0)]
    Overlap {
        /// What the node has.
        old: TenantNetwork,
        /// What was asked for.
        new: TenantNetwork,
    },
    /// The slot has no address in the tenant's subnet.
    #[error("slot {} has no address in {}", instance.slot.0, instance.tenant.subnet)]
    Slot {
        /// As given.
        instance: InstanceNetwork,
    },
}

/// What a node's network is to look like: no two subnets overlap, each instance has its tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeNetwork {
    tenants: BTreeMap<NetId, TenantNetwork>,
    instances: BTreeSet<InstanceNetwork>,
    /// Those of the instances that sleep: they have rules, which wait for their wake, and no tap.
    asleep: BTreeSet<(NetId, Slot)>,
}

impl NodeNetwork {
    /// The network with these tenants and instances; an instance brings its tenant along.
    ///
    /// # Errors
    /// Two of them conflict, or one is outside the address plan.
    pub fn of(
        tenants: impl IntoIterator<Item = TenantNetwork>,
        instances: impl IntoIterator<Item = InstanceNetwork>,
    ) -> Result<Self, NetworkConflict> {
        let mut network = Self::default();
        for tenant in tenants {
            network.add_tenant(tenant)?;
        }
        for instance in instances {
            network.add_instance(instance)?;
        }
        Ok(network)
    }

    /// Adds a tenant; it may be there already.
    ///
    /// # Errors
    /// It conflicts with another tenant or is outside the address plan.
    pub fn add_tenant(&mut self, new: TenantNetwork) -> Result<(), NetworkConflict> {
        if !(1..=NET_ID_MAX).contains(&new.net_id.0) {
            return Err(NetworkConflict::NetId { net_id: new.net_id });
        }
        check_subnet(new.subnet)
            .map_err(|source| NetworkConflict::Subnet { net_id: new.net_id, source })?;
        match self.tenants.get(&new.net_id) {
            Some(&old) if old == new => return Ok(()),
            Some(&old) => return Err(NetworkConflict::TwoSubnets { old, new }),
            None => {}
        }
        let overlaps = |old: &&TenantNetwork| {
            old.subnet.contains(&new.subnet) || new.subnet.contains(&old.subnet)
        };
        if let Some(&old) = self.tenants.values().find(overlaps) {
            return Err(NetworkConflict::Overlap { old, new });
        }
        self.tenants.insert(new.net_id, new);
        Ok(())
    }

    /// Adds an instance and its tenant; both may be there already, the instance with another rate.
    ///
    /// # Errors
    /// The tenant conflicts with another, or the slot has no address.
    pub fn add_instance(&mut self, instance: InstanceNetwork) -> Result<(), NetworkConflict> {
        if !(BUILDER_SLOT..=instance.tenant.last_slot()).contains(&instance.slot) {
            return Err(NetworkConflict::Slot { instance });
        }
        self.add_tenant(instance.tenant)?;
        self.remove_instance(&instance);
        self.instances.insert(instance);
        Ok(())
    }

    /// Does the same for an instance that sleeps: it has no tap.
    ///
    /// # Errors
    /// Those of [`add_instance`](Self::add_instance).
    pub fn add_asleep(&mut self, instance: InstanceNetwork) -> Result<(), NetworkConflict> {
        self.add_instance(instance)?;
        self.asleep.insert((instance.tenant.net_id, instance.slot));
        Ok(())
    }

    /// Takes note that an instance, if it is there, has no tap from now on.
    pub fn fall_asleep(&mut self, instance: &InstanceNetwork) {
        let place = (instance.tenant.net_id, instance.slot);
        if self.instances.iter().any(|it| (it.tenant.net_id, it.slot) == place) {
            self.asleep.insert(place);
        }
    }

    /// Takes an instance out, whatever its rate, and leaves its tenant.
    pub fn remove_instance(&mut self, instance: &InstanceNetwork) {
        self.asleep.remove(&(instance.tenant.net_id, instance.slot));
        // The least of this place, and so before what is there.
        let place = InstanceNetwork::new(instance.tenant, instance.slot);
        let found = self.instances.range(place..).next().copied();
        if let Some(found) = found.filter(|it| (it.tenant, it.slot) == (place.tenant, place.slot)) {
            self.instances.remove(&found);
        }
    }

    /// Takes a tenant and all its instances out.
    pub fn remove_tenant(&mut self, net_id: NetId) {
        self.tenants.remove(&net_id);
        self.instances.retain(|instance| instance.tenant.net_id != net_id);
        self.asleep.retain(|(of, _)| *of != net_id);
    }

    /// The tenants, by net id.
    pub fn tenants(&self) -> impl Iterator<Item = &TenantNetwork> {
        self.tenants.values()
    }

    /// The tenant with this number.
    pub fn tenant(&self, net_id: NetId) -> Option<&TenantNetwork> {
        self.tenants.get(&net_id)
    }

    /// The instances, by net id and slot.
    pub fn instances(&self) -> impl Iterator<Item = &InstanceNetwork> {
        self.instances.iter()
    }

    /// The instances that have a tap, by net id and slot.
    pub fn awake(&self) -> impl Iterator<Item = &InstanceNetwork> {
        let sleeps = |it: &InstanceNetwork| self.asleep.contains(&(it.tenant.net_id, it.slot));
        self.instances.iter().filter(move |instance| !sleeps(instance))
    }

    /// Whether no tenant, and so no instance, is in it.
    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }
}

/// What a link's name says about it, if it follows the address plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkName {
    /// A tenant's bridge.
    Bridge(NetId),
    /// An instance's tap.
    Tap(NetId, Slot),
}

impl LinkName {
    /// Reads `br-tenant-<net_id>` or `tn<net_id>i<slot>`.
    pub fn parse(name: &str) -> Option<Self> {
        let number = |text: &str| {
            let number: u16 = text.parse().ok()?;
            (number.to_string() == text).then_some(number)
        };
        if let Some(net_id) = name.strip_prefix("br-tenant-") {
            return Some(Self::Bridge(NetId(number(net_id)?)));
        }
        let (net_id, slot) = name.strip_prefix("tn")?.split_once('i')?;
        Some(Self::Tap(NetId(number(net_id)?), Slot(number(slot)?)))
    }

    /// The tenant's number.
    pub fn net_id(&self) -> NetId {
        match *self {
            Self::Bridge(net_id) | Self::Tap(net_id, _) => net_id,
        }
    }
}

/// Names a state directory, and so an agent, on its machine: 8 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateDirId(u32);

impl StateDirId {
    /// The id with the first 4 bytes of the digest of the directory's path.
    pub fn from_digest(digest: [u8; 4]) -> Self {
        Self(u32::from_be_bytes(digest))
    }

    /// The interface alias that marks a link as belonging to this state directory.
    pub fn link_alias(&self) -> String {
        format!("mvm:{self}")
    }
}

impl fmt::Display for StateDirId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl FromStr for StateDirId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let is_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 8 || !text.bytes().all(is_hex) {
            return Err(format!("`{text}` is not a state directory id: expected 8 hex digits"));
        }
        u32::from_str_radix(text, 16).map(Self).map_err(|error| error.to_string())
    }
}

crate::serde_as_text!(StateDirId);

/// The name that an agent's firewall tables have, in each family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableName(String);

impl TableName {
    /// The table of the agent with the default state directory: `mvm`.
    pub fn of_default_state_dir() -> Self {
        Self("mvm".to_owned())
    }

    /// The table of an agent with another state directory: `mvm_<id>`.
    pub fn of_state_dir(id: StateDirId) -> Self {
        Self(format!("mvm_{id}"))
    }

    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(net_id: u16, subnet: &str) -> TenantNetwork {
        TenantNetwork { net_id: NetId(net_id), subnet: subnet.parse().unwrap() }
    }

    #[test]
    fn an_instance_brings_its_tenant_and_a_tenant_takes_its_instances_along() {
        let mut network = NodeNetwork::default();
        let first = InstanceNetwork::new(tenant(1, "10.240.1.0/24"), Slot(3));
        let other = InstanceNetwork::new(tenant(2, "10.240.2.0/24"), Slot(3));
        network.add_instance(first).unwrap();
        network.add_instance(other).unwrap();
        network.remove_instance(&other);
        assert_eq!(network.tenants().count(), 2);
        network.remove_tenant(NetId(1));
        assert_eq!(network.instances().count(), 0);
        network.remove_tenant(NetId(2));
        assert!(network.is_empty());
    }

    #[test]
    fn an_instance_that_sleeps_has_its_place_and_no_tap() {
        let place = |slot| InstanceNetwork::new(tenant(1, "10.240.1.0/24"), Slot(slot));
        let mut network = NodeNetwork::of([], [place(3), place(4)]).unwrap();
        network.add_asleep(place(4)).unwrap();
        assert_eq!(network.instances().count(), 2);
        assert_eq!(network.awake().collect::<Vec<_>>(), [&place(3)]);
        network.add_instance(place(4)).unwrap();
        assert_eq!(network.awake().count(), 2);
        network.add_asleep(place(3)).unwrap();
        network.remove_instance(&place(3));
        assert_eq!(network, NodeNetwork::of([], [place(4)]).unwrap());
    }

    #[test]
    fn a_place_has_one_rate_and_is_left_whatever_it_was() {
        let place = InstanceNetwork::new(tenant(1, "10.240.1.0/24"), Slot(3));
        let limited = InstanceNetwork { rate_mbit_s: Some(5), ..place };
        let mut network = NodeNetwork::of([], [place, limited]).unwrap();
        assert_eq!(network.instances().collect::<Vec<_>>(), [&limited]);
        let neighbour = InstanceNetwork::new(place.tenant, Slot(4));
        network.add_instance(neighbour).unwrap();
        network.remove_instance(&place);
        assert_eq!(network.instances().collect::<Vec<_>>(), [&neighbour]);
        network.remove_instance(&place);
        assert_eq!(network.instances().count(), 1);
    }

    #[test]
    fn tenants_that_would_share_a_number_or_an_address_are_refused() {
        let mut network = NodeNetwork::of([tenant(1, "10.0.0.0/16")], []).unwrap();
        let before = network.clone();
        network.add_tenant(tenant(1, "10.0.0.0/16")).unwrap();
        for bad in [
            tenant(1, "10.1.0.0/16"),
            tenant(2, "10.0.7.0/24"),
            tenant(2, "10.0.0.0/16"),
            tenant(0, "10.2.0.0/24"),
            tenant(NET_ID_MAX + 1, "10.2.0.0/24"),
            tenant(2, "8.8.8.0/24"),
        ] {
            assert!(network.add_tenant(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(network, before);
    }

    #[test]
    fn a_slot_without_an_address_is_refused() {
        let small = tenant(1, "10.0.0.0/29");
        let at = |slot| InstanceNetwork::new(small, Slot(slot));
        for (slot, fits) in [(0, false), (1, false), (2, true), (3, true), (6, true), (7, false)] {
            assert_eq!(NodeNetwork::of([], [at(slot)]).is_ok(), fits, "slot {slot}");
        }
    }

    #[test]
    fn link_names_are_read_back() {
        let instance = InstanceNetwork::new(tenant(12, "10.0.0.0/24"), Slot(34));
        assert_eq!(LinkName::parse(&instance.tap()), Some(LinkName::Tap(NetId(12), Slot(34))));
        let bridge = instance.tenant.bridge();
        assert_eq!(LinkName::parse(&bridge), Some(LinkName::Bridge(NetId(12))));
        for other in
            ["eth0", "tn0", "tn1i", "tni1", "tn01i3", "tn1i+3", "br-tenant-", "br-tenant-x"]
        {
            assert_eq!(LinkName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_state_directory_is_named_by_eight_hex_digits() {
        let id = StateDirId::from_digest([0, 0xab, 1, 2]);
        assert_eq!(id.to_string(), "00ab0102");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.link_alias(), "mvm:00ab0102");
        assert_eq!(TableName::of_state_dir(id).as_str(), "mvm_00ab0102");
        for bad in ["", "00ab010", "00AB0102", "+0ab0102", "00ab01022"] {
            assert!(bad.parse::<StateDirId>().is_err(), "{bad:?} was accepted");
        }
    }
}
