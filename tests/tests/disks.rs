//! Data disks on real microVMs: what is on one outlives instances, crashes and growth, and no two
//! that would be in each other's way have it at once.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use mvm_tests::node::kill;
use mvm_tests::{LIMIT, Node, until};
use rustix::process::Signal;
use serde_json::Value;

const ON: &str = "data:/srv/data";
const READ_ONLY: &str = "data:/srv/data:ro";

fn kib(node: &Node, path: &str) -> u64 {
    let line = node.guest(path, "df -k /srv/data | tail -1");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn what_is_on_a_disk_outlives_instances_and_nobody_is_in_a_writers_way() {
    let Some(node) = Node::new() else { return };
    node.ok(&["tenant", "create", "acme", "--disk", "10G"]);
    assert_eq!(node.ok(&["disk", "create", "acme/data", "--size", "64M"]).trim(), "acme/data");
    node.small_pool("acme/write", &["--disk", "64M", "--disk-attach", ON]);
    node.small_pool("acme/read", &["--disk", "64M", "--disk-attach", READ_ONLY]);
    node.mvm(&["disk", "rm", "acme/data"])
        .fails_with(5)
        .says(&["pool acme/read", "pool acme/write"]);

    let writer = node.boot("acme/write");
    assert!(kib(&node, &writer) < 64 * 1024);
    node.guest(&writer, "echo precious > /srv/data/file && sync");
    let disk = node.json(&["disk", "info", "acme/data"]);
    assert_eq!(disk["instances"][0]["instance"], writer.as_str(), "{disk}");
    for pool in ["acme/write", "acme/read"] {
        let refused = node.mvm(&["instance", "create", pool, "--start"]).fails_with(5);
        refused.says(&["disk acme/data", &writer, "writes it", "mvm stop"]);
    }
    node.mvm(&["disk", "resize", "acme/data", "--size", "256M"]).fails_with(5).says(&[&writer]);

    // Killed in the middle of writing: the journal is replayed as it starts again by itself.
    node.guest(&writer, "for i in 1 2 3 4 5 6 7 8; do echo $i > /srv/data/$i; done");
    let [vmm] = node.vmm_pids()[..] else { panic!("one VMM runs") };
    kill(vmm, Signal::KILL);
    until("the writer runs again", LIMIT, || {
        let again = node.instance(&writer);
        (again["state"] == "running" && again["boots"] == 2).then_some(())
    });
    assert_eq!(node.guest(&writer, "cat /srv/data/file"), "precious");

    node.ok(&["stop", &writer]);
    node.mvm(&["disk", "resize", "acme/data", "--size", "32M"]).fails_with(2).says(&["shrink"]);
    node.ok(&["disk", "resize", "acme/data", "--size", "256M"]);
    node.ok(&["pool", "scale", "acme/read", "--running", "2"]);
    let readers: Vec<String> = node
        .instances()
        .iter()
        .filter(|instance| instance["state"] == "running")
        .map(|instance| instance["path"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(readers.len(), 2);
    for reader in &readers {
        assert_eq!(node.guest(reader, "cat /srv/data/file"), "precious");
        assert_eq!(node.guest(reader, "touch /srv/data/x 2>/dev/null || echo refused"), "refused");
    }
    node.mvm(&["start", &writer]).fails_with(5).says(&["cannot write", "reads it", "acme/read/i-"]);
    node.ok(&["pool", "destroy", "acme/read", "--force"]);
    node.ok(&["instance", "destroy", &writer]);

    let heir = node.boot("acme/write");
    assert_eq!(node.guest(&heir, "cat /srv/data/file"), "precious");
    assert!(kib(&node, &heir) > 200 * 1024, "the file system has grown");
    node.guest(&heir, "dd if=/dev/zero of=/srv/data/big bs=1M count=100 && rm /srv/data/big");
    node.ok(&["stop", &heir]);

    // What cannot be mounted is told in words, and a lost disk is not made anew.
    let file = node.dir().join("disks/acme/data.ext4");
    OpenOptions::new().write(true).open(&file).unwrap().write_all_at(&[0; 8192], 0).unwrap();
    let damaged = node.mvm(&["start", &heir]).fails_with(1);
    damaged.says(&["disk data cannot be mounted on /srv/data", "no ext4 file system"]);
    std::fs::remove_file(&file).unwrap();
    node.ok(&["stop", &heir]);
    node.mvm(&["start", &heir]).fails_with(1).says(&["data.ext4", "No such file"]);
    assert!(!file.exists());

    node.ok(&["pool", "destroy", "acme/write", "--force"]);
    node.mvm(&["tenant", "destroy", "acme"]).fails_with(5).says(&["mvm disk rm acme/data"]);
    node.ok(&["disk", "rm", "acme/data"]);
    assert_eq!(node.json(&["disk", "list"]), Value::Array(vec![]));
    node.ok(&["tenant", "destroy", "acme"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_reader_of_a_disk_whose_writer_was_killed_says_how_its_journal_is_replayed() {
    let Some(node) = Node::new() else { return };
    node.ok(&["tenant", "create", "acme"]);
    node.ok(&["disk", "create", "acme/data", "--size", "64M"]);
    node.small_pool("acme/write", &["--disk", "64M", "--disk-attach", ON]);
    node.small_pool("acme/read", &["--disk", "64M", "--disk-attach", READ_ONLY]);
    let writer = node.boot("acme/write");
    node.guest(&writer, "echo one > /srv/data/file && sync && echo two > /srv/data/other");
    node.ok(&["kill", &writer]);

    let refused = node.mvm(&["instance", "create", "acme/read", "--start"]).fails_with(1);
    let instances = node.json(&["instance", "list", "acme/read"]);
    let reader = instances[0]["path"].as_str().unwrap().to_owned();
    let steps = [format!("mvm stop {reader}"), format!("mvm start {writer}")];
    refused.says(&["disk data cannot be mounted", &steps[0], &steps[1]]);
    for step in [["stop", &reader], ["start", &writer], ["kill", &writer]] {
        node.ok(&step);
    }
    node.ok(&["rm", &writer]);

    let replay = ["run", "--rm", "--tenant", "acme", "-v", "data:/mnt", "builtin", "true"];
    let refused = node.mvm(&["start", &reader]).fails_with(1);
    refused.says(&[&format!("mvm {}", replay.join(" "))]);
    node.ok(&["stop", &reader]);
    node.ok(&replay);
    node.ok(&["start", &reader]);
    assert_eq!(node.guest(&reader, "cat /srv/data/file"), "one");
}
