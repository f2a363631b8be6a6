//! Real guests that are put to sleep and restored, as themselves and as forks, on QEMU.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stderr, reason = "a skipped test says why")]

mod image_support;
mod stand_in_program;
mod vmm_support;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::{
    Configuration, ExecRequest, ExitStatus, HookReport, NetworkConfiguration, WakeReason,
};
use mvm_core::net::MacAddr;
use mvm_host::guest::{Session, SessionMode};
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::{MemoryImage, Nic, Packing, Restore, SaveChanges, Vm, VmSpec};
use vmm_support::{Host, PATIENCE, eventually, qemu::Qemu};

const TAP: &str = "mvmtap0";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 240, 0, 1);
const HOOK: &str = "#!/bin/busybox sh\necho $MVM_EVENT $MVM_WAKE_REASON $MVM_WAKES\n";

/// Runs a program of the host in this thread's network namespace.
fn ip(arguments: &str) -> String {
    let (is_done, text) = image_support::run("ip", &arguments.split(' ').collect::<Vec<_>>());
    assert!(is_done, "ip {arguments}: {text}");
    text
}

/// The bridge's side of a tap that learns addresses from announcements alone.
#[allow(unsafe_code)]
fn own_network() {
    // SAFETY: only the network namespace of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
    ip(&format!("tuntap add dev {TAP} mode tap"));
    ip(&format!("address add {GATEWAY}/24 dev {TAP}"));
    ip(&format!("link set {TAP} up"));
    std::fs::write(format!("/proc/sys/net/ipv4/conf/{TAP}/arp_accept"), "1").unwrap();
}

/// An instance of a name and an address.
#[derive(Clone, Copy)]
struct Identity {
    name: &'static str,
    address: Ipv4Addr,
}

impl Identity {
    fn mac(self) -> MacAddr {
        MacAddr::of_address(self.address)
    }

    fn spec(self, spec: VmSpec) -> VmSpec {
        let nic = Some(Nic { tap: TAP.to_owned(), mac: self.mac() });
        VmSpec { nic, kernel_args: "quiet mvm.root=none".into(), ..spec }
    }

    fn configuration(self, clock: Option<Duration>) -> Configuration {
        let network = NetworkConfiguration {
            address: self.address,
            prefix_len: 24,
            gateway: GATEWAY,
            nameservers: Vec::new(),
            search: Vec::new(),
            resolver_options: Vec::new(),
            mtu: None,
            mac: Some(self.mac()),
        };
        Configuration {
            instance: format!("acme/web/{}", self.name),
            hostname: self.name.to_owned(),
            network: Some(network),
            wall_clock_unix_ns: clock.map(|clock| clock.as_nanos() as u64),
            ..Configuration::default()
        }
    }

    /// What is asked and said by whoever looks.
    async fn check(self, session: &Session) {
        let seen = shell(session, "hostname; cat /sys/class/net/eth0/address; cat /etc/hostname");
        assert_eq!(seen.await, format!("{0}\n{1}\n{0}\n", self.name, self.mac()));
        let seen = shell(session, "ip -4 -o address show dev eth0").await;
        let address = format!("inet {}/24 ", self.address);
        assert!(seen.contains(&address) && seen.lines().count() == 1, "{seen}");
        let seen = shell(session, "ip route").await;
        let mut routes: Vec<&str> = seen.lines().map(str::trim).collect();
        routes.sort();
        let own = format!("10.240.0.0/24 dev eth0 scope link  src {}", self.address);
        assert_eq!(routes, [own.as_str(), "default via 10.240.0.1 dev eth0"]);
        // The host has not said a word to it before.
        let known = format!("{} dev {TAP} lladdr {}", self.address, self.mac());
        let announced = || ip("neigh show").contains(&known);
        eventually("the guest has announced itself", announced).await;
        let pinged = shell(session, "ping -c 1 -w 20 10.240.0.1").await;
        assert!(pinged.contains(" 0% packet loss"), "{pinged}");
    }
}

async fn shell(session: &Session, script: &str) -> String {
    let argv = ["/bin/busybox", "sh", "-c", script].map(str::to_owned).into();
    let request = ExecRequest { argv, cwd: Some("/".into()), ..ExecRequest::default() };
    let output = session.exec(request, PATIENCE).await.unwrap().output(1 << 16).await.unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status, ExitStatus::Exited { code: 0 }, "{script}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn only_output(report: &HookReport) -> &str {
    let [run] = &report.runs[..] else { panic!("{report:?}") };
    assert!(run.is_success() && report.skipped.is_empty(), "{report:?}");
    &run.output
}

/// What a guest says of what is to be its own.
async fn secrets(session: &Session) -> (String, String, String) {
    let machine_id = shell(session, "cat /etc/machine-id").await;
    let keys = "cd /etc/ssh; ls; cat *; ls /run/mvm/ssh";
    (machine_id, shell(session, keys).await, shell(session, "cat /run/mvm/wakes").await)
}

async fn asleep(host: &Host<Qemu>, vm: &Arc<dyn Vm>) -> SnapshotDir {
    let dir = SnapshotDir::from(&host.root.path().join("asleep"));
    std::fs::create_dir(&dir).unwrap();
    vm.pause().await.unwrap();
    vm.save(&dir, SaveChanges::Apart(Packing::Plain)).await.unwrap();
    vm.kill().await.unwrap();
    vm.wait().await;
    dir
}

#[tokio::test]
async fn a_restored_guest_is_itself_and_a_fork_is_another_from_its_random_numbers_on() {
    let hooks =
        [("etc/mvm/hooks/pre-sleep.d/10-tell", HOOK), ("etc/mvm/hooks/post-wake.d/10-tell", HOOK)];
    let backend = match Qemu::with_agent(&hooks).await {
        Ok(backend) => backend,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    own_network();
    let host = Host::new(backend);
    let vmm = vmm_support::Backend::vmm(&host.backend);
    let open = async |vm: &Arc<dyn Vm>, mode| {
        Session::open(vm.connect_guest().await.unwrap(), mode, PATIENCE).await.unwrap()
    };

    let origin = Identity { name: "web-1", address: Ipv4Addr::new(10, 240, 0, 3) };
    let vm = vmm.launch(&origin.spec(host.spec(1))).await.unwrap();
    let session = open(&vm, SessionMode::Fresh).await;
    session.configure(origin.configuration(None), PATIENCE).await.unwrap();
    shell(&session, "/bin/busybox --install -s /bin").await;
    origin.check(&session).await;
    // What stands for ssh-keygen is told the key's file last.
    let keys = "mkdir -p /etc/ssh /run/mvm/ssh /usr/bin; touch /run/mvm/ssh/authorized_keys; \
                cd /etc/ssh; for kind in ed25519 rsa; do \
                    echo old > ssh_host_${kind}_key; echo a b root@x > ssh_host_${kind}_key.pub; \
                done; \
                printf '#!/bin/busybox sh\nfor file; do :; done\necho new | tee $file > $file.pub\n' \
                    > /usr/bin/ssh-keygen; \
                chmod 755 /usr/bin/ssh-keygen";
    shell(&session, keys).await;
    let before = secrets(&session).await;
    assert_eq!(before.2, "0\n");
    let report = session.prepare_sleep(PATIENCE, PATIENCE).await.unwrap();
    assert_eq!(only_output(&report), "pre-sleep\n");
    drop(session);
    let dir = asleep(&host, &vm).await;
    let memory = Arc::new(MemoryImage::share(&dir.memory_image()).unwrap());
    let from = Restore { dir, memory, build: vmm.build().await.unwrap() };

    let fork = |name, last| Identity { name, address: Ipv4Addr::new(10, 240, 0, last) };
    let mut random = Vec::new();
    let mut machine_ids = vec![before.0.clone()];
    // The host's clock may have been set back since, too.
    for (identity, reason, seconds) in [
        (fork("web-2", 9), WakeReason::Forked, 4_000_000_000),
        (fork("web-3", 10), WakeReason::Forked, 4_000_000_000),
        (origin, WakeReason::Restored, 1_000_000_000),
    ] {
        ip(&format!("neigh flush dev {TAP}"));
        let vm = vmm.restore(&identity.spec(host.spec(2)), &from).await.unwrap();
        vm.resume().await.unwrap();
        let session = open(&vm, SessionMode::Existing).await;
        // Before anything else: only the session's opening can make a difference.
        random.push(shell(&session, "head -c 16 /dev/urandom | od -tx1").await);
        let clock = Some(Duration::from_secs(seconds));
        session.configure(identity.configuration(clock), PATIENCE).await.unwrap();
        let report = session.woken(reason, PATIENCE, PATIENCE).await.unwrap();
        assert_eq!(only_output(&report), format!("post-wake {reason} 1\n"));
        identity.check(&session).await;
        let woken = shell(&session, "cat /run/mvm/woken").await;
        let begins = &seconds.to_string()[..7];
        assert!(woken.starts_with(begins) && woken.ends_with(&format!("{reason}\n")), "{woken}");
        let after = secrets(&session).await;
        if reason == WakeReason::Forked {
            // The quick kind of the two is made anew.
            assert_eq!(after.1, "ssh_host_ed25519_key\nssh_host_ed25519_key.pub\nnew\nnew\n");
            machine_ids.push(after.0.clone());
        } else {
            assert_eq!((&after.0, &after.1), (&before.0, &before.1));
        }
        assert_eq!(after.2, "1\n");
        // Told again, as after the host's agent was replaced, it stays what it has become.
        session.configure(identity.configuration(None), PATIENCE).await.unwrap();
        assert_eq!(secrets(&session).await, after);
        session.shutdown(Duration::ZERO, PATIENCE).await.unwrap();
        vm.wait().await;
    }
    for values in [&mut random, &mut machine_ids] {
        values.sort();
        values.dedup();
        assert_eq!(values.len(), 3, "{values:?}");
    }
}
