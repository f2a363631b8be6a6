//! Golden and property tests of the firewall text.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::net::{InstanceNetwork, NetId, Slot, StateDirId, TenantNetwork};

fn tenant(net_id: u16) -> TenantNetwork {
    let net_id = NetId(net_id);
    TenantNetwork { net_id, subnet: TenantNetwork::default_subnet(net_id) }
}

fn network(tenants: &[u16], instances: &[(u16, u16)]) -> NodeNetwork {
    let instances =
        instances.iter().map(|&(net_id, slot)| InstanceNetwork::new(tenant(net_id), Slot(slot)));
    NodeNetwork::of(tenants.iter().map(|&net_id| tenant(net_id)), instances).unwrap()
}

fn table() -> TableName {
    TableName::of_default_state_dir()
}

#[test]
fn a_full_batch_replaces_both_tables_and_names_no_other() {
    let other = TableName::of_state_dir(StateDirId::from_digest([0xde, 0xad, 0xbe, 0xef]));
    let text = render_full(&other, &network(&[1], &[(1, 3), (1, 4)]));
    let heads: Vec<&str> = text.lines().filter(|line| line.contains("table ")).collect();
    assert_eq!(
        heads,
        [
            "add table inet mvm_deadbeef",
            "delete table inet mvm_deadbeef",
            "table inet mvm_deadbeef {",
            "add table bridge mvm_deadbeef",
            "delete table bridge mvm_deadbeef",
            "table bridge mvm_deadbeef {",
        ]
    );
    assert!(!text.contains("flush"));
}

#[test]
fn tenants_and_instances_are_set_elements() {
    let text = render_full(&table(), &network(&[1, 12], &[(1, 3), (12, 4)]));
    let sets: Vec<&str> = text.lines().filter(|line| line.starts_with("\tset ")).collect();
    assert_eq!(
        sets,
        [
            "\tset bridges { type ifname; elements = { \"br-tenant-1\", \"br-tenant-12\" }; }",
            "\tset switched { type ifname . ifname; elements = { \"br-tenant-1\" . \"br-tenant-1\", \"br-tenant-12\" . \"br-tenant-12\" }; }",
            "\tset taps { type ifname; flags interval; elements = { \"tn12i*\", \"tn1i*\" }; }",
            "\tset subnets { type ipv4_addr; flags interval; elements = { 10.240.1.0/24, 10.240.12.0/24 }; }",
            "\tset sources { type ifname . ipv4_addr; flags interval; elements = { \"br-tenant-1\" . 10.240.1.0/24, \"br-tenant-12\" . 10.240.12.0/24 }; }",
            "\tset gateways { type ifname . ipv4_addr; limit rate 10/second burst 20 packets; elements = { \"br-tenant-1\" . 10.240.1.1, \"br-tenant-12\" . 10.240.12.1 }; }",
            "\tset resolvers { type ifname . ipv4_addr; elements = { \"br-tenant-1\" . 10.240.1.1, \"br-tenant-12\" . 10.240.12.1 }; }",
            "\tset taps { type ifname; flags interval; elements = { \"tn12i*\", \"tn1i*\" }; }",
            "\tset instances { type ifname . ether_addr . ipv4_addr; elements = { \"tn12i4\" . 02:6d:0a:f0:0c:04 . 10.240.12.4, \"tn1i3\" . 02:6d:0a:f0:01:03 . 10.240.1.3 }; }",
            "\tset senders { type ifname; limit rate over 125000 bytes/second burst 262144 bytes; }",
            "\tset receivers { type ifname; limit rate over 125000 bytes/second burst 262144 bytes; }",
        ]
    );
}

#[test]
fn a_rate_is_an_element_of_both_directions_and_changes_in_one_batch() {
    let place = InstanceNetwork::new(tenant(1), Slot(3));
    let at = |rate_mbit_s| NodeNetwork::of([], [InstanceNetwork { rate_mbit_s, ..place }]).unwrap();
    let element =
        |rate| format!("\"tn1i3\" limit rate over {rate} bytes/second burst 262144 bytes");
    let (slow, fast) = (element(125_000), element(125_000_000));
    assert_eq!(
        render_delta(&table(), &at(Some(1)), &at(Some(1000))),
        format!(
            "delete element bridge mvm senders {{ {slow} }}\n\
             delete element bridge mvm receivers {{ {slow} }}\n\
             add element bridge mvm senders {{ {fast} }}\n\
             add element bridge mvm receivers {{ {fast} }}\n"
        )
    );
    assert!(render_full(&table(), &at(Some(1))).contains(&format!("elements = {{ {slow} }}")));
}

#[test]
fn every_base_chain_accepts_what_is_not_ours() {
    let text = render_full(&table(), &network(&[1], &[]));
    let hooks: Vec<&str> = text.lines().filter(|line| line.contains(" hook ")).collect();
    assert_eq!(hooks.len(), 6);
    assert!(hooks.iter().all(|line| line.ends_with("policy accept;")), "{hooks:?}");
}

#[test]
fn the_rules_do_not_depend_on_tenants_or_instances() {
    let rules = |network: &NodeNetwork| {
        let text = render_full(&table(), network);
        text.lines()
            .filter(|line| !line.starts_with("\tset "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(rules(&network(&[1], &[])), rules(&network(&[1, 2, 3], &[(1, 3), (3, 9)])));
}

#[test]
fn every_rule_says_what_it_is_for() {
    let text = render_full(&table(), &network(&[1], &[]));
    for line in text.lines().filter(|line| line.starts_with("\t\t") && !line.contains(" hook ")) {
        assert!(line.contains(" comment \""), "{line}");
    }
}

#[test]
fn without_tenants_the_tables_go_away() {
    let gone = "add table inet mvm\ndelete table inet mvm\n\
                add table bridge mvm\ndelete table bridge mvm\n";
    assert_eq!(render_full(&table(), &NodeNetwork::default()), gone);
    assert_eq!(render_delta(&table(), &network(&[1], &[]), &NodeNetwork::default()), gone);
}

#[test]
fn adding_an_instance_adds_one_element() {
    let (old, new) = (network(&[1], &[]), network(&[1], &[(1, 3)]));
    let element = "\"tn1i3\" . 02:6d:0a:f0:01:03 . 10.240.1.3";
    assert_eq!(
        render_delta(&table(), &old, &new),
        format!("add element bridge mvm instances {{ {element} }}\n")
    );
    assert_eq!(
        render_delta(&table(), &new, &old),
        format!("delete element bridge mvm instances {{ {element} }}\n")
    );
    assert_eq!(render_delta(&table(), &new, &new), "");
}

#[test]
fn removing_a_tenant_refills_the_name_patterns() {
    let delta = render_delta(&table(), &network(&[1, 2], &[]), &network(&[2], &[]));
    assert_eq!(
        delta,
        "delete element inet mvm bridges { \"br-tenant-1\" }\n\
         delete element inet mvm switched { \"br-tenant-1\" . \"br-tenant-1\" }\n\
         flush set inet mvm taps\n\
         delete element inet mvm subnets { 10.240.1.0/24 }\n\
         delete element inet mvm sources { \"br-tenant-1\" . 10.240.1.0/24 }\n\
         delete element inet mvm gateways { \"br-tenant-1\" . 10.240.1.1 }\n\
         delete element inet mvm resolvers { \"br-tenant-1\" . 10.240.1.1 }\n\
         flush set bridge mvm taps\n\
         add element inet mvm taps { \"tn2i*\" }\n\
         add element bridge mvm taps { \"tn2i*\" }\n"
    );
}

type Elements = BTreeMap<(String, String), BTreeSet<String>>;

/// An independent reading of the element commands of a batch, applied to a model of the sets.
fn apply(sets: &mut Elements, batch: &str) {
    for line in batch.lines() {
        let words: Vec<&str> = line.splitn(6, ' ').collect();
        match words.as_slice() {
            ["flush", "set", family, "mvm", set] => {
                sets.insert((family.to_string(), set.to_string()), BTreeSet::new());
            }
            [verb, "element", family, "mvm", set, elements] => {
                let elements = elements.trim_start_matches("{ ").trim_end_matches(" }");
                let held = sets.entry((family.to_string(), set.to_string())).or_default();
                for element in elements.split(", ") {
                    let changed = match *verb {
                        "add" => held.insert(element.to_owned()),
                        "delete" => held.remove(element),
                        _ => panic!("unexpected verb in {line}"),
                    };
                    assert!(changed, "{line} does not change the set");
                }
            }
            _ => panic!("unexpected line {line}"),
        }
    }
    sets.retain(|_, held| !held.is_empty());
}

/// The sets of a full batch.
fn parse(batch: &str) -> Elements {
    let mut sets = Elements::new();
    let mut family = "";
    for line in batch.lines() {
        if let Some(rest) = line.strip_prefix("table ") {
            family = rest.split(' ').next().unwrap();
        }
        if let Some((head, rest)) = line.split_once("elements = { ") {
            let name = head.trim_start_matches("\tset ").split(' ').next().unwrap();
            let elements = rest.trim_end_matches(" }; }").split(", ").map(str::to_owned).collect();
            sets.insert((family.to_owned(), name.to_owned()), elements);
        }
    }
    sets
}

fn any_network() -> impl Strategy<Value = NodeNetwork> {
    let instances = prop::collection::btree_set((1u16..6, 3u16..9), 0..12);
    let rate = prop::option::of(1u32..3);
    (prop::collection::btree_set(1u16..6, 1..5), instances, rate).prop_map(
        |(tenants, instances, rate_mbit_s)| {
            let mut network = network(
                &tenants.into_iter().collect::<Vec<_>>(),
                &instances.into_iter().collect::<Vec<_>>(),
            );
            // Some have it, and some have none.
            for place in network.clone().instances().step_by(2) {
                network.add_instance(InstanceNetwork { rate_mbit_s, ..*place }).unwrap();
            }
            network
        },
    )
}

proptest! {
    #[test]
    fn a_delta_turns_the_old_sets_into_the_new_ones(old in any_network(), new in any_network()) {
        let mut sets = parse(&render_full(&table(), &old));
        apply(&mut sets, &render_delta(&table(), &old, &new));
        prop_assert_eq!(sets, parse(&render_full(&table(), &new)));
    }

    #[test]
    fn every_instance_has_exactly_one_source(network in any_network()) {
        let sets = parse(&render_full(&table(), &network));
        let none = BTreeSet::new();
        let held = sets.get(&("bridge".to_owned(), "instances".to_owned())).unwrap_or(&none);
        prop_assert_eq!(held.len(), network.instances().count());
        for instance in network.instances() {
            let tap = format!("\"{}\" . ", instance.tap());
            let of_tap: Vec<_> = held.iter().filter(|element| element.starts_with(&tap)).collect();
            prop_assert_eq!(of_tap.len(), 1);
            let address = format!(" {}", instance.address());
            prop_assert!(of_tap[0].ends_with(&address));
        }
    }
}
