//! Builds that are given up in the middle, in every way: no mount, process or file of them stays, and the
//! host's own files do.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use mvm_tests::{LIMIT, Node, Running, host, until};
use rustix::process::{Pid, Signal, kill_process_group};

/// Stands for `mmdebstrap` at work: filesystems and files of the host are mounted in its directory, and a
/// child in a session of its own writes there and ends for nothing less than SIGKILL.
const STAND_IN: &str = r#"#!/bin/sh
root="$TMPDIR/root"
mkdir -p "$root/proc" "$root/dev/shm"
mount -t proc proc "$root/proc"
mount --bind CANARIES "$root/dev/shm"
setsid sh -c 'trap "" TERM HUP INT; touch CANARIES/at-work; while :; do : >"$0/$$"; sleep 1; done' "$root" &
while [ ! -e CANARIES/die ]; do sleep 0.1; done
kill -9 $$
"#;

struct Site {
    node: Node,
    canaries: PathBuf,
    _dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Option<Self> {
        let mut node = Node::new()?;
        let dir = tempfile::tempdir().unwrap();
        let (bin, canaries) = (dir.path().join("bin"), dir.path().join("canaries"));
        fs::create_dir(&bin).unwrap();
        fs::create_dir(&canaries).unwrap();
        fs::write(canaries.join("canary"), "x").unwrap();
        let tool = bin.join("mmdebstrap");
        fs::write(&tool, STAND_IN.replace("CANARIES", canaries.to_str().unwrap())).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        node.set_variable("PATH", &path);
        Some(Self { node, canaries, _dir: dir })
    }

    /// Begins to build and returns once the tool is at work.
    fn begin(&self, args: &[&str]) -> Running {
        let mut command = self.node.command(args);
        command.process_group(0);
        let running = Running::start(command, None);
        let at_work = self.canaries.join("at-work");
        until("the tool is at work", LIMIT, || at_work.exists().then_some(()));
        assert_ne!(self.processes(), 0);
        assert!(host::mounts(self.node.dir()).is_empty(), "the host sees no mount");
        fs::remove_file(at_work).unwrap();
        running
    }

    fn processes(&self) -> usize {
        let mark = self.canaries.to_str().unwrap();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let commands = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        commands.filter(|words| String::from_utf8_lossy(words).contains(mark)).count()
    }

    /// Waits until nothing is left.
    fn until_clean(&self, way: &str) {
        let names = |dir: &Path| fs::read_dir(dir).into_iter().flatten().count();
        let scratch = self.node.dir().join("layers/scratch");
        until(&format!("nothing is left after {way}"), LIMIT, || {
            (self.processes() == 0 && names(&scratch) == 0).then_some(())
        });
        assert!(host::mounts(self.node.dir()).is_empty(), "{way}");
        assert!(self.canaries.join("canary").exists(), "{way}");
    }
}

impl Site {
    /// Destroys a pool whose build an agent may have begun again.
    fn destroy(&self, pool: &str, way: &str) {
        self.node.ok(&["pool", "destroy", pool, "--force"]);
        self.until_clean(way);
        drop(fs::remove_file(self.canaries.join("at-work")));
    }
}

#[test]
fn a_debian_build_that_is_given_up_leaves_nothing_and_touches_nothing() {
    let Some(site) = Site::new() else { return };
    let node = &site.node;
    let build = |pool: &str| {
        node.small_pool(pool, &["--debian", "bookworm"]);
        site.begin(&["pool", "build", pool])
    };

    let run = site.begin(&["run", "--rm", "--mem", "192M", "mmdebstrap:bookworm", "--", "true"]);
    kill_process_group(Pid::from_raw(run.pid() as i32).unwrap(), Signal::INT).unwrap();
    drop(run.wait(LIMIT));
    // What is interrupted before it runs may take its pool along or leave it building.
    let _ = node.mvm(&["tenant", "destroy", "default", "--force"]);
    site.until_clean("Ctrl-C");

    let building = build("demo/destroyed");
    site.destroy("demo/destroyed", "pool destroy");
    drop(building);

    let building = build("demo/stopped");
    node.ok(&["agent", "stop"]);
    site.until_clean("agent stop");
    drop(building);
    site.destroy("demo/stopped", "agent stop");

    // A command that waits would have the next agent started, which builds it again.
    drop(build("demo/killed"));
    node.kill_agent();
    until("the tool is gone", LIMIT, || (site.processes() == 0).then_some(()));
    site.destroy("demo/killed", "an agent that is killed");

    let building = build("demo/dead");
    fs::write(site.canaries.join("die"), "").unwrap();
    building.wait(LIMIT).fails_with(1).says(&["`mmdebstrap` failed (signal: 9"]);
    site.destroy("demo/dead", "the tool that died");
}
