//! Machines as they are: busy, full, shared, damaged, and used by somebody who may not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a skipped test says why")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_tests::node::kill;
use mvm_tests::run::tool;
use mvm_tests::{LIMIT, Node, Running, binary, host, until};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn a_microvm_boots_on_a_busy_machine() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--boot-timeout", "110"]);
    node.ok(&["pool", "build", "acme/web"]);
    let spin = || {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Running::start(command, None)
    };
    let load: Vec<Running> = (0..4).map(|_| spin()).collect();
    let path = node.boot("acme/web");
    assert_eq!(node.guest(&path, "echo up"), "up");
    assert_eq!(node.instance(&path)["boots"], 1);
    drop(load);
}

#[test]
fn two_state_directories_on_one_machine_do_not_disturb_each_other() {
    let (Some(a), Some(b)) = (Node::new(), Node::new()) else { return };
    for node in [&a, &b] {
        node.small_pool("acme/web", &[]);
    }
    let networks = [&a, &b].map(|node| {
        let tenant = node.json(&["tenant", "info", "acme"]);
        (tenant["subnet"].clone(), tenant["bridge"].clone())
    });
    assert_ne!(networks[0].0, networks[1].0);
    assert_ne!(networks[0].1, networks[1].1);
    let (in_a, in_b) = (a.boot("acme/web"), b.boot("acme/web"));
    let vmms = b.vmm_pids();
    for node in [&a, &b] {
        node.ok(&["net", "verify"]);
        assert_eq!(node.instances().len(), 1);
    }
    a.guest(&in_a, "echo up");
    a.ok(&["tenant", "destroy", "acme", "--force"]);
    a.ok(&["agent", "stop"]);
    assert_eq!(a.leftovers(), [""; 0]);
    b.ok(&["net", "verify"]);
    assert_eq!(b.vmm_pids(), vmms);
    let gateway = b.json(&["tenant", "info", "acme"])["gateway"].as_str().unwrap().to_owned();
    b.guest(&in_b, &format!("ip route | grep -q 'default via {gateway}'"));
}

/// A directory that is removed in the end.
fn temporary() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("mvm-e2e-").tempdir().unwrap()
}

#[test]
fn the_state_directorys_path_may_be_longer_than_a_socket_address() {
    let base = temporary();
    let dir =
        [30, 31, 32, 33].iter().fold(base.path().to_owned(), |dir, n| dir.join("d".repeat(*n)));
    assert!(dir.as_os_str().len() > 108);
    let Some(node) = Node::at(&dir) else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    assert_eq!(node.guest(&path, "echo up"), "up");
    node.kill_agent();
    assert_eq!(node.guest(&path, "echo up"), "up");
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

/// A small filesystem of its own, unmounted in the end.
struct SmallFilesystem {
    at: PathBuf,
    _dir: tempfile::TempDir,
}

impl SmallFilesystem {
    fn mount(size: &str) -> Self {
        let dir = temporary();
        let path = dir.path().to_str().unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "mvm-e2e", path]).ok();
        Self { at: dir.path().to_owned(), _dir: dir }
    }

    /// A filesystem with a journal, and nothing set aside for root.
    fn ext4(size: &str) -> Self {
        let dir = temporary();
        let (file, path) = (dir.path().join("ext4"), dir.path().join("mount"));
        fs::create_dir(&path).unwrap();
        let [file, path] = [file, path].map(|path| path.to_str().unwrap().to_owned());
        tool("mke2fs", &["-q", "-F", "-t", "ext4", "-m", "0", &file, size]).ok();
        tool("mount", &["-o", "loop", &file, &path]).ok();
        Self { at: PathBuf::from(path), _dir: dir }
    }

    /// Takes what is left, to the last block.
    fn fill_up(&self) {
        let mut file = fs::File::create(self.at.join("last")).unwrap();
        while file.write_all(&[1; 4096]).and_then(|()| file.sync_data()).is_ok() {}
    }

    /// Takes all space but this many KiB.
    fn fill(&self, leave_kib: u64) -> PathBuf {
        let filler = self.at.join("filler");
        let stat = rustix::fs::statvfs(&self.at).unwrap();
        let length = stat.f_bavail * stat.f_frsize - leave_kib * 1024;
        let file = fs::File::create(&filler).unwrap();
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length) {
            // Somebody else took the rest.
            Err(Errno::NOSPC) => {}
            taken => taken.unwrap(),
        }
        filler
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let path = self.at.to_string_lossy().into_owned();
        let _ = Command::new("umount").args(["-l", &path]).status();
    }
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing_half_made() {
    // Mounting needs root, too.
    if !rustix::process::geteuid().is_root() {
        println!("skipped: microVMs and their networks need root");
        return;
    }
    let disk = SmallFilesystem::mount("280M");
    let Some(node) = Node::at(&disk.at.join("state")) else { return };
    fs::remove_dir_all(node.dir().join("images")).unwrap();
    node.small_pool("acme/web", &["--disk", "64M", "--restart", "never"]);

    let filler = disk.fill(4096);
    let failed = node.mvm(&["pool", "build", "acme/web"]).fails_with(1);
    failed.says(&["no space left on the filesystem of"]);
    let made = fs::read_dir(node.dir().join("images")).into_iter().flatten().flatten();
    let made: Vec<PathBuf> = made.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    assert_eq!(made, Vec::<PathBuf>::new(), "half-built images");
    fs::remove_file(&filler).unwrap();
    node.ok(&["pool", "build", "acme/web"]);

    // No room for a writable layer, then none for a record.
    let filler = disk.fill(60);
    let failed = node.mvm(&["instance", "create", "acme/web", "--start", "--timeout", "20"]);
    assert!([1, 6].contains(&failed.code), "{failed}");
    failed.says(&["no space left"]);
    fs::remove_file(&filler).unwrap();
    let filler = disk.fill(0);
    let failed = node.mvm(&["tenant", "create", "other", "--timeout", "20"]);
    assert_ne!(failed.code, 0, "{failed}");
    failed.says(&["no space left"]);
    assert_eq!(node.vmm_pids(), [0; 0]);
    fs::remove_file(&filler).unwrap();
    node.ok(&["tenant", "create", "other"]);
    node.ok(&["start", "acme/web"]);
    let path = node.instances()[0]["path"].as_str().unwrap().to_owned();
    assert_eq!(node.guest(&path, "echo up"), "up");
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    node.ok(&["tenant", "destroy", "other"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_sleep_that_finds_no_space_leaves_the_guest_as_it_was() {
    // Mounting needs root, too.
    if !rustix::process::geteuid().is_root() {
        println!("skipped: microVMs and their networks need root");
        return;
    }
    let disk = SmallFilesystem::mount("600M");
    let Some(node) = Node::at(&disk.at.join("state")) else { return };
    node.small_pool("acme/web", &["--disk", "64M"]);
    let path = node.boot("acme/web");
    node.guest(&path, "(while true; do sleep 1; done) >/dev/null 2>&1 & echo $! > /run/pid");
    let lives = "kill -0 $(cat /run/pid) && echo lives";
    let snapshots = || {
        let dir = node.dir().join("instances").join(path.rsplit('/').next().unwrap());
        let names = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.file_name());
        let names = names.filter_map(|name| name.into_string().ok());
        names.filter(|name| name.starts_with("sleep-")).collect::<Vec<_>>()
    };

    let filler = disk.fill(2048);
    node.ok(&["sleep", &path, "--no-wait"]);
    let view = until("it cannot be put to sleep", LIMIT, || {
        Some(node.instance(&path)).filter(|view| !view["setback"].is_null())
    });
    let error = view["setback"]["error"].as_str().unwrap();
    assert!(error.to_lowercase().contains("no space left"), "{error}");
    assert_eq!(view["state"], "running", "{view}");
    assert_eq!(snapshots(), [""; 0], "half a snapshot is left");
    fs::remove_file(&filler).unwrap();
    assert_eq!(node.guest(&path, lives), "lives");
    node.ok(&["sleep", &path]);
    assert_eq!(node.guest(&path, lives), "lives");
    assert_eq!(node.instance(&path)["boots"], 1);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn guests_stand_still_while_the_host_s_filesystem_is_full_and_lose_nothing() {
    // Mounting needs root, too.
    if !rustix::process::geteuid().is_root() {
        println!("skipped: microVMs and their networks need root");
        return;
    }
    let disk = SmallFilesystem::ext4("700M");
    let Some(node) = Node::at(&disk.at.join("state")) else { return };
    node.ok(&["tenant", "create", "acme", "--disk", "10G"]);
    node.ok(&["disk", "create", "acme/data", "--size", "256M"]);
    node.small_pool("acme/web", &["--disk", "256M", "--disk-attach", "data:/srv/data"]);
    let path = node.boot("acme/web");
    let filler = disk.fill(20 * 1024);
    node.guest(
        &path,
        "(for f in /root/a /srv/data/b; do
            head -c 20000000 /dev/urandom | tee $f | md5sum | cut -c-32 >> /tmp/sums
          done; sync; echo done > /tmp/done) >/dev/null 2>&1 &",
    );
    let stands_still = || {
        until("it stands still", LIMIT, || {
            Some(node.instance(&path)).filter(|view| view["lacks_space"] == true)
        })
    };
    stands_still();
    for is_agent_new in [false, true] {
        if is_agent_new {
            node.kill_agent();
            stands_still();
        }
        assert!(node.ok(&["ps"]).contains("host disk full"));
        assert!(node.ok(&["why", &path]).contains("it stands still"));
        until("the node tells", LIMIT, || {
            let told = node.json(&["node", "info"])["problems"].to_string();
            (told.contains(&path) && told.contains("free space")).then_some(())
        });
        node.mvm(&["exec", &path, "--", "true"]).fails_with(5).says(&["finds no space"]);
        // Either there is no space to note the wish, or the guest cannot be saved.
        node.mvm(&["sleep", &path]).fails_with(1).says(&["no space"]);
    }
    fs::remove_file(&filler).unwrap();
    node.ok(&["start", &path]);
    until("it goes on", LIMIT, || (node.instance(&path)["lacks_space"] == false).then_some(()));
    let sums = "while [ ! -e /tmp/done ]; do sleep 0.1; done; cat /tmp/sums
                echo 3 > /proc/sys/vm/drop_caches; md5sum /root/a /srv/data/b | cut -c-32";
    let sums = node.guest(&path, sums);
    let [a, b, on_layer, on_disk] = sums.lines().collect::<Vec<_>>()[..] else { panic!("{sums}") };
    assert_eq!((a, b), (on_layer, on_disk));
    assert_eq!(node.instance(&path)["boots"], 1);

    let reserve = node.dir().join("reserve");
    until("space is set aside again", LIMIT, || reserve.exists().then_some(()));

    // The one that fills the filesystem can be stopped and removed, by an agent that starts on it too.
    disk.fill(8 * 1024);
    node.guest(&path, "(head -c 20000000 /dev/urandom > /root/c; sync) >/dev/null 2>&1 &");
    stands_still();
    disk.fill_up();
    node.ok(&["agent", "stop"]);
    node.ok(&["stop", &path, "--grace", "2"]);
    node.ok(&["instance", "destroy", &path]);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

/// Replaces a stored record, while no agent runs, and returns what it was.
fn damage(node: &Node, key: &str, text: &str) -> String {
    node.ok(&["agent", "stop"]);
    let database = rusqlite::Connection::open(node.dir().join("mvm.db")).unwrap();
    let read = "SELECT value FROM kv WHERE key = ?1";
    let before: Vec<u8> = database.query_row(read, [key], |row| row.get(0)).unwrap();
    let changed = database
        .execute("UPDATE kv SET value = ?2 WHERE key = ?1", (key, text.as_bytes()))
        .unwrap();
    assert_eq!(changed, 1);
    String::from_utf8(before).unwrap()
}

/// Damages one record of a tenant and checks that nothing but the tenant's changes waits for it.
fn a_bad_record_holds_up_its_tenant_alone(key_of: impl Fn(&str) -> String) {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    node.small_pool("beta/web", &[]);
    let (acme, beta) = (node.boot("acme/web"), node.boot("beta/web"));
    let vmms = node.vmm_pids();
    let key = key_of(&acme);
    let before = damage(&node, &key, "{\"broken\": tru");

    let bad = node.json(&["node", "info"])["bad_records"].clone();
    assert_eq!(bad[0]["key"], key.as_str(), "{bad}");
    assert_eq!(node.vmm_pids(), vmms, "nothing is touched");
    for args in [["stop", &acme], ["why", &acme]] {
        let refused = node.mvm(&args);
        assert_ne!(refused.code, 0, "{refused}");
        refused.says(&[&key, "mvm node record"]);
    }
    assert_eq!(node.guest(&beta, "echo up"), "up");
    node.ok(&["restart", &beta]);
    assert_eq!(node.vmm_pids().len(), 2);

    node.mvm_with_input(&["node", "record", "set", &key, "-"], before.as_bytes()).ok();
    assert_eq!(node.json(&["node", "info"])["bad_records"], Value::Array(vec![]));
    assert_eq!(node.until_state(&acme, "running")["boots"], 1, "it ran all the time");
    assert_eq!(node.guest(&acme, "echo up"), "up");
    node.ok(&["net", "verify"]);
    node.ok(&["stop", &acme]);
    assert_eq!(node.vmm_pids().len(), 1);
}

#[test]
fn an_observed_record_that_does_not_parse_holds_up_its_tenant_alone() {
    a_bad_record_holds_up_its_tenant_alone(|instance| format!("observed/instance/{instance}"));
}

#[test]
fn a_desired_record_that_does_not_parse_holds_up_its_tenant_alone() {
    a_bad_record_holds_up_its_tenant_alone(|_| "desired/pool/acme/web".to_owned());
}

#[test]
fn a_damaged_database_is_named_and_microvms_wait_for_its_return() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    node.ok(&["agent", "stop"]);
    let database = node.dir().join("mvm.db");
    let whole = fs::read(&database).unwrap();
    let mut broken = whole.clone();
    broken[..100].fill(0x5a);
    fs::write(&database, &broken).unwrap();
    let failed = node.mvm(&["ps"]).fails_with(7);
    failed.says(&[database.to_str().unwrap()]);
    assert_eq!(node.agent_pid(), None);
    assert_eq!(node.vmm_pids().len(), 1, "it is not the microVM's fault");
    fs::write(&database, whole).unwrap();
    assert_eq!(node.guest(&path, "echo up"), "up");
    assert_eq!(node.instance(&path)["boots"], 1);
}

#[test]
fn a_second_agent_is_refused_with_the_firsts_pid() {
    let Some(node) = Node::new() else { return };
    node.ok(&["ps"]);
    let first = node.agent_pid().unwrap();
    let refused = node.mvm(&["agent", "serve"]).fails_with(5);
    refused.says(&[&format!("(pid {first})"), node.dir().to_str().unwrap(), "mvm agent stop"]);
    assert_eq!(node.agent_pid(), Some(first));
    // A killed agent holds nothing.
    kill(first, Signal::KILL);
    until("the next agent serves", LIMIT, || (node.mvm(&["ps"]).code == 0).then_some(()));
    assert_ne!(node.agent_pid(), Some(first));
}

#[test]
fn who_is_not_root_is_told_to_use_sudo() {
    let Some(node) = Node::new() else { return };
    let as_nobody = |state_dir: &Path, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
        // The binary's directory may be closed to others.
        let copy = temporary();
        let program = copy.path().join("mvm");
        fs::copy(binary::mvm(), &program).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(copy.path(), open).unwrap();
        command.arg(&program).args(args).env("MVM_STATE_DIR", state_dir).current_dir("/");
        Running::start(command, None).wait(LIMIT)
    };
    node.ok(&["ps"]);
    let denied = as_nobody(node.dir(), &["ps"]).fails_with(7);
    denied.says(&["agent.sock", "sudo"]);
    let own = temporary();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(own.path(), open).unwrap();
    for args in [&["ps"][..], &["agent", "serve"]] {
        let denied = as_nobody(&own.path().join("state"), args).fails_with(1);
        denied.says(&["needs root", "sudo"]);
    }
    assert_eq!(host::processes(own.path()), []);
}

#[test]
fn signals_of_others_do_not_end_the_agent_its_log_is_bounded_and_it_may_open_many_files() {
    let Some(node) = Node::new() else { return };
    node.ok(&["--vmm", "sim", "ps"]);
    let agent = node.agent_pid().unwrap();
    let log = node.dir().join("agent.log");
    let says = |signal: &str| {
        kill(agent, if signal == "SIGHUP" { Signal::HUP } else { Signal::USR1 });
        until(&format!("{signal} is in the log"), LIMIT, || {
            fs::read_to_string(&log).unwrap().contains(signal).then_some(())
        });
    };
    says("SIGHUP");
    says("SIGUSR1");
    let limits = fs::read_to_string(format!("/proc/{agent}/limits")).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let files: Vec<u64> = files.split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(files[0] == files[1] || files[0] >= 65_536, "{files:?}");

    // What is in it does not matter.
    fs::OpenOptions::new().append(true).open(&log).unwrap().set_len(9 << 20).unwrap();
    let earlier = node.dir().join("agent.log.1");
    until("another log is begun", LIMIT, || (earlier.exists() && log.exists()).then_some(()));
    says("SIGHUP");
    assert!(fs::metadata(&log).unwrap().len() < 1 << 20);
    assert_eq!(node.agent_pid(), Some(agent));
}
