//! What microVMs reach: their own tenant and the world, and nothing else. The network of a node is
//! verified, tampered with, and gone in the end.
//!
//! The node's agent runs in a network namespace that plays the host, with another one beyond it
//! that plays the world.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::net::Ipv4Addr;

use mvm_tests::netns::Namespace;
use mvm_tests::{LIMIT, Node, until};
use serde_json::Value;

/// The host's address on its uplink.
const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 1);
/// The world's address at the other end.
const WORLD: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 2);
/// Where clouds serve a machine's credentials.
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A node on a host with an uplink. Fields are dropped in order.
struct Scene {
    node: Node,
    host: Namespace,
    world: Namespace,
}

impl Scene {
    fn new(purpose: &str) -> Option<Self> {
        let node = Node::new()?;
        let host = Namespace::new(&format!("{purpose}-host"));
        let world = Namespace::new(&format!("{purpose}-world"));
        host.connect("wan", &format!("{HOST}/24"), &world, "host", &format!("{WORLD}/24"));
        world.ip(&format!("addr add {METADATA}/32 dev host"));
        host.ip(&format!("route add {METADATA}/32 via {WORLD}"));
        host.start_agent(&node);
        Some(Self { node, host, world })
    }

    fn pings(&self, from: &str, to: Ipv4Addr) -> bool {
        let ping = ["exec", from, "--", "ping", "-c", "1", "-W", "2", &to.to_string()];
        self.node.mvm(&ping).code == 0
    }

    /// What a server tells a guest, or `None` if it cannot be reached.
    fn asks(&self, from: &str, to: Ipv4Addr, port: u16) -> Option<String> {
        let script = format!("nc -w 3 {to} {port} </dev/null");
        let output = self.node.mvm(&["exec", from, "--", "sh", "-c", &script]);
        let told = output.stdout.trim().to_owned();
        (!told.is_empty()).then_some(told)
    }

    fn assert_verified(&self) {
        let output = self.node.mvm(&["net", "verify"]).ok();
        assert!(output.stdout.contains("all as expected"), "{output}");
    }

    /// Expects that `net verify` says this of a change, and what comes of it. The agent may put it back
    /// just before it is looked at: then the change is made once more.
    #[track_caller]
    fn assert_told(&self, change: &str, says: &str) {
        let told = || {
            self.host.ip(change);
            let output = self.node.mvm(&["net", "verify"]);
            (output.code == 1).then_some(output)
        };
        let output = until("the change is told", LIMIT, told);
        assert!(output.stdout.contains(says), "{says} is not in {output}");
        output.says(&["error: the kernel's network state differs", "hint: ", "`mvm restart`"]);
    }

    fn until_verified(&self) {
        let verified = || (self.node.mvm(&["net", "verify"]).code == 0).then_some(());
        until("the network is mended", LIMIT, verified);
    }

    fn delete_a_rule(&self) {
        let list = self.host.tool("nft", &["-j", "-a", "list", "ruleset"]).ok().json();
        let objects = list["nftables"].as_array().into_iter().flatten();
        let mut rules = objects.filter_map(|object| object.get("rule"));
        let rule = rules.find(|rule| rule["family"] == "inet").expect("the firewall has rules");
        let [table, chain] = ["table", "chain"].map(|name| rule[name].as_str().expect("a name"));
        let handle = rule["handle"].to_string();
        self.host.tool("nft", &["delete", "rule", "inet", table, chain, "handle", &handle]).ok();
    }
}

fn address(view: &Value) -> Ipv4Addr {
    view["address"].as_str().and_then(|text| text.parse().ok()).expect("an address")
}

fn gateway(node: &Node, tenant: &str) -> Ipv4Addr {
    let view = node.json(&["tenant", "info", tenant]);
    view["gateway"].as_str().and_then(|text| text.parse().ok()).expect("a gateway")
}

#[test]
fn an_instance_reaches_its_tenant_and_the_world_and_nothing_else() {
    let Some(scene) = Scene::new("reach") else { return };
    let Scene { node, host, world } = &scene;
    node.small_pool("red/web", &[]);
    node.small_pool("blue/web", &[]);
    let created = ["red/web", "red/web", "blue/web"].map(|pool| {
        let output = node.json(&["instance", "create", pool, "--start", "--no-wait"]);
        output["concerns"]["instances"][0].as_str().expect("a path").to_owned()
    });
    let [one, two, stranger] = created.each_ref().map(|path| node.until_state(path, "running"));
    let [one_path, two_path, stranger_path] = created.each_ref().map(String::as_str);

    // Its own tenant.
    assert!(scene.pings(one_path, address(&two)));
    assert!(scene.pings(two_path, address(&one)));
    assert!(scene.pings(one_path, gateway(node, "red")), "its own gateway");
    // One that sleeps is woken by its neighbour's packet, and the next one arrives.
    node.ok(&["sleep", two_path]);
    until("the sleeper is woken", LIMIT, || scene.pings(one_path, address(&two)).then_some(()));
    node.until_state(two_path, "running");
    // Another tenant.
    assert!(!scene.pings(one_path, address(&stranger)));
    assert!(!scene.pings(stranger_path, address(&one)));
    assert!(!scene.pings(one_path, gateway(node, "blue")), "another tenant's gateway");
    // The world, with the host's address.
    let port = world.serve_tcp();
    assert_eq!(scene.asks(one_path, WORLD, port), Some(HOST.to_string()));
    assert_eq!(scene.asks(stranger_path, WORLD, port), Some(HOST.to_string()));
    // What the host itself reaches, and a guest does not.
    assert!(host.ask_tcp(METADATA, port).is_some());
    assert_eq!(scene.asks(one_path, METADATA, port), None);
    let port = host.serve_tcp();
    for local in [HOST, gateway(node, "red"), gateway(node, "blue")] {
        assert!(host.ask_tcp(local, port).is_some(), "the host's service is not at {local}");
        assert_eq!(scene.asks(one_path, local, port), None, "a guest reaches {local}");
    }
    scene.assert_verified();

    // Destroyed one after the other, each takes what is its own.
    node.ok(&["tenant", "destroy", "red", "--force"]);
    assert!(scene.pings(stranger_path, gateway(node, "blue")), "blue suffers from red's end");
    node.ok(&["tenant", "destroy", "blue", "--force"]);
    let links = host.tool("ip", &["-br", "link"]).ok().stdout;
    let links: Vec<&str> = links.lines().filter_map(|line| line.split('@').next()).collect();
    assert!(links.iter().all(|link| link.starts_with("lo ") || *link == "wan"), "{links:?}");
    assert_eq!(host.tool("nft", &["list", "tables"]).ok().stdout, "");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_network_that_somebody_changed_is_told_and_an_address_is_kept_for_life() {
    let Some(scene) = Scene::new("tamper") else { return };
    let Scene { node, host, .. } = &scene;
    node.small_pool("acme/web", &[]);
    node.small_pool("acme/quiet", &["--net", "none"]);
    let path = node.boot("acme/web");
    let before = node.instance(&path);
    let bridge = node.json(&["tenant", "info", "acme"])["bridge"].clone();
    let bridge = bridge.as_str().expect("a bridge");
    scene.assert_verified();

    // The agent itself looks after its links and its firewall, under the same guest.
    scene.assert_told(&format!("link set {bridge} down"), &format!("{bridge} is down"));
    scene.until_verified();
    scene.delete_a_rule();
    scene.until_verified();
    assert!(node.agent_log().contains("they are put back"), "the log does not say so");
    host.ip(&format!("link del {bridge}"));
    scene.until_verified();
    assert!(scene.pings(&path, gateway(node, "acme")), "its bridge was made anew");
    let resolver = format!("nameserver {}", gateway(node, "acme"));
    assert!(node.guest(&path, "cat /etc/resolv.conf").starts_with(&resolver));
    // A tap cannot be given back to a microVM that runs.
    let tap = before["tap"].as_str().expect("a tap");
    host.ip(&format!("link del {tap}"));
    let lost = || (!node.instance(&path)["network_problem"].is_null()).then_some(());
    until("the loss is told", LIMIT, lost);
    let output = node.mvm(&["net", "verify"]).fails_with(1);
    assert!(output.stdout.contains(tap), "{output}");
    assert!(node.ok(&["ps"]).contains("running (no network)"));
    node.ok(&["restart", &path]);
    assert!(scene.pings(&path, gateway(node, "acme")), "it was restarted");
    scene.assert_verified();

    let guest =
        |node: &Node| node.guest(&path, "ip -o -4 addr show eth0; cat /sys/class/net/eth0/address");
    let seen = guest(node);
    for field in ["address", "mac"] {
        let value = before[field].as_str().expect("a text");
        assert!(seen.contains(value), "{value} is not in {seen}");
    }
    node.ok(&["stop", &path]);
    // What comes later does not take its place.
    node.ok(&["instance", "create", "acme/web"]);
    node.ok(&["start", &path]);
    let after = node.instance(&path);
    for field in ["address", "mac", "tap"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    assert_eq!(guest(node), seen);

    let quiet = node.boot("acme/quiet");
    assert_eq!(node.guest(&quiet, "ls /sys/class/net; hostname | wc -l"), "lo\n1");
    let view = node.instance(&quiet);
    assert!(view["tap"].is_null() && view["address"].is_null(), "{view:#}");
    scene.assert_verified();
}
