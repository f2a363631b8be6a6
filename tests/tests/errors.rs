//! What goes wrong before anything is made: the exit code, what is said, and that nothing changes.
//!
//! Most of it runs on the simulated VMM. [`network`](../network.rs) and [`exec`](../exec.rs) have
//! what goes wrong inside running microVMs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;

use mvm_tests::run::{Output, Running, tool};
use mvm_tests::wait::until;
use mvm_tests::{LIMIT, Node};

/// A command line, its exit code, and what its standard error must say.
type Row<'a> = (&'a [&'a str], i32, &'a [&'a str]);

/// A node whose agent simulates its microVMs.
fn simulated() -> Option<Node> {
    let node = Node::new()?;
    node.ok(&["--vmm", "sim", "ps"]);
    Some(node)
}

/// Runs a command that is refused: nothing on standard output, and an error that says all of this.
#[track_caller]
fn refused(node: &Node, args: &[&str], code: i32, parts: &[&str]) -> Output {
    let output = node.mvm(args).fails_with(code).says(&["error: "]).says(parts);
    assert!(output.stdout.is_empty(), "data beside an error: {output}");
    assert!(output.stderr.starts_with("error: "), "more than the error: {output}");
    output
}

/// Runs commands that are refused, and checks that nothing came of them.
fn all_refused(node: &Node, rows: &[Row<'_>]) {
    let state = || node.json(&["node", "record", "show", "desired/"]);
    let before = state();
    for (args, code, parts) in rows {
        refused(node, args, *code, parts);
    }
    assert_eq!(state(), before, "a refused command changed something");
}

/// The paths of a pool's instances.
fn paths(node: &Node, pool: &str) -> Vec<String> {
    let list = node.json(&["instance", "list", pool]);
    let list = list.as_array().into_iter().flatten();
    list.filter_map(|view| Some(view["path"].as_str()?.to_owned())).collect()
}

#[test]
fn what_does_not_exist_is_named_with_the_way_on() {
    let Some(node) = simulated() else { return };
    node.ok(&["tenant", "create", "demo"]);
    let no_tenant = &["there is no tenant nope", "hint: ", "`mvm tenant list`"];
    let no_pool = &["there is no pool demo/nope", "hint: ", "`mvm pool list`"];
    let mut rows: Vec<Row<'_>> = vec![
        (&["tenant", "info", "nope"], 3, no_tenant),
        (&["tenant", "destroy", "nope"], 3, no_tenant),
        (&["tenant", "update", "nope", "--mem", "1G"], 3, no_tenant),
        (&["pool", "create", "nope/web"], 3, no_tenant),
        (&["pool", "info", "demo/nope"], 3, no_pool),
        (&["pool", "build", "demo/nope"], 3, no_pool),
        (&["pool", "scale", "demo/nope", "--running", "1"], 3, no_pool),
        (&["pool", "destroy", "demo/nope"], 3, no_pool),
        (&["instance", "create", "demo/nope"], 3, &["`mvm pool create demo/nope`"]),
        (&["start", "--all"], 3, &["there are no instances", "`mvm run IMAGE`"]),
    ];
    let verbs: [&[&str]; 9] = [
        &["start"],
        &["stop"],
        &["restart"],
        &["rm"],
        &["why"],
        &["logs"],
        &["stats"],
        &["instance", "info"],
        &["exec"],
    ];
    let what = [("nope", "tenant nope"), ("demo/nope", "pool demo/nope"), ("i-0", "i-0")];
    let lines: Vec<(Vec<&str>, &str)> = verbs
        .iter()
        .flat_map(|verb| what.map(|(selector, name)| (*verb, selector, name)))
        .map(|(verb, selector, name)| {
            let program: &[&str] = if verb == ["exec"] { &["--", "true"] } else { &[] };
            ([verb, &[selector], program].concat(), name)
        })
        .collect();
    let parts: Vec<[&str; 2]> = lines.iter().map(|(_, name)| [*name, "hint: "]).collect();
    rows.extend(lines.iter().zip(&parts).map(|((args, _), parts)| (&args[..], 3, &parts[..])));
    all_refused(&node, &rows);
}

#[test]
fn what_makes_no_sense_is_a_usage_error_that_says_what_would() {
    let Some(node) = simulated() else { return };
    node.ok(&["tenant", "create", "demo"]);
    let name = &["lower-case letters, digits and `-`"];
    let long = "x".repeat(33);
    let rows: &[Row<'_>] = &[
        (&["tenant", "create", "De_mo"], 2, &["`De_mo`", name[0]]),
        (&["tenant", "create", "1st"], 2, name),
        (&["tenant", "create", &long], 2, &["longer than 32 characters"]),
        (&["tenant", "create", ""], 2, &["error: "]),
        (&["pool", "create", "demo/Web"], 2, name),
        (&["pool", "create", "demo/a/b"], 2, name),
        (&["pool", "create", "demo/x", "--mem", "8"], 2, &["--mem is 8M", "at least 96M"]),
        (&["pool", "create", "demo/x", "--mem", "lots"], 2, &["a size such as 256"]),
        (&["pool", "create", "demo/x", "--vcpus", "0"], 2, &["--vcpus is 0", "1 to 32"]),
        (&["pool", "create", "demo/x", "--disk", "1"], 2, &["--disk is 1M", "at least 16M"]),
        (&["pool", "create", "demo/x", "--image", "No Pe"], 2, &["expected builtin"]),
        (&["pool", "create", "demo/x", "--net", "nope"], 2, &["expected tenant or none"]),
        (&["pool", "create", "demo/x", "--boot-timeout", "0"], 2, &["at least 1"]),
        (&["start", "demo/web/x"], 2, &["`i-` and up to 8 hexadecimal digits"]),
        (&["start"], 2, &["SELECTOR"]),
        (&["tenant", "create", "a", "--subnet", "10.78.0.0"], 2, &["a subnet such as 10."]),
        (&["tenant", "create", "a", "--subnet", "10.78.0.1/24"], 2, &["mean 10.78.0.0/24?"]),
        (&["tenant", "create", "a", "--subnet", "8.8.8.0/24"], 2, &["within 10.0.0.0/8"]),
        (&["tenant", "create", "a", "--subnet", "10.0.0.0/8"], 2, &["/16 to /29"]),
        (&["tenant", "create", "a", "--subnet", "10.78.0.0/30"], 2, &["/16 to /29"]),
        (&["ps", "--vmm", "xen"], 2, &["`xen`", "firecracker, qemu, sim"]),
        (&["ps", "-o", "xml"], 2, &["table, json, yaml"]),
        (&["completions", "tcsh"], 2, &["bash, elvish, fish, powershell, zsh"]),
        (&["pss"], 2, &["'ps'"]),
        (&["node", "record", "set", "desired/x", "/nowhere"], 1, &["cannot read /nowhere"]),
    ];
    all_refused(&node, rows);
    for noun in ["tenant", "pool", "instance"] {
        let output = node.mvm(&[noun]).fails_with(2).says(&[&format!("Usage: mvm {noun}")]);
        assert!(output.stderr.contains("  create "), "no list of verbs: {output}");
    }
}

#[test]
fn what_is_there_already_or_in_use_is_a_conflict() {
    let Some(node) = simulated() else { return };
    node.ok(&["tenant", "create", "demo", "--subnet", "10.77.0.0/29"]);
    node.ok(&["pool", "create", "demo/web"]);
    node.ok(&["pool", "scale", "demo/web", "--running", "2"]);
    node.ok(&["instance", "create", "demo/web"]);
    let ids = paths(&node, "demo/web");
    let states = node.instances();
    let running: Vec<&str> = states
        .iter()
        .filter(|view| view["state"] == "running")
        .filter_map(|view| view["path"].as_str())
        .collect();
    let stopped = ids.iter().find(|path| !running.contains(&path.as_str())).unwrap();
    let named = [running[0], running[1], "`mvm pool destroy demo/web --force`"];
    let rm = [running[0], running[1], "`mvm rm -f demo/web --all`"];
    let full = ["10.77.0.0/29", "allows 4 instances: 3 in use, 2 more requested"];
    let several = ["demo/web matches 3 instances", &ids[0], "pass --all"];
    let rows: &[Row<'_>] = &[
        (&["tenant", "create", "demo"], 5, &["tenant demo exists already"]),
        (&["pool", "create", "demo/web"], 5, &["pool demo/web exists already"]),
        (
            &["tenant", "create", "b", "--subnet", "10.77.0.0/24"],
            5,
            &["of tenant demo", "--subnet"],
        ),
        (&["tenant", "create", "b", "--subnet", "10.77.0.4/30"], 2, &["/16 to /29"]),
        (&["pool", "destroy", "demo/web"], 5, &named),
        (&["rm", "demo/web", "--all"], 5, &rm),
        (&["tenant", "destroy", "demo"], 5, &["demo/web", "`mvm tenant destroy demo --force`"]),
        (&["instance", "create", "demo/web", "--count", "2"], 4, &full),
        (&["instance", "create", "demo/web", "--count", "0"], 2, &["1 to 1000"]),
        (&["instance", "create", "demo/web", "--count", "100000"], 2, &["1 to 1000"]),
        (&["start", "demo/web"], 2, &several),
        (&["start", "i-"], 2, &["i- matches 3 instances", "pass --all"]),
        (&["why", "demo/web"], 2, &["matches 3 instances", "name one of them"]),
        (&["instance", "info", "i-"], 2, &["matches 3 instances", "name one of them"]),
        (&["exec", stopped, "--", "true"], 5, &["not running", "`mvm start i-"]),
        (&["ps", "--vmm", "qemu"], 5, &["uses sim with tcg, not qemu", "`mvm agent stop`"]),
    ];
    all_refused(&node, rows);
    let output = node.mvm(&["pool", "destroy", "demo/web", "--force"]).ok();
    for path in running {
        assert!(output.stderr.contains(&format!("stopping {path}")), "{output}");
    }
    assert_eq!(node.instances(), [""; 0]);
}

#[test]
fn each_limit_says_what_is_asked_used_and_allowed() {
    let Some(node) = simulated() else { return };
    node.ok(&[
        &["tenant", "create", "demo", "--vcpus", "4", "--mem", "1G", "--disk", "1G"][..],
        &["--running", "3", "--pools", "4", "--instances-per-pool", "5"],
    ]
    .concat());
    for (pool, options) in [
        ("demo/a", &["--vcpus", "1", "--mem", "128", "--disk", "64"]),
        ("demo/cpus", &["--vcpus", "3", "--mem", "128", "--disk", "64"]),
        ("demo/mem", &["--vcpus", "1", "--mem", "900", "--disk", "64"]),
        ("demo/disk", &["--vcpus", "1", "--mem", "128", "--disk", "500"]),
    ] {
        node.ok(&[&["pool", "create", pool], &options[..]].concat());
    }
    node.ok(&["instance", "create", "demo/a", "--count", "2", "--start"]);
    node.ok(&["tenant", "create", "big", "--subnet", "10.251.0.0/16"]);
    node.ok(&["pool", "create", "big/big", "--mem", "4T"]);
    let up = "mvm tenant update demo --";
    let raise = |flag: &str| format!("raise it with `{up}{flag}`");
    let hints =
        ["vcpus 5", "mem 1156", "disk 1128", "running 4", "pools 5", "instances-per-pool 6"]
            .map(raise);
    let rows: &[Row<'_>] = &[
        (
            &["instance", "create", "demo/cpus", "--start"],
            4,
            &["quota of tenant demo allows 4 vCPUs: 2 in use, 3 more requested", &hints[0]],
        ),
        (
            &["instance", "create", "demo/mem", "--start"],
            4,
            &["allows 1024 MiB of memory: 256 in use, 900 more requested", &hints[1]],
        ),
        (
            &["instance", "create", "demo/disk", "--count", "2"],
            4,
            &["allows 1024 MiB of disk: 128 in use, 1000 more requested", &hints[2]],
        ),
        (
            &["pool", "scale", "demo/a", "--running", "4"],
            4,
            &["allows 3 running instances: 2 in use, 2 more requested", &hints[3]],
        ),
        (
            &["pool", "create", "demo/more"],
            4,
            &["allows 4 pools: 4 in use, 1 more requested", &hints[4]],
        ),
        (
            &["instance", "create", "demo/a", "--count", "4"],
            4,
            &["(pool demo/a) allows 5 instances per pool: 2 in use, 4 more requested", &hints[5]],
        ),
        (
            &["instance", "create", "big/big", "--start", "--count", "300"],
            4,
            &["this node allows 1073741824 MiB of memory: 256 in use", "`mvm ps -a`"],
        ),
    ];
    let rows: Vec<Row<'_>> = rows.to_vec();
    all_refused(&node, &rows);
}

#[test]
fn a_document_that_cannot_be_used_is_shown_with_its_place() {
    let Some(node) = simulated() else { return };
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let unknown = write("u.toml", "tenant = \"demo\"\n\n[pools.web]\nmemory = 3\n");
    let yaml = write("u.yaml", "tenant: demo\npools:\n  web:\n    memory: 3\n");
    let no_toml = write("no.toml", "tenant = \"demo\"\n[pools.web\n");
    let kind = write("kind.toml", "tenant = \"demo\"\n[quota]\nvcpus = \"four\"\n");
    let empty = write("empty.toml", "");
    let range = write("range.toml", "tenant = \"demo\"\n[pools.web]\nmem_mib = 8\n");
    let name = write("name.toml", "tenant = \"De mo\"\n");
    let language = write("fleet.ini", "tenant = \"demo\"\n");
    let over =
        write("over.toml", "tenant = \"demo\"\n[quota]\nrunning = 1\n[pools.web]\nrunning = 2\n");
    let rows: &[Row<'_>] = &[
        (&["up", "/no/such.toml"], 2, &["cannot read /no/such.toml: No such file"]),
        (&["up", "/"], 2, &["error: "]),
        (&["up", &no_toml], 2, &["no.toml:2:", "  | [pools.web"]),
        (&["up", &unknown], 2, &["u.toml:4:1: unknown field `memory`", "`mem_mib`", "\n  | ^"]),
        (&["up", &yaml], 2, &["u.yaml:4:5: unknown field `memory`", "mem_mib", "\n  |     ^"]),
        (&["up", &kind], 2, &["kind.toml:3:9: ", "expected a whole number", "  |         ^"]),
        (&["up", &empty], 2, &["empty.toml:1:1: missing field `tenant`"]),
        (&["up", &range], 2, &["pool demo/web: mem_mib is 8, but must be at least 96"]),
        (&["up", &name], 2, &["name.toml:1:10: tenant name `De mo` is not valid"]),
        (&["up", &language], 2, &["fleet.ini", ".toml, .yaml, .yml or .json"]),
        (&["up", &over], 4, &["allows 1 running instances: 0 in use, 2 more requested"]),
        (&["down", &unknown], 2, &["u.toml:4:1: "]),
    ];
    all_refused(&node, rows);
}

#[test]
fn a_vmm_without_a_driver_and_a_socket_without_an_agent_are_unreachable() {
    let Some(node) = Node::new() else { return };
    let says = &["Firecracker cannot be used", "`--vmm qemu`", "agent.log"];
    refused(&node, &["ps", "--vmm", "firecracker"], 7, says);
    refused(&node, &["agent", "status"], 7, &["no agent runs for", "`mvm ps`"]);
    let socket = node.dir().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let stranger = std::thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in listener.incoming().take(3) {
            let mut stream = stream.unwrap();
            stream.read_exact(&mut [0; 8]).unwrap();
            stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").unwrap();
        }
    });
    for line in [&["ps"][..], &["exec", "a/b", "--", "true"], &["stop", "--all"]] {
        refused(&node, line, 7, &["does not speak this version's protocol", "hint: "]);
    }
    stranger.join().unwrap();
    // What nobody listens on is no agent's any more: the next command starts one.
    assert!(socket.exists());
    node.ok(&["--vmm", "sim", "ps"]);
}

#[test]
fn a_subnet_of_the_host_itself_is_refused() {
    let Some(node) = Node::new() else { return };
    let link = format!("e2e{}", std::process::id());
    let _link = Link::bridge(&link, "10.99.7.1/24");
    for subnet in ["10.99.7.0/24", "10.99.0.0/16", "10.99.7.128/25"] {
        let says = &["overlaps 10.99.7.0/24, which this machine uses itself", "--subnet"];
        node.mvm(&["tenant", "create", "demo", "--subnet", subnet]).fails_with(5).says(says);
    }
    assert_eq!(node.json(&["tenant", "list"]), serde_json::json!([]));
}

/// A link of the test's own, removed when dropped.
struct Link(String);

impl Link {
    fn bridge(name: &str, address: &str) -> Self {
        tool("ip", &["link", "add", name, "type", "bridge"]).ok();
        let link = Self(name.to_owned());
        tool("ip", &["addr", "add", address, "dev", name]).ok();
        tool("ip", &["link", "set", name, "up"]).ok();
        link
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        tool("ip", &["link", "del", &self.0]);
    }
}

/// Makes the directory `$2` lack the program `$3`, with `$1` as a place to work in, and becomes the
/// rest of its arguments.
const HIDE: &str = r#"
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mknod "$1/upper/$3" c 0 0
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$2"
shift 3
exec "$@"
"#;

/// Runs a command on a machine that lacks a program, that is, in a mount namespace where it was
/// removed. An agent that the command starts lacks it too.
fn without(node: &Node, program: &str, args: &[&str]) -> Output {
    let dirs = ["/usr/bin", "/usr/sbin"].map(Path::new);
    let dir = *dirs.iter().find(|dir| dir.join(program).exists()).unwrap();
    let work = tempfile::tempdir().unwrap();
    let mvm = node.command(args);
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", HIDE, "sh"]);
    command.arg(work.path()).arg(dir).arg(program);
    command.arg(mvm.get_program()).args(mvm.get_args()).env("MVM_STATE_DIR", node.dir());
    command.current_dir(mvm_tests::binary::repository());
    Running::start(command, None).wait(LIMIT)
}

#[test]
fn a_missing_tool_is_named_with_what_installs_it() {
    let Some(node) = Node::new() else { return };
    for program in ["mkfs.erofs", "mke2fs", "nft", "depmod", "qemu-system-x86_64"] {
        let doctor = without(&node, program, &["doctor", "-o", "json"]).fails_with(1);
        let checks = doctor.json();
        let fails = |check: &&serde_json::Value| check["verdict"] == "fail";
        let failed: Vec<_> = checks.as_array().unwrap().iter().filter(fails).collect();
        assert_eq!(failed.len(), 1, "{program}: {checks:#}");
        assert_eq!(failed[0]["fix"], "sudo mvm bootstrap", "{program}");

        let up = without(&node, program, &["up", "examples/hello.toml"]).fails_with(1);
        up.says(&[&format!("it lacks `{program}`"), "`mvm bootstrap`"]);
        assert_eq!(node.agent_pid(), None, "an agent was started for nothing");
    }
    // Whoever does without the check hears of it where the tool is needed.
    let create = without(&node, "nft", &["tenant", "create", "demo"]);
    until("the missing tool is told", LIMIT, || {
        let told = format!("{create}{}", node.ok(&["node", "info"]));
        told.contains("`nft` is not installed: `mvm bootstrap`").then_some(())
    });
}
