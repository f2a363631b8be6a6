//! The agent is killed with SIGKILL at every moment; microVMs go on and nothing is lost or doubled.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mvm_tests::run::tool;
use mvm_tests::{LIMIT, Node, host, until};
use serde_json::Value;

/// Runs a command and kills the agent when the command is that old, or has ended.
fn kill_agent_during(node: &Node, args: &[&str], delay: Duration) {
    let began = Instant::now();
    let mut command = node.spawn(args);
    until("it is time to kill the agent", LIMIT, || {
        (began.elapsed() >= delay || command.has_ended()).then_some(())
    });
    node.kill_agent();
    // The command may have come to its end, have lost the agent, or have started another one.
    let output = command.wait(LIMIT);
    assert!([0, 1, 7].contains(&output.code), "{output}");
    assert!(!output.stderr.contains("panicked at"), "{output}");
}

/// All instances run, with one VMM and one address each.
fn assert_sound(node: &Node, count: usize) {
    let instances = node.instances();
    assert_eq!(instances.len(), count, "{instances:#?}");
    let running = |instance: &Value| instance["state"] == "running";
    assert!(instances.iter().all(running), "{instances:#?}");
    let addresses: BTreeSet<_> = instances.iter().map(|i| i["address"].to_string()).collect();
    assert_eq!(addresses.len(), count, "{instances:#?}");
    let mut pids: Vec<_> = instances.iter().map(|i| i["pid"].as_u64().unwrap() as u32).collect();
    pids.sort_unstable();
    assert_eq!(node.vmm_pids(), pids);
    for instance in &instances {
        assert_eq!(node.guest(instance["path"].as_str().unwrap(), "echo up"), "up");
    }
    node.ok(&["net", "verify"]);
}

#[test]
fn microvms_and_their_programs_outlive_the_agent() {
    let Some(node) = Node::new() else { return };
    node.ok(&["up", "examples/hello.toml"]);
    let before = node.instances();
    let paths: Vec<&str> = before.iter().map(|i| i["path"].as_str().unwrap()).collect();
    let marks: Vec<_> = paths
        .iter()
        .map(|path| {
            let program = node.guest(path, "setsid sleep 100000 >/dev/null 2>&1 & echo $!");
            (program, node.guest(path, "cat /proc/sys/kernel/random/boot_id"))
        })
        .collect();
    let (agent, vmms) = (node.agent_pid(), node.vmm_pids());
    for _ in 0..3 {
        node.kill_agent();
        assert_eq!(node.vmm_pids(), vmms, "they do not need the agent");
        assert_sound(&node, 2);
        assert_eq!(node.vmm_pids(), vmms, "they are adopted");
    }
    assert_ne!(node.agent_pid(), agent);
    for (instance, (program, boot)) in before.iter().zip(&marks) {
        let path = instance["path"].as_str().unwrap();
        let now = node.instance(path);
        assert_eq!(now["running_since_unix_ms"], instance["running_since_unix_ms"]);
        assert_eq!(now["boots"], 1);
        node.guest(path, &format!("kill -0 {program}"));
        assert_eq!(node.guest(path, "cat /proc/sys/kernel/random/boot_id"), *boot);
    }
    a_copy_takes_nothing_of_it(&node, &vmms, paths[0]);
    node.kill_agent();
    node.ok(&["down", "examples/hello.toml"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

/// A copy of a state directory whose microVMs run is refused, and then has microVMs of its own.
fn a_copy_takes_nothing_of_it(node: &Node, vmms: &[u32], path: &str) {
    let dir = tempfile::Builder::new().prefix("mvm-copy-").tempdir().unwrap();
    let copy = Node::at(dir.path()).unwrap();
    node.kill_agent();
    for entry in std::fs::read_dir(node.dir()).unwrap() {
        let from = entry.unwrap().path();
        // The rest, which is immutable, it has already.
        if !copy.dir().join(from.file_name().unwrap()).exists() {
            let [from, to] = [from.as_path(), copy.dir()].map(|path| path.to_str().unwrap());
            tool("cp", &["-a", "--sparse=always", from, to]).ok();
        }
    }
    for verb in ["stop", "start"] {
        copy.mvm(&[verb, path]).fails_with(5).says(&["is a copy of", "node claim"]);
    }
    copy.ok(&["node", "claim"]);
    assert_sound(node, 2);
    let rests = |it: &Value| it["state"] != "running" && it["activity"].is_null();
    let nothing_runs = || copy.instances().iter().all(rests).then_some(());
    until("nothing of the copy runs", LIMIT, nothing_runs);
    copy.ok(&["start", path]);
    let (ours, theirs) = (copy.instance(path), node.instance(path));
    assert_ne!(ours["address"], theirs["address"]);
    assert_eq!(copy.guest(path, "echo up"), "up");
    copy.ok(&["net", "verify"]);
    assert_eq!(node.vmm_pids(), vmms);
    assert_sound(node, 2);
    copy.ok(&["down", "examples/hello.toml"]);
    assert_eq!(copy.leftovers(), [""; 0]);
}

#[test]
fn an_agent_killed_during_up_or_down_loses_and_doubles_nothing() {
    let Some(node) = Node::new() else { return };
    let delays = [(20, 10), (150, 60), (600, 150), (2000, 400), (4500, 1000)];
    for (up, down) in
        delays.map(|(up, down)| (Duration::from_millis(up), Duration::from_millis(down)))
    {
        kill_agent_during(&node, &["up", "examples/hello.toml"], up);
        node.ok(&["up", "examples/hello.toml"]);
        assert_sound(&node, 2);
        kill_agent_during(&node, &["down", "examples/hello.toml"], down);
        node.ok(&["down", "examples/hello.toml"]);
        assert_eq!(node.leftovers(), [""; 0], "killed after {up:?} and {down:?}");
    }
}

#[test]
fn an_agent_killed_during_stop_or_start_loses_and_doubles_nothing() {
    let Some(node) = Node::new() else { return };
    node.ok(&["up", "examples/hello.toml"]);
    let paths: Vec<_> = node.instances().iter().map(|i| i["path"].clone()).collect();
    for (stop, start) in [(15, 30), (120, 400), (700, 3000)] {
        let (stop, start) = (Duration::from_millis(stop), Duration::from_millis(start));
        kill_agent_during(&node, &["stop", "demo", "--all"], stop);
        node.ok(&["stop", "demo", "--all"]);
        assert_eq!(node.vmm_pids(), [0; 0]);
        let instances = node.instances();
        assert!(instances.iter().all(|i| i["state"] == "stopped"), "{instances:#?}");
        kill_agent_during(&node, &["start", "demo", "--all"], start);
        node.ok(&["start", "demo", "--all"]);
        assert_sound(&node, 2);
        let now: Vec<_> = node.instances().iter().map(|i| i["path"].clone()).collect();
        assert_eq!(now, paths);
    }
}

#[test]
fn a_stop_goes_on_under_the_next_agent() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    // The guest waits half of its grace for a program that ignores the request to end.
    node.start_deaf_program(&path);
    node.ok(&["stop", &path, "--grace", "10", "--no-wait"]);
    until("the stop is under way", LIMIT, || {
        (node.instance(&path)["activity"] == "stopping").then_some(())
    });
    node.kill_agent();
    assert_eq!(node.vmm_pids().len(), 1, "the guest is still on its way down");
    let stopped = node.until_state(&path, "stopped");
    assert_eq!(stopped["last_death"]["cause"], "operator", "{stopped}");
    assert_eq!(node.vmm_pids(), [0; 0]);
}

#[test]
fn what_happened_while_no_agent_ran_is_known() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--restart", "never"]);
    let (off, panicked) = (node.boot("acme/web"), node.boot("acme/web"));
    let later = |path: &str, what: &str| {
        node.guest(path, &format!("setsid sh -c 'sleep 4; {what}' >/dev/null 2>&1 &"));
    };
    later(&off, "poweroff -f");
    later(&panicked, "echo c > /proc/sysrq-trigger");
    node.kill_agent();
    assert_eq!(node.vmm_pids().len(), 2, "they end after the agent");
    until("both VMMs are gone", LIMIT, || node.vmm_pids().is_empty().then_some(()));
    let off = node.until_state(&off, "stopped");
    assert_eq!(off["last_death"]["cause"], "guest_shutdown", "{off}");
    let path = panicked;
    let panicked = node.until_state(&path, "failed");
    assert_eq!(panicked["last_death"]["cause"], "guest_panic", "{panicked}");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("guest kernel panic") && why.contains("sysrq"), "{why}");
}

#[test]
fn commands_that_start_an_agent_at_once_share_it() {
    let Some(node) = Node::new() else { return };
    for _ in 0..5 {
        let commands: Vec<_> = (0..4).map(|_| node.spawn(&["ps"])).collect();
        for command in commands {
            command.wait(LIMIT).ok();
        }
        until("the agents that came second are gone", LIMIT, || {
            let processes = host::processes(node.dir());
            let agents = processes.iter().filter(|p| p.command.contains("agent serve")).count();
            (agents == 1).then_some(())
        });
        assert!(node.agent_pid().is_some());
        node.kill_agent();
    }
}
