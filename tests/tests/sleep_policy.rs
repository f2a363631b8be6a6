//! Sleep policies with real guests: what keeps one awake is measured, and the rest falls asleep.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use mvm_tests::node::Node;
use mvm_tests::wait::until;
use serde_json::Value;

/// Longest time after which an idle guest with these policies rests, on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

fn used_by(node: &Node, path: &str) -> Value {
    node.json(&["why", path])["activity"]["used_by"]["by"].clone()
}

/// Waits until it was measured that an instance is in use by this.
fn until_used_by(node: &Node, path: &str, by: &str) {
    until(&format!("{path} is used by {by}"), LIMIT, || (used_by(node, path) == by).then_some(()));
}

#[test]
fn an_idle_guest_rests_and_one_that_is_used_does_not() {
    let Some(node) = Node::new() else { return };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    drop(listener);
    let publish = format!("{address}:80");
    let policy = ["--warm-after", "2s", "--sleep-after", "4s", "--min-running", "1s"];
    node.small_pool("acme/web", &[&policy[..], &["--publish", &publish]].concat());
    let path = node.boot("acme/web");
    let rested = |state: &str| {
        until(&format!("{path} is {state}"), LIMIT, || {
            Some(node.instance(&path)).filter(|view| view["state"] == state)
        })
    };

    // Nobody uses it.
    assert_eq!(rested("warm")["rested"]["rest"], "warm");
    let view = rested("sleeping");
    assert_eq!((&view["rested"]["why"], &view["rested"]["after_s"]), (&"idle".into(), &4.into()));
    assert_eq!(node.vmm_pids(), [0; 0]);
    let why = node.ok(&["why", &path]);
    assert!(why.contains("Its pool's sleep policy put it to sleep"), "{why}");
    assert!(why.contains("and its pool's policy says 4s"), "{why}");

    // An exec keeps it awake for as long as it runs, and is not cut off.
    let begun = Instant::now();
    assert_eq!(node.guest(&path, "sleep 9; echo done"), "done");
    assert!(begun.elapsed() >= Duration::from_secs(9));
    assert_eq!(node.instance(&path)["state"], "running");

    // So does a program that computes, which nobody waits for.
    node.guest(&path, "(trap '' HUP; while ! test -e /tmp/enough; do :; done) >/dev/null 2>&1 &");
    until_used_by(&node, &path, "cpu");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(node.instance(&path)["state"], "running");
    let stats = node.json(&["stats", &path])[0]["activity"].clone();
    assert!(stats["cpu_permille"].as_u64() > Some(200), "{stats}");
    node.guest(&path, "touch /tmp/enough");

    // A program that says so.
    node.guest(&path, "touch /run/mvm/busy");
    until_used_by(&node, &path, "busy");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(node.instance(&path)["state"], "running");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("It is in use: its guest says that it is busy."), "{why}");
    node.guest(&path, "rm /run/mvm/busy");

    // A connection from outside, also if nothing goes over it.
    node.guest(
        &path,
        "(trap '' HUP; nc -l -p 80 -e cat) >/dev/null 2>&1 &
         while ! grep -q ':0050 ' /proc/net/tcp*; do sleep 0.1; done",
    );
    let client = TcpStream::connect(address).unwrap();
    until_used_by(&node, &path, "streams");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(node.instance(&path)["state"], "running");
    drop(client);
    rested("sleeping");

    // Whoever is pinned is left alone, until it is not any more.
    node.ok(&["wake", &path]);
    node.ok(&["instance", "pin", &path]);
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(node.instance(&path)["state"], "running");
    assert!(node.ok(&["instance", "info", &path]).contains("pinned: "));
    node.ok(&["instance", "unpin", &path]);
    rested("sleeping");

    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn traffic_between_guests_keeps_both_awake() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/peer", &["--sleep-after", "3s", "--min-running", "1s"]);
    let (one, two) = (node.boot("acme/peer"), node.boot("acme/peer"));
    let address = node.instance(&two)["address"].as_str().unwrap().to_owned();
    let ping = format!("(trap '' HUP; ping -i 1 -s 500 -w 12 {address}) >/dev/null 2>&1 &");
    node.guest(&one, &ping);
    until_used_by(&node, &one, "network");
    until_used_by(&node, &two, "network");
    for path in [&one, &two] {
        until(&format!("{path} sleeps"), LIMIT, || {
            (node.instance(path)["state"] == "sleeping").then_some(())
        });
    }
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_machine_that_is_short_of_memory_puts_what_is_idle_to_sleep_early() {
    let Some(mut node) = Node::new() else { return };
    // More than any machine has.
    node.set_variable("MVM_KEEP_FREE", "64T");
    node.small_pool("acme/idle", &["--sleep-after", "1h", "--min-running", "1s"]);
    node.small_pool("acme/vital", &["--sleep-after", "1h", "--min-running", "1s", "--critical"]);
    node.small_pool("acme/plain", &[]);
    let vital = node.boot("acme/vital");
    let plain = node.boot("acme/plain");
    let idle = [node.boot("acme/idle"), node.boot("acme/idle")];
    for path in &idle {
        let view = until(&format!("{path} sleeps"), LIMIT, || {
            Some(node.instance(path)).filter(|view| view["state"] == "sleeping")
        });
        assert_eq!(view["rested"]["why"], "memory", "{view}");
    }
    assert!(node.ok(&["why", &idle[0]]).contains("memory ran short ("));
    for path in [&vital, &plain] {
        assert_eq!(node.instance(path)["state"], "running", "{path}");
    }
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn what_a_guest_has_changed_is_compressed_where_its_pool_says_so() {
    use std::os::unix::fs::MetadataExt as _;
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--compress"]);
    let path = node.boot("acme/web");
    // Compressible, as most of what programs keep.
    let fill = "yes 'a line of text' | head -c 20000000 > /run/text; md5sum < /run/text";
    let size = |name: &str| {
        let id = path.rsplit('/').next().unwrap();
        let file = node.dir().join("instances").join(id).join(name);
        std::fs::metadata(file).unwrap().size()
    };
    node.ok(&["sleep", &path]);
    let sum = node.guest(&path, fill);
    node.ok(&["sleep", &path]);
    let packed = size("sleep-2/memory.changes");
    assert_eq!(node.guest(&path, "md5sum < /run/text"), sum);
    let text = node.ok(&["pool", "policy", "acme/web", "--compress=no"]);
    assert_eq!(text, "none: never put to rest\n");
    node.ok(&["sleep", &path]);
    assert!(packed * 3 < 20_000_000, "{packed} bytes compressed");
    // As it is it goes into the image, together with what was compressed before.
    assert!(size("sleep-3/memory.image") > 0);
    assert_eq!(node.guest(&path, "md5sum < /run/text"), sum);
    assert_eq!(node.instance(&path)["boots"], 1);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_policy_is_shown_changed_and_checked() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let policy = |args: &[&str]| node.ok(&[&["pool", "policy", "acme/web"], args].concat());
    assert_eq!(policy(&[]), "none: never put to rest\n");
    let text = policy(&["--warm-after", "5m", "--sleep-after", "30m"]);
    assert_eq!(text, "warm after 5m, asleep after 30m without use, runs at least 30s\n");
    let text = policy(&["--warm-after", "never", "--min-running", "2m"]);
    assert_eq!(text, "asleep after 30m without use, runs at least 2m\n");
    assert_eq!(policy(&["--critical"]), "critical: never put to rest\n");
    policy(&["--critical=no"]);
    let info = node.ok(&["pool", "info", "acme/web"]);
    assert!(info.contains("asleep after 30m without use"), "{info}");
    let refused = node.mvm(&["pool", "policy", "acme/web", "--warm-after", "1h"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    let words = "--sleep-after is 1800, but must be more than --warm-after, which is 3600";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    let refused = node.mvm(&["pool", "policy", "acme/wbe", "--critical"]);
    assert!(refused.stderr.contains("acme/web"), "it knows what was meant: {}", refused.stderr);
}
