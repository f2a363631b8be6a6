//! A microVM's main process on a person's terminal: `mvm run -it`, leaving it and coming back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::Duration;

use mvm_tests::{Node, Terminal, until};

/// How long what happens at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);
/// Leaves a program alone.
const DETACH: &str = "\x10\x11";
/// Says its size at once and at each change, counts interrupts, and ends with what it is told.
/// BusyBox's `read` sleeps through a signal that arrives just before it waits, and looks again after
/// a second here.
const PROGRAM: &str = "trap 'echo \"<$(stty size)>\"' WINCH; trap 'echo interrupted' INT; \
                       echo \"<$(stty size)> <$TERM>\"; \
                       while :; do if read -r -t 1 line; then echo \"got <$line>\"; \
                       case $line in exit*) exit ${line#exit };; esac; fi; done";

fn run(node: &Node, options: &[&str], script: &str) -> Terminal {
    let args = [&["run", "-it", "--net", "none", "--mem", "192M", "--name", "term"], options];
    let command = ["builtin", "--", "sh", "-c", script];
    Terminal::start(node.command(&[&args.concat()[..], &command].concat()))
}

fn attach(node: &Node) -> Terminal {
    Terminal::start(node.command(&["attach", "-it", "default/term"]))
}

#[test]
fn a_main_process_has_the_terminal_is_left_alone_and_found_again() {
    let Some(node) = Node::new() else { return };
    let mut terminal = run(&node, &["--rm"], PROGRAM);
    leaving_needs_no_guest(&node, &mut terminal);
    assert_eq!(terminal.wait(), Some(0));
    let path = node.instances()[0]["path"].as_str().unwrap().to_owned();

    let mut terminal = attach(&node);
    // The boot is waited for now. What the program wrote at its start may be seen or not.
    terminal.until_raw();
    until("the first size is in the log", SOON, || {
        node.ok(&["logs", &path]).contains("<33 101> <vt220>").then_some(())
    });
    terminal.resize(44, 80);
    terminal.until_seen("<44 80>");
    terminal.key("\x03");
    terminal.until_seen("interrupted");
    terminal.key("first\r");
    terminal.until_seen("got <first>");
    terminal.key(DETACH);
    terminal.until_seen("goes on");
    assert_eq!(terminal.wait(), Some(0));
    assert_eq!(node.instance(&path)["state"], "running");

    let mut terminal = attach(&node);
    terminal.until_raw();
    // Its size is another now.
    terminal.until_seen("<33 101>");
    terminal.key("second\r");
    terminal.until_seen("got <second>");
    terminal.key("exit 7\r");
    terminal.until_seen("got <exit 7>");
    assert_eq!(terminal.wait(), Some(7));
    until("it is removed, as was asked", SOON, || node.instances().is_empty().then_some(()));
}

/// The keys are typed when the machine has been asked for and has not booted.
fn leaving_needs_no_guest(node: &Node, terminal: &mut Terminal) {
    terminal.until_raw();
    terminal.key(DETACH);
    terminal.until_seen("come back with `mvm attach -it i-");
    let state = node.instances()[0]["state"].clone();
    assert_ne!(state, "running", "the boot was waited for");
}

#[test]
fn a_terminal_without_a_program_has_a_shell() {
    let Some(node) = Node::new() else { return };
    let run = ["run", "-it", "--rm", "--net", "none", "--mem", "192M", "builtin"];
    let mut terminal = Terminal::start(node.command(&run));
    terminal.until_raw();
    terminal.key("echo $((6 * 7))-$0\r");
    terminal.until_seen("42-");
    terminal.key("exit 3\r");
    assert_eq!(terminal.wait(), Some(3));
    until("it is removed", SOON, || node.instances().is_empty().then_some(()));
}
