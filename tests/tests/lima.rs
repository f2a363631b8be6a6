//! Commands that are handed over to a Lima machine, with a stand-in for `limactl` that runs them
//! here, in an environment of their own as `ssh` gives it. What only a Mac can show is not shown.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_tests::{LIMIT, Node, Output, Running, binary};

const LIMACTL: &str = r#"#!/bin/sh
printf '%s\n' "$*" >> "$LIMA_HOME/log"
case "$1" in
--version) echo limactl version 1.0.0 ;;
start)
    for last; do :; done
    case "$last" in *.yaml) cp "$last" "$LIMA_HOME/template" ;; esac
    mkdir -p "$LIMA_HOME/lab" ;;
copy) test -x "$2" ;;
shell)
    [ -t 0 ] && [ -t 1 ] && echo tty >> "$LIMA_HOME/log"
    cd "$3" || exit 1
    shift 4
    exec env -i PATH="$PATH" LIMA_HOME="$LIMA_HOME" "$@" ;;
*) exit 99 ;;
esac
"#;

/// The machine's `sudo`, which installs nothing on this one.
const SUDO: &str = r#"#!/bin/sh
[ "$1" = install ] && exit 0
exec "$@"
"#;

/// A home with programs in front of the others.
struct Lima {
    home: tempfile::TempDir,
}

impl Lima {
    fn new() -> Self {
        let lima = Self { home: tempfile::tempdir().unwrap() };
        fs::create_dir(lima.bin()).unwrap();
        fs::create_dir(lima.lima_home()).unwrap();
        lima.program("limactl", LIMACTL);
        lima.program("sudo", SUDO);
        symlink(binary::mvm(), lima.bin().join("mvm")).unwrap();
        lima
    }

    fn bin(&self) -> PathBuf {
        self.home.path().join("bin")
    }

    fn lima_home(&self) -> PathBuf {
        self.home.path().join("lima")
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.bin().join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Makes the machine, as far as a command needs to see of it.
    fn make_machine(&self) {
        fs::create_dir(self.lima_home().join("lab")).unwrap();
    }

    /// A command in this home, which finds the stand-in.
    fn around(&self, mut command: Command, dir: &Path) -> Command {
        let path = format!("{}:{}", self.bin().display(), std::env::var("PATH").unwrap());
        command.current_dir(dir).env("PATH", path).env("HOME", self.home.path());
        command.env("LIMA_HOME", self.lima_home()).env("MVM_LIMA", "lab");
        command
    }

    fn run(&self, node: &Node, args: &[&str], stdin: Option<&[u8]>) -> Output {
        Running::start(self.around(node.command(args), self.home.path()), stdin).wait(LIMIT)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.lima_home().join("log")).unwrap_or_default()
    }
}

const DOCUMENT: &str = "tenant = \"demo\"\n[pools.web]\nrunning = 1\n";

#[test]
fn arguments_input_files_exit_code_and_terminal_are_the_forwarded_commands_own() {
    let Some(node) = Node::new() else { return };
    let lima = Lima::new();
    lima.make_machine();
    lima.run(&node, &["--vmm", "sim", "up", "-"], Some(DOCUMENT.as_bytes())).ok();
    assert!(lima.log().contains("lab sudo env MVM_LIMA="), "{}", lima.log());
    let [path] = &node.instances()[..] else { panic!("not one") };
    let path = path["path"].as_str().unwrap();

    // Words with blanks, quotes and nothing in them arrive as they are.
    let printed =
        lima.run(&node, &["exec", path, "--", "echo", "a  b", "", "$HOME 'x' \"y\""], None);
    assert_eq!(printed.ok().stdout, "a  b  $HOME 'x' \"y\"\n");
    let copied = lima.run(&node, &["exec", "-i", path, "--", "cat"], Some(b"\x00\xffbytes\n"));
    assert!(copied.ok().stdout.ends_with("bytes\n"));
    lima.run(&node, &["tenant", "info", "nobody"], None).fails_with(3).says(&["no tenant nobody"]);
    lima.run(&node, &["exec", path, "--", "sh", "-c", "exit 7"], None).fails_with(7);
    lima.run(&node, &["frobnicate"], None).fails_with(2);

    // A file is found by a path relative to where the command was typed.
    let below = lima.home.path().join("below");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("fleet.toml"), DOCUMENT).unwrap();
    let up = lima.around(node.command(&["up", "fleet.toml"]), &below);
    Running::start(up, None).wait(LIMIT).ok();
    let outside = lima.around(node.command(&["ps"]), Path::new("/usr"));
    Running::start(outside, None).wait(LIMIT).ok();
    assert!(lima.log().contains("shell --workdir / lab"), "{}", lima.log());

    // The terminal is the command's own.
    assert!(!lima.log().contains("tty\n"));
    let typed = format!("{} ps", lima.bin().join("mvm").display());
    let mut script = Command::new("script");
    script.args(["-qec", &typed, "/dev/null"]).env("MVM_STATE_DIR", node.dir());
    let shown = Running::start(lima.around(script, lima.home.path()), None).wait(LIMIT).ok();
    assert!(shown.stdout.contains(path), "{shown}");
    assert!(lima.log().contains("tty\n"), "{}", lima.log());
}

#[test]
fn a_native_command_never_looks_for_lima() {
    let Some(node) = Node::new() else { return };
    let lima = Lima::new();
    lima.make_machine();
    let native = |args: &[&str], unset: bool| {
        let mut command = lima.around(node.command(args), lima.home.path());
        match unset {
            true => command.env_remove("MVM_LIMA"),
            false => command.env("MVM_LIMA", ""),
        };
        Running::start(command, None).wait(LIMIT).ok();
    };
    for unset in [true, false] {
        native(&["version"], unset);
        native(&["--vmm", "sim", "ps"], unset);
        native(&["--help"], unset);
    }
    assert_eq!(lima.log(), "");
}

#[test]
fn without_lima_or_its_machine_the_next_command_is_told() {
    let Some(node) = Node::new() else { return };
    let lima = Lima::new();
    lima.run(&node, &["ps"], None)
        .fails_with(7)
        .says(&["no Lima machine `lab`", "`mvm bootstrap`"]);
    fs::remove_file(lima.bin().join("limactl")).unwrap();
    for verb in ["ps", "bootstrap"] {
        lima.run(&node, &[verb], None).fails_with(7).says(&["`limactl` is not installed", "brew"]);
    }
    let mut command = lima.around(node.command(&["ps"]), lima.home.path());
    command.env("MVM_LIMA", "--all");
    Running::start(command, None).wait(LIMIT).fails_with(2).says(&["not a Lima machine's name"]);
}

#[test]
fn bootstrap_makes_the_machine_installs_mvm_in_it_and_goes_on_inside() {
    let Some(node) = Node::new() else { return };
    let lima = Lima::new();
    lima.run(&node, &["bootstrap", "--yes"], None).ok();
    let template = fs::read_to_string(lima.lima_home().join("template")).unwrap();
    for line in ["vmType: qemu", "nestedVirtualization: false", "writable: true"] {
        assert!(template.contains(line), "{template}");
    }
    let log = lima.log();
    let mut at = 0;
    for step in [
        "start --name=lab --tty=false",
        "copy ",
        "lab sudo install -m 0755 /tmp/mvm.new /usr/local/bin/mvm",
        "mvm bootstrap --yes",
    ] {
        let found = log[at..].find(step).unwrap_or_else(|| panic!("{step} is not next: {log}"));
        at += found;
    }
    lima.run(&node, &["bootstrap", "--yes"], None).ok();
    assert!(lima.log()[log.len()..].contains("start --tty=false lab"), "it is not made again");
    let mut wrong = lima.around(node.command(&["bootstrap"]), lima.home.path());
    wrong.env("MVM_LINUX_BINARY", lima.bin().join("sudo"));
    Running::start(wrong, None).wait(LIMIT).fails_with(1).says(&["is not a program for Linux"]);
}
