//! An image's own init in real microVMs: process 1 is its, and the guest agent is beside it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_tests::archive::{archive_of_root, busybox_root};
use mvm_tests::{Node, until};
use serde_json::json;

const INITTAB: &str = "\
::sysinit:/bin/busybox sh -c 'hostname > /run/name; echo init-was-here > /dev/console'
::shutdown:/bin/busybox sh -c 'echo init-says-bye > /dev/console'
";

/// A root with busybox and, if there is to be one, its init.
fn root(node: &Node, dir: &Path, has_init: bool) -> PathBuf {
    let root = busybox_root(node, dir, &["sh", "cat", "hostname", "poweroff", "tr"]);
    if has_init {
        symlink("/bin/busybox", root.join("sbin/init")).unwrap();
    }
    fs::write(root.join("etc/inittab"), INITTAB).unwrap();
    root
}

fn pool(node: &Node, name: &str, has_init: bool) {
    let dir = tempfile::tempdir().unwrap();
    let archive = archive_of_root(
        dir.path(),
        &root(node, dir.path(), has_init),
        &json!({ "Cmd": ["/sbin/init"] }),
    );
    let image = format!("docker-archive:{}", archive.display());
    node.small_pool(name, &["--image", &image, "--restart", "never"]);
    node.ok(&["pool", "build", name]);
}

#[test]
fn an_init_is_process_1_is_asked_to_power_off_and_may_do_so_itself() {
    let Some(node) = Node::new() else { return };
    pool(&node, "acme/init", true);
    let path = node.boot("acme/init");
    assert_eq!(node.guest(&path, "cat /proc/1/comm"), "init");
    let name = node.guest(&path, "while ! test -s /run/name; do :; done; cat /run/name");
    assert_eq!(name, format!("init-{}", path.rsplit('/').next().unwrap()));
    let agents = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done";
    assert!(node.guest(&path, agents).lines().any(|line| line.starts_with('@')));
    assert!(node.ok(&["logs", &path]).contains("init-was-here"));
    node.mvm(&["attach", &path]).fails_with(5).says(&["no main process"]);

    node.ok(&["stop", &path]);
    let view = node.instance(&path);
    assert_eq!(view["last_death"]["cause"], "operator");
    assert_eq!(view["last_death"]["exit"]["reason"], "guest_shutdown", "{view:#}");
    assert!(node.ok(&["logs", &path]).contains("init-says-bye"));

    node.ok(&["start", &path]);
    // The program's own end is not waited for: the machine goes.
    drop(node.mvm(&["exec", &path, "--", "poweroff"]));
    let view = node.until_state(&path, "stopped");
    assert_eq!(view["last_death"]["cause"], "guest_shutdown", "{view:#}");
}

#[test]
fn an_init_behind_a_link_of_another_name_is_process_1() {
    let Some(node) = Node::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let root = root(&node, dir.path(), false);
    let init = root.join("sbin/init");
    fs::write(&init, "#!/bin/busybox sh\nexec /bin/busybox init\n").unwrap();
    fs::set_permissions(&init, PermissionsExt::from_mode(0o755)).unwrap();
    symlink("sbin/init", root.join("entry")).unwrap();
    let config = json!({ "Entrypoint": ["/entry"] });
    let archive = archive_of_root(dir.path(), &root, &config);
    let image = format!("docker-archive:{}", archive.display());
    node.small_pool("acme/entry", &["--image", &image, "--restart", "never"]);
    let path = node.boot("acme/entry");
    // The script may be asked before it has become that.
    until("the init is process 1", Duration::from_secs(30), || {
        let process_1 = node.guest(&path, "tr '\\0' ' ' < /proc/1/cmdline");
        (process_1 == "/bin/busybox init").then_some(())
    });
    node.ok(&["stop", &path]);
    assert_eq!(node.instance(&path)["last_death"]["exit"]["reason"], "guest_shutdown");
}

#[test]
fn an_init_that_is_not_there_is_said() {
    let Some(node) = Node::new() else { return };
    pool(&node, "acme/none", false);
    node.mvm(&["instance", "create", "acme/none", "--start"])
        .fails_with(127)
        .says(&["start failed: init `/sbin/init`: No such file or directory"]);
}
