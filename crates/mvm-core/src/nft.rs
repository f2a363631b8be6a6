//! The firewall of one agent as text for `nft -f -`.
//!
//! The host's network backend feeds the text to `nft`; one batch is one kernel transaction, so
//! the firewall is never half there. Nothing here runs anything or names anything that belongs to
//! other software: an agent has one table in the family `inet` and one in the family `bridge`, and
//! every rule starts by matching interfaces of this agent's own sets.
//!
//! ```text
//!  bridge  a frame from a tap must carry its instance's MAC and address (IPv4 and ARP);
//!          anything else (IPv6, VLAN tags, other protocols, spoofed sources) is dropped, and so is
//!          what a guest sends or is sent faster than its rate
//!  inet    forward: guests reach whatever is no tenant's and not on the host's links of their own; only
//!                   replies come in; no TCP segment is larger than the way out takes
//!          input:   guests reach nothing of the host, but may ping their own gateway and ask it for names
//!          nat:     guests leave with the host's address
//! ```
//!
//! The rules never change: tenants and instances are elements of sets, so that adding one is
//! adding elements. Bridge rules keep no state, because connection tracking of bridged traffic is
//! an optional part of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::net::{InstanceNetwork, NodeNetwork, TableName, TenantNetwork};
use crate::rates::bytes_per_second;

/// The families in which an agent has a table of its name.
pub const FAMILIES: [&str; 2] = ["inet", "bridge"];

/// A set of one of the two tables.
struct Set {
    family: &'static str,
    name: &'static str,
    /// Everything between the braces but the elements.
    definition: &'static str,
    removal: Removal,
}

/// How an element leaves a set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// One by one.
    Element,
    /// By refilling the set with all tap patterns: nft 1.0.6 cannot delete a name pattern.
    Refill,
}

const BRIDGES: Set =
    Set { family: "inet", name: "bridges", definition: "type ifname", removal: Removal::Element };
const SWITCHED: Set = Set {
    family: "inet",
    name: "switched",
    definition: "type ifname . ifname",
    removal: Removal::Element,
};
const INET_TAPS: Set = Set {
    family: "inet",
    name: "taps",
    definition: "type ifname; flags interval",
    removal: Removal::Refill,
};
const SUBNETS: Set = Set {
    family: "inet",
    name: "subnets",
    definition: "type ipv4_addr; flags interval",
    removal: Removal::Element,
};
const SOURCES: Set = Set {
    family: "inet",
    name: "sources",
    definition: "type ifname . ipv4_addr; flags interval",
    removal: Removal::Element,
};
const GATEWAYS: Set = Set {
    family: "inet",
    name: "gateways",
    // A limit of the set is kept per element: no tenant uses up another's.
    definition: "type ifname . ipv4_addr; limit rate 10/second burst 20 packets",
    removal: Removal::Element,
};
const RESOLVERS: Set = Set {
    family: "inet",
    name: "resolvers",
    definition: "type ifname . ipv4_addr",
    removal: Removal::Element,
};
const BRIDGE_TAPS: Set = Set { family: "bridge", ..INET_TAPS };
const INSTANCES: Set = Set {
    family: "bridge",
    name: "instances",
    definition: "type ifname . ether_addr . ipv4_addr",
    removal: Removal::Element,
};
const SENDERS: Set = Set {
    family: "bridge",
    name: "senders",
    // Each element has a limit of its own; this one is for an element that comes without.
    definition: "type ifname; limit rate over 125000 bytes/second burst 262144 bytes",
    removal: Removal::Element,
};
const RECEIVERS: Set = Set { name: "receivers", ..SENDERS };

const SETS: [Set; 11] = [
    BRIDGES,
    SWITCHED,
    INET_TAPS,
    SUBNETS,
    SOURCES,
    GATEWAYS,
    RESOLVERS,
    BRIDGE_TAPS,
    INSTANCES,
    SENDERS,
    RECEIVERS,
];

/// What may come at once, in bytes, besides what a rate allows in a second: a few of the largest
/// packets, which a guest hands over in one piece.
const BURST: u32 = 256 << 10;

/// The chains of the family `inet`.
///
/// Tenants of all agents have bridges of one pattern, and a packet to a tenant leaves by its bridge: other
/// addresses of the network that tenants' subnets are taken from may be anybody's.
///
/// From a guest, what is forbidden comes first and whatever is left may go out. There is no rule
/// that accepts established connections from a guest: it would let an answer, or an ICMP error
/// about somebody else's connection, go where the guest itself may not.
const INET_CHAINS: &str = r#"
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname . oifname @switched accept comment "within a tenant; seen here when br_netfilter is on"
		iifname @taps drop comment "from a tap that left its bridge"
		iifname @bridges tcp flags syn tcp option maxseg size set rt mtu comment "segments that fit the way out"
		oifname @bridges tcp flags syn tcp option maxseg size set rt mtu comment "segments that fit the way in"
		iifname @bridges jump from_guest comment "from a guest"
		oifname @bridges jump to_guest comment "to a guest"
	}

	chain from_guest {
		meta nfproto != ipv4 drop comment "no IPv6"
		oifname "br-tenant-*" drop comment "to another tenant"
		ip daddr 169.254.0.0/16 drop comment "to the metadata address"
		ip daddr @subnets drop comment "to a tenant's own subnet"
		iifname . ip saddr != @sources drop comment "from an address of another subnet"
		ct state invalid drop comment "would leave untranslated"
		ct direction original ct status dnat drop comment "to a forwarded port of the host"
	}

	chain to_guest {
		ct state established,related accept comment "answers"
		drop comment "unsolicited"
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname @taps drop comment "from a tap that left its bridge"
		iifname @bridges jump guest_to_host comment "from a guest"
	}

	chain guest_to_host {
		ct state established ct direction reply accept comment "answers to the host"
		icmp type echo-request iifname . ip daddr @gateways accept comment "ping of the own gateway"
		iifname . ip daddr @resolvers meta l4proto { tcp, udp } th dport 53 accept comment "names, at the own gateway"
		drop comment "the host"
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @subnets oifname != @bridges masquerade comment "guests leave with the host's address"
	}
"#;

/// The chains of the family `bridge`.
///
/// `ether type` is read from the frame, so a VLAN tag does not hide behind the inner protocol.
/// Frames to the reserved addresses of 802.1D may skip prerouting, and pass input instead.
const BRIDGE_CHAINS: &str = r#"
	chain prerouting {
		type filter hook prerouting priority dstnat; policy accept;
		iifname @senders drop comment "from a guest, faster than its rate"
		iifname @taps jump from_guest comment "from a guest"
	}

	chain postrouting {
		type filter hook postrouting priority srcnat; policy accept;
		oifname @receivers drop comment "to a guest, faster than its rate"
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname @taps jump from_guest comment "from a guest to the host"
	}

	chain from_guest {
		ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop comment "link-local control protocols"
		ether type ip iifname . ether saddr . ip saddr @instances accept comment "IPv4 from its instance"
		ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation { request, reply } iifname . ether saddr . arp saddr ip @instances iifname . arp saddr ether . arp saddr ip @instances accept comment "ARP about its instance"
		drop comment "spoofed, or neither IPv4 nor ARP"
	}
"#;

/// The batch that replaces whatever the agent's tables hold by the firewall of `network`.
///
/// Connections that are tracked stay tracked. Without any tenant the tables go away.
pub fn render_full(table: &TableName, network: &NodeNetwork) -> String {
    let mut text = String::new();
    let elements = elements((network.tenants(), network.instances()));
    for family in FAMILIES {
        // A table must exist to be deleted; both happen in the same transaction.
        let _ = writeln!(text, "add table {family} {table}\ndelete table {family} {table}");
        if network.is_empty() {
            continue;
        }
        let _ = writeln!(text, "table {family} {table} {{");
        for set in SETS.iter().filter(|set| set.family == family) {
            let _ = write!(text, "\tset {} {{ {};", set.name, set.definition);
            if let Some(elements) = elements.get(&(set.family, set.name)) {
                let _ = write!(text, " elements = {{ {} }};", join(elements));
            }
            text.push_str(" }\n");
        }
        match family {
            "inet" => text.push_str(INET_CHAINS),
            _ => text.push_str(BRIDGE_CHAINS),
        }
        text.push_str("}\n");
    }
    text
}

/// The batch that turns the firewall of `old` into that of `new`; empty if they are the same.
///
/// It fails as a whole if the kernel does not hold the firewall of `old`.
pub fn render_delta(table: &TableName, old: &NodeNetwork, new: &NodeNetwork) -> String {
    if old == new {
        return String::new();
    }
    if old.is_empty() || new.is_empty() {
        return render_full(table, new);
    }
    // Only what differs is put into words: a node has thousands of instances, a delta mostly one.
    let (gone, come) = (elements(only_in(old, new)), elements(only_in(new, old)));
    let none = BTreeSet::new();
    let (mut deletions, mut additions) = (String::new(), String::new());
    for set in &SETS {
        let (family, name) = (set.family, set.name);
        let gone = gone.get(&(family, name)).unwrap_or(&none);
        let come = come.get(&(family, name)).unwrap_or(&none);
        let removed: BTreeSet<String> = gone.difference(come).cloned().collect();
        let mut added: BTreeSet<String> = come.difference(gone).cloned().collect();
        if !removed.is_empty() && set.removal == Removal::Refill {
            let _ = writeln!(deletions, "flush set {family} {table} {name}");
            added = new.tenants().map(tap_pattern).collect();
        } else if !removed.is_empty() {
            let removed = join(&removed);
            let _ = writeln!(deletions, "delete element {family} {table} {name} {{ {removed} }}");
        }
        if !added.is_empty() {
            let added = join(&added);
            let _ = writeln!(additions, "add element {family} {table} {name} {{ {added} }}");
        }
    }
    // Intervals that go make room for intervals that come.
    deletions + &additions
}

/// The tenants and instances of a network that another one lacks.
fn only_in<'a>(
    network: &'a NodeNetwork,
    other: &'a NodeNetwork,
) -> (impl Iterator<Item = &'a TenantNetwork>, impl Iterator<Item = &'a InstanceNetwork>) {
    let instances: BTreeSet<&InstanceNetwork> = other.instances().collect();
    (
        network.tenants().filter(|tenant| other.tenant(tenant.net_id) != Some(tenant)),
        network.instances().filter(move |instance| !instances.contains(instance)),
    )
}

/// The elements of each set that has any, in nft's syntax, by family and name.
fn elements<'a>(
    (tenants, instances): (
        impl Iterator<Item = &'a TenantNetwork>,
        impl Iterator<Item = &'a InstanceNetwork>,
    ),
) -> BTreeMap<(&'static str, &'static str), BTreeSet<String>> {
    let mut elements: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    let mut add = |set: &Set, element: String| {
        elements.entry((set.family, set.name)).or_default().insert(element);
    };
    for tenant in tenants {
        let bridge = tenant.bridge();
        add(&BRIDGES, format!("\"{bridge}\""));
        add(&SWITCHED, format!("\"{bridge}\" . \"{bridge}\""));
        add(&INET_TAPS, tap_pattern(tenant));
        add(&BRIDGE_TAPS, tap_pattern(tenant));
        add(&SUBNETS, tenant.subnet.to_string());
        add(&SOURCES, format!("\"{bridge}\" . {}", tenant.subnet));
        let gateway = format!("\"{bridge}\" . {}", tenant.gateway());
        add(&GATEWAYS, gateway.clone());
        add(&RESOLVERS, gateway);
    }
    for instance in instances {
        let (tap, mac, address) = (instance.tap(), instance.mac(), instance.address());
        add(&INSTANCES, format!("\"{tap}\" . {mac} . {address}"));
        if let Some(rate) = instance.rate_mbit_s {
            let limited = format!("\"{tap}\" {}", limit(rate));
            add(&SENDERS, limited.clone());
            add(&RECEIVERS, limited);
        }
    }
    elements
}

/// All taps of a tenant, also those that are not instances (yet): they are dropped, not let through.
fn tap_pattern(tenant: &TenantNetwork) -> String {
    format!("\"{}*\"", tenant.tap_prefix())
}

/// What matches all that is faster than a rate in Mbit/s.
fn limit(mbit_s: u32) -> String {
    let rate = bytes_per_second(mbit_s);
    format!("limit rate over {rate} bytes/second burst {BURST} bytes")
}

fn join(elements: &BTreeSet<String>) -> String {
    elements.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
