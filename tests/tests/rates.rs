//! Instances use their disks and the network no faster than their pool says, and run on the VMM that
//! it names or say why not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::Node;

/// Runs a script in a guest and returns how long it took there, in hundredths of a second.
fn hundredths(node: &Node, path: &str, script: &str) -> u64 {
    let timed = format!(
        "now() {{ cut -d' ' -f1 /proc/uptime | tr -d .; }}
         began=$(now); {{ {script}; }} >/dev/null 2>&1 || echo failed; echo $(($(now) - began))"
    );
    let said = node.guest(path, &timed);
    said.parse().unwrap_or_else(|_| panic!("{script}: {said}"))
}

#[test]
fn a_guest_is_held_to_its_rates_also_after_a_sleep() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/slow", &["--disk-rate", "4M", "--net-rate", "8"]);
    let info = node.ok(&["pool", "info", "acme/slow"]);
    assert!(info.contains("network 8 Mbit/s, disks 4 MiB/s"), "{info}");
    let [one, two] = [(); 2].map(|()| node.boot("acme/slow"));
    let address = node.instance(&one)["address"].as_str().unwrap().to_owned();
    node.guest(
        &one,
        "mkdir /tmp/www; head -c 4194304 /dev/zero > /tmp/www/file; httpd -h /tmp/www",
    );
    let fetch = format!("wget -q -O /dev/null http://{address}/file");
    let write = "dd if=/dev/urandom of=/root/file bs=65536 count=256 conv=fsync";
    for _ in 0..2 {
        // 16 MiB at 4 MiB/s, of which what a second allows may come at once.
        let took = hundredths(&node, &two, write);
        assert!(took >= 280, "16 MiB in {took}/100 s");
        // 4 MiB at 1 MB/s, of which as much again and a bit may come at once.
        let took = hundredths(&node, &two, &fetch);
        assert!(took >= 250, "4 MiB in {took}/100 s");
        // Firecracker counts it, QEMU does not.
        let io = node.json(&["stats", &two])[0]["disk_io"].clone();
        let throttled = io["throttled"].as_u64();
        assert!(throttled.is_none_or(|times| times > 0), "{io}");
        assert!(io["written_bytes"].as_u64().is_some_and(|bytes| bytes >= 16 << 20), "{io}");
        node.ok(&["sleep", &two]);
        node.ok(&["wake", &two]);
    }
    assert!(node.ok(&["net", "verify"]).contains("all as expected"));
    let error = node.mvm(&["pool", "create", "acme/none", "--net-rate", "0"]).fails_with(2);
    assert!(error.stderr.contains("--net-rate is 0, but must be 1 to 100000"), "{error}");
}

#[test]
fn a_pool_runs_on_the_vmm_that_it_names_or_says_why_not() {
    let Some(mut node) = Node::new() else { return };
    node.set_variable("MVM_FIRECRACKER", "/nowhere/firecracker");
    node.ask_for_vmm("qemu");
    node.small_pool("acme/here", &["--on", "qemu"]);
    let path = node.boot("acme/here");
    assert_eq!(node.instance(&path)["vmm"], "qemu");
    node.small_pool("acme/there", &["--on", "firecracker", "--restart", "never"]);
    node.mvm(&["instance", "create", "acme/there", "--start"]).fails_with(1).says(&[
        "its pool is to run on firecracker, and it cannot",
        "`/nowhere/firecracker` is not installed",
    ]);
    node.mvm(&["pool", "create", "acme/nowhere", "--on", "sim"])
        .fails_with(2)
        .says(&["vmm is sim"]);
}
