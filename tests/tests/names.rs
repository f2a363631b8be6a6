//! Names that the agent knows: offered behind TAB, and told to whoever mistyped one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::{LIMIT, Node, Running};

/// What bash is offered in place of the last of these words.
fn offered(node: &Node, words: &[&str]) -> Vec<String> {
    let mut command = node.command(&[&["--"], words].concat());
    command
        .env("MVM_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string())
        .env("_CLAP_COMPLETE_COMP_TYPE", "9")
        .env("_CLAP_COMPLETE_SPACE", "false")
        .env("_CLAP_IFS", "\n");
    let output = Running::start(command, None).wait(LIMIT).ok();
    assert_eq!(output.stderr, "", "a shell shows it in the middle of the line");
    output.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn live_names_are_offered_and_meant_ones_are_told_and_no_agent_is_started_for_it() {
    let Some(node) = Node::new() else { return };
    assert_eq!(offered(&node, &["mvm", "stop", "de"]), [""; 0]);
    assert_eq!(node.agent_pids(), [0; 0]);

    node.ok(&["--vmm", "sim", "tenant", "create", "demo"]);
    node.ok(&["disk", "create", "demo/data", "--size", "16M"]);
    node.ok(&["pool", "create", "demo/web"]);
    let path = node.ok(&["instance", "create", "demo/web"]).trim().to_owned();
    let id = path.rsplit_once('/').unwrap().1;
    assert_eq!(offered(&node, &["mvm", "stop", "i-"]), [id]);
    assert_eq!(offered(&node, &["mvm", "instance", "info", "demo/w"]), [&path, "demo/web"]);
    assert_eq!(offered(&node, &["mvm", "pool", "scale", "d"]), ["demo/web"]);
    assert_eq!(offered(&node, &["mvm", "tenant", "info", "d"]), ["demo"]);
    assert_eq!(offered(&node, &["mvm", "disk", "rm", "demo/"]), ["demo/data"]);
    let attach = ["mvm", "instance", "create", "demo/web", "--disk-attach", "d"];
    assert_eq!(offered(&node, &attach), ["data:/"]);
    assert_eq!(offered(&node, &["mvm", "tenant", "update", "demo", "--lift", "v"]), ["vcpus"]);

    for (arguments, meant) in [
        (&["tenant", "info", "dmeo"][..], "did you mean demo?"),
        (&["pool", "scale", "demo/wbe", "--running", "1"], "did you mean demo/web?"),
        (&["disk", "info", "demo/dta"], "did you mean demo/data?"),
        (&["disk", "rm", "demo/dat"], "did you mean demo/data?"),
        (&["start", "demo/webb"], "did you mean demo/web?"),
        (&["logs", &path.replace("demo", "dem")], &format!("did you mean {path}?")),
    ] {
        node.mvm(arguments).fails_with(3).says(&[meant]);
    }
    let far = node.mvm(&["pool", "info", "other/thing"]).fails_with(3);
    far.says(&["see `mvm pool list`"]);
}
