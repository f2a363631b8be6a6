//! An instance from the first command to the last, and nothing left of it.

use mvm_tests::{Node, host};
use serde_json::Value;

/// What must not change over an instance's life.
fn identity(instance: &Value) -> [Value; 3] {
    ["path", "address", "mac"].map(|field| instance[field].clone())
}

#[test]
fn an_instance_lives_and_leaves_nothing() {
    let Some(node) = Node::new() else { return };
    let before = host::foreign_network();

    node.ok(&["tenant", "create", "acme", "--vcpus", "2", "--mem", "1G"]);
    node.ok(&["pool", "create", "acme/web", "--mem", "192M"]);
    let built = node.json(&["pool", "build", "acme/web"])["pools"][0].clone();
    let again = node.json(&["pool", "build", "acme/web"])["pools"][0].clone();
    assert_eq!(again["build"]["already_there"], true, "{again}");
    assert_eq!(again["revision"], built["revision"]);

    let created = node.ok(&["instance", "create", "acme/web"]);
    let path = created.trim();
    assert_eq!(node.instance(path)["state"], "created");
    assert_eq!(node.qemu_pids(), [0; 0]);
    node.ok(&["instance", "start", path]);
    let running = node.instance(path);
    assert_eq!(running["state"], "running");
    assert_eq!(node.qemu_pids(), [running["pid"].as_u64().unwrap() as u32]);

    assert_eq!(node.guest(path, "uname -s"), "Linux");
    assert_eq!(node.guest(path, "cat /sys/class/net/eth0/address"), running["mac"]);
    let address = running["address"].as_str().unwrap();
    let seen = node.guest(path, "ip -4 addr show dev eth0");
    assert!(seen.contains(&format!("inet {address}/24")), "{seen}");
    node.guest(path, "echo kept > /root/file");

    let console = node.ok(&["logs", path]);
    assert!(console.contains("mvm-guest"), "{console}");
    let kernel = node.ok(&["logs", path, "--source", "kernel"]);
    assert!(kernel.contains("Linux version"), "{kernel}");
    node.ok(&["logs", path, "--source", "vmm"]);
    assert_eq!(node.ok(&["logs", path, "--tail", "2"]).lines().count(), 2);

    let stats = node.json(&["stats", path])[0].clone();
    assert!(stats["cpu_ms"].as_u64() > Some(0), "{stats}");
    assert!(stats["host_rss_kib"].as_u64() > Some(10_000), "{stats}");
    assert!(stats["guest"]["mem_total_kib"].as_u64() > Some(100_000), "{stats}");

    node.ok(&["instance", "stop", path]);
    let stopped = node.instance(path);
    assert_eq!((&stopped["state"], &stopped["pid"]), (&"stopped".into(), &Value::Null));
    assert_eq!(node.qemu_pids(), [0; 0]);
    assert_eq!(stopped["last_death"]["cause"], "operator");
    assert!(node.ok(&["logs", path]).contains("mvm-guest"), "a console outlives its run");

    node.ok(&["instance", "start", path]);
    let started = node.instance(path);
    assert_eq!(identity(&started), identity(&running));
    assert_eq!(node.guest(path, "cat /root/file"), "kept");
    node.ok(&["instance", "restart", path]);
    let restarted = node.instance(path);
    assert_eq!(identity(&restarted), identity(&running));
    assert_eq!((&started["boots"], &restarted["boots"]), (&2.into(), &3.into()));
    assert_ne!(started["pid"], restarted["pid"]);
    assert_eq!(node.guest(path, "cat /root/file"), "kept");
    node.ok(&["net", "verify"]);

    let refused = node.mvm(&["instance", "destroy", path]).fails_with(5);
    refused.says(&["--force"]);
    node.ok(&["instance", "destroy", path, "--force"]);
    assert_eq!(node.instances(), [Value::Null; 0]);
    assert!(host::instance_dirs(node.dir()).is_empty());
    node.ok(&["pool", "destroy", "acme/web"]);
    node.ok(&["tenant", "destroy", "acme"]);
    assert_eq!(node.leftovers(), [""; 0]);
    assert_eq!(host::foreign_network(), before);
}

/// What `up` made, without what time changes.
fn made(node: &Node) -> Vec<[Value; 5]> {
    let fields = ["path", "address", "pid", "boots", "running_since_unix_ms"];
    let instances = node.instances();
    instances.iter().map(|instance| fields.map(|field| instance[field].clone())).collect()
}

#[test]
fn documents_are_applied_once_and_removed_whole() {
    let Some(node) = Node::new() else { return };
    let before = host::foreign_network();
    let first = node.json(&["up", "examples/hello.toml", "--yes"]);
    assert_eq!(first["instances"].as_array().unwrap().len(), 2, "{first}");
    let instances = made(&node);
    let second = node.json(&["up", "examples/hello.toml"]);
    assert_eq!((&second["revision"], made(&node)), (&first["revision"], instances.clone()));
    let twin = node.json(&["up", "examples/hello.yaml"]);
    assert_eq!((&twin["revision"], made(&node)), (&first["revision"], instances));
    node.ok(&["down", "examples/hello.yaml"]);
    assert_eq!(node.leftovers(), [""; 0]);
    node.ok(&["down", "examples/hello.toml"]);
    assert_eq!(host::foreign_network(), before);
}
