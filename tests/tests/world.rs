//! The world of a program in a real microVM, as images expect it: process 1, variables, directory,
//! user, limits and the kernel's parameters. Many checks share each boot.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use mvm_tests::archive::{archive_of_root, busybox_root};
use mvm_tests::{LIMIT, Node, until};
use serde_json::{Value, json};

/// Refuses, as s6-overlay does, to be any other process than the first.
const SUPERVISOR: &str = "#!/bin/sh
[ $$ = 1 ] || { echo 'can only run as process 1'; exit 100; }
echo \"args=$* FOO=$FOO big=${#BIG} in $(pwd) files=$(ulimit -n)\"
trap 'echo asked to end; exit 9' QUIT
while ! [ -e /tmp/end ]; do sleep 0.1; done
exit 5
";

/// A system's init: what it was given, and the way down that busybox's own programs ask for.
const SYSTEM: &str = "#!/bin/sh
echo \"pid=$$ args=$* FOO=$FOO container=$container in $(pwd)\" >/run/told
trap 'echo init-says-bye >/dev/console; poweroff -f' USR2
while :; do sleep 0.1; done
";

const PROGRAMS: [&str; 15] = [
    "sh", "cat", "ls", "id", "sleep", "tr", "stat", "df", "nc", "ping", "wc", "poweroff", "awk",
    "env", "kill",
];

/// An image with these programs of its own, which is run in this way.
fn image(node: &Node, dir: &Path, scripts: &[(&str, &str)], run: &Value) -> String {
    let root = busybox_root(node, dir, &PROGRAMS);
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1000:\nextra:x:2000:web\n").unwrap();
    for (name, text) in scripts {
        let path = root.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    format!("docker-archive:{}", archive_of_root(dir, &root, run).display())
}

#[test]
fn a_supervisor_that_insists_is_process_1_and_finds_what_image_and_pool_say() {
    let Some(node) = Node::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = json!({
        "Entrypoint": ["/init"], "Cmd": ["serve", "--all"], "Env": ["FOO=bar"],
        "WorkingDir": "/srv/app", "StopSignal": "SIGQUIT",
        "Volumes": { "/data": {}, "/srv/deep/store": {} },
        "Healthcheck": { "Test": ["CMD", "true"] },
    });
    let image = image(&node, dir.path(), &[("init", SUPERVISOR)], &run);
    let big = format!("BIG={}", "x".repeat(70_000));
    let options = [
        "-d",
        "--name",
        "box",
        "--mem",
        "192M",
        "-e",
        &big,
        "--ulimit",
        "nofile=100:200",
        "--sysctl",
        "net.core.somaxconn=777",
        "--shm-size",
        "16M",
    ];
    let path = node.ok(&[&["run"], &options[..], &[&image]].concat()).trim().to_owned();
    let told = "args=serve --all FOO=bar big=70000 in /srv/app files=100\n";
    until("the supervisor speaks", LIMIT, || (node.ok(&["logs", &path]) == told).then_some(()));
    assert_eq!(node.guest(&path, "tr '\\0' ' ' </proc/1/cmdline"), "/bin/sh /init serve --all");
    process_1_is_shared(&node, &path);
    directories_and_users(&node, &path);
    the_kernel_is_roomy(&node, &path);

    let info = node.ok(&["pool", "info", "default/box"]);
    for part in ["/data, /srv/deep/store", "the image's is not run", "net.core.somaxconn=777"] {
        assert!(info.contains(part), "{part}: {info}");
    }
    node.ok(&["stop", &path]);
    assert_eq!(node.ok(&["logs", &path]), format!("{told}asked to end\n"));
    assert_eq!(node.instance(&path)["exit_code"], 9);

    // Its own end is the instance's, and a kernel without a sysctl is named.
    node.ok(&["start", &path]);
    drop(node.mvm(&["exec", &path, "--", "sh", "-c", ": >/tmp/end"]));
    let view = until("it has ended", LIMIT, || {
        Some(node.instance(&path)).filter(|view| view["state"] == "failed")
    });
    assert_eq!(view["exit_code"], 5, "{view:#}");
    node.mvm(&["run", "--rm", "--mem", "192M", "--sysctl", "no.such=1", &image])
        .fails_with(1)
        .says(&["the guest's kernel has no sysctl no.such"]);
}

fn process_1_is_shared(node: &Node, path: &str) {
    // What exec starts is among the supervisor's processes, and its end and code are told.
    let alone = node.guest(path, "ls -d /proc/[0-9]* | wc -l");
    assert!(alone.trim().parse::<u32>().unwrap() < 10, "{alone}");
    node.mvm(&["exec", path, "--", "sh", "-c", "exit 7"]).fails_with(7);
    node.mvm(&["exec", path, "--", "sh", "-c", "kill -9 $$"]).fails_with(137);
    // Its descendants whose parent is gone are the supervisor's.
    let orphan = "(sh -c 'sleep 0.1; cat /proc/self/status >/tmp/orphan') & exit 0";
    node.ok(&["exec", path, "--", "sh", "-c", orphan]);
    node.guest(path, "while ! [ -s /tmp/orphan ]; do sleep 0.1; done");
}

fn directories_and_users(node: &Node, path: &str) {
    assert_eq!(node.guest(path, "pwd"), "/srv/app");
    assert_eq!(node.guest(path, "stat -c '%a %u' /data /srv/deep/store"), "755 0\n755 0");
    assert_eq!(node.guest(path, "echo ${#BIG} $FOO"), "70000 bar");
    let word = "y".repeat(100_000);
    let shown = node.ok(&["exec", path, "--", "sh", "-c", "echo ${#1}", "sh", &word]);
    assert_eq!(shown, "100000\n");
    let many = [&["exec", path, "--", "sh", "-c", "echo $#", "sh"], &[word.as_str(); 12][..]];
    assert_eq!(node.ok(&many.concat()), "12\n");
    let user = |options: &[&str]| {
        let script = "echo $(id -u):$(id -g):$(id -G):$HOME:$(pwd)";
        node.ok(&[&["exec", path], options, &["--", "sh", "-c", script]].concat())
    };
    assert_eq!(user(&[]), "0:0:0:/root:/srv/app\n");
    assert_eq!(user(&["-u", "web"]), "1000:1000:1000 2000:/home/web:/srv/app\n");
    assert_eq!(user(&["-u", "1000"]), "1000:1000:1000 2000:/home/web:/srv/app\n");
    assert_eq!(user(&["-u", "1234:5678"]), "1234:5678:5678:/:/srv/app\n");
    assert_eq!(user(&["-u", "web", "-w", "/tmp"]), "1000:1000:1000 2000:/home/web:/tmp\n");
    node.mvm(&["exec", path, "-w", "/none", "--", "ls"])
        .fails_with(127)
        .says(&["working directory `/none`"]);
}

fn the_kernel_is_roomy(node: &Node, path: &str) {
    let value = |name: &str| node.guest(path, &format!("cat /proc/sys/{name}"));
    assert_eq!(value("net/core/somaxconn"), "777");
    assert!(value("vm/max_map_count").parse::<u32>().unwrap() >= 262_144);
    assert_eq!(node.guest(path, "ulimit -Sn; ulimit -Hn"), "100\n200");
    assert!(node.guest(path, "df -k /dev/shm").contains(" 16384 "));
    let as_web = |script: &str| node.mvm(&["exec", path, "-u", "1000", "--", "sh", "-c", script]);
    let port = "nc -l -p 80 </dev/null & sleep 0.5; kill $! && echo listened";
    assert_eq!(as_web(port).ok().stdout, "listened\n");
    assert_eq!(value("net/ipv4/ping_group_range"), "0\t2147483647");
}

#[test]
fn a_system_that_a_command_names_is_process_1_with_its_arguments_and_variables() {
    let Some(node) = Node::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = json!({ "Env": ["FOO=bar", "container=docker"], "WorkingDir": "/srv" });
    let image = image(&node, dir.path(), &[("sbin/init", SYSTEM)], &run);
    let options = ["run", "-d", "--name", "system", "--mem", "192M", &image, "--"];
    let command = ["init", "--unit=rescue.target", "a b"];
    let path = node.ok(&[&options[..], &command].concat()).trim().to_owned();
    let told = "while ! [ -s /run/told ]; do sleep 0.1; done; cat /run/told";
    let expected = "pid=1 args=--unit=rescue.target a b FOO=bar container= in /srv";
    assert_eq!(node.guest(&path, told), expected);
    assert_eq!(node.guest(&path, "pwd; ulimit -n"), "/srv\n65536");
    node.ok(&["stop", &path]);
    let death = node.instance(&path)["last_death"].clone();
    assert_eq!(death["exit"]["reason"], "guest_shutdown", "{death:#}");
    assert!(node.ok(&["logs", &path, "--source", "console"]).contains("init-says-bye"));
}

#[test]
fn a_program_that_died_of_the_guests_memory_is_told_as_such() {
    let Some(node) = Node::new() else { return };
    let hog = "BEGIN { s = \"x\"; while (1) s = s s }";
    let output = node.mvm(&["run", "--mem", "128M", "builtin", "--", "awk", hog]);
    output.fails_with(137).says(&["the guest ran out of memory"]);
    let path = node.instances()[0]["path"].as_str().unwrap().to_owned();
    let why = until("its end is told", LIMIT, || {
        Some(node.ok(&["why", &path])).filter(|why| why.contains("signal 9"))
    });
    assert!(why.contains("signal 9: the guest ran out of memory"), "{why}");
}
