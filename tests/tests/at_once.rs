//! Commands that run at the same time, on the simulated VMM: whoever wins, what is left is
//! consistent.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;

use mvm_tests::{LIMIT, Node, until};

/// A node whose agent simulates its microVMs, with one tenant and one pool.
fn simulated() -> Option<Node> {
    let node = Node::new()?;
    node.ok(&["--vmm", "sim", "tenant", "create", "demo"]);
    node.ok(&["pool", "create", "demo/web"]);
    Some(node)
}

/// Runs commands at the same time and returns their exit codes.
fn at_once(node: &Node, commands: &[&[&str]]) -> Vec<i32> {
    let running: Vec<_> = commands.iter().map(|args| node.spawn(args)).collect();
    let outputs = running.into_iter().map(|command| command.wait(LIMIT));
    outputs
        .map(|output| {
            assert!(!output.stderr.contains("panicked"), "{output}");
            assert!(output.code == 0 || output.stderr.contains("error: "), "{output}");
            output.code
        })
        .collect()
}

/// Waits until every instance is at rest in the state that it is wished to be in.
fn until_settled(node: &Node) -> Vec<serde_json::Value> {
    until("all instances are as wished", LIMIT, || {
        let all = node.instances();
        let is_settled = |view: &serde_json::Value| {
            let state =
                if view["state"] == "created" { "stopped" } else { view["state"].as_str()? };
            (view["activity"].is_null() && view["desired"] == state).then_some(())
        };
        all.iter().all(|view| is_settled(view).is_some()).then_some(all)
    })
}

#[test]
fn of_twenty_creates_each_makes_its_own_instance() {
    let Some(node) = simulated() else { return };
    let create: &[&str] = &["instance", "create", "demo/web", "--start"];
    assert_eq!(at_once(&node, &[create; 20]), [0; 20]);
    let all = until_settled(&node);
    for field in ["path", "address", "mac", "tap"] {
        let distinct: BTreeSet<_> = all.iter().map(|view| view[field].as_str().unwrap()).collect();
        assert_eq!(distinct.len(), 20, "{field}");
    }
    assert_eq!(node.json(&["pool", "info", "demo/web"])["running"], 20);
    node.mvm(&["net", "verify"]).ok();
}

#[test]
fn a_limit_holds_however_many_ask_at_once() {
    let Some(node) = simulated() else { return };
    node.ok(&["tenant", "update", "demo", "--running", "3"]);
    let create: &[&str] = &["instance", "create", "demo/web", "--start"];
    let mut codes = at_once(&node, &[create; 8]);
    codes.sort_unstable();
    assert_eq!(codes, [0, 0, 0, 4, 4, 4, 4, 4]);
    assert_eq!(until_settled(&node).len(), 3);
}

#[test]
fn conflicting_verbs_leave_an_instance_where_the_last_wish_is() {
    let Some(node) = simulated() else { return };
    for verbs in [["start", "stop"], ["stop", "restart"], ["restart", "start"], ["restart", "stop"]]
    {
        let path = node.boot("demo/web");
        let codes = at_once(&node, &[&[verbs[0], &path], &[verbs[1], &path]]);
        for code in &codes {
            assert!([0, 5].contains(code), "{verbs:?}: {codes:?}");
        }
        assert!(codes.contains(&0), "{verbs:?}: {codes:?}");
        until_settled(&node);
        // It is not stuck, wherever it is.
        node.ok(&["start", &path]);
        assert_eq!(node.instance(&path)["state"], "running", "{verbs:?}");
        node.ok(&["stop", &path]);
        node.ok(&["rm", &path]);
    }
}

#[test]
fn whatever_meets_a_destroy_the_instance_is_gone() {
    let Some(node) = simulated() else { return };
    for verb in ["start", "stop", "restart", "exec"] {
        let path = node.boot("demo/web");
        let program: &[&str] = if verb == "exec" { &["--", "true"] } else { &[] };
        let other = [&[verb, &path], program].concat();
        let codes = at_once(&node, &[&other, &["rm", &path, "--force"]]);
        assert_eq!(codes[1], 0, "{verb}: {codes:?}");
        // Done before, refused as gone or going, or superseded. An exec may lose its guest.
        let allowed: &[i32] = if verb == "exec" { &[0, 1, 3, 5] } else { &[0, 3, 5] };
        assert!(allowed.contains(&codes[0]), "{verb}: {codes:?}");
        assert_eq!(node.instances(), [""; 0], "{verb}");
    }
    assert_eq!(node.json(&["pool", "info", "demo/web"])["instances"], 0);
}

#[test]
fn a_tenant_and_what_is_made_in_it_at_once_are_both_there_or_both_gone() {
    let Some(node) = simulated() else { return };
    let create: &[&str] = &["instance", "create", "demo/web", "--count", "3", "--start"];
    let codes = at_once(&node, &[create, &["tenant", "destroy", "demo", "--force"], create]);
    assert_eq!(codes[1], 0, "{codes:?}");
    for code in [codes[0], codes[2]] {
        // Superseded while it was waited for, or refused: the tenant goes or is gone.
        assert!([0, 3, 5].contains(&code), "{codes:?}");
    }
    assert_eq!(node.json(&["tenant", "list"]), serde_json::json!([]));
    assert_eq!(node.instances(), [""; 0]);
}

#[test]
fn first_commands_at_once_share_one_agent() {
    let Some(node) = Node::new() else { return };
    let ps: &[&str] = &["--vmm", "sim", "ps"];
    assert_eq!(at_once(&node, &[ps; 6]), [0; 6]);
    assert!(node.agent_pid().is_some());
}
