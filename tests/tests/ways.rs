//! The ways into a guest: a terminal, files, forwarded connections and SSH; on one microVM that
//! has no network.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a skipped test says why")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use mvm_tests::{LIMIT, Node, Running, Terminal, until};
use rustix::process::Signal;

/// How long what happens at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);
/// Programs that are started together.
const MANY: usize = 300;

struct Guest {
    node: Node,
    path: String,
}

impl Guest {
    fn boot() -> Option<Self> {
        let node = Node::new()?;
        node.small_pool("acme/web", &["--net", "none"]);
        let path = node.boot("acme/web");
        Some(Self { node, path })
    }

    fn sh(&self, script: &str) -> String {
        self.node.guest(&self.path, script)
    }

    /// A path in the guest, as `mvm cp` names it.
    fn at(&self, path: &str) -> String {
        format!("{}:{path}", self.path)
    }
}

#[test]
fn every_way_into_a_guest_works_without_a_network() {
    let Some(guest) = Guest::boot() else { return };
    a_terminal_is_as_if_the_program_ran_here(&guest);
    a_terminal_is_given_back_however_it_ends(&guest);
    detaching_leaves_the_program_running(&guest);
    what_needs_a_terminal_says_so(&guest);
    a_client_that_is_killed_while_the_program_does_not_read(&guest);
    hundreds_at_once(&guest);
    trees_are_copied_both_ways(&guest);
    copies_that_cannot_be_made_say_why(&guest);
    connections_are_forwarded(&guest);
    ssh_without_a_server_says_so(&guest);
    ssh_scp_and_rsync(&guest);
}

fn on_terminal(guest: &Guest, script: &str) -> Terminal {
    Terminal::start(guest.node.command(&["exec", "-it", &guest.path, "--", "sh", "-c", script]))
}

fn a_terminal_is_as_if_the_program_ran_here(guest: &Guest) {
    // The traps first: a signal that comes before them is lost.
    let script = "trap 'echo \"<$(stty size)>\"' WINCH; trap 'echo told; exit 9' INT; \
                  echo \"<$(stty size)> <$TERM> <$(tty)>\"; while :; do sleep 0.1; done";
    let mut terminal = on_terminal(guest, script);
    terminal.until_seen("<33 101> <vt220> </dev/pts/");
    terminal.until_raw();
    terminal.resize(44, 80);
    terminal.until_seen("<44 80>");
    terminal.key("\x03");
    terminal.until_seen("told");
    assert_eq!(terminal.wait(), Some(9));
}

fn a_terminal_is_given_back_however_it_ends(guest: &Guest) {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let terminal = on_terminal(guest, "echo ready; trap '' HUP INT TERM; sleep 5001");
        terminal.until_seen("ready");
        terminal.until_raw();
        terminal.signal(signal);
        assert_eq!(terminal.wait(), Some(130), "{signal:?}");
        until_gone(guest, "sleep 5001");
    }
    let terminal =
        Terminal::start(guest.node.command(&["exec", "-it", &guest.path, "--", "no-such"]));
    terminal.until_seen("`no-such` was not found in PATH");
    assert_eq!(terminal.wait(), Some(127));
}

fn until_gone(guest: &Guest, words: &str) {
    until(&format!("`{words}` is gone from the guest"), SOON, || {
        (!guest.node.ok(&["exec", &guest.path, "--", "ps", "-o", "args"]).contains(words))
            .then_some(())
    });
}

fn detaching_leaves_the_program_running(guest: &Guest) {
    let mut terminal = on_terminal(guest, "echo ready; seq 1 5; sleep 5002");
    terminal.until_seen("ready");
    terminal.until_raw();
    terminal.key("\x10\x11");
    terminal.until_seen("detached: the program runs on");
    assert_eq!(terminal.wait(), Some(0));
    guest.node.ok(&["exec", "-d", &guest.path, "--", "sleep", "5003"]);
    let processes = guest.sh("ps -o args");
    assert!(processes.contains("sleep 5002") && processes.contains("sleep 5003"), "{processes}");
    guest.sh("pkill -f 'sleep 500[23]' || killall sleep");
    guest.node.mvm(&["exec", "-d", &guest.path, "--", "nope"]).fails_with(127).says(&["`nope`"]);
}

fn what_needs_a_terminal_says_so(guest: &Guest) {
    let output = guest.node.mvm(&["exec", "-t", &guest.path, "--", "true"]).fails_with(2);
    output.says(&["-t needs a terminal", "hint: leave -t out"]);
}

/// Its input is blocked, and there is no output: only the hang-up itself tells.
fn a_client_that_is_killed_while_the_program_does_not_read(guest: &Guest) {
    let args = ["exec", "-i", &guest.path, "--", "sh", "-c", "echo ready; exec sleep 5004"];
    let mut child = guest
        .node
        .command(&args)
        .stdin(File::open("/dev/zero").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    until_gone(guest, "sleep 5004");
}

fn hundreds_at_once(guest: &Guest) {
    let texts: Vec<String> = (0..MANY).map(|n| format!("text of {n}")).collect();
    let start = |text: &String| guest.node.spawn(&["exec", &guest.path, "--", "echo", text]);
    let running: Vec<Running> = texts.iter().map(start).collect();
    for (text, running) in texts.iter().zip(running) {
        assert_eq!(running.wait(LIMIT).ok().stdout.trim_end(), text);
    }
}

fn facts(dir: &Path) -> Vec<String> {
    let (mut found, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let what = match () {
                () if metadata.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
                () if metadata.is_dir() => "dir".to_owned(),
                () => format!("{} bytes, {} names", metadata.len(), metadata.nlink()),
            };
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            found.push(format!("{name} {:o} {} {what}", metadata.mode(), metadata.mtime()));
            if metadata.is_dir() {
                dirs.push(path);
            }
        }
    }
    found.sort();
    found
}

fn trees_are_copied_both_ways(guest: &Guest) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    let bytes: Vec<u8> =
        (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(tree.join("large"), &bytes).unwrap();
    fs::write(tree.join("sub/tool"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("sub/tool"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::hard_link(tree.join("sub/tool"), tree.join("sub/second")).unwrap();
    symlink("../large", tree.join("sub/link")).unwrap();
    let (node, tree_name) = (&guest.node, tree.display().to_string());
    node.ok(&["cp", &tree_name, &guest.at("/root")]);
    assert_eq!(guest.sh("/root/tree/sub/tool; stat -c %a /root/tree/sub/second"), "ran\n751");
    let back = dir.path().join("back");
    node.ok(&["cp", &guest.at("/root/tree"), &back.display().to_string()]);
    assert_eq!(facts(&tree), facts(&back));
    assert!(fs::read(back.join("large")).unwrap() == bytes);
    // What a directory holds, a file under a name, and archives.
    node.ok(&["cp", &format!("{tree_name}/."), &guest.at("/root/fresh")]);
    assert_eq!(guest.sh("ls /root/fresh"), "large\nsub");
    node.ok(&["cp", &format!("{tree_name}/sub/tool"), &guest.at("/root/renamed")]);
    assert_eq!(guest.sh("sh /root/renamed"), "ran");
    let archive = dir.path().join("archive.tar");
    let command = &mut node.command(&["cp", &guest.at("/root/tree/sub"), "-"]);
    assert!(command.stdout(File::create(&archive).unwrap()).status().unwrap().success());
    guest.sh("mkdir /root/unpacked");
    let command = &mut node.command(&["cp", "-", &guest.at("/root/unpacked")]);
    assert!(command.stdin(File::open(&archive).unwrap()).status().unwrap().success());
    assert_eq!(guest.sh("ls /root/unpacked/sub"), "empty\nlink\nsecond\ntool");
}

fn copies_that_cannot_be_made_say_why(guest: &Guest) {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().display().to_string();
    let cp = |from: &str, to: &str| guest.node.mvm(&["cp", from, to]);
    cp(&guest.at("/no/such"), &here).fails_with(1).says(&["cannot read /no/such", &guest.path]);
    cp(&format!("{here}/none"), &guest.at("/")).fails_with(1).says(&["none", "No such file"]);
    cp(&here, &guest.at("/no/such/place")).fails_with(1).says(&["there is no such directory"]);
    cp(&here, &guest.at("/etc/passwd")).fails_with(1).says(&["it is a file"]);
    cp("/a", "/b").fails_with(2).says(&["neither side is in a guest"]);
    cp(&guest.at("/a"), &guest.at("/b")).fails_with(2).says(&["both sides are in guests"]);
    cp("acme/web:", &here).fails_with(2).says(&["no path is named"]);
    cp("acme/nope:/x", &here).fails_with(3).says(&["there is no pool acme/nope"]);
    // A disk that is full.
    guest.sh("mkdir -p /root/small && mount -t tmpfs -o size=64k none /root/small");
    fs::write(dir.path().join("large"), vec![1; 1 << 20]).unwrap();
    cp(&format!("{here}/large"), &guest.at("/root/small/"))
        .fails_with(1)
        .says(&["cannot write /root/small/large", "No space left"]);
    assert_eq!(guest.sh("ls -A /root/small"), "");
}

fn connections_are_forwarded(guest: &Guest) {
    guest.sh("mkdir -p /srv; echo page >/srv/index.html; httpd -p 127.0.0.1:8099 -h /srv");
    let mut forward = guest.node.spawn(&["forward", &guest.path, "0:8099"]);
    let address = until("the address is told", SOON, || {
        forward.stdout_so_far().lines().next().map(str::to_owned)
    });
    let get = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("page\n"), "{answer}");
    };
    get();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(get);
        }
    });
    forward.signal(Signal::INT);
    forward.wait(SOON).ok();
    let request = b"GET /index.html HTTP/1.0\r\n\r\n";
    let args = ["forward", &guest.path, "--stdio", "8099"];
    assert!(guest.node.mvm_with_input(&args, request).ok().stdout.ends_with("page\n"));
    let refused = guest.node.mvm_with_input(&["forward", &guest.path, "--stdio", "1"], b"");
    refused.fails_with(1).says(&["cannot connect to 127.0.0.1:1", "refused"]);
    guest.node.mvm(&["forward", &guest.path, "/run/x"]).fails_with(2).says(&["0:/run/x"]);
}

fn ssh_without_a_server_says_so(guest: &Guest) {
    let output = guest.node.mvm(&["ssh", &guest.path, "--", "true"]).fails_with(1);
    output.says(&["there is no SSH server (sshd) in its image", "mvm exec -it i-"]);
}

/// Debian's SSH server and rsync with their libraries, as a tree to be put over a root.
fn server() -> Option<PathBuf> {
    let base = mvm_tests::binary::repository().join("target/e2e");
    let (debian, tree) = (base.join("ssh-debian"), base.join("ssh-tree"));
    if tree.join("done").exists() {
        return Some(tree);
    }
    let _ = fs::remove_dir_all(&debian);
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--include=openssh-server,rsync", "bookworm"]).arg(&debian);
    let made = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: SSH needs Debian's openssh-server, through mmdebstrap");
        return None;
    }
    let script = "set -e; cd \"$1\"; rm -rf \"$2\"; \
        mkdir -p \"$2\"/lib64 \"$2\"/usr/lib/x86_64-linux-gnu \"$2\"/usr/lib/openssh \"$2\"/etc/ssh; \
        cp -a --parents usr/sbin/sshd usr/bin/ssh-keygen usr/bin/rsync usr/lib/openssh/sftp-server \"$2\"; \
        cp -a usr/lib/x86_64-linux-gnu/*.so* lib/x86_64-linux-gnu/*.so* \"$2\"/usr/lib/x86_64-linux-gnu; \
        cp -L lib64/ld-linux-x86-64.so.2 \"$2\"/lib64; \
        printf 'UsePAM no\\nSubsystem sftp /usr/lib/openssh/sftp-server\\n' >\"$2\"/etc/ssh/sshd_config; \
        touch \"$2\"/done";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).args([&debian, &tree]);
    assert!(command.status().unwrap().success());
    let _ = fs::remove_dir_all(&debian);
    Some(tree)
}

fn plain_ssh_after_a_written_configuration(node: &Node, host: &str) {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join(".ssh");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("config"), "Host *\n  User nobody\n").unwrap();
    let write = || {
        let mut command = node.command(&["ssh-config", "--write"]);
        command.env("HOME", home.path());
        Running::start(command, None).wait(SOON).ok();
        let inode = |name: &str| fs::metadata(dir.join(name)).unwrap().ino();
        (facts(&dir), inode("config"), inode("mvm.conf"))
    };
    let first = write();
    assert_eq!(first, write(), "a second time changes nothing");
    assert_eq!(first.0.len(), 2, "{first:?}");
    // ssh looks where the user's home is, whatever HOME says.
    let script = "mount --bind \"$1\" /root && exec ssh -o BatchMode=yes \"$2\" id -un";
    let home = home.path().display().to_string();
    let output = mvm_tests::run::tool("unshare", &["-m", "sh", "-c", script, "sh", &home, host]);
    assert_eq!(output.ok().stdout, "root\n");
}

fn ssh_scp_and_rsync(guest: &Guest) {
    let Some(tree) = server() else { return };
    let node = &guest.node;
    node.ok(&["cp", &format!("{}/.", tree.display()), &guest.at("/")]);
    guest.sh("echo 'sshd:x:101:65534::/run/sshd:/bin/false' >>/etc/passwd");
    // This server has no PAM, and lets no locked account in, whatever key it has.
    guest.sh("sed -i 's/^root:[^:]*:/root:!$6$salt$hash:/' /etc/shadow");
    let refused = node.mvm(&["ssh", &guest.path, "--", "true"]).fails_with(255);
    refused.says(&["root's password is locked", "`passwd -u root`"]);
    guest.sh("sed -i 's/^root:[^:]*:/root:!:/' /etc/shadow");
    let output = node.mvm(&["ssh", &guest.path, "--", "id -un; echo to-stderr >&2; exit 7"]);
    let output = output.fails_with(7);
    assert_eq!(output.stdout, "root\n");
    assert!(output.stderr.contains("to-stderr"), "{output}");
    assert_eq!(guest.sh("grep ^root: /etc/shadow | cut -d : -f 2"), "*");
    assert_eq!(node.ok(&["ssh", &guest.path, "-l", "mvm", "--", "id", "-un"]), "mvm\n");
    // To ssh the first word counts; an option that mvm has too is ssh's there.
    let options = ["-o", "User=mvm", "-o", "LogLevel=ERROR"];
    let args = [&["ssh", &guest.path], &options[..], &["--", "id", "-un"]].concat();
    assert_eq!(node.ok(&args), "mvm\n");
    // A user's own keys go on to count, and none of ours are put among them.
    assert_eq!(guest.sh("ls -A /root/.ssh 2>/dev/null | wc -l"), "0");

    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config").display().to_string();
    let text = node.ok(&["ssh-config", "acme"]);
    fs::write(&config, &text).unwrap();
    let host = text.lines().find_map(|line| line.strip_prefix("Host ")).unwrap().to_owned();
    plain_ssh_after_a_written_configuration(node, &host);
    let bytes: Vec<u8> =
        (0..2_000_000u32).map(|n| (n.wrapping_mul(2_246_822_519) >> 11) as u8).collect();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name).display().to_string());
    fs::write(&from, &bytes).unwrap();
    mvm_tests::run::tool("scp", &["-F", &config, &from, &format!("{host}:/root/scp")]).ok();
    mvm_tests::run::tool("scp", &["-F", &config, &format!("{host}:/root/scp"), &to]).ok();
    assert!(fs::read(&to).unwrap() == bytes);
    if Command::new("rsync").arg("--version").stdout(Stdio::null()).status().is_ok() {
        let ssh = format!("ssh -F {config}");
        let target = format!("{host}:/root/rsync/");
        mvm_tests::run::tool("rsync", &["-a", "-e", &ssh, &from, &target]).ok();
        assert_eq!(guest.sh("cmp /root/scp /root/rsync/from && echo same"), "same");
    } else {
        println!("skipped: rsync is not installed");
    }
    // The tenant's key goes with the tenant.
    let key = node.dir().join("ssh/acme/id_ed25519");
    assert_eq!(fs::metadata(&key).unwrap().mode() & 0o777, 0o600);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    until("the key is gone", SOON, || (!key.exists()).then_some(()));
}
