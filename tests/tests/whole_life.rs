//! An instance from the first command to the last, and nothing left of it.

#![allow(clippy::print_stdout, reason = "it shows what a newcomer sees")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::{Node, binary, host};
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
    assert_eq!(node.vmm_pids(), [0; 0]);
    node.ok(&["instance", "start", path]);
    let running = node.instance(path);
    assert_eq!(running["state"], "running");
    assert_eq!(node.vmm_pids(), [running["pid"].as_u64().unwrap() as u32]);

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
    assert_eq!(node.vmm_pids(), [0; 0]);
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
    refused.says(&["mvm rm -f"]);
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
    let desired = || node.json(&["node", "record", "show", "desired/"]);
    let (instances, records) = (made(&node), desired());
    for document in ["examples/hello.toml", "examples/hello.yaml"] {
        node.ok(&["up", document]);
        assert_eq!((made(&node), desired()), (instances.clone(), records.clone()), "{document}");
    }
    node.ok(&["down", "examples/hello.yaml"]);
    assert_eq!(node.leftovers(), [""; 0]);
    node.ok(&["down", "examples/hello.toml"]);
    assert_eq!(host::foreign_network(), before);
}

/// The commands of a Markdown file's `console` blocks, without their remarks.
fn console_commands(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(binary::repository().join(file)).unwrap();
    let blocks = text.split("```console\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).filter_map(|line| line.strip_prefix("# "));
    lines.map(|line| line.split("  #").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn the_readmes_commands_work_as_they_stand() {
    let Some(node) = Node::new() else { return };
    let commands = console_commands("README.md");
    assert!(commands.len() >= 10, "{commands:?}");
    for command in commands {
        // It runs this test.
        if command == "cargo xtask test" {
            continue;
        }
        let command = command.replace("cargo run --release -- ", "mvm ");
        let arguments = command.strip_prefix("mvm ");
        let arguments = arguments.unwrap_or_else(|| panic!("not of mvm: `{command}`"));
        // Only a placeholder for an instance needs to be filled in.
        let id = command.contains("i-").then(|| {
            let path = node.instances()[0]["path"].as_str().unwrap().to_owned();
            path.rsplit_once('/').unwrap().1.to_owned()
        });
        let id = id.unwrap_or_default();
        let arguments = arguments.replace("i-…", &id).replace("i-3f", &id);
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let output = node.mvm(&arguments).ok();
        println!("# {command}\n{}", output.stdout);
        assert!(!output.stdout.trim().is_empty(), "it shows nothing: {output}");
    }
    // `mvm down` is the last one; the tenant of `mvm run` stays, with nothing in it.
    node.ok(&["tenant", "destroy", "default"]);
    assert_eq!(node.leftovers(), [""; 0]);
}
