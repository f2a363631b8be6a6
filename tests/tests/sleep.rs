//! Sleep and wake of real microVMs: nothing is lost, whatever happens on the way.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_tests::node::Node;
use mvm_tests::wait::until;

/// Milliseconds by which a guest's clock may differ after a wake, and the time that reading takes.
const CLOCK_MS: i128 = 100;

fn host_ms() -> i128 {
    i128::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// The guest's clock less the host's, in milliseconds: between these two.
fn clock_error(node: &Node, path: &str) -> (i128, i128) {
    let before = host_ms();
    let text = node.guest(path, "adjtimex | grep -E 'tv_(u?)sec'");
    let after = host_ms();
    let number = |name: &str| -> i128 {
        let line = text.lines().find(|line| line.contains(name)).unwrap();
        line.split_ascii_whitespace().last().unwrap().parse().unwrap()
    };
    let guest = number("tv_sec") * 1000 + number("tv_usec") / 1000;
    (guest - after, guest - before)
}

fn instance_dir(node: &Node, path: &str) -> PathBuf {
    node.dir().join("instances").join(path.rsplit('/').next().unwrap())
}

#[test]
fn a_guest_goes_on_where_it_was_again_and_again() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let (path, peer) = (node.boot("acme/web"), node.boot("acme/web"));
    let address = node.instance(&peer)["address"].as_str().unwrap().to_owned();
    node.guest(
        &path,
        "mkdir -p /etc/mvm/hooks/pre-sleep.d /etc/mvm/hooks/post-wake.d
         printf '#!/bin/sh\\necho slept >> /root/hooks\\n' > /etc/mvm/hooks/pre-sleep.d/10-note
         printf '#!/bin/sh\\necho woke $MVM_WAKES >> /root/hooks\\n' > /etc/mvm/hooks/post-wake.d/10-note
         chmod 755 /etc/mvm/hooks/*/*
         head -c 8000000 /dev/urandom > /dev/shm/memory || head -c 8000000 /dev/urandom > /tmp/memory
         head -c 8000000 /dev/urandom > /root/disk
         cat /dev/shm/memory /tmp/memory 2>/dev/null | md5sum > /root/sums; md5sum < /root/disk >> /root/sums",
    );
    // A connection that is open over all the sleeps: it says a line when it is told to.
    node.guest(&peer, "(tail -f /dev/null | nc -l -p 7000 > /tmp/heard) >/dev/null 2>&1 & echo");
    node.guest(
        &path,
        &format!(
            "mkfifo /tmp/say; (nc {address} 7000 < /tmp/say) >/dev/null 2>&1 &
             (exec 3> /tmp/say; for i in 1 2 3 4 5 6 7 8; do
                while [ ! -e /tmp/go-$i ]; do sleep 0.05; done; echo line $i >&3
              done) >/dev/null 2>&1 &
             echo $! > /tmp/pid"
        ),
    );
    let pid = node.guest(&path, "cat /tmp/pid");
    let mut random = vec![];
    for round in 1..=5 {
        node.ok(&["sleep", &path]);
        let view = node.until_state(&path, "sleeping");
        assert_eq!(
            (&view["pid"], &view["desired"]),
            (&serde_json::Value::Null, &"sleeping".into())
        );
        assert_eq!(node.vmm_pids().len(), 1, "only the peer has a process");
        match round % 2 {
            0 => drop(node.ok(&["wake", &path])),
            // Whoever needs it wakes it.
            _ => assert_eq!(node.guest(&path, "cat /tmp/pid"), pid),
        }
        let (least, most) = clock_error(&node, &path);
        assert!(least <= CLOCK_MS && most >= -CLOCK_MS, "the clock is {least} to {most} ms off");
        assert_eq!(node.guest(&path, "cat /run/mvm/wakes"), round.to_string());
        random.push(node.guest(&path, "head -c 16 /dev/urandom | md5sum"));
        node.guest(&path, &format!("kill -0 {pid} && touch /tmp/go-{round}"));
        let heard = format!("line {round}");
        until("the peer hears it", Duration::from_secs(20), || {
            (node.guest(&peer, "tail -n 1 /tmp/heard") == heard).then_some(())
        });
        let again = "cat /dev/shm/memory /tmp/memory 2>/dev/null | md5sum; md5sum < /root/disk";
        assert_eq!(node.guest(&path, again), node.guest(&path, "cat /root/sums"));
        let hooks: Vec<String> = (1..=round).map(|round| format!("slept\nwoke {round}")).collect();
        assert_eq!(node.guest(&path, "cat /root/hooks"), hooks.join("\n"));
    }
    random.sort();
    random.dedup();
    assert_eq!(random.len(), 5, "no random numbers come twice");
    // It is one image all the time, into which what changed is written.
    let image = |name: &str| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(instance_dir(&node, &path).join(name).join("memory.image")).unwrap().ino()
    };
    let fifth = image("sleep-5");
    node.ok(&["sleep", &path, "--force"]);
    assert_eq!(image("sleep-6"), fifth);
    assert!(!instance_dir(&node, &path).join("sleep-5").exists());
    // A fork begins from it: from now on it stays as it is, and what changes is kept apart.
    let forked = node.json(&["fork", &path]);
    let fork = forked["concerns"]["instances"][0].as_str().unwrap().to_owned();
    node.ok(&["wake", &path]);
    let other = "f=/dev/shm/memory; [ -e $f ] || f=/tmp/memory; head -c 1000000 /dev/urandom > $f";
    node.guest(&path, other);
    node.ok(&["sleep", &path, "--force"]);
    let changes = instance_dir(&node, &path).join("sleep-7/memory.changes");
    assert!(fs::metadata(changes).unwrap().len() > 1_000_000);
    let again = "cat /dev/shm/memory /tmp/memory 2>/dev/null | md5sum; md5sum < /root/disk";
    assert_eq!(node.guest(&fork, again), node.guest(&fork, "cat /root/sums"));
    assert_ne!(node.guest(&path, again), node.guest(&path, "cat /root/sums"));
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_damaged_snapshot_is_told_and_the_disk_is_kept() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    node.guest(&path, "echo kept > /root/file");
    node.ok(&["sleep", &path]);
    let image = instance_dir(&node, &path).join("sleep-1/memory.image");
    let file = fs::File::options().read(true).write(true).open(&image).unwrap();
    use std::os::unix::fs::FileExt as _;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 40 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 40 << 20).unwrap();
    drop(file);
    node.ok(&["wake", &path]);
    assert_eq!(node.guest(&path, "cat /root/file; cat /run/mvm/wakes"), "kept\n0");
    let why = node.ok(&["why", &path]);
    assert!(
        why.contains("snapshot could not be restored") && why.contains("memory.image"),
        "{why}"
    );
    assert_eq!(node.instance(&path)["boots"], 2);
}

#[test]
fn an_agent_that_is_killed_at_any_moment_loses_no_guest() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    node.guest(&path, "(while true; do sleep 1; done) >/dev/null 2>&1 & echo $! > /root/pid");
    let pid = node.guest(&path, "cat /root/pid");
    for (verb, wait_ms) in
        [("sleep", 5), ("sleep", 150), ("sleep", 400), ("wake", 20), ("sleep", 800), ("wake", 120)]
    {
        node.ok(&[verb, &path, "--no-wait"]);
        // Wherever it is by then.
        std::thread::sleep(Duration::from_millis(wait_ms));
        node.kill_agent();
        let (verb, state) = match verb {
            "sleep" => ("sleep", "sleeping"),
            _ => ("wake", "running"),
        };
        node.ok(&[verb, &path]);
        node.until_state(&path, state);
        assert_eq!(node.vmm_pids().len(), usize::from(state == "running"));
    }
    assert_eq!(
        node.guest(&path, "cat /root/pid; kill -0 $(cat /root/pid) && echo lives"),
        format!("{pid}\nlives")
    );
    assert_eq!(node.instance(&path)["boots"], 1, "{}", node.ok(&["why", &path]));
}

#[test]
fn forks_have_their_sources_memory_and_their_own_identity() {
    let Some(node) = Node::new() else { return };
    // Four of them, also where the disk is small.
    node.small_pool("acme/web", &["--disk", "256M"]);
    let source = node.boot("acme/web");
    node.guest(
        &source,
        "echo kept > /root/file; mkdir -p /dev/shm; echo in memory > /tmp/file
         (while true; do sleep 1; done) >/dev/null 2>&1 & echo $! > /tmp/pid",
    );
    let forked = node.json(&["fork", &source, "-n", "2"]);
    let forks: Vec<String> = forked["concerns"]["instances"]
        .as_array()
        .unwrap()
        .iter()
        .map(|path| path.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(forks.len(), 2, "{forked}");
    let mut identities = vec![];
    for path in [&source, &forks[0], &forks[1]] {
        let address = node.instance(path)["address"].as_str().unwrap().to_owned();
        let script = "cat /root/file /tmp/file; kill -0 $(cat /tmp/pid) && echo lives
            cat /etc/machine-id; hostname; ip -4 addr show dev eth0 | grep -o 'inet [0-9.]*'
            cat /sys/class/net/eth0/address; head -c 16 /dev/urandom | md5sum";
        let seen = node.guest(path, script);
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines[..3], ["kept", "in memory", "lives"], "{path}");
        assert_eq!(lines[5], format!("inet {address}"));
        assert_eq!(lines[6], node.instance(path)["mac"].as_str().unwrap());
        identities.extend(lines[3..].iter().map(|line| (*line).to_owned()));
    }
    let all = identities.len();
    identities.sort();
    identities.dedup();
    assert_eq!(identities.len(), all, "something is not its own: {identities:?}");

    // Each writes to its own disk and memory, and reaches the others.
    node.guest(&forks[0], "echo mine > /root/file; echo mine > /tmp/file");
    assert_eq!(node.guest(&forks[1], "cat /root/file /tmp/file"), "kept\nin memory");
    assert_eq!(node.guest(&source, "cat /root/file /tmp/file"), "kept\nin memory");
    let address = node.instance(&forks[1])["address"].as_str().unwrap().to_owned();
    for path in [&source, &forks[0]] {
        node.guest(path, &format!("ping -c 1 -W 5 {address}"));
    }
    // A fork sleeps, wakes, and is forked while it sleeps.
    node.ok(&["sleep", &forks[0]]);
    let again = node.json(&["fork", &forks[0]]);
    let again = again["concerns"]["instances"][0].as_str().unwrap();
    assert_eq!(node.guest(again, "cat /root/file /tmp/file"), "mine\nmine");
    assert_eq!(node.instance(&forks[0])["state"], "sleeping");
    assert_eq!(node.guest(&forks[0], "cat /tmp/file"), "mine");
    // The command that starts the agent may be the fork itself.
    node.kill_agent();
    node.json(&["fork", &forks[1]]);
    let forks = node.instances().iter().filter(|view| view["boots"] == 0).count();
    assert_eq!(forks, 4, "no fork booted");
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_copy_whose_instance_falls_asleep_says_so() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    node.guest(&path, "mkdir /root/in");
    let mut command = node.command(&["cp", "-", &format!("{path}:/root/in")]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut copy = command.spawn().unwrap();
    // The beginning of a file that is longer than what comes of it.
    let archive = node.dir().join("archive");
    fs::write(&archive, [b'x'; 1 << 20]).unwrap();
    let archive =
        Command::new("tar").args(["cf", "-", "-C"]).arg(node.dir()).arg("archive").output();
    let mut stdin = copy.stdin.take().unwrap();
    stdin.write_all(&archive.unwrap().stdout[..512 << 10]).unwrap();
    until("it is under way", Duration::from_secs(60), || {
        (node.guest(&path, "ls -A /root/in | wc -l") != "0").then_some(())
    });
    node.ok(&["sleep", &path]);
    // Whoever reads an archive has more to read until it ends.
    drop(stdin.write_all(&[0; 1 << 20]));
    let output = copy.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("fell asleep"), "{said}");
    node.until_state(&path, "sleeping");
}
