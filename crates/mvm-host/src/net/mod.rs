//! The network seam: bridges, taps, addresses and the firewall of one agent on one machine.
//!
//! The agent calls it: [`Network::ensure`] when it starts and in its reconcile rounds, the verbs
//! for one instance or tenant in between. It never decides who gets which network: net ids and
//! slots come from admission, which asks [`Network::occupied`] and [`Network::claim`] first.
//!
//! Several agents (state directories) may share a machine with each other and with other software.
//! A link is ours if its alias is the owner's; a firewall table is ours if it has the owner's name;
//! net ids are claimed machine-wide. Nothing else is changed or removed, except that IPv4
//! forwarding is switched on.

mod claims;
mod conflicts;
mod difference;
mod error;
mod generation;
mod links;
mod linux;
mod names;
mod namespace;
mod nft;
mod orphans;
mod owner;
mod ownership;
mod registry;
mod resting;
mod ruleset;
mod sim;
mod sysctl;
mod tap;
mod verify;

use std::collections::BTreeSet;
use std::net::IpAddr;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, NetId, NodeNetwork, TenantNetwork, Traffic};

pub use claims::CLAIMS_DIR;
pub use conflicts::{Conflict, route_conflicts};
pub use difference::Difference;
pub use error::NetworkError;
pub use linux::LinuxNetwork;
pub use names::ResolvConf;
pub(crate) use names::{RESOLV_CONF, read as read_resolv_conf};
pub(crate) use namespace::make_tap;
pub use orphans::{Orphan, OrphanKind, orphans, orphans_of, prune_orphans, prune_orphans_of};
pub use owner::Owner;
pub(crate) use owner::digest_of;
pub use registry::Registry;
pub use sim::{SimMachine, SimNetwork};

/// What admission must avoid on this machine, because it is not this agent's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Occupied {
    /// Net ids that others have claimed, or whose link names others use.
    pub net_ids: BTreeSet<NetId>,
    /// Networks that the machine reaches by other links than ours.
    pub subnets: BTreeSet<Ipv4Net>,
}

/// What guests take over from the machine's own network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The machine's name servers that guests can ask by themselves.
    pub nameservers: Vec<IpAddr>,
    /// Whether those are better asked first, because other software's firewall keeps questions from the gateway.
    pub is_gateway_last: bool,
    /// Domains in which the machine looks for short names.
    pub search: Vec<String>,
    /// Options of the machine's resolver.
    pub resolver_options: Vec<String>,
    /// The largest packet that fits the way out, in bytes, if it can be told.
    pub mtu: Option<u16>,
}

/// The network of one agent on one machine.
///
/// Changes are made one after the other. A caller that computes `expected` for
/// [`ensure`](Network::ensure) must not add or remove instances between computing and calling.
#[async_trait]
pub trait Network: Send + Sync {
    /// Reserves a net id on this machine for this agent; it may be reserved for it already.
    ///
    /// # Errors
    /// Another agent, whose state directory exists, has it.
    async fn claim(&self, net_id: NetId) -> Result<(), NetworkError>;

    /// Gives a reservation back; it is not an error if this agent has none.
    ///
    /// # Errors
    /// The operating system refused.
    async fn release(&self, net_id: NetId) -> Result<(), NetworkError>;

    /// What admission must avoid when it picks a net id or accepts a subnet.
    ///
    /// # Errors
    /// The machine's links and routes cannot be read.
    async fn occupied(&self) -> Result<Occupied, NetworkError>;

    /// Makes the machine agree with `expected` and removes what is ours and not in it.
    ///
    /// # Errors
    /// What could be done is done; a tenant whose net id or links are somebody else's is left out.
    async fn ensure(&self, expected: &NodeNetwork) -> Result<(), NetworkError>;

    /// Makes a tenant's bridge, guarded.
    ///
    /// # Errors
    /// The net id or the link is somebody else's, or the operating system refused.
    async fn add_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError>;

    /// Makes an instance's tap, and its tenant's bridge if need be, and lets its packets through.
    ///
    /// # Errors
    /// [`ensure`](Network::ensure) was not called yet, the net id or a link is somebody else's, or
    /// the operating system refused.
    async fn add_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError>;

    /// Does the same without the tap, which the VMM's driver makes in the VMM's own network namespace,
    /// and [`take_tap`](Network::take_tap) takes from there.
    ///
    /// # Errors
    /// Those of [`add_instance`](Network::add_instance).
    async fn admit_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError>;

    /// Takes an instance's tap out of the network namespace of its VMM, the process `pid`, which has it open
    /// and keeps it, and makes it a port of its tenant's bridge. It may have been taken already.
    ///
    /// # Errors
    /// [`admit_instance`](Network::admit_instance) was not called yet, there is no such tap, a link of
    /// its name is somebody else's, or the operating system refused.
    async fn take_tap(&self, instance: InstanceNetwork, pid: u32) -> Result<(), NetworkError>;

    /// Removes the tap of an instance that sleeps, whose rules wait for its wake; it is not an error if
    /// the tap is gone.
    ///
    /// # Errors
    /// The operating system refused.
    async fn remove_tap(&self, instance: InstanceNetwork) -> Result<(), NetworkError>;

    /// Removes an instance's tap and stops its packets; it is not an error if it is gone.
    ///
    /// # Errors
    /// It goes on past errors and reports all of them.
    async fn remove_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError>;

    /// Removes all of a tenant's taps, its bridge and its claim; any of them may be gone.
    ///
    /// # Errors
    /// It goes on past errors and reports all of them.
    async fn remove_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError>;

    /// What an instance's interface has carried since its tap was made; `None` if there is no tap.
    ///
    /// # Errors
    /// The machine's state cannot be read.
    async fn traffic(&self, instance: InstanceNetwork) -> Result<Option<Traffic>, NetworkError>;

    /// Puts back what somebody else has changed of this agent's firewall, and tells whether there was
    /// anything. Quick as long as nobody has changed any firewall.
    ///
    /// # Errors
    /// The firewall cannot be read or replaced.
    async fn mend_firewall(&self) -> Result<bool, NetworkError>;

    /// Puts back what somebody else has changed of the links that this agent has made since it called
    /// [`ensure`](Network::ensure), and tells whether there was anything.
    ///
    /// # Errors
    /// The machine's state cannot be read, or the operating system refused.
    async fn mend_links(&self) -> Result<bool, NetworkError>;

    /// Which of these instances, whose microVMs run, have lost their taps: the one that is there, if any, is
    /// not open in any process.
    ///
    /// # Errors
    /// The machine's state cannot be read.
    async fn cut_off(
        &self,
        running: &[InstanceNetwork],
    ) -> Result<BTreeSet<InstanceNetwork>, NetworkError>;

    /// Makes these tenants have a name server at their gateways, which asks whomever the machine asks, and
    /// no others. Their bridges must be there. Quick if nothing has changed.
    ///
    /// # Errors
    /// It goes on past errors, such as a port that another program has, and reports all of them.
    async fn serve_names(&self, tenants: &BTreeSet<TenantNetwork>) -> Result<(), NetworkError>;

    /// What guests take over from the machine's own network, as of now.
    ///
    /// # Errors
    /// The machine's state cannot be read.
    async fn surroundings(&self) -> Result<Surroundings, NetworkError>;

    /// Looks out for packets of neighbours to these instances, which rest, and to no others. Questions for
    /// their addresses are answered in their names. Quick if nothing has changed.
    ///
    /// # Errors
    /// It goes on past errors and reports all of them.
    async fn watch_resting(&self, resting: &BTreeSet<InstanceNetwork>) -> Result<(), NetworkError>;

    /// The next instance of those that are [watched](Network::watch_resting) to which a neighbour has
    /// sent a packet, which is lost.
    async fn visited(&self) -> InstanceNetwork;

    /// How the machine differs from `expected`; empty if it does not.
    ///
    /// # Errors
    /// The machine's state cannot be read.
    async fn verify(&self, expected: &NodeNetwork) -> Result<Vec<Difference>, NetworkError>;
}
