//! Programs in a guest behave as if they ran here: output, input, exit codes, signals and ends.
//!
//! All of it runs on one microVM, one section after the other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use mvm_tests::{LIMIT, Node, Running, until};
use rustix::process::Signal;

/// How long what happens at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// A node and the one instance that the sections share.
struct Guest {
    node: Node,
    path: String,
}

impl Guest {
    fn boot() -> Option<Self> {
        let node = Node::new()?;
        node.small_pool("acme/web", &[]);
        let path = node.boot("acme/web");
        Some(Self { node, path })
    }

    fn args<'a>(&'a self, options: &[&'a str], program: &[&'a str]) -> Vec<&'a str> {
        [&["exec", &self.path], options, &["--"], program].concat()
    }

    /// Starts a shell script and waits until it says that it is ready.
    fn script(&self, script: &str) -> Running {
        let running = self.node.spawn(&self.args(&[], &["sh", "-c", script]));
        until("the script is ready", SOON, || {
            running.stdout_so_far().contains("ready").then_some(())
        });
        running
    }

    /// Waits until no process in the guest has these words in its arguments.
    fn until_gone(&self, words: &str) {
        until(&format!("`{words}` is gone from the guest"), SOON, || {
            let processes = self.node.ok(&self.args(&[], &["ps", "-o", "args"]));
            (!processes.contains(words)).then_some(())
        });
    }
}

#[test]
fn a_program_in_a_guest_is_as_if_it_ran_here() {
    let Some(guest) = Guest::boot() else { return };
    streams_and_codes(&guest);
    what_does_not_exist(&guest);
    surroundings(&guest);
    binary_input_and_output(&guest);
    order_is_kept(&guest);
    fifty_at_once(&guest);
    signals(&guest);
    a_second_interrupt(&guest);
    a_client_that_is_killed(&guest);
    a_reader_that_goes_away(&guest);
    a_reader_that_does_not_read(&guest);
    interrupted_while_the_guest_starts(&guest);
}

fn streams_and_codes(guest: &Guest) {
    let node = &guest.node;
    let script = "echo out; echo err >&2; exit 7";
    let output = node.mvm(&guest.args(&[], &["sh", "-c", script])).fails_with(7);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    for (script, code) in [("true", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill $$", 143)] {
        let output = node.mvm(&guest.args(&[], &["sh", "-c", script])).fails_with(code);
        assert_eq!(output.stderr, "", "{script}");
    }
    node.mvm(&guest.args(&["--timeout", "1"], &["sleep", "4001"])).fails_with(124);
    guest.until_gone("sleep 4001");
    // Without --, and in any instance of a pool.
    assert_eq!(node.ok(&["exec", "acme/web", "echo", "-n", "-o"]), "-o");
}

fn what_does_not_exist(guest: &Guest) {
    let run = |options: &[&str], program: &str| guest.node.mvm(&guest.args(options, &[program]));
    let named = format!("error: {}: ", guest.path);
    run(&[], "no-such").fails_with(127).says(&[&named, "`no-such` was not found in PATH"]);
    run(&[], "/no/such").fails_with(127).says(&[&named, "`/no/such` does not exist"]);
    run(&[], "/etc/passwd").fails_with(126).says(&[&named, "`/etc/passwd` cannot be executed"]);
    run(&[], "/").fails_with(126).says(&[&named, "`/` cannot be executed"]);
    run(&["-w", "/no/such"], "true")
        .fails_with(127)
        .says(&[&named, "working directory `/no/such`"]);
    run(&["-u", "mvm", "-w", "/root"], "true").fails_with(126).says(&["working directory `/root`"]);
    run(&["-u", "ghost"], "true").fails_with(127).says(&[&named, "user `ghost`"]);
    run(&["-u", "mvm:ghosts"], "true").fails_with(127).says(&[&named, "group `ghosts`"]);
    run(&["-u", ":"], "true").fails_with(2).says(&[&named, "NAME or UID"]);
    run(&["-e", "NAME"], "true").fails_with(2).says(&["expected NAME=VALUE"]);
}

fn surroundings(guest: &Guest) {
    let script = r#"echo "$(id -u):$(id -g)|$USER|$HOME|$PWD|$A""#;
    let run = |options: &[&str]| guest.node.ok(&guest.args(options, &["sh", "-c", script]));
    assert_eq!(run(&[]), "0:0|root|/root|/root|\n");
    assert_eq!(run(&["-u", "mvm", "-e", "A=b  =c"]), "1000:1000|mvm|/home/mvm|/home/mvm|b  =c\n");
    assert_eq!(run(&["-u", "1000:tty", "-w", "/tmp"]), "1000:5|mvm|/home/mvm|/tmp|\n");
    assert_eq!(run(&["-u", "4242", "-e", "HOME=/tmp"]), "4242:0|4242|/tmp|/|\n");
    let odd = ["a b", "", "'\"$x", "é\n"];
    let program = [&["printf", "[%s]"], &odd[..]].concat();
    assert_eq!(guest.node.ok(&guest.args(&[], &program)), "[a b][]['\"$x][é\n]");
}

fn binary_input_and_output(guest: &Guest) {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    // Every byte value in every place, and nothing that repeats with the size of a piece.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(8 << 20)
    .collect();
    fs::write(&from, &bytes).unwrap();
    let status = guest
        .node
        .command(&guest.args(&["-i"], &["cat"]))
        .stdin(File::open(&from).unwrap())
        .stdout(File::create(&to).unwrap())
        .status()
        .unwrap();
    assert!(status.success());
    assert!(fs::read(&to).unwrap() == bytes, "8 MiB came back otherwise");
    let read = guest.node.mvm_with_input(&guest.args(&[], &["cat"]), b"not passed on").ok();
    assert_eq!(read.stdout, "");
    // A program that does not read to the end is not held up.
    let input = vec![b'x'; 4 << 20];
    let read = guest.node.mvm_with_input(&guest.args(&["-i"], &["head", "-c", "3"]), &input).ok();
    assert_eq!(read.stdout, "xxx");
}

fn order_is_kept(guest: &Guest) {
    let lines: Vec<String> = guest
        .node
        .ok(&guest.args(&[], &["seq", "1", "20000"]))
        .lines()
        .map(str::to_owned)
        .collect();
    let expected: Vec<String> = (1..=20_000).map(|n: u32| n.to_string()).collect();
    assert!(lines == expected, "20000 lines came in another order");
}

fn fifty_at_once(guest: &Guest) {
    let texts: Vec<String> = (0..50).map(|n| format!("text of {n}")).collect();
    let start = |text: &String| guest.node.spawn(&guest.args(&[], &["echo", text]));
    let running: Vec<Running> = texts.iter().map(start).collect();
    for (text, running) in texts.iter().zip(running) {
        assert_eq!(running.wait(LIMIT).ok().stdout.trim_end(), text);
    }
}

fn signals(guest: &Guest) {
    const LOOP: &str = "echo ready; while :; do sleep 0.1; done";
    for (signal, trap, plain) in [(Signal::INT, "INT", 130), (Signal::TERM, "TERM", 143)] {
        let mut running = guest.script(&format!("trap 'echo told; exit 9' {trap}; {LOOP}"));
        running.signal(signal);
        let output = running.wait(SOON).fails_with(9);
        assert!(output.stdout.ends_with("told\n"), "{output}");
        let mut running = guest.script("echo ready; exec sleep 4002");
        running.signal(signal);
        running.wait(SOON).fails_with(plain);
        guest.until_gone("sleep 4002");
    }
}

fn a_second_interrupt(guest: &Guest) {
    let mut running = guest.script("trap '' INT; echo ready; sleep 4003; sleep 4003");
    // More than two: a signal that comes while one is taken counts once.
    until("the client has hung up", SOON, || {
        running.signal(Signal::INT);
        running.has_ended().then_some(())
    });
    running.wait(SOON).fails_with(130).says(&["error: interrupted"]);
    guest.until_gone("sleep 4003");
}

fn a_client_that_is_killed(guest: &Guest) {
    let mut running = guest.script("echo ready; sleep 4004 & sleep 4004");
    running.signal(Signal::KILL);
    running.wait(SOON).fails_with(137);
    guest.until_gone("sleep 4004");
}

/// What `mvm exec … | head -1` does.
fn a_reader_that_goes_away(guest: &Guest) {
    let mut command = guest.node.command(&guest.args(&[], &["yes", "4005"]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "4005\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    guest.until_gone("yes 4005");
}

/// Of 200 MiB that nobody reads, next to nothing is held anywhere.
fn a_reader_that_does_not_read(guest: &Guest) {
    let node = &guest.node;
    let agent = node.agent_pid().unwrap();
    let agent_before = rss_kib(agent);
    let guest_rss = || node.guest(&guest.path, "awk '/VmRSS/ {print $2}' /proc/1/status");
    let guest_before: u64 = guest_rss().parse().unwrap();
    let script = "echo $$; exec head -c 209715200 /dev/zero";
    let mut command = node.command(&guest.args(&[], &["sh", "-c", script]));
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let pid = first_line(&mut stdout);
    let written = || -> u64 {
        let script = format!("awk '/wchar/ {{print $2}}' /proc/{pid}/io");
        node.guest(&guest.path, &script).parse().unwrap()
    };
    let mut last = 0;
    let stuck_at = until("the program is held up", LIMIT, || {
        let now = written();
        std::mem::replace(&mut last, now).eq(&now).then_some(now)
    });
    assert!((1..64 << 20).contains(&stuck_at), "held up after {stuck_at} bytes");
    let agent_grew = rss_kib(agent).saturating_sub(agent_before);
    let guest_grew = guest_rss().parse::<u64>().unwrap().saturating_sub(guest_before);
    assert!(agent_grew < 32 << 10, "the agent holds {agent_grew} KiB more");
    assert!(guest_grew < 16 << 10, "the guest agent holds {guest_grew} KiB more");
    // Others are not held up.
    assert_eq!(node.guest(&guest.path, "echo hello"), "hello");
    child.kill().unwrap();
    child.wait().unwrap();
    guest.until_gone("head -c 209715200");
}

/// Reads a line byte by byte, so that nothing behind it is read.
fn first_line(from: &mut impl std::io::Read) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while from.read_exact(&mut byte).is_ok() && byte != *b"\n" {
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn interrupted_while_the_guest_starts(guest: &Guest) {
    let Guest { node, path } = guest;
    node.ok(&["stop", path]);
    node.mvm(&["exec", path, "--", "true"]).fails_with(5).says(&["not running", "`mvm start i-"]);
    node.ok(&["start", path, "--no-wait"]);
    let mut running = node.spawn(&guest.args(&[], &["touch", "/root/ran"]));
    // It asks first and catches signals then.
    until("the client catches SIGINT", SOON, || {
        let status = fs::read_to_string(format!("/proc/{}/status", running.pid())).ok()?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        (caught & 1 << (Signal::INT.as_raw() - 1) != 0).then_some(())
    });
    running.signal(Signal::INT);
    running.wait(SOON).fails_with(130);
    // One that goes on waiting has its program run.
    assert_eq!(node.guest(path, "sleep 1; ls /root"), "");
}

#[test]
fn logs_are_shown_cut_followed_and_kept() {
    let Some(guest) = Guest::boot() else { return };
    let Guest { node, path } = &guest;
    let write = |text: &str| node.guest(path, &format!("echo {text} > /dev/console"));
    write("marker-1");
    let whole = node.ok(&["logs", path]);
    assert!(whole.contains("mvm-guest: ") && whole.contains("marker-1"), "{whole}");
    assert_eq!(node.ok(&["logs", path, "--tail", "1"]).trim(), "marker-1");
    assert_eq!(node.ok(&["logs", path, "--tail", "3"]).lines().count(), 3);
    assert_eq!(node.ok(&["logs", "acme/web", "--tail", "0"]), "");

    let mut running = node.spawn(&["logs", path, "-f", "--tail", "1"]);
    until("the last line is shown", SOON, || {
        running.stdout_so_far().contains("marker-1").then_some(())
    });
    write("marker-2");
    until("a new line is followed", SOON, || {
        running.stdout_so_far().contains("marker-2").then_some(())
    });
    // Over a restart, whose console begins anew.
    node.ok(&["restart", path]);
    write("marker-3");
    until("the next run is followed", SOON, || {
        running.stdout_so_far().contains("marker-3").then_some(())
    });
    running.signal(Signal::INT);
    let followed = running.wait(SOON).fails_with(130);
    assert_eq!(followed.stderr, "");

    let kernel = node.ok(&["logs", path, "--source", "kernel"]);
    assert!(kernel.contains("Linux version"), "{kernel}");
    assert_eq!(node.ok(&["logs", path, "--source", "kernel", "--tail", "2"]).lines().count(), 2);
    node.ok(&["logs", path, "--source", "vmm"]);
    node.ok(&["stop", path]);
    assert!(node.ok(&["logs", path]).contains("marker-3"));
    let kernel = node.mvm(&["logs", path, "--source", "kernel"]).fails_with(5);
    kernel.says(&["is stopped, not running", "hint: start it with `mvm start i-"]);
}
