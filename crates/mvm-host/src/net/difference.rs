//! One way in which a machine's network is not what it is expected to be.

use std::fmt;

use ipnet::Ipv4Net;
use mvm_core::net::MacAddr;

/// One way in which the machine differs from what is expected; its text is for an operator.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// A bridge or tap is missing.
    LinkMissing {
        /// Its name.
        link: String,
    },
    /// A bridge or tap is ours, and nobody expects it.
    LinkUnexpected {
        /// Its name.
        link: String,
    },
    /// A bridge or tap of that name is somebody else's.
    LinkForeign {
        /// Its name.
        link: String,
        /// Whose it is, in words.
        owner: String,
    },
    /// A link of that name is not a bridge or tap.
    LinkKind {
        /// Its name.
        link: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A link is down.
    LinkDown {
        /// Its name.
        link: String,
    },
    /// A tap is on no bridge or on another one.
    NotAttached {
        /// The tap.
        tap: String,
        /// The bridge that it belongs on.
        bridge: String,
    },
    /// A tap may be opened by somebody else.
    TapOwner {
        /// The tap.
        tap: String,
        /// The user id that should own it.
        expected: u32,
        /// The user id that owns it, if any.
        found: Option<u32>,
    },
    /// A bridge has another MAC.
    Mac {
        /// The bridge.
        link: String,
        /// The MAC that it should have.
        expected: MacAddr,
    },
    /// A bridge has lost its address.
    AddressMissing {
        /// The bridge.
        link: String,
        /// The address.
        address: Ipv4Net,
    },
    /// A bridge has an address that it should not have.
    AddressUnexpected {
        /// The bridge.
        link: String,
        /// The address.
        address: Ipv4Net,
    },
    /// The machine reaches addresses of a tenant's subnet by another link.
    RouteOverlap {
        /// The tenant's subnet.
        subnet: Ipv4Net,
        /// Where the other route leads.
        route: Ipv4Net,
    },
    /// A running microVM's tap was deleted; one that was made anew does not lead to it.
    TapLost {
        /// The tap.
        tap: String,
    },
    /// A setting of the kernel or of a bridge has another value.
    Setting {
        /// The setting's name.
        name: String,
        /// The value that it should have.
        expected: String,
        /// The value that it has.
        found: String,
    },
    /// A net id is not claimed for this agent.
    ClaimMissing {
        /// The claim's number.
        net_id: u16,
    },
    /// A table, set or chain of the firewall is missing.
    FirewallMissing {
        /// Family, kind and name.
        object: String,
    },
    /// The firewall has a table, set or chain that it should not have.
    FirewallUnexpected {
        /// Family, kind and name.
        object: String,
    },
    /// A set or chain of the firewall is defined in another way.
    FirewallDefinition {
        /// Family, kind and name.
        object: String,
    },
    /// A set of the firewall lacks an element.
    ElementMissing {
        /// Family and name of the set.
        set: String,
        /// The element.
        element: String,
    },
    /// A set of the firewall has an element too many.
    ElementUnexpected {
        /// Family and name of the set.
        set: String,
        /// The element.
        element: String,
    },
    /// A chain of the firewall lacks a rule.
    RuleMissing {
        /// Family and name of the chain.
        chain: String,
        /// What the rule is for.
        rule: String,
    },
    /// A chain of the firewall has a rule too many, or one that was changed.
    RuleUnexpected {
        /// Family and name of the chain.
        chain: String,
        /// The rule, as nft's JSON.
        rule: String,
    },
    /// A chain of the firewall has the right rules in another order.
    RuleOrder {
        /// Family and name of the chain.
        chain: String,
    },
}

impl Difference {
    /// Whether it is one of links and their settings that putting them back mends.
    pub(super) fn is_of_links(&self) -> bool {
        matches!(
            self,
            Self::LinkMissing { .. }
                | Self::LinkDown { .. }
                | Self::NotAttached { .. }
                | Self::TapOwner { .. }
                | Self::Mac { .. }
                | Self::AddressMissing { .. }
                | Self::AddressUnexpected { .. }
                | Self::Setting { .. }
                | Self::ClaimMissing { .. }
        )
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkMissing { link } => write!(f, "{link} is missing"),
            Self::LinkUnexpected { link } => write!(f, "{link} is left over"),
            Self::LinkForeign { link, owner } => write!(f, "{link} belongs to {owner}"),
            Self::LinkKind { link, expected } => write!(f, "{link} is not a {expected}"),
            Self::LinkDown { link } => write!(f, "{link} is down"),
            Self::NotAttached { tap, bridge } => write!(f, "{tap} is not on {bridge}"),
            Self::TapOwner { tap, expected, found: Some(found) } => {
                write!(f, "{tap} belongs to user {found} instead of {expected}")
            }
            Self::TapOwner { tap, expected, found: None } => {
                write!(f, "{tap} belongs to no user instead of {expected}")
            }
            Self::Mac { link, expected } => write!(f, "{link} does not have the MAC {expected}"),
            Self::AddressMissing { link, address } => {
                write!(f, "{link} does not have the address {address}")
            }
            Self::AddressUnexpected { link, address } => {
                write!(f, "{link} has the unexpected address {address}")
            }
            Self::RouteOverlap { subnet, route } => {
                write!(
                    f,
                    "the subnet {subnet} overlaps {route}, which this machine routes elsewhere"
                )
            }
            Self::TapLost { tap } => {
                write!(
                    f,
                    "the microVM behind {tap} has lost it: it has no network until it is restarted"
                )
            }
            Self::Setting { name, expected, found } => {
                write!(f, "{name} is {found} instead of {expected}")
            }
            Self::ClaimMissing { net_id } => write!(f, "net id {net_id} is not claimed"),
            Self::FirewallMissing { object } => write!(f, "firewall {object} is missing"),
            Self::FirewallUnexpected { object } => write!(f, "firewall {object} is unexpected"),
            Self::FirewallDefinition { object } => write!(f, "firewall {object} was changed"),
            Self::ElementMissing { set, element } => {
                write!(f, "element missing in set {set}: {element}")
            }
            Self::ElementUnexpected { set, element } => {
                write!(f, "unexpected element in set {set}: {element}")
            }
            Self::RuleMissing { chain, rule } => {
                write!(f, "rule missing in chain {chain}: {rule}")
            }
            Self::RuleUnexpected { chain, rule } => {
                write!(f, "unexpected rule in chain {chain}: {rule}")
            }
            Self::RuleOrder { chain } => write!(f, "rules of chain {chain} are out of order"),
        }
    }
}
