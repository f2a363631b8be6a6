//! The address plan: which bridge, tap, address and MAC belong to whom.
//!
//! Everything is derived from two small numbers that admission assigns once: a tenant's [`NetId`]
//! and an instance's [`Slot`] within its tenant. Both stay the same across stop and start, so an
//! instance keeps its address and MAC for life, on whichever node it runs.
//!
//! ```text
//!  tenant    bridge br-tenant-<net_id>   gateway = first address of the subnet (.1)
//!  builders  second address (.2)
//!  instance  tap tn<net_id>i<slot>       address = subnet + slot, slots from 3
//! ```

mod node;

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use node::{BUILDER_SLOT, LinkName, NetworkConflict, NodeNetwork, StateDirId, TableName};

/// Tenant subnets are taken out of this network unless a tenant asks for its own.
pub const TENANT_SUPERNET: &str = "10.240.0.0/12";
/// Prefix length of a tenant's subnet unless it asks for its own.
pub const TENANT_PREFIX_LEN: u8 = 24;
/// Largest net id: one /24 of the supernet each.
pub const NET_ID_MAX: u16 = 4095;
/// Offset of the first instance in its tenant's subnet.
pub const FIRST_SLOT: u16 = 3;
/// Largest slot, whatever the subnet's size: user ids are `base + net_id * 4096 + slot`.
pub const SLOT_MAX: u16 = 4095;
/// First user id given to VMM processes: above the ranges of users, services and containers.
pub const VMM_UID_BASE: u32 = 0x7000_0000;

/// A tenant's network number on its node, 1 to [`NET_ID_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetId(pub u16);

/// An instance's offset in its tenant's subnet, from [`FIRST_SLOT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u16);

impl NetId {
    /// How many net ids there are.
    pub const COUNT: u16 = NET_ID_MAX;
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The MAC that goes with an address: locally administered, `02:6d:` (`m`) and the address.
    pub fn of_address(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x6d, a, b, c, d])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

crate::serde_as_text!(MacAddr);

impl FromStr for MacAddr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            *octet = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("`{text}` is not a MAC address"))?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(format!("`{text}` is not a MAC address")),
        }
    }
}

/// One tenant's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TenantNetwork {
    /// The tenant's number.
    pub net_id: NetId,
    /// The tenant's subnet.
    pub subnet: Ipv4Net,
}

/// One instance's place in its tenant's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InstanceNetwork {
    /// The tenant's network.
    pub tenant: TenantNetwork,
    /// The instance's offset.
    pub slot: Slot,
    /// What it may send, and what it may receive, in Mbit/s; without a limit if absent.
    #[serde(default)]
    pub rate_mbit_s: Option<u32>,
}

/// What an instance's interface has carried since its tap was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Bytes that the guest was sent.
    pub received_bytes: u64,
}

/// Why a subnet cannot be a tenant's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Host bits are set.
    #[error("{subnet} has host bits set; did you mean {network}?")]
    HostBits {
        /// As given.
        subnet: Ipv4Net,
        /// With host bits cleared.
        network: Ipv4Net,
    },
    /// Too small or too large.
    #[error("{subnet} must have a prefix of /16 to /29")]
    Size {
        /// As given.
        subnet: Ipv4Net,
    },
    /// Not in a private range.
    #[error("{subnet} is not within 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")]
    Public {
        /// As given.
        subnet: Ipv4Net,
    },
}

/// Checks that a subnet can be a tenant's.
///
/// # Errors
/// It has host bits, the wrong size, or is not private.
pub fn check_subnet(subnet: Ipv4Net) -> Result<(), SubnetError> {
    if subnet.trunc() != subnet {
        return Err(SubnetError::HostBits { subnet, network: subnet.trunc() });
    }
    if !(16..=29).contains(&subnet.prefix_len()) {
        return Err(SubnetError::Size { subnet });
    }
    if !subnet.network().is_private() || !subnet.broadcast().is_private() {
        return Err(SubnetError::Public { subnet });
    }
    Ok(())
}

impl TenantNetwork {
    /// The subnet that a net id has unless its tenant asked for another.
    pub fn default_subnet(net_id: NetId) -> Ipv4Net {
        let base = u32::from(Ipv4Addr::new(10, 240, 0, 0));
        Ipv4Net::new_assert(Ipv4Addr::from(base + (u32::from(net_id.0) << 8)), TENANT_PREFIX_LEN)
    }

    /// The bridge's interface name.
    pub fn bridge(&self) -> String {
        format!("br-tenant-{}", self.net_id.0)
    }

    /// The gateway's address: the subnet's first.
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// The gateway's address with the subnet's prefix length, as the bridge has it.
    pub fn gateway_net(&self) -> Ipv4Net {
        Ipv4Net::new_assert(self.gateway(), self.subnet.prefix_len())
    }

    /// The bridge's MAC, so that it does not change with the bridge's ports.
    pub fn gateway_mac(&self) -> MacAddr {
        MacAddr::of_address(self.gateway())
    }

    /// What the names of all taps of the tenant start with, and those of no other tenant.
    pub fn tap_prefix(&self) -> String {
        format!("tn{}i", self.net_id.0)
    }

    /// The last slot that has an address.
    pub fn last_slot(&self) -> Slot {
        let hosts = 1u32 << (32 - self.subnet.prefix_len());
        Slot(u16::try_from(hosts - 2).unwrap_or(SLOT_MAX).min(SLOT_MAX))
    }

    /// How many instances the subnet holds.
    pub fn capacity(&self) -> u32 {
        u32::from(self.last_slot().0 + 1 - FIRST_SLOT)
    }

    fn address(&self, offset: u16) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()) + u32::from(offset))
    }
}

impl InstanceNetwork {
    /// The place, without a limit.
    pub fn new(tenant: TenantNetwork, slot: Slot) -> Self {
        Self { tenant, slot, rate_mbit_s: None }
    }

    /// The tap's interface name, at most 15 bytes.
    pub fn tap(&self) -> String {
        format!("{}{}", self.tenant.tap_prefix(), self.slot.0)
    }

    /// The user that may open the tap: the one that the instance's VMM runs as.
    pub fn owner_uid(&self) -> u32 {
        vmm_uid(self.tenant.net_id, self.slot)
    }

    /// The instance's address.
    pub fn address(&self) -> Ipv4Addr {
        self.tenant.address(self.slot.0)
    }

    /// The instance's MAC.
    pub fn mac(&self) -> MacAddr {
        MacAddr::of_address(self.address())
    }
}

/// The unprivileged user and group id of an instance's VMM process.
pub fn vmm_uid(net_id: NetId, slot: Slot) -> u32 {
    VMM_UID_BASE + (u32::from(net_id.0) << 12) + u32::from(slot.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(net_id: u16) -> TenantNetwork {
        let net_id = NetId(net_id);
        TenantNetwork { net_id, subnet: TenantNetwork::default_subnet(net_id) }
    }

    #[test]
    fn addresses_are_derived_from_net_id_and_slot() {
        let instance = InstanceNetwork::new(tenant(7), Slot(3));
        assert_eq!(tenant(7).bridge(), "br-tenant-7");
        assert_eq!(tenant(7).gateway().to_string(), "10.240.7.1");
        assert_eq!(instance.address().to_string(), "10.240.7.3");
        assert_eq!(instance.mac().to_string(), "02:6d:0a:f0:07:03");
        assert_eq!(instance.tap(), "tn7i3");
    }

    #[test]
    fn the_largest_numbers_fit_their_fields() {
        let last = InstanceNetwork::new(tenant(NET_ID_MAX), Slot(SLOT_MAX));
        assert_eq!(last.tenant.subnet.to_string(), "10.255.255.0/24");
        assert!(last.tap().len() <= 15 && last.tenant.bridge().len() <= 15);
        assert!(vmm_uid(NetId(NET_ID_MAX), Slot(SLOT_MAX)) < i32::MAX as u32);
    }

    #[test]
    fn capacity_leaves_out_network_gateway_builder_and_broadcast() {
        assert_eq!(tenant(1).capacity(), 252);
        let small = TenantNetwork { net_id: NetId(1), subnet: "10.0.0.0/29".parse().unwrap() };
        assert_eq!((small.capacity(), small.last_slot()), (4, Slot(6)));
        let large = TenantNetwork { net_id: NetId(1), subnet: "10.0.0.0/16".parse().unwrap() };
        assert_eq!(large.last_slot(), Slot(SLOT_MAX));
    }

    #[test]
    fn subnets_are_private_aligned_and_of_a_sane_size() {
        for good in ["10.240.0.0/24", "192.168.3.0/28", "172.16.0.0/16"] {
            check_subnet(good.parse().unwrap()).unwrap();
        }
        for bad in ["10.0.0.1/24", "10.0.0.0/8", "10.0.0.0/30", "8.8.8.0/24", "172.32.0.0/16"] {
            assert!(check_subnet(bad.parse().unwrap()).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_mac_round_trips_through_json() {
        let mac = MacAddr([2, 0x6d, 10, 240, 7, 3]);
        let json = serde_json::to_string(&mac).unwrap();
        assert_eq!(serde_json::from_str::<MacAddr>(&json).unwrap(), mac);
        assert!(serde_json::from_str::<MacAddr>("\"02:6d:0a:f0:07\"").is_err());
    }
}
