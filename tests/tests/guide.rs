//! The guide, walked from top to bottom: each of its commands works as it stands, where it stands.
//!
//! A command runs in a shell, in a directory that has what the guide speaks of. What the test fills
//! in: instances' ids, free ports, and the place of OpenSSH's configuration. Remarks that the test
//! reads: `ends with N` (the exit code, otherwise 0) and `until Ctrl-C`. A line of a block that is
//! no command is what the command before it prints.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a test says what it does and skips")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::registry::Registry;
use mvm_tests::run::{Running, tool};
use mvm_tests::terminal::Terminal;
use mvm_tests::wait::until;
use mvm_tests::{Node, binary, buildah};
use rustix::process::Signal;

/// How long one command may take: one builds a Debian.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// The ports of this machine that the guide speaks of.
const PORTS: [&str; 4] = ["8080", "8443", "9000", "5432"];

/// A line of the guide that is typed, and what stands below it.
#[derive(Debug)]
struct Step {
    command: String,
    remark: String,
    output: Vec<String>,
}

/// The steps of the guide's `console` blocks, in order.
fn steps(guide: &str) -> Vec<Step> {
    let blocks = guide.split("```console\n").skip(1);
    let lines = blocks.flat_map(|block| block.split("```").next().unwrap().lines());
    let mut steps: Vec<Step> = Vec::new();
    for line in lines {
        if line.starts_with("$ ") {
            continue; // Of a Mac.
        }
        match line.strip_prefix("# ") {
            Some(line) => {
                let (command, remark) = line.split_once("  #").unwrap_or((line, ""));
                steps.push(Step {
                    command: command.trim().to_owned(),
                    remark: remark.trim().to_owned(),
                    output: Vec::new(),
                });
            }
            None if !line.is_empty() => {
                steps.last_mut().unwrap().output.push(line.to_owned());
            }
            None => {}
        }
    }
    steps
}

/// Where the guide is walked: a node, and a directory with the files that it speaks of.
struct Walk {
    node: Node,
    dir: tempfile::TempDir,
    ports: Vec<(&'static str, String)>,
    _registry: Registry,
}

impl Walk {
    /// `None` if something is missing here, and the reason is printed.
    fn new(guide: &str) -> Option<Self> {
        let node = Node::new()?;
        let registry = Registry::start(&["buildah", "skopeo", "mmdebstrap", "ssh", "curl"])?;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["bin", "build", "home/.ssh", "site", "context"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("site/index.html"), "hello\n").unwrap();
        let document = guide.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        assert!(document.starts_with("tenant = \"acme\""), "{document}");
        fs::write(at("acme.toml"), document).unwrap();
        symlink(binary::mvm(), at("bin/mvm")).unwrap();
        fs::write(at("bin/docker"), "#!/bin/sh\nexec cat app.tar\n").unwrap();
        fs::set_permissions(at("bin/docker"), PermissionsExt::from_mode(0o755)).unwrap();
        make_images(dir.path(), &registry);
        let mirror = format!("[registry.\"docker.io\"]\nmirrors = [\"{}\"]\n", registry.host());
        fs::write(node.dir().join("registries.toml"), mirror).unwrap();
        let ports = PORTS.map(|port| {
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            (port, free.to_string())
        });
        Some(Self { node, dir, ports: ports.into(), _registry: registry })
    }

    /// The command with what is this walk's own filled in.
    fn filled(&self, command: &str) -> String {
        let mut command = command.replace("ssh acme-", "ssh -F home/.ssh/config acme-");
        for (port, free) in &self.ports {
            command = command.replace(port, free);
        }
        for placeholder in ["i-0123abcd", "i-01"] {
            let Some((before, _)) = command.split_once(placeholder) else { continue };
            let pool = before.rsplit([' ', '=']).next().unwrap().replacen("acme-", "acme/", 1);
            let pool = pool.trim_end_matches(['/', '-']).to_owned();
            let instances = self.node.json(&["instance", "list", &pool]);
            let path = instances[0]["path"].as_str().unwrap_or_else(|| panic!("{pool}: none"));
            command = command.replace(placeholder, path.rsplit('/').next().unwrap());
        }
        command
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).current_dir(self.dir.path());
        for (name, value) in self.node.command(&[]).get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        let path = std::env::var("PATH").unwrap_or_default();
        shell.env("PATH", format!("{}:{path}", self.dir.path().join("bin").display()));
        shell.env("HOME", self.dir.path().join("home"));
        shell
    }

    fn take(&self, step: &Step) {
        let command = self.filled(&step.command);
        let shell = self.shell(&command);
        if step.remark.ends_with("until Ctrl-C") {
            // Ctrl-C is for the command, not for the shell around it.
            let mut running = Running::start(self.shell(&format!("exec {command}")), None);
            until("it says what it does", COMMAND_LIMIT, || {
                let said = running.stdout_so_far() + &running.stderr_so_far();
                (!said.is_empty()).then_some(())
            });
            running.signal(Signal::INT);
            running.wait(COMMAND_LIMIT);
        } else if command.contains(" -it ") {
            let mut terminal = Terminal::start(shell);
            terminal.until_raw();
            terminal.key("exit\r");
            assert_eq!(terminal.wait(), Some(0), "{command}");
        } else {
            let code =
                step.remark.strip_prefix("ends with ").map_or(0, |code| code.parse().unwrap());
            let output = Running::start(shell, None).wait(COMMAND_LIMIT).fails_with(code);
            for line in &step.output {
                assert!(output.stdout.contains(line), "it does not print `{line}`: {output}");
            }
        }
    }
}

/// What the guide takes out of a registry, a layout and an archive: one small server.
fn make_images(dir: &Path, registry: &Registry) {
    let context = dir.join("context");
    fs::copy("/bin/busybox", context.join("busybox")).unwrap();
    let layout = format!("oci:{}:v1", dir.join("build/layout").display());
    for version in ["1.27", "1.28"] {
        let containerfile = format!(
            "FROM scratch\nCOPY busybox /bin/busybox\nENV VERSION={version}\n\
             CMD [\"/bin/busybox\", \"httpd\", \"-f\", \"-p\", \"443\"]\n"
        );
        buildah::context(&context, &containerfile, &[]);
        buildah::build(&context, &layout);
        let to = format!("docker://{}/library/nginx:{version}", registry.host());
        tool("skopeo", &["copy", "-q", "--dest-tls-verify=false", &layout, &to]).ok();
    }
    let archive = format!("docker-archive:{}:app:latest", dir.join("app.tar").display());
    tool("skopeo", &["copy", "-q", &layout, &archive]).ok();
}

#[test]
fn each_command_of_the_guide_works_where_it_stands() {
    let guide = fs::read_to_string(binary::repository().join("docs/guide.md")).unwrap();
    let steps = steps(&guide);
    assert!(steps.len() > 60, "{}", steps.len());
    let Some(walk) = Walk::new(&guide) else { return };
    for step in &steps {
        println!("# {}", step.command);
        walk.take(step);
    }
    assert_eq!(walk.node.json(&["ps", "-a"]).as_array().unwrap().len(), 0, "something is left");
    walk.node.ok(&["tenant", "destroy", "default", "--force"]);
    assert_eq!(walk.node.leftovers(), [""; 0]);
}
