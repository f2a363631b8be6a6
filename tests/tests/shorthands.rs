//! Short ways to say things, and data for programs. It runs on the simulated VMM.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::run::tool;
use mvm_tests::{LIMIT, Node, Running};
use serde_json::Value;

/// A node with two running instances of one pool, and one of another, and the paths of all.
fn simulated() -> Option<(Node, [String; 3])> {
    let node = Node::new()?;
    node.ok(&["--vmm", "sim", "tenant", "create", "demo"]);
    node.ok(&["pool", "create", "demo/web"]);
    node.ok(&["pool", "create", "demo/solo"]);
    let output = node.json(&["instance", "create", "demo/web", "--count", "2", "--start"]);
    let path = |output: &Value, i: usize| {
        output["concerns"]["instances"][i].as_str().expect("a path").to_owned()
    };
    let paths = [path(&output, 0), path(&output, 1), node.boot("demo/solo")];
    Some((node, paths))
}

fn id(path: &str) -> &str {
    path.rsplit('/').next().expect("a path has an id")
}

/// The shortest prefix of an id that no other has.
fn unique_prefix<'a>(path: &'a str, all: &[String]) -> &'a str {
    let id = id(path);
    let is_unique =
        |prefix: &str| all.iter().filter(|other| self::id(other).starts_with(prefix)).count() == 1;
    let len = (3..=id.len()).find(|len| is_unique(&id[..*len])).expect("ids differ");
    &id[..len]
}

#[test]
fn short_verbs_are_the_long_ones() {
    let Some((node, paths)) = simulated() else { return };
    let path = paths[2].as_str();
    for (short, long) in [
        (&["ps", "-a"][..], &["instance", "list"][..]),
        (&["why", path], &["instance", "why", path]),
        (&["logs", path], &["instance", "logs", path]),
        (&["exec", path, "--", "echo", "x"], &["instance", "exec", path, "--", "echo", "x"]),
    ] {
        assert_eq!(node.ok(short), node.ok(long), "{short:?}");
    }
    for (verb, state) in [("stop", "stopped"), ("start", "running"), ("restart", "running")] {
        for noun in [&[][..], &["instance"]] {
            let said = node.ok(&[noun, &[verb, path]].concat());
            assert_eq!(said.trim(), path);
            assert_eq!(node.instance(path)["state"], state, "{noun:?} {verb}");
        }
    }
    let paths_of = |stats: Value| -> Vec<Value> {
        stats.as_array().into_iter().flatten().map(|view| view["path"].clone()).collect()
    };
    let [short, long] = [&["stats"][..], &["instance", "stats"]].map(|line| node.json(line));
    assert_eq!(paths_of(short), paths_of(long));
    node.ok(&["rm", path, "-f"]);
    node.ok(&["instance", "destroy", &paths[0], "--force"]);
    assert_eq!(node.instances().len(), 1);
}

#[test]
fn an_instance_is_found_by_whatever_means_it_alone() {
    let Some((node, paths)) = simulated() else { return };
    for path in &paths {
        let prefix = unique_prefix(path, &paths);
        let pool = path.rsplit_once('/').expect("a path").0;
        let mut names = vec![path.clone(), id(path).to_owned(), prefix.to_owned()];
        names.push(format!("{pool}/{prefix}"));
        // Without i- where it cannot be the name of a tenant.
        if prefix[2..].starts_with(|c: char| c.is_ascii_digit()) {
            names.push(prefix[2..].to_owned());
            names.push(format!("{pool}/{}", &prefix[2..]));
        }
        for name in names {
            assert_eq!(node.json(&["instance", "info", &name])["path"], **path, "{name}");
        }
    }
    // A pool is enough where it has one instance, or where any will do.
    assert_eq!(node.json(&["why", "demo/solo"])["instance"]["path"], paths[2]);
    assert_eq!(node.ok(&["exec", "demo/web", "--", "echo", "x"]), "x\n");
    assert_eq!(node.ok(&["exec", "demo", "--", "echo", "x"]), "x\n");
    node.ok(&["stop", &paths[0]]);
    assert_eq!(node.ok(&["exec", "demo/web", "--", "echo", "x"]), "x\n", "the one that runs");
    node.mvm(&["logs", "demo/web"]).fails_with(2).says(&["matches 2 instances"]);
    // All that a name means, where that is said.
    node.ok(&["stop", "demo", "--all"]);
    assert_eq!(node.ok(&["ps"]).lines().count(), 1, "only the header");
    node.ok(&["start", "demo/web", "--all"]);
    assert_eq!(node.json(&["ps"]).as_array().map(Vec::len), Some(2));
}

/// All of these are there; the whole list is `docs/schema`'s, which has a test of its own.
fn assert_fields(value: &serde_json::Value, names: &[&str]) {
    let object = value.as_object().expect("an object");
    let missing: Vec<_> = names.iter().filter(|name| !object.contains_key(**name)).collect();
    assert!(missing.is_empty(), "{missing:?} are not in {value:#}");
}

/// A change of these names breaks programs that read them.
#[test]
fn data_for_programs_has_its_fields_in_json_and_yaml() {
    const QUOTA: [&str; 6] =
        ["vcpus", "mem_mib", "disk_mib", "running", "pools", "instances_per_pool"];
    const USAGE: [&str; 6] = ["vcpus", "mem_mib", "disk_mib", "running", "pools", "instances"];
    const TENANT: [&str; 8] =
        ["name", "subnet", "gateway", "bridge", "quota", "reserved", "created_unix_ms", "removing"];
    const POOL: [&str; 17] = [
        "path",
        "image",
        "vcpus",
        "mem_mib",
        "disk_mib",
        "net",
        "restart",
        "boot_timeout_s",
        "desired_running",
        "running",
        "instances",
        "revision",
        "build",
        "build_generation",
        "created_unix_ms",
        "removing",
        "exposed_ports",
    ];
    const INSTANCE: [&str; 22] = [
        "path",
        "state",
        "activity",
        "desired",
        "generation",
        "waiting",
        "address",
        "mac",
        "tap",
        "vcpus",
        "mem_mib",
        "disk_mib",
        "revision",
        "vmm",
        "pid",
        "accel",
        "running_since_unix_ms",
        "created_unix_ms",
        "boots",
        "failures",
        "last_death",
        "exposed_ports",
    ];
    let Some((node, paths)) = simulated() else { return };
    let path = paths[2].as_str();
    let tenant = &node.json(&["tenant", "list"])[0];
    assert_fields(tenant, &TENANT);
    assert_fields(&tenant["quota"], &QUOTA);
    assert_fields(&tenant["reserved"], &USAGE);
    assert_eq!(node.json(&["tenant", "info", "demo"]), *tenant);
    let pools = node.json(&["pool", "list"]);
    assert_fields(&pools[0], &POOL);
    assert_eq!(node.json(&["pool", "info", "demo/solo"]), pools[0]);
    assert_eq!(node.json(&["pool", "list", "demo"]), pools);
    let instances = node.json(&["ps", "demo/solo"]);
    assert_fields(&instances[0], &INSTANCE);
    assert_eq!(node.json(&["instance", "info", path]), instances[0]);
    assert_fields(
        &node.json(&["why", path]),
        &["instance", "summary", "output_tail", "console_tail"],
    );
    let stats = node.json(&["stats", path]);
    let usage = [
        "path",
        "cpu_ms",
        "host_rss_kib",
        "host_disk_kib",
        "disk_read_kib",
        "disk_written_kib",
        "disk_io",
        "vmm_counters",
        "traffic",
        "guest",
        "guest_error",
    ];
    assert_fields(&stats[0], &usage);
    let verify = node.json(&["net", "verify"]);
    assert_fields(&verify, &["tenants", "instances", "differences"]);
    let info = [
        "version",
        "pid",
        "started_unix_ms",
        "state_dir",
        "hostname",
        "vmm",
        "accel",
        "chosen_because",
        "capacity",
        "reserved",
        "tenants",
        "bad_records",
        "problems",
    ];
    assert_fields(&node.json(&["node", "info"]), &info);
    assert_fields(&node.json(&["agent", "status"]), &info);
    assert_fields(&node.json(&["node", "record", "show"])[0], &["key", "text"]);
    assert_fields(&node.json(&["version"]), &["version"]);
    let outcome = node.json(&["stop", path]);
    let fields = ["revision", "waited", "notes", "concerns", "instances", "pools"];
    assert_fields(&outcome, &fields);
    assert_fields(&outcome["concerns"], &["instances", "pools"]);
    // Nothing is an empty list, and nothing is said beside it.
    let nothing = node.mvm(&["stats", "-o", "json", "demo/solo"]).ok();
    assert_eq!((nothing.stdout.as_str(), nothing.stderr.as_str()), ("[]\n", ""));
    for line in [&["tenant", "list"][..], &["pool", "info", "demo/web"], &["ps"], &["node", "info"]]
    {
        let yaml = node.ok(&[&["-o", "yaml"], line].concat());
        // What is empty is written as such.
        let filled = yaml.replace("{}", "");
        assert!(filled.contains(": ") && !filled.contains('{'), "{yaml}");
    }
}

#[test]
fn completions_are_scripts_that_their_shells_take() {
    let Some(node) = Node::new() else { return };
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = node.mvm(&["completions", shell]).ok();
        assert_eq!(script.stderr, "", "{shell}");
        assert!(script.stdout.contains("mvm"), "{shell}");
        let file = node.dir().join(shell);
        std::fs::write(&file, &script.stdout).unwrap();
        // The others are not installed everywhere.
        if shell == "bash" {
            let file = file.to_str().expect("a temporary directory has a plain name");
            tool("bash", &["-n", file]).ok();
        }
    }
    assert!(node.agent_pid().is_none(), "completions need no agent");
}

#[test]
fn the_version_is_the_same_everywhere_and_help_is_data() {
    let Some(node) = Node::new() else { return };
    let version = node.ok(&["version"]);
    assert!(version.starts_with("mvm ") && version.contains('.'), "{version}");
    for flag in ["--version", "-V"] {
        assert_eq!(node.ok(&[flag]), version);
    }
    for line in [&["--help"][..], &["-h"], &["help"], &["help", "exec"], &["exec", "--help"]] {
        let help = node.mvm(line).ok();
        assert!(help.stdout.contains("Usage: mvm") && help.stderr.is_empty(), "{help}");
    }
    assert!(node.agent_pid().is_none(), "they need no agent");
}

/// On a terminal, messages are coloured unless that is not wished.
#[test]
fn no_color_is_honoured() {
    let Some(node) = Node::new() else { return };
    let on_terminal = |variable: Option<&str>, options: &str| {
        let mvm = node.command(&[]);
        let mut command = std::process::Command::new("script");
        let line = format!("{} {options} agent status", mvm.get_program().display());
        command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        command.env("MVM_STATE_DIR", node.dir()).env("TERM", "xterm").env_remove("NO_COLOR");
        if let Some(value) = variable {
            command.env("NO_COLOR", value);
        }
        let output = Running::start(command, None).wait(LIMIT).fails_with(7);
        assert!(output.stdout.contains("no agent runs"), "{output}");
        output.stdout.contains('\x1b')
    };
    assert!(on_terminal(None, ""));
    assert!(on_terminal(Some(""), ""), "an empty value wishes nothing");
    assert!(!on_terminal(Some("1"), ""));
    assert!(!on_terminal(None, "--no-color"));
    let plain = node.mvm(&["agent", "status"]).fails_with(7);
    assert!(!plain.stderr.contains('\x1b'), "not on a terminal");
}
