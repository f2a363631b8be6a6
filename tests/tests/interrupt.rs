//! Ctrl-C in the middle of any verb: exit code 130, and what was asked for goes on.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use mvm_tests::run::tool;
use mvm_tests::{LIMIT, Node, Output, Running, until};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long an interrupted command may take to end.
const PROMPT: Duration = Duration::from_secs(10);

/// Starts a command as a shell does, and interrupts it and all that it started in the foreground
/// once `is_time` says so.
#[track_caller]
fn interrupt(node: &Node, args: &[&str], mut is_time: impl FnMut(&Running) -> bool) -> Output {
    let mut command = node.command(args);
    command.process_group(0);
    let mut running = Running::start(command, None);
    until(&format!("{args:?} is under way"), LIMIT, || is_time(&running).then_some(()));
    assert!(!running.has_ended(), "too late: {}", running.wait(PROMPT));
    let group = Pid::from_raw(running.pid() as i32).unwrap();
    kill_process_group(group, Signal::INT).unwrap();
    running.wait(PROMPT).fails_with(130)
}

fn says(text: &str) -> impl FnMut(&Running) -> bool {
    move |command| command.stderr_so_far().contains(text)
}

#[test]
fn up_and_down_go_on_without_their_commands() {
    let Some(node) = Node::new() else { return };
    let output = interrupt(&node, &["up", "examples/hello.toml"], |_| !node.vmm_pids().is_empty());
    output.says(&["started the agent", "interrupted", "goes on in the background", "mvm ps"]);
    assert!(node.agent_pid().is_some(), "the agent is no part of the command");
    node.ok(&["up", "examples/hello.toml"]);
    assert_eq!((node.instances().len(), node.vmm_pids().len()), (2, 2));

    // It takes guests a while to give up on these programs.
    for instance in node.instances() {
        node.start_deaf_program(instance["path"].as_str().unwrap());
    }
    interrupt(&node, &["down", "examples/hello.toml"], says("destroying"));
    node.ok(&["down", "examples/hello.toml"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn start_and_stop_go_on_without_their_commands() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.ok(&["instance", "create", "acme/web"]).trim().to_owned();
    let start = ["instance", "start", &path, "--wait"];
    interrupt(&node, &start, |_| !node.vmm_pids().is_empty());
    assert_eq!(node.until_state(&path, "running")["boots"], 1);

    // It takes the guest half of its grace to give up on this program.
    node.start_deaf_program(&path);
    interrupt(&node, &["stop", &path, "--grace", "8"], says("stopping"));
    assert_eq!(node.until_state(&path, "stopped")["last_death"]["cause"], "operator");
    assert_eq!(node.vmm_pids(), [0; 0]);
}

#[test]
fn an_image_build_goes_on_without_its_command() {
    let Some(node) = Node::new() else { return };
    let images = node.dir().join("images");
    std::fs::remove_dir_all(&images).unwrap();
    node.small_pool("acme/web", &[]);
    interrupt(&node, &["pool", "build", "acme/web"], |_| images.exists());
    node.ok(&["pool", "build", "acme/web"]);
    let built = std::fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().file_name());
    let revisions = built.filter(|name| !name.to_string_lossy().starts_with('.')).count();
    assert_eq!(revisions, 1, "{:?}", std::fs::read_dir(&images).unwrap().collect::<Vec<_>>());
}

#[test]
fn exec_and_logs_end_at_once_and_leave_nothing_in_the_guest() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    let prints =
        |text: &'static str| move |command: &Running| command.stdout_so_far().contains(text);
    interrupt(&node, &["logs", &path, "-f"], prints("mvm-guest"));

    let program = ["exec", &path, "--", "sh", "-c", "echo begun; exec sleep 54321"];
    interrupt(&node, &program, prints("begun"));
    let is_gone = || node.guest(&path, "ps | grep -v grep | grep -c 54321; true") == "0";
    until("the program is gone", LIMIT, || is_gone().then_some(()));

    // A program that ignores the first Ctrl-C is left by a second one.
    let stubborn = "trap '' INT; echo begun; while :; do sleep 54321; done";
    let mut command = node.spawn(&["exec", &path, "--", "sh", "-c", stubborn]);
    until("it runs", LIMIT, || command.stdout_so_far().contains("begun").then_some(()));
    until("it has hung up", PROMPT, || {
        command.signal(Signal::INT);
        command.has_ended().then_some(())
    });
    command.wait(PROMPT).fails_with(130);
    until("the program is gone", LIMIT, || is_gone().then_some(()));
    assert_eq!(node.instance(&path)["boots"], 1);
}

#[test]
fn a_copy_into_a_guest_that_is_cut_off_leaves_nothing_there() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), vec![7; 1 << 20]).unwrap();
    let archive = dir.path().join("archive");
    let [dir, archive] = [dir.path(), &archive].map(|path| path.to_str().unwrap());
    tool("tar", &["-C", dir, "-cf", archive, "file"]).ok();
    let archive = fs::read(archive).unwrap();
    node.guest(&path, "mkdir /root/into");
    let into = format!("{path}:/root/into/");
    let is_writing = || {
        node.guest(&path, "ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c /root/into/; true") == "1"
    };
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut command = node.command(&["cp", "-", &into]);
        let mut command = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // The rest never comes.
        let mut stdin = command.stdin.take().unwrap();
        stdin.write_all(&archive[..archive.len() / 2]).unwrap();
        until("the guest writes", LIMIT, || is_writing().then_some(()));
        kill_process(Pid::from_child(&command), signal).unwrap();
        until("the command has ended", PROMPT, || command.try_wait().unwrap());
        until("the guest's side has ended", LIMIT, || (!is_writing()).then_some(()));
        assert_eq!(node.guest(&path, "ls -A /root/into"), "", "{signal:?}");
    }
}

#[test]
fn an_agent_in_the_foreground_ends_in_order() {
    let Some(node) = Node::new() else { return };
    let mut command = node.command(&["agent", "serve"]);
    command.process_group(0);
    let mut agent = Running::start(command, None);
    until("it serves", LIMIT, || agent.stderr_so_far().contains("serving").then_some(()));
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    assert_eq!(node.agent_pid(), Some(agent.pid()), "the commands use this one");
    let group = Pid::from_raw(agent.pid() as i32).unwrap();
    kill_process_group(group, Signal::INT).unwrap();
    until("it has ended", PROMPT, || agent.has_ended().then_some(()));
    agent.wait(PROMPT).ok().says(&["microVMs keep running"]);
    assert_eq!(node.vmm_pids().len(), 1);
    assert_eq!(node.guest(&path, "echo up"), "up");
    assert_eq!(node.instance(&path)["boots"], 1);
}

#[test]
fn a_run_that_is_interrupted_before_its_program_runs_ends_and_leaves_nothing() {
    let Some(node) = Node::new() else { return };
    let run = ["run", "--rm", "--mem", "192M", "--net", "none", "builtin", "sleep", "1000"];
    let has_pool = || {
        node.agent_pid().is_some() && !node.json(&["pool", "list"]).as_array().unwrap().is_empty()
    };
    let moments: [(&str, &dyn Fn() -> bool); 4] = [
        ("at once", &|| true),
        ("once an agent is there", &|| node.agent_pid().is_some()),
        ("once it has a pool", &has_pool),
        ("once its machine boots", &|| !node.vmm_pids().is_empty()),
    ];
    for (when, is_time) in moments {
        let output = interrupt(&node, &run, |_| is_time());
        assert!(!output.stderr.contains("goes on"), "{when}: {output}");
        until(&format!("nothing is left of one that ended {when}"), LIMIT, || {
            let pools = node.json(&["pool", "list"]);
            (node.instances().is_empty() && pools.as_array().unwrap().is_empty()).then_some(())
        });
        assert_eq!(node.vmm_pids(), [0; 0], "{when}");
    }
}
