//! Each way in which a microVM ends is told apart, with the console's last lines.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::node::kill;
use mvm_tests::{LIMIT, Node, host, seed, until};
use rustix::process::Signal;
use serde_json::Value;

/// Starts a shell command in a guest that will not live to see its end.
fn doom(node: &Node, path: &str, script: &str) {
    node.guest(path, &format!("setsid sh -c 'sleep 1; {script}' >/dev/null 2>&1 &"));
}

/// Waits until an instance's last run ended for this reason.
#[track_caller]
fn until_cause(node: &Node, path: &str, cause: &str) -> Value {
    until(&format!("{path} ended by {cause}"), LIMIT, || {
        Some(node.instance(path)).filter(|i| i["last_death"]["cause"] == cause)
    })
}

fn tail(value: &Value) -> String {
    let lines = value["last_death"]["console_tail"].as_array();
    lines.into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_guests_do_to_themselves_is_told_apart() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--restart", "never"]);
    let path = node.boot("acme/web");

    doom(&node, &path, "echo c > /proc/sysrq-trigger");
    until_cause(&node, &path, "guest_panic");
    let failed = node.until_state(&path, "failed");
    assert!(tail(&failed).contains("Kernel panic - not syncing"), "{failed}");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("guest kernel panic"), "{why}");
    assert!(why.contains("sysrq triggered crash"), "{why}");

    node.ok(&["start", &path]);
    let eat = "for n in 1 2 3; do dd if=/dev/zero of=/dev/null bs=80M count=5 & done; wait";
    node.guest(&path, &format!("({eat}) 2>/dev/null; true"));
    assert_eq!(node.instance(&path)["boots"], 2, "a program's end is not the guest's");
    let stats = node.json(&["stats", &path])[0].clone();
    assert!(stats["guest"]["oom_kills"].as_u64() >= Some(1), "{stats}");

    doom(&node, &path, &format!("echo 1 > /proc/sys/vm/panic_on_oom; {eat}"));
    until_cause(&node, &path, "guest_oom");
    node.until_state(&path, "failed");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("guest out of memory"), "{why}");

    node.ok(&["start", &path]);
    doom(&node, &path, "poweroff -f");
    until_cause(&node, &path, "guest_shutdown");
    node.until_state(&path, "stopped");
}

#[test]
fn a_guest_that_ends_by_itself_is_treated_by_its_restart_policy() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--restart", "on-failure"]);
    let path = node.boot("acme/web");

    doom(&node, &path, "reboot -f");
    until_cause(&node, &path, "guest_reboot");
    let back = node.until_state(&path, "running");
    assert_eq!((&back["boots"], &back["failures"]), (&2.into(), &0.into()), "{back}");

    doom(&node, &path, "echo c > /proc/sysrq-trigger");
    until_cause(&node, &path, "guest_panic");
    assert_eq!(node.until_state(&path, "running")["boots"], 3);

    doom(&node, &path, "poweroff -f");
    until_cause(&node, &path, "guest_shutdown");
    node.until_state(&path, "stopped");
    until("it is left alone", LIMIT, || {
        (node.instance(&path)["waiting"]["waiting"] == "restart_policy").then_some(())
    });
    let why = node.ok(&["why", &path]);
    assert!(why.contains("the guest powered off"), "{why}");
    node.ok(&["start", &path]);
    assert_eq!(node.instance(&path)["boots"], 4);
}

#[test]
fn a_vmm_that_is_ended_from_outside_is_replaced_and_its_signal_known() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    let ends = [
        (Signal::KILL, "killed_from_outside", "killed from outside by signal 9"),
        (Signal::TERM, "killed_from_outside", "killed from outside by signal 15"),
        (Signal::SEGV, "vmm_crash", "VMM crash"),
    ];
    for (boots, (signal, cause, says)) in (2..).zip(ends) {
        let [vmm] = node.vmm_pids()[..] else { panic!("one VMM runs") };
        kill(vmm, signal);
        until(&format!("{path} is back after {signal:?}"), LIMIT, || {
            let now = node.instance(&path);
            (now["state"] == "running" && now["boots"] == boots).then_some(())
        });
        let back = node.instance(&path);
        assert_eq!(back["last_death"]["cause"], cause, "{back}");
        let why = node.ok(&["why", &path]);
        assert!(why.contains(says), "{why}");
        assert_ne!(node.vmm_pids(), [vmm]);
    }
    node.ok(&["stop", &path]);
    let stopped = node.instance(&path);
    assert_eq!(stopped["last_death"]["cause"], "operator");
    let why = node.ok(&["why", &path]);
    assert!(why.contains("stopped by an operator"), "{why}");
}

/// The files of the only image.
fn image_dir(node: &Node) -> std::path::PathBuf {
    let images = std::fs::read_dir(node.dir().join("images")).unwrap();
    let mut images: Vec<_> = images.map(|entry| entry.unwrap().path()).collect();
    images.retain(|path| path.is_dir());
    assert_eq!(images.len(), 1, "{images:?}");
    images.remove(0)
}

#[test]
fn a_guest_without_a_usable_initrd_fails_with_its_last_words() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--restart", "never"]);
    node.ok(&["pool", "build", "acme/web"]);
    // Of the same length, so that only the guest notices.
    let initrd = image_dir(&node).join("initrd");
    seed::own_copy(&initrd);
    let length = std::fs::metadata(&initrd).unwrap().len();
    std::fs::write(&initrd, vec![0; length as usize]).unwrap();
    let failed = node.mvm(&["instance", "create", "acme/web", "--start"]).fails_with(1);
    failed.says(&["guest kernel panic", "Kernel panic - not syncing: VFS: Unable to mount root"]);
    assert_eq!(node.vmm_pids(), [0; 0]);
}

#[test]
fn a_guest_that_never_answers_is_ended_with_its_last_words() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--restart", "never", "--boot-timeout", "10"]);
    let create = node.spawn(&["instance", "create", "acme/web", "--start"]);
    // Frozen in the middle of its boot.
    let vmm = until("the guest's kernel says something", LIMIT, || {
        let dir = host::instance_dirs(node.dir()).pop()?;
        let console = std::fs::read_to_string(dir.join("console.log")).ok()?;
        console.contains("Linux version").then(|| node.vmm_pids()[0])
    });
    kill(vmm, Signal::STOP);
    let failed = create.wait(LIMIT).fails_with(1);
    failed.says(&["the guest agent did not answer in time", "\n  | ["]);
    assert_eq!(node.vmm_pids(), [0; 0]);
    let path = node.instances()[0]["path"].as_str().unwrap().to_owned();
    let why = node.ok(&["why", &path]);
    assert!(why.contains("did not answer in time") && why.contains("\n  | ["), "{why}");
}

#[test]
fn a_damaged_image_file_is_named_with_the_way_to_mend_it() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    node.ok(&["pool", "build", "acme/web"]);
    let kernel = image_dir(&node).join("vmlinuz");
    seed::own_copy(&kernel);
    std::fs::OpenOptions::new().write(true).open(&kernel).unwrap().set_len(100_000).unwrap();
    let failed = node.mvm(&["instance", "create", "acme/web", "--start"]).fails_with(1);
    failed.says(&[kernel.to_str().unwrap(), "100000 bytes", "`mvm pool build`"]);
    assert_eq!(node.vmm_pids(), [0; 0]);
    node.ok(&["pool", "build", "acme/web"]);
    node.ok(&["start", "acme/web"]);
    let path = node.instances()[0]["path"].as_str().unwrap().to_owned();
    assert_eq!(node.guest(&path, "echo up"), "up");
}
