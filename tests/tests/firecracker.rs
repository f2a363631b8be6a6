//! An instance's whole life on Firecracker, where it is installed and KVM works: in the lab.

#![allow(clippy::print_stdout, reason = "a skipped test says why")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mvm_tests::node::kill;
use mvm_tests::{Node, host};

/// A node whose microVMs run on Firecracker.
fn node() -> Option<Node> {
    let is_there =
        std::env::var_os("MVM_FIRECRACKER").is_some_and(|path| Path::new(&path).exists());
    let has_kvm = std::env::var("MVM_TEST_ACCEL").as_deref() == Ok("kvm");
    if !(is_there && has_kvm) {
        println!("skipped: needs MVM_FIRECRACKER and MVM_TEST_ACCEL=kvm, as in `cargo xtask lab`");
    }
    let mut node = (is_there && has_kvm).then(Node::new)??;
    node.ask_for_vmm("firecracker");
    Some(node)
}

/// The same, with an agent in production.
fn node_in_production() -> Option<Node> {
    let mut node = node()?;
    let Ok(filter) = std::env::var("MVM_TEST_SECCOMP_FILTER") else {
        println!("skipped: needs MVM_TEST_SECCOMP_FILTER, a compiled seccomp filter");
        return None;
    };
    node.set_variable("MVM_PRODUCTION", "1");
    node.set_variable("MVM_SECCOMP_FILTER", &filter);
    Some(node)
}

#[test]
fn an_instance_lives_on_firecracker_and_leaves_nothing() {
    let Some(node) = node() else { return };
    let before = host::foreign_network();
    let doctor = node.mvm(&["doctor"]).stdout;
    assert!(doctor.contains("firecracker with kvm: version 1."), "{doctor}");

    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    let running = node.until_state(&path, "running");
    let pid = running["pid"].as_u64().unwrap();
    let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert_eq!(program.trim(), "firecracker");
    assert_eq!(node.guest(&path, "cat /sys/class/net/eth0/address"), running["mac"]);
    node.guest(&path, "echo kept > /root/file");

    // It sleeps and wakes, where it was, time after time.
    node.guest(&path, "(while true; do sleep 1; done) >/dev/null 2>&1 & echo $! > /tmp/pid");
    let program = "cat /tmp/pid && kill -0 $(cat /tmp/pid) && cat /run/mvm/wakes";
    let pid = node.guest(&path, "cat /tmp/pid");
    for wakes in 1..=3 {
        node.ok(&["sleep", &path]);
        let asleep = node.until_state(&path, "sleeping");
        assert_eq!(asleep["pid"], serde_json::Value::Null);
        let dir = node.dir().join("instances").join(path.rsplit('/').next().unwrap());
        assert!(!dir.join("jail").exists(), "what sleeps keeps a copy of Firecracker");
        assert_eq!(node.guest(&path, program), format!("{pid}\n{wakes}"));
        let woken = node.instance(&path);
        assert_eq!((&woken["boots"], &woken["wakes"]), (&1.into(), &wakes.into()), "{woken}");
    }

    // A fork has its memory, and an identity of its own.
    let fork = node.json(&["fork", &path]);
    let fork = fork["concerns"]["instances"][0].as_str().unwrap().to_owned();
    assert_eq!(
        node.guest(&fork, "cat /root/file; kill -0 $(cat /tmp/pid) && echo lives"),
        "kept\nlives"
    );
    let (own, other) = (node.instance(&fork), node.instance(&path));
    assert_eq!(own["boots"], 0, "{own}");
    assert_eq!(node.guest(&fork, "cat /sys/class/net/eth0/address"), own["mac"]);
    node.guest(&fork, &format!("ping -c 1 -W 10 {}", other["address"].as_str().unwrap()));
    node.ok(&["instance", "destroy", &fork, "--force"]);
    let pid = node.instance(&path)["pid"].as_u64().unwrap();

    // The agent is killed: the microVM goes on, and is found again. Nothing counts twice or is lost.
    let written = || node.json(&["stats", &path])[0]["disk_io"]["written_bytes"].as_u64().unwrap();
    let before_writing = written();
    let write = "head -c 1048576 /dev/urandom > /root/more; sync";
    node.guest(&path, write);
    let once = written();
    node.guest(&path, write);
    node.kill_agent();
    assert_eq!(node.guest(&path, "cat /root/file"), "kept");
    assert_eq!(node.instance(&path)["pid"].as_u64(), Some(pid));
    let (first, second) = (once - before_writing, written() - once);
    for bytes in [first, second] {
        assert!((1 << 20..4 << 20).contains(&bytes), "{first} B, then {second} B");
    }

    node.ok(&["instance", "stop", &path]);
    let stopped = node.instance(&path);
    assert_eq!((&stopped["state"], &stopped["pid"]), (&"stopped".into(), &serde_json::Value::Null));
    assert_eq!(stopped["last_death"]["cause"], "operator");

    // Firecracker is killed: the cause is told, and the instance comes back with its disk.
    node.ok(&["instance", "start", &path]);
    let pid = node.until_state(&path, "running")["pid"].as_u64().unwrap();
    kill(u32::try_from(pid).unwrap(), rustix::process::Signal::KILL);
    let again = mvm_tests::until("it runs again", mvm_tests::LIMIT, || {
        let instance = node.instance(&path);
        let is_new = instance["pid"].as_u64().is_some_and(|new| new != pid);
        (instance["state"] == "running" && is_new).then_some(instance)
    });
    assert_eq!(again["boots"], 3, "{again}");
    assert_eq!(node.guest(&path, "cat /root/file"), "kept");

    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), Vec::<String>::new());
    assert_eq!(host::foreign_network(), before);
    let groups = std::fs::read_dir("/sys/fs/cgroup/mvm").unwrap().filter_map(Result::ok);
    let groups = groups.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
    assert_eq!(groups.collect::<Vec<_>>(), Vec::<std::ffi::OsString>::new());
}

#[test]
fn in_production_what_was_woken_is_behind_every_wall() {
    let Some(node) = node_in_production() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    for _ in 0..2 {
        node.ok(&["sleep", &path]);
        node.guest(&path, "true");
        // The agent refuses one without all of them; these are two that it refuses.
        let proc = format!("/proc/{}", node.instance(&path)["pid"]);
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
        let network = |process: &str| std::fs::read_link(format!("{process}/ns/net")).unwrap();
        assert_ne!(network(&proc), network("/proc/self"));
        // Its tap is out of there all the same.
        let gateway = "ping -c 1 -W 10 $(ip route | awk '/default/ {print $3}')";
        node.guest(&path, gateway);
        let stats = node.json(&["stats", &path]);
        let counters = stats[0]["vmm_counters"].as_object().unwrap();
        assert!(counters.contains_key("vsock.conns_added"), "{stats}");
        assert!(!counters.contains_key("seccomp.num_faults"), "{stats}");
        node.ok(&["net", "verify"]);
    }
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn memory_that_a_guest_frees_goes_back_to_the_host() {
    if let Some(node) = node() {
        memory_goes_back(&node);
    }
}

#[test]
fn memory_goes_back_in_production_if_that_is_wanted() {
    if let Some(mut node) = node_in_production() {
        node.set_variable("MVM_FREE_PAGE_REPORTING", "1");
        memory_goes_back(&node);
    }
}

fn memory_goes_back(node: &Node) {
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    let told = || {
        let stats = node.json(&["stats", &path]);
        let bytes = |name: &str| stats[0]["vmm_counters"][name].as_u64().unwrap_or_default();
        let [total, available] =
            ["total", "available"].map(|what| bytes(&format!("balloon_statistics.{what}_memory")));
        assert!(0 < available && available < total && total < 256 << 20, "{stats}");
    };
    told();
    let resident_kib = || node.json(&["stats", &path])[0]["host_rss_kib"].as_u64().unwrap();
    let filled_kib = 64 << 10;
    // Pieces of less than 256 KiB stay with the guest: how many depends on how its memory is cut up.
    let part_kib = filled_kib * 3 / 8;
    let fill_and_free = || {
        let before = resident_kib();
        node.guest(&path, "head -c 67108864 /dev/urandom > /tmp/large");
        let full = resident_kib();
        assert!(full >= before + filled_kib / 2, "{before} KiB, then {full} KiB");
        node.guest(&path, "rm /tmp/large");
        mvm_tests::until("the memory is given back", mvm_tests::LIMIT, || {
            (resident_kib() + part_kib <= full).then_some(())
        });
    };
    node.guest(&path, "head -c 8388608 /dev/urandom > /tmp/kept; md5sum /tmp/kept > /tmp/sum");
    fill_and_free();
    let id = path.rsplit('/').next().unwrap();
    let image_bytes = |number: u32| {
        let name = format!("sleep-{number}/memory.image");
        let image = std::fs::metadata(node.dir().join("instances").join(id).join(name));
        image.unwrap().blocks() * 512
    };
    let mut first = None;
    for _ in 0..2 {
        node.ok(&["sleep", &path]);
        first = first.or_else(|| Some(image_bytes(1)));
        node.ok(&["wake", &path]);
        // What it gave back is a gap of the mapped image, of which the next sleep saves nothing.
        fill_and_free();
        node.guest(&path, "md5sum -c /tmp/sum");
        told();
    }
    node.ok(&["sleep", &path]);
    let (first, last) = (first.unwrap_or_default(), image_bytes(3));
    // If nothing were given back, it would be twice what was filled, and what the kernel changes.
    assert!(last < first + 2 * (filled_kib << 10), "{last} bytes after {first}");
    node.guest(&path, "md5sum -c /tmp/sum");
    node.ok(&["tenant", "destroy", "acme", "--force"]);
}
