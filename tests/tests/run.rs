//! Main processes in real microVMs: `mvm run`, `mvm attach`, and the logs that they leave.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::Duration;

use mvm_tests::{Node, until};
use rustix::process::Signal;

/// Far more than anything takes.
const LIMIT: Duration = Duration::from_secs(120);

/// `mvm run` of the built-in image in a small microVM.
fn run<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--mem", "192M"], options, &["builtin", "--"], command].concat()
}

fn only_path(node: &Node) -> String {
    let instances = node.instances();
    assert_eq!(instances.len(), 1, "{instances:#?}");
    instances[0]["path"].as_str().unwrap().to_owned()
}

#[test]
fn a_run_passes_output_input_and_exit_code_on_and_leaves_nothing_behind() {
    let Some(node) = Node::new() else { return };
    let script = "pwd; id -un; echo $A; cat; echo err >&2; exit 7";
    let options = ["--rm", "-i", "-e", "A=b c", "-u", "nobody", "-w", "/srv/made"];
    let args = run(&options, &["sh", "-c", script]);
    let input = b"one\ntwo\xff\n";
    let output = node.mvm_with_input(&args, input).fails_with(7);
    assert_eq!(output.stdout, "/srv/made\nnobody\nb c\none\ntwo\u{fffd}\n");
    assert!(output.stderr.contains("err\n"), "{output}");
    assert!(node.instances().is_empty());
    assert_eq!(node.json(&["pool", "list"]).as_array().unwrap().len(), 0);
    node.ok(&["tenant", "destroy", "default"]);
    assert!(node.leftovers().is_empty(), "{:?}", node.leftovers());
}

#[test]
fn what_cannot_be_started_is_said_and_not_tried_in_silence() {
    let Some(node) = Node::new() else { return };
    node.mvm(&run(&["--rm"], &["/app", "-x"]))
        .fails_with(127)
        .says(&["start failed: `/app` does not exist"]);
    until("it is removed", LIMIT, || node.instances().is_empty().then_some(()));
    node.mvm(&run(&["-u", "ghost"], &["true"]))
        .fails_with(127)
        .says(&["start failed: user `ghost` is not in /etc/passwd", "mvm why"]);
    let path = only_path(&node);
    let view = node.until_state(&path, "failed");
    assert!(view["last_death"]["error"].as_str().unwrap().contains("user `ghost`"), "{view:#}");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("user `ghost` is not in /etc/passwd"), "{why}");
    node.mvm(&["attach", &path]).fails_with(5).says(&["failed, not running"]);
    let denied = node.mvm(&run(&["-d"], &["/etc/passwd"])).fails_with(126);
    denied.says(&["`/etc/passwd` cannot be executed"]);
    node.mvm(&["run", "No Image"]).fails_with(2).says(&["No Image"]);
}

#[test]
fn a_stop_sends_the_stop_signal_and_the_logs_stay() {
    let Some(node) = Node::new() else { return };
    let script =
        "trap 'echo bye; exit 9' INT; echo ready; echo oops >&2; while :; do sleep 0.1; done";
    let args = run(&["-d", "--name", "web", "--stop-signal", "SIGINT"], &["sh", "-c", script]);
    let path = node.ok(&args).trim().to_owned();
    assert!(path.starts_with("default/web/i-"), "{path}");
    until("it is ready", LIMIT, || node.ok(&["logs", &path]).contains("ready").then_some(()));
    node.ok(&["stop", &path]);
    let view = node.instance(&path);
    assert_eq!((&view["state"], &view["exit_code"]), (&"stopped".into(), &9.into()), "{view:#}");
    assert_eq!(view["last_death"]["cause"], "operator");
    let logs = node.mvm(&["logs", &path]).ok();
    assert_eq!((logs.stdout.as_str(), logs.stderr.as_str()), ("ready\nbye\n", "oops\n"));

    // A second boot goes on in the same log.
    node.ok(&["start", &path]);
    until("it is ready again", LIMIT, || {
        let logs = node.ok(&["logs", &path, "--source", "stdout"]);
        (logs == "ready\nbye\nready\n").then_some(())
    });
    let mut attached = node.spawn(&["attach", &path]);
    until("it is attached", LIMIT, || {
        attached.signal(Signal::TERM);
        attached.has_ended().then_some(())
    });
    node.mvm(&["stop", &path, "--force"]).ok();
    assert_eq!(node.ok(&["logs", &path, "-n", "1", "--source", "stderr"]), "");
    let all = node.mvm(&["logs", &path, "--source", "all", "--timestamps"]).ok();
    let boots = all.stdout.matches("Z mvm: a boot started").count();
    assert_eq!(boots, 2, "{all}");
    assert_eq!(node.ok(&["logs", &path, "--since", "2200-01-01T00:00:00Z"]), "");
    node.mvm(&["logs", &path, "--source", "console", "-t"]).fails_with(2).says(&["no times"]);
}

#[test]
fn the_exit_code_decides_whether_it_is_started_again() {
    let Some(node) = Node::new() else { return };
    let script = "test -e /seen && exit 0; touch /seen; exit 3";
    let args = run(&["--restart", "on-failure"], &["sh", "-c", script]);
    // It stays until nothing is started again.
    node.mvm(&args).ok().says(&["exited with code 3; its restart policy `on-failure`"]);
    let path = only_path(&node);
    let view = until("it has succeeded", LIMIT, || {
        Some(node.instance(&path))
            .filter(|view| view["exit_code"] == 0 && view["state"] == "stopped")
            .filter(|view| view["activity"].is_null())
    });
    assert_eq!(view["boots"], 2);
    assert_eq!(
        (&view["last_death"]["cause"], &view["last_death"]["code"]),
        (&"exited".into(), &0.into())
    );
    let why = node.ok(&["why", &path]);
    assert!(why.contains("exited with code 0") && why.contains("on-failure"), "{why}");
}

#[test]
fn a_killed_agent_loses_neither_output_nor_exit_code() {
    let Some(node) = Node::new() else { return };
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.02; done; exit 5";
    let path = node.ok(&run(&["-d"], &["sh", "-c", script])).trim().to_owned();
    for mark in ["line 20\n", "line 120\n"] {
        until(mark, LIMIT, || node.ok(&["logs", &path]).contains(mark).then_some(()));
        node.kill_agent();
    }
    let view = until("it has ended", LIMIT, || {
        Some(node.instance(&path)).filter(|view| view["state"] == "failed")
    });
    assert_eq!((&view["exit_code"], &view["boots"]), (&5.into(), &1.into()), "{view:#}");
    assert_eq!(view["last_death"]["cause"], "exited");
    let expected: String = (0..400).map(|i| format!("line {i}\n")).collect();
    assert_eq!(node.ok(&["logs", &path]), expected);
}

#[test]
fn an_attached_run_outlives_its_agent_and_a_stop_right_after_the_next_ones_start_is_in_order() {
    let Some(node) = Node::new() else { return };
    let script = "trap 'sleep 1; echo bye; exit 4' TERM; echo ready; while :; do sleep 0.1; done";
    let mut attached = node.spawn(&run(&["--rm", "--name", "y"], &["sh", "-c", script]));
    until("it runs", LIMIT, || attached.stdout_so_far().contains("ready").then_some(()));
    let mut follower = node.spawn(&["logs", "-f", "default/y"]);
    until("it is followed", LIMIT, || follower.stdout_so_far().contains("ready").then_some(()));
    let mut program = node.spawn(&["exec", "default/y", "--", "sh", "-c", "echo on; sleep 9999"]);
    until("it runs, too", LIMIT, || program.stdout_so_far().contains("on").then_some(()));
    let vmm = node.vmm_pids();

    node.ok(&["agent", "stop"]);
    until("the program is lost", LIMIT, || program.has_ended().then_some(()));
    program.wait(LIMIT).fails_with(7).says(&["the agent ended", "which ends too"]);
    assert!(!attached.has_ended() && !follower.has_ended());
    assert_eq!(node.vmm_pids(), vmm, "the microVM goes on");

    // This starts an agent.
    node.ok(&["stop", "default/y"]);
    let output = attached.wait(LIMIT).fails_with(4);
    assert_eq!(output.stdout, "ready\nbye\n", "{output}");
    assert!(follower.wait(LIMIT).stdout.ends_with("bye\n"));
    assert!(node.instances().is_empty());
    assert_eq!(node.json(&["pool", "list"]).as_array().unwrap().len(), 0);
}

#[test]
fn a_flood_reaches_the_caller_whole_and_the_log_in_part() {
    let Some(node) = Node::new() else { return };
    let bytes = 12_000_000;
    let script = format!("yes 0123456789abcde | head -c {bytes}");
    let output = node.mvm(&run(&[], &["sh", "-c", &script])).ok();
    assert_eq!(output.stdout.len(), bytes);
    let path = only_path(&node);
    node.until_state(&path, "stopped");
    let log = node.ok(&["logs", &path]);
    assert!((4_000_000..9_000_000).contains(&log.len()), "{}", log.len());
    assert!(output.stdout.ends_with(&log));
    let id = path.rsplit('/').next().unwrap();
    let size = std::fs::metadata(node.dir().join("instances").join(id).join("main.log")).unwrap();
    assert!(size.len() < 6_000_000);
}
