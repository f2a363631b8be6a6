//! systemd as an image's own init, in a Debian system that was made for the test.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::{Path, PathBuf};

use mvm_tests::archive::docker_archive;
use mvm_tests::made_once::Debian;
use mvm_tests::{LIMIT, Node, until};

/// A unit that is stopped early in a shutdown, and says on the console that it was.
const UNIT: &str = "\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'echo unit-is-stopped >/dev/console'
[Install]
WantedBy=multi-user.target
";

/// A Debian system with systemd, which is made once; or `None`, and the reason is printed.
fn debian() -> Option<PathBuf> {
    let debian = Debian { name: "systemd", packages: "systemd-sysv,dbus", options: &[] };
    let archive = debian.archive()?;
    let dir = archive.parent()?;
    let image = dir.join("image.tar");
    match image.exists() {
        true => Some(image),
        false => Some(docker_archive(dir, "layer.tar", &["/sbin/init"])),
    }
}

fn boot(node: &Node, image: &Path) -> String {
    let image = format!("docker-archive:{}", image.display());
    let options = ["--image", &image, "--mem", "512M", "--net", "none", "--restart", "never"];
    node.ok(&["tenant", "create", "acme"]);
    node.ok(&[&["pool", "create", "acme/debian"], &options[..]].concat());
    node.ok(&["pool", "build", "acme/debian"]);
    node.boot("acme/debian")
}

fn until_up(node: &Node, path: &str) {
    let state = until("systemd has started everything", LIMIT, || {
        let args = ["exec", path, "--", "systemctl", "is-system-running", "--wait"];
        let state = node.mvm(&args).stdout.trim().to_owned();
        ["running", "degraded"].contains(&&*state).then_some(state)
    });
    assert_eq!(state, "running", "{}", node.mvm(&["exec", path, "--", "systemctl", "--failed"]));
}

#[test]
fn systemd_is_process_1_and_ends_in_its_own_order() {
    let Some(node) = Node::new() else { return };
    let Some(image) = debian() else { return };
    let path = boot(&node, &image);
    assert_eq!(node.guest(&path, "readlink /proc/1/exe"), "/usr/lib/systemd/systemd");
    until_up(&node, &path);
    let install = "cat >/etc/systemd/system/last.service && systemctl enable --now last.service";
    let args = ["exec", "-i", &path, "--", "sh", "-c", install];
    node.mvm_with_input(&args, UNIT.as_bytes()).ok();

    node.ok(&["stop", &path]);
    let death = node.instance(&path)["last_death"].clone();
    assert_eq!(death["cause"], "operator", "{death:#}");
    assert_eq!(death["exit"]["reason"], "guest_shutdown", "{death:#}");
    let console = node.ok(&["logs", &path]);
    assert!(console.contains("unit-is-stopped"), "{console}");
    // The guest agent is spared to the end.
    assert!(console.contains("marked to be excluded from killing"), "{console}");
    assert!(!console.contains("Timed out waiting for device"), "{console}");

    // What was written is there after it.
    node.ok(&["start", &path]);
    until_up(&node, &path);
    assert_eq!(node.guest(&path, "systemctl is-active last.service"), "active");
    node.ok(&["exec", &path, "--", "systemctl", "poweroff", "--no-block"]);
    let view = node.until_state(&path, "stopped");
    assert_eq!(view["last_death"]["cause"], "guest_shutdown", "{view:#}");
}
