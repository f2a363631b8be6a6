//! Guests as their users know them: the clock, the kernel's modules, SSH, and what forks have of
//! their own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a test says what it does and skips")]

use std::time::{SystemTime, UNIX_EPOCH};

use mvm_tests::{LIMIT, Node, until};

/// What Docker, k3s and WireGuard load, each with what shows that it works.
const MODULES: &str = "
    for module in bridge veth nf_tables overlay tun fuse loop wireguard; do
        modprobe $module || echo $module is missing
    done
    for kind in bridge veth wireguard; do
        ip link add name a-$kind type $kind && ip link del a-$kind || echo no link of $kind
    done
    for node in net/tun fuse loop-control; do
        [ -c /dev/$node ] || echo no /dev/$node
    done
    grep -qw fuse /proc/filesystems || echo no FUSE";

fn forks(node: &Node, source: &str, count: &str) -> Vec<String> {
    let forked = node.json(&["fork", source, "-n", count]);
    let paths = forked["concerns"]["instances"].as_array().unwrap().iter();
    paths.map(|path| path.as_str().unwrap().to_owned()).collect()
}

/// The values, after it was seen that no two are the same.
fn different(mut values: Vec<String>) -> Vec<String> {
    let count = values.len();
    values.sort();
    values.dedup();
    assert_eq!(values.len(), count, "something is not its own: {values:?}");
    values
}

#[test]
fn a_guest_has_the_hosts_time_its_kernels_modules_and_forks_that_are_their_own() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &["--disk", "64M"]);
    let path = node.boot("acme/web");

    // The kernel asks for a module that nobody has loaded.
    node.guest(&path, "ip link add br0 type bridge && ip link set br0 up");
    assert_eq!(node.guest(&path, MODULES), "");

    for wrong in ["@1000000", "@4000000000"] {
        node.guest(&path, &format!("date -s {wrong}"));
        until("the clock is right again", LIMIT, || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
            let guest: u64 = node.guest(&path, "date +%s").parse().unwrap();
            (guest.abs_diff(now) <= 2).then_some(())
        });
    }

    // A fork of a guest whose disk is full, and which must not be put to sleep.
    node.guest(&path, "dd if=/dev/zero of=/root/filler bs=64k 2>/dev/null; touch /run/mvm/busy");
    assert_eq!(node.guest(&path, "echo more >/root/more 2>/dev/null || echo full"), "full");
    let mut own = vec![];
    let mut all = forks(&node, &path, "2");
    all.push(path.clone());
    for path in &all {
        let script = "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id
            tail -n 1 /etc/hosts; ls /run/mvm/busy 2>/dev/null || echo idle; lsmod | grep -c bridge";
        let seen = node.guest(path, script);
        let lines: Vec<&str> = seen.lines().collect();
        let [hostname, file, machine, boot, host, busy, ..] = lines[..] else {
            panic!("{path}: {seen}");
        };
        assert_eq!(hostname, file);
        assert!(host.ends_with(hostname) && boot.len() == 36, "{seen}");
        let is_source = *path == all[2];
        assert_eq!(busy, if is_source { "/run/mvm/busy" } else { "idle" }, "{path}");
        own.extend([hostname, machine, boot].map(str::to_owned));
    }
    different(own);
    // The same in a fork's life, and another one in its forks.
    let boot_id = |path: &str| node.guest(path, "cat /proc/sys/kernel/random/boot_id");
    let before = boot_id(&all[0]);
    node.ok(&["sleep", &all[0]]);
    assert_eq!(boot_id(&all[0]), before);
    let again = forks(&node, &all[0], "1");
    different(vec![before, boot_id(&again[0]), boot_id(&path)]);
    // The agent that comes next knows its main process's output by the boot that it was of.
    assert!(!node.guest(&again[0], "dmesg | grep -c 'another instance from now on'").is_empty());
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

/// What of a guest nobody else may have: its SSH host keys, and the key of its certificate.
const SECRETS: &str = "
    cat /etc/ssh/ssh_host_*_key | md5sum; md5sum </etc/ssl/private/ssl-cert-snakeoil.key
    cat /etc/machine-id
    openssl x509 -in /etc/ssl/certs/ssl-cert-snakeoil.pem -noout -pubkey | md5sum";

#[test]
fn a_debian_guest_has_keys_of_its_own_and_lets_ssh_in_whatever_its_name_servers_do() {
    let Some(node) = Node::new() else { return };
    if !mvm_tests::run::tool("sh", &["-c", "command -v mmdebstrap || echo none"])
        .ok()
        .stdout
        .contains('/')
    {
        println!("skipped: a Debian image needs mmdebstrap");
        return;
    }
    node.ok(&["tenant", "create", "acme"]);
    let image = ["--debian", "bookworm", "--packages", "openssh-server,ssl-cert"];
    let server = "mkdir -p /run/sshd; exec /usr/sbin/sshd -D";
    let options = ["--mem", "256M", "--", "sh", "-c", server];
    node.ok(&[&["pool", "create", "acme/debian"], &image[..], &options[..]].concat());
    let paths = [node.boot("acme/debian"), node.boot("acme/debian")];
    // Nobody answers there, and each question would take five seconds and more.
    let deaf = "echo 'nameserver 192.0.2.1' >/etc/resolv.conf; passwd -l root 2>&1";
    for path in &paths {
        node.guest(path, deaf);
        let seen = node.ok(&["ssh", path, "--", "id -un; getent hosts UNKNOWN"]);
        // A client that has no address is no question for the name servers.
        assert!(seen.starts_with("root\n127.0.0.1 "), "{seen}");
    }
    let listener = "grep -aqs 'listener' /proc/[0-9]*/cmdline && echo listens";
    let mut all = paths.to_vec();
    all.extend(forks(&node, &paths[0], "1"));
    let secrets = all.iter().flat_map(|path| {
        let seen = node.guest(path, SECRETS);
        assert_eq!(seen.lines().count(), 4, "{path}: {seen}");
        seen.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    different(secrets.collect());
    // The server that went on in the fork has its keys, too.
    let shown = |path: &str| {
        node.guest(path, "ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null | cut -d ' ' -f 2-")
    };
    let kept = |path: &str| node.guest(path, "cut -d ' ' -f 1,2 /etc/ssh/ssh_host_ed25519_key.pub");
    for path in &all {
        assert_eq!(node.guest(path, listener), "listens");
        until("the server shows its own key", LIMIT, || (shown(path) == kept(path)).then_some(()));
    }
    assert_eq!(node.ok(&["ssh", &all[2], "--", "id", "-un"]), "root\n");
    // They are kept over a restart.
    let before = node.guest(&paths[1], SECRETS);
    node.ok(&["stop", &paths[1]]);
    node.ok(&["start", &paths[1]]);
    assert_eq!(node.guest(&paths[1], SECRETS), before);
}

/// Takes minutes in software emulation; `CONTRIBUTING.md` says how to run it.
#[test]
#[ignore = "Docker takes minutes to start without hardware virtualization"]
fn docker_runs_in_a_guest_and_a_container_in_it() {
    let Some(node) = Node::new() else { return };
    node.ok(&["tenant", "create", "acme"]);
    node.ok(&["disk", "create", "acme/docker", "--size", "2G"]);
    let image = ["--debian", "bookworm", "--packages", "docker.io,iptables,kmod,busybox-static"];
    let server = "exec dockerd --iptables=true >/root/docker.log 2>&1";
    let options =
        ["--mem", "1G", "--disk-attach", "docker:/var/lib/docker", "--", "sh", "-c", server];
    node.ok(&[&["pool", "create", "acme/docker"], &image[..], &options[..]].concat());
    let path = node.boot("acme/docker");
    until("dockerd answers", 5 * LIMIT, || {
        let asked = node.mvm(&["exec", &path, "--", "docker", "info", "--format", "{{.Driver}}"]);
        (asked.code == 0).then(|| assert_eq!(asked.stdout.trim(), "overlay2"))
    });
    let script = "mkdir -p /root/image/bin && cp /bin/busybox /root/image/bin/ \
        && ln -sf busybox /root/image/bin/sh && tar -C /root/image -c . | docker import - small >/dev/null \
        && docker run --rm small /bin/busybox sh -c \
            'busybox echo in a container; busybox ip -4 addr show eth0; busybox ping -c 1 172.17.0.1' 2>&1";
    let seen = node.guest(&path, script);
    assert!(seen.contains("in a container") && seen.contains("inet 172.17."), "{seen}");
    assert!(seen.contains("1 packets received"), "{seen}");
}
