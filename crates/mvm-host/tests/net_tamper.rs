//! What somebody may do to an agent's network behind its back: `verify` names it, `ensure` mends it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use mvm_host::net::Network;
use net_support::{Machine, differences, in_namespace, ip, nft, node, set_sysctl};

type Tampering = (&'static str, fn(), &'static str);

/// What somebody does behind the agent's back, and how it is reported.
const TAMPERINGS: &[Tampering] = &[
    ("bridge down", || drop(ip("link set br-tenant-1 down")), "br-tenant-1 is down"),
    ("bridge gone", || drop(ip("link del br-tenant-1")), "br-tenant-1 is missing"),
    ("tap down", || drop(ip("link set tn1i3 down")), "tn1i3 is down"),
    ("tap gone", || drop(ip("link del tn1i3")), "tn1i3 is missing"),
    ("tap detached", || drop(ip("link set tn1i3 nomaster")), "tn1i3 is not on br-tenant-1"),
    (
        "tap on another bridge",
        || drop(ip("link set tn1i3 master br-tenant-2")),
        "tn1i3 is not on br-tenant-1",
    ),
    (
        "tap of root",
        || {
            let alias = ip("link show tn1i3");
            let alias = alias.split("alias ").nth(1).unwrap().trim().to_owned();
            ip("link del tn1i3");
            ip("tuntap add dev tn1i3 mode tap");
            ip(&format!("link set tn1i3 alias {alias} master br-tenant-1 up"));
        },
        "tn1i3 belongs to no user instead of 1879052291",
    ),
    (
        "address removed",
        || drop(ip("address del 10.240.1.1/24 dev br-tenant-1")),
        "br-tenant-1 does not have the address 10.240.1.1/24",
    ),
    (
        "address added",
        || drop(ip("address add 10.1.1.1/24 dev br-tenant-1")),
        "br-tenant-1 has the unexpected address 10.1.1.1/24",
    ),
    (
        "bridge's MAC changed",
        || drop(ip("link set br-tenant-1 address 02:00:00:00:00:01")),
        "br-tenant-1 does not have the MAC 02:6d:0a:f0:01:01",
    ),
    (
        "spanning tree on",
        || drop(ip("link set br-tenant-1 type bridge stp_state 1")),
        "spanning tree of br-tenant-1 is 1 instead of 0",
    ),
    (
        "link-local frames to the host",
        || drop(ip("link set br-tenant-1 type bridge group_fwd_mask 0")),
        "link-local forwarding of br-tenant-1 is 0 instead of 1",
    ),
    (
        "setting of a bridge",
        || set_sysctl("ipv4/conf/br-tenant-1/route_localnet", "1"),
        "net.ipv4.conf.br-tenant-1.route_localnet is 1 instead of 0",
    ),
    (
        "forwarding off",
        || set_sysctl("ipv4/ip_forward", "0"),
        "net.ipv4.ip_forward is 0 instead of 1",
    ),
    (
        "rule deleted",
        || delete_rule("unsolicited"),
        "rule missing in chain inet to_guest: unsolicited",
    ),
    (
        "bridge rule deleted",
        || delete_rule("spoofed"),
        "rule missing in chain bridge from_guest: spoofed, or neither IPv4 nor ARP",
    ),
    (
        "rule added",
        || drop(nft(&format!("insert rule inet {} to_guest accept\n", table()))),
        "unexpected rule in chain inet to_guest: ",
    ),
    (
        "chain added",
        || drop(nft(&format!("add chain inet {} extra\n", table()))),
        "firewall inet chain extra is unexpected",
    ),
    (
        "policy changed",
        || {
            nft(&format!(
                "add chain inet {} forward {{ type filter hook forward priority 0; policy drop; }}\n",
                table()
            ));
        },
        "firewall inet chain forward was changed",
    ),
    (
        "element removed",
        || {
            let element = "\"tn1i3\" . 02:6d:0a:f0:01:03 . 10.240.1.3";
            nft(&format!("delete element bridge {} instances {{ {element} }}\n", table()));
        },
        "element missing in set bridge instances: tn1i3 . 02:6d:0a:f0:01:03 . 10.240.1.3",
    ),
    (
        "element added",
        || {
            let element = "\"tn1i3\" . 02:6d:0a:f0:01:03 . 10.240.1.9";
            nft(&format!("add element bridge {} instances {{ {element} }}\n", table()));
        },
        "unexpected element in set bridge instances: tn1i3 . 02:6d:0a:f0:01:03 . 10.240.1.9",
    ),
    (
        "subnet removed",
        || drop(nft(&format!("delete element inet {} subnets {{ 10.240.1.0/24 }}\n", table()))),
        "element missing in set inet subnets: 10.240.1.0/24",
    ),
    (
        "table gone",
        || drop(nft(&format!("delete table bridge {}\n", table()))),
        "firewall bridge table",
    ),
    (
        "link left over",
        || {
            let alias = ip("link show tn1i3");
            let alias = alias.split("alias ").nth(1).unwrap().trim().to_owned();
            ip("tuntap add dev tn9i9 mode tap");
            ip(&format!("link set tn9i9 alias {alias}"));
        },
        "tn9i9 is left over",
    ),
];

/// The name of the one agent's tables.
fn table() -> String {
    let tables = nft("list tables\n");
    tables.split_whitespace().find(|word| word.starts_with("mvm_")).unwrap().to_owned()
}

/// Deletes the rule whose comment starts so.
fn delete_rule(comment: &str) {
    let (mut family, mut chain) = (String::new(), String::new());
    for line in nft("list ruleset\n").lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", name, ..] => family = (*name).to_owned(),
            ["chain", name, ..] => chain = (*name).to_owned(),
            [.., "handle", handle] if line.contains(&format!("comment \"{comment}")) => {
                nft(&format!("delete rule {family} {} {chain} handle {handle}\n", table()));
                return;
            }
            _ => {}
        }
    }
    panic!("there is no rule with the comment {comment}");
}

#[test]
fn verify_names_every_kind_of_tampering_and_ensure_mends_it() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (network, expected) = (machine.agent("a"), node(&[(1, 3), (2, 3)]));
        network.ensure(&expected).await.unwrap();
        for (what, tamper, report) in TAMPERINGS {
            assert_eq!(differences(&network, &expected).await, [""; 0], "before: {what}");
            tamper();
            let found = differences(&network, &expected).await;
            assert!(found.iter().any(|text| text.starts_with(report)), "{what}: {found:?}");
            network.ensure(&expected).await.unwrap();
        }
        assert_eq!(differences(&network, &expected).await, [""; 0]);
    });
}
