//! The inits of other systems as process 1: SysV's, and on demand OpenRC and runit.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::made_once::Debian;
use mvm_tests::{LIMIT, Node, until};

/// Boots a system with a service that says on the console when it begins and ends, and stops it.
fn lives_and_ends_in_order(debian: &Debian, init: &str) {
    let Some(node) = Node::new() else { return };
    let Some(archive) = debian.archive() else { return };
    let image = format!("rootfs:{}", archive.display());
    let options = ["--image", &image, "--mem", "512M", "--net", "none", "--restart", "never"];
    node.ok(&["tenant", "create", "acme"]);
    node.ok(&[&["pool", "create", "acme/box"], &options[..]].concat());
    let path = node.boot("acme/box");
    assert_eq!(node.guest(&path, "readlink /proc/1/exe"), init);
    until("the service has begun", LIMIT, || {
        node.ok(&["logs", &path]).contains("service-has-begun").then_some(())
    });
    node.ok(&["stop", &path, "--grace", "90"]);
    let death = node.instance(&path)["last_death"].clone();
    assert_eq!(death["cause"], "operator", "{death:#}");
    assert_eq!(death["exit"]["reason"], "guest_shutdown", "{death:#}");
    let console = node.ok(&["logs", &path]);
    assert!(console.contains("service-has-ended"), "{console}");
    // Nothing that it killed was ours, and nothing of ours was waited for.
    assert!(!console.contains("Killing all remaining processes...[31mfailed"), "{console}");
}

#[test]
fn sysv_init_runs_its_scripts_and_ends_in_their_order() {
    lives_and_ends_in_order(&Debian::WITH_SERVICES, "/usr/sbin/init");
}

#[test]
#[ignore = "on demand: its Debian takes two minutes to make"]
fn openrc_runs_its_scripts_and_ends_in_their_order() {
    lives_and_ends_in_order(&Debian::OPENRC, "/usr/sbin/init");
}

/// A service of runit, whose program says itself that it ends.
const SERVICE: &str = r#"--customize-hook=
mkdir -p "$1/etc/sv/told" "$1/etc/service" && cat >"$1/etc/sv/told/run" <<'END'
#!/bin/sh
trap 'echo service-has-ended >/dev/console; exit 0' TERM
echo service-has-begun >/dev/console
while :; do sleep 1; done
END
chmod +x "$1/etc/sv/told/run" && ln -sf /etc/sv/told "$1/etc/service/told""#;

#[test]
#[ignore = "on demand: its Debian takes two minutes to make"]
fn runit_runs_its_services_and_ends_them() {
    let debian = Debian { name: "runit", packages: "runit-init,runit", options: &[SERVICE] };
    lives_and_ends_in_order(&debian, "/usr/sbin/runit");
}
