//! The network backend against the real kernel, in throw-away network namespaces.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::collections::BTreeSet;
use std::future::Future;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::process::{Child, Command};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mvm_core::net::{InstanceNetwork, NetId, NodeNetwork};
use mvm_host::net::{Network, NetworkError, Occupied, route_conflicts};
use net_support::guest::{Station, open_tap};
use net_support::{Machine, differences, in_namespace, instance, ip, nft, node, sysctl, tenant};

/// What a change would change: links with indexes and MACs, addresses, rules with handles.
fn everything() -> Vec<String> {
    let links = ip("-o link show");
    let links = links.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mac = words.iter().position(|word| *word == "link/ether").map(|at| words[at + 1]);
        format!("{} {} {mac:?}", words[0], words[1])
    });
    let rest = ip("-o -4 address show") + &nft("list ruleset\n");
    links.chain(rest.lines().map(str::to_owned)).collect()
}

#[test]
fn ensure_makes_everything_once() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (network, expected) = (machine.agent("a"), node(&[(1, 3), (1, 4), (2, 3)]));
        assert!(!differences(&network, &expected).await.is_empty());
        network.ensure(&expected).await.unwrap();
        assert_eq!(differences(&network, &expected).await, [""; 0]);
        let before = everything();
        network.ensure(&expected).await.unwrap();
        assert_eq!(everything(), before);
        assert_eq!(sysctl("ipv4/ip_forward").as_deref(), Some("1"));
    });
}

#[test]
fn an_agent_that_starts_again_finds_everything_as_it_left_it() {
    in_namespace(|| async {
        let machine = Machine::new();
        let expected = node(&[(1, 3), (2, 3)]);
        machine.agent("a").ensure(&expected).await.unwrap();
        let before = everything();
        let network = machine.agent("a");
        assert_eq!(differences(&network, &expected).await, [""; 0]);
        network.ensure(&expected).await.unwrap();
        assert_eq!(everything(), before);
    });
}

#[test]
fn the_machine_may_be_looked_at_by_many_at_once() {
    in_namespace(|| async {
        let machine = Machine::new();
        for number in 0..60 {
            ip(&format!("link add other{number} type bridge"));
        }
        // On several threads, as the agent; they are in this one's namespace.
        let looks = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let network = Arc::new(machine.agent("a"));
                let looks = (0..8).map(|_| {
                    let network = Arc::clone(&network);
                    tokio::spawn(async move {
                        for _ in 0..50 {
                            network.occupied().await.unwrap();
                        }
                    })
                });
                for look in looks.collect::<Vec<_>>() {
                    look.await.unwrap();
                }
            });
        });
        looks.join().unwrap();
    });
}

#[test]
fn what_is_not_expected_any_more_goes_away() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3), (1, 4), (2, 3)])).await.unwrap();
        let expected = node(&[(1, 4)]);
        network.ensure(&expected).await.unwrap();
        assert_eq!(differences(&network, &expected).await, [""; 0]);
        assert!(!ip("link show").contains("tenant-2"));
        network.ensure(&NodeNetwork::default()).await.unwrap();
        assert!(!ip("link show").contains("tenant"));
        assert_eq!(nft("list ruleset\n"), "");
    });
}

#[test]
fn instances_and_tenants_are_added_and_removed_one_by_one() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&NodeNetwork::default()).await.unwrap();
        for (net_id, slot) in [(1, 3), (1, 4), (2, 3), (11, 3)] {
            network.add_instance(instance(net_id, slot)).await.unwrap();
        }
        assert_eq!(differences(&network, &node(&[(1, 3), (1, 4), (2, 3), (11, 3)])).await, [""; 0]);
        network.add_instance(instance(1, 3)).await.unwrap();
        network.remove_instance(instance(1, 3)).await.unwrap();
        network.remove_instance(instance(1, 3)).await.unwrap();
        assert_eq!(differences(&network, &node(&[(1, 4), (2, 3), (11, 3)])).await, [""; 0]);
        network.remove_tenant(tenant(1)).await.unwrap();
        network.remove_tenant(tenant(1)).await.unwrap();
        assert_eq!(differences(&network, &node(&[(2, 3), (11, 3)])).await, [""; 0]);
        network.remove_tenant(tenant(2)).await.unwrap();
        network.remove_tenant(tenant(11)).await.unwrap();
        assert_eq!(differences(&network, &NodeNetwork::default()).await, [""; 0]);
        assert_eq!(nft("list ruleset\n"), "");
        let claims = std::fs::read_dir(machine.claims_dir()).unwrap().flatten();
        // The registry of owners stays.
        assert_eq!(claims.map(|entry| entry.file_name()).collect::<Vec<_>>(), ["owners"]);
    });
}

#[test]
fn adding_an_instance_leaves_the_rules_and_other_instances_alone() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        let rules = |ruleset: String| {
            let is_rule = |line: &&str| line.contains("comment");
            ruleset.lines().filter(is_rule).map(str::to_owned).collect::<Vec<_>>()
        };
        let (before, link) = (rules(nft("list ruleset\n")), ip("link show tn1i3"));
        network.add_instance(instance(1, 4)).await.unwrap();
        network.add_instance(instance(2, 3)).await.unwrap();
        // With their handles: the same rules, not equal ones.
        assert_eq!(rules(nft("list ruleset\n")), before);
        assert_eq!(ip("link show tn1i3"), link);
    });
}

#[test]
fn nothing_is_added_before_the_machine_is_known() {
    in_namespace(|| async {
        let machine = Machine::new();
        machine.agent("a").ensure(&node(&[(1, 3)])).await.unwrap();
        let restarted = machine.agent("a");
        let refused = restarted.add_instance(instance(1, 4)).await;
        assert!(matches!(refused, Err(NetworkError::NotEnsured)), "{refused:?}");
        assert_eq!(differences(&restarted, &node(&[(1, 3)])).await, [""; 0]);
    });
}

#[test]
fn links_of_others_are_left_alone_and_their_names_are_refused() {
    in_namespace(|| async {
        let machine = Machine::new();
        ip("link add br-tenant-1 type bridge");
        ip("tuntap add dev tn2i4 mode tap");
        let before = [ip("-d link show br-tenant-1"), ip("-d link show tn2i4")];
        let network = machine.agent("a");
        let error = network.ensure(&node(&[(1, 3), (2, 3), (2, 4)])).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("br-tenant-1 belongs to other software"), "{text}");
        assert!(text.contains("tn2i4 belongs to other software"), "{text}");
        assert!(ip("link show tn2i3").contains("master br-tenant-2"));
        for taken in [instance(1, 3), instance(2, 4)] {
            let error = network.add_instance(taken).await.unwrap_err();
            assert!(matches!(error, NetworkError::Taken { .. }), "{error}");
            network.remove_instance(taken).await.unwrap();
        }
        network.remove_tenant(tenant(1)).await.unwrap();
        network.ensure(&NodeNetwork::default()).await.unwrap();
        assert_eq!([ip("-d link show br-tenant-1"), ip("-d link show tn2i4")], before);
    });
}

#[test]
fn firewall_tables_of_others_are_left_alone() {
    in_namespace(|| async {
        let machine = Machine::new();
        nft("table inet mvm_other {\n set bridges { type ifname; elements = { \"br0\" }; }\n}\n");
        nft(
            "table ip filter {\n chain forward { type filter hook forward priority 0; policy drop; }\n}\n",
        );
        let list = || nft("list table inet mvm_other\n") + &nft("list table ip filter\n");
        let before = list();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        network.add_instance(instance(1, 4)).await.unwrap();
        network.remove_tenant(tenant(1)).await.unwrap();
        assert_eq!(list(), before);
        assert_eq!(nft("list tables\n").lines().count(), 2);
    });
}

#[test]
fn agents_of_one_machine_do_not_disturb_each_other() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (a, b) = (machine.agent("a"), machine.agent("b"));
        let (of_a, of_b) = (node(&[(1, 3), (2, 3)]), node(&[(3, 3)]));
        a.ensure(&of_a).await.unwrap();
        b.ensure(&of_b).await.unwrap();
        a.ensure(&of_a).await.unwrap();
        assert_eq!(differences(&a, &of_a).await, [""; 0]);
        assert_eq!(differences(&b, &of_b).await, [""; 0]);
        let refused = b.claim(NetId(1)).await;
        assert!(matches!(refused, Err(NetworkError::Claimed { .. })), "{refused:?}");
        let refused = b.add_instance(instance(1, 4)).await;
        assert!(matches!(refused, Err(NetworkError::Claimed { .. })), "{refused:?}");
        b.remove_tenant(tenant(1)).await.unwrap();
        b.ensure(&NodeNetwork::default()).await.unwrap();
        assert_eq!(differences(&a, &of_a).await, [""; 0]);
    });
}

#[test]
fn what_others_use_is_reported_as_occupied() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (a, b) = (machine.agent("a"), machine.agent("b"));
        a.ensure(&node(&[(1, 3)])).await.unwrap();
        b.claim(NetId(7)).await.unwrap();
        ip("link add br-tenant-8 type bridge");
        ip("tuntap add dev tn9i3 mode tap");
        ip("tuntap add dev eth7 mode tap");
        ip("address add 192.168.7.1/24 dev eth7");
        ip("link set eth7 up");
        ip("route add blackhole 172.16.0.0/16");
        let occupied = a.occupied().await.unwrap();
        assert_eq!(occupied.net_ids, BTreeSet::from([7, 8, 9].map(NetId)));
        for subnet in ["192.168.7.0/24", "172.16.0.0/16"] {
            assert!(occupied.subnets.contains(&subnet.parse().unwrap()), "{:?}", occupied.subnets);
        }
        let Occupied { net_ids, subnets } = b.occupied().await.unwrap();
        assert!(net_ids.contains(&NetId(1)) && !net_ids.contains(&NetId(7)));
        assert!(
            subnets.contains(&tenant(1).subnet) && !occupied.subnets.contains(&tenant(1).subnet)
        );
    });
}

#[test]
fn a_lost_claim_is_reported_and_taken_again() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (network, expected) = (machine.agent("a"), node(&[(1, 3)]));
        network.ensure(&expected).await.unwrap();
        std::fs::remove_file(machine.claims_dir().join("1")).unwrap();
        assert_eq!(differences(&network, &expected).await, ["net id 1 is not claimed"]);
        network.ensure(&expected).await.unwrap();
        assert_eq!(differences(&network, &expected).await, [""; 0]);
    });
}

/// What is changed of any firewall, as `nft monitor` tells it.
struct Changes {
    monitor: Child,
    told: tempfile::NamedTempFile,
    marks: u32,
    /// Lines that were read.
    seen: usize,
}

impl Changes {
    /// Tells what comes from now on.
    fn watch() -> Self {
        let told = tempfile::NamedTempFile::new().unwrap();
        let output = told.reopen().unwrap();
        let monitor = Command::new("nft").arg("monitor").stdout(output).spawn().unwrap();
        let mut changes = Self { monitor, told, marks: 0, seen: 0 };
        changes.until_now();
        changes
    }

    /// What has come since it was asked last, other than the marks that it makes for this.
    fn until_now(&mut self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            // The first ones come before it listens.
            self.marks += 1;
            let mark = format!("mark{}", self.marks);
            nft(&format!("add table inet {mark}\n"));
            let soon = Instant::now() + Duration::from_millis(500);
            while Instant::now() < soon {
                let lines = self.lines();
                if lines.iter().any(|line| line.ends_with(&mark)) {
                    let is_news = |line: &String| !line.contains("mark") && !line.starts_with('#');
                    let before = std::mem::replace(&mut self.seen, lines.len());
                    return lines.into_iter().skip(before).filter(is_news).collect();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(Instant::now() < deadline, "`nft monitor` does not tell of {mark}");
        }
    }

    fn lines(&self) -> Vec<String> {
        std::fs::read_to_string(self.told.path()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.monitor.kill().unwrap();
        self.monitor.wait().unwrap();
    }
}

#[test]
fn a_wake_changes_no_firewall() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        let mut changes = Changes::watch();
        assert!(!network.mend_firewall().await.unwrap(), "it was not this agent's that changed");
        network.remove_tap(instance(1, 3)).await.unwrap();
        network.add_instance(instance(1, 3)).await.unwrap();
        assert_eq!(changes.until_now(), [""; 0]);
        // Whatever else somebody has changed just now, nothing of others is touched for it.
        network.remove_tap(instance(1, 3)).await.unwrap();
        network.add_instance(instance(1, 4)).await.unwrap();
        network.add_instance(instance(1, 3)).await.unwrap();
        let told = changes.until_now();
        assert!(told.iter().all(|line| line.contains("add element bridge")), "{told:?}");
        network.remove_instance(instance(1, 3)).await.unwrap();
        let told = changes.until_now();
        assert!(told.iter().any(|line| line.contains("delete element bridge")), "{told:?}");
    });
}

#[test]
fn what_somebody_changed_of_the_firewall_is_put_back() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (network, expected) = (machine.agent("a"), node(&[(1, 3), (2, 3)]));
        assert!(!network.mend_firewall().await.unwrap(), "nothing is known");
        network.ensure(&expected).await.unwrap();
        assert!(!network.mend_firewall().await.unwrap());
        nft("add table inet of_others\n");
        assert!(!network.mend_firewall().await.unwrap(), "it was not this agent's");
        let table = machine.owner("a").table().clone();
        for change in [
            format!(
                "delete element bridge {table} instances {{ \"tn1i3\" . {} . {} }}\n",
                instance(1, 3).mac(),
                instance(1, 3).address()
            ),
            format!("flush table inet {table}\n"),
            format!("delete table bridge {table}\n"),
            "flush ruleset\n".to_owned(),
        ] {
            nft(&change);
            assert!(network.mend_firewall().await.unwrap(), "{change}");
            assert_eq!(differences(&network, &expected).await, [""; 0]);
            assert!(!network.mend_firewall().await.unwrap(), "{change}");
        }
    });
}

#[test]
fn an_instance_wakes_although_somebody_emptied_the_firewall() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        network.remove_tap(instance(1, 3)).await.unwrap();
        nft("flush ruleset\n");
        network.add_instance(instance(1, 3)).await.unwrap();
        assert_eq!(differences(&network, &node(&[(1, 3)])).await, [""; 0]);
    });
}

#[test]
fn an_instance_is_added_although_somebody_emptied_the_firewall() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        nft("flush ruleset\n");
        network.add_instance(instance(1, 4)).await.unwrap();
        assert_eq!(differences(&network, &node(&[(1, 3), (1, 4)])).await, [""; 0]);
    });
}

#[test]
fn a_bridge_that_was_made_and_not_yet_marked_is_taken_up_or_removed() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        let make = || ip("link add br-tenant-1 address 02:6d:0a:f0:01:01 type bridge");
        network.claim(NetId(1)).await.unwrap();
        make();
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        assert_eq!(differences(&network, &node(&[(1, 3)])).await, [""; 0]);
        ip("link del br-tenant-1");
        make();
        network.ensure(&NodeNetwork::default()).await.unwrap();
        assert!(!ip("link show").contains("br-tenant-1"));
        // Without the claim it is somebody else's.
        network.release(NetId(1)).await.unwrap();
        make();
        network.ensure(&NodeNetwork::default()).await.unwrap();
        assert!(ip("link show").contains("br-tenant-1"));
    });
}

/// Polls a future so many times and then drops it, as if its process were killed there.
struct CutOff<F> {
    inner: Pin<Box<F>>,
    polls: u32,
}

impl<F: Future> Future for CutOff<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            return Poll::Ready(None);
        }
        self.polls -= 1;
        self.inner.as_mut().poll(context).map(Some)
    }
}

#[test]
fn whatever_is_cut_off_anywhere_is_mended_by_the_next_agent() {
    in_namespace(|| async {
        let machine = Machine::new();
        let expected = node(&[(1, 3), (1, 4), (2, 3)]);
        let mut polls = 0;
        loop {
            machine.agent("a").ensure(&NodeNetwork::default()).await.unwrap();
            let first = machine.agent("a");
            let ensured = CutOff { inner: Box::pin(first.ensure(&expected)), polls };
            let is_done = pin!(ensured).await.is_some();
            let next = machine.agent("a");
            next.ensure(&expected).await.unwrap();
            assert_eq!(differences(&next, &expected).await, [""; 0], "after {polls} polls");
            if is_done {
                break;
            }
            polls += 1;
        }
        assert!(polls > 20, "it was not cut off often: {polls}");
    });
}

#[test]
fn a_tap_that_a_vmm_holds_open_is_removed_all_the_same() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3), (2, 3)])).await.unwrap();
        let in_use = open_tap("tn1i3");
        network.remove_tenant(tenant(1)).await.unwrap();
        assert!(!ip("link show").contains("tn1i3"));
        drop(in_use);
        assert_eq!(differences(&network, &node(&[(2, 3)])).await, [""; 0]);
    });
}

/// A process in a network namespace of its own, as a VMM is.
struct Vmm(Child);

impl Vmm {
    fn new() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap();
        let vmm = Self(child);
        let comm = format!("/proc/{}/comm", vmm.pid());
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
            assert!(Instant::now() < deadline, "it is not in its namespace");
            std::thread::yield_now();
        }
        vmm
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn ip(&self, arguments: &str) {
        let namespace = format!("--net=/proc/{}/ns/net", self.pid());
        let mut command = Command::new("nsenter");
        let status = command.args([&namespace, "ip"]).args(arguments.split(' ')).status();
        assert!(status.unwrap().success(), "ip {arguments}");
    }

    fn make_tap(&self, instance: InstanceNetwork, owner_uid: u32) {
        self.ip(&format!("tuntap add dev {} mode tap user {owner_uid}", instance.tap()));
    }

    /// Opens the tap, where it is.
    fn open_tap(&self, instance: InstanceNetwork) -> std::fs::File {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        let open = move || {
            let network = rustix::thread::ThreadNameSpaceType::NETWORK;
            rustix::thread::move_into_thread_name_spaces(namespace.as_fd(), network).unwrap();
            open_tap(&instance.tap())
        };
        std::thread::spawn(open).join().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_tap_is_taken_from_the_namespace_of_the_vmm_that_has_it_open() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        let (instance, expected) = (instance(1, 4), node(&[(1, 3), (1, 4)]));
        network.admit_instance(instance).await.unwrap();
        assert_eq!(differences(&network, &expected).await.len(), 1, "only the tap is missing");

        let vmm = Vmm::new();
        let missing = network.take_tap(instance, vmm.pid()).await;
        assert!(missing.is_err(), "there is none");
        vmm.make_tap(instance, instance.owner_uid() + 1);
        let others = network.take_tap(instance, vmm.pid()).await;
        assert!(others.is_err(), "it is another user's");
        vmm.ip(&format!("link del {}", instance.tap()));
        vmm.make_tap(instance, instance.owner_uid());
        let tap = vmm.open_tap(instance);
        // An agent that came back in between has made another one.
        network.ensure(&expected).await.unwrap();
        for _ in 0..2 {
            network.take_tap(instance, vmm.pid()).await.unwrap();
            assert_eq!(differences(&network, &expected).await, [""; 0]);
        }
        assert_eq!(sysctl(&format!("ipv6/conf/{}/disable_ipv6", instance.tap())), Some("1".into()));

        // Packets flow: both are answered by the gateway.
        let mut guest = Station::guest_on(tap, instance);
        guest.fence();
        // From a VMM that is where the machine's links are there is nothing to take.
        let here = Vmm(Command::new("sleep").arg("120").spawn().unwrap());
        network.take_tap(instance, here.pid()).await.unwrap();
        drop(here);
        assert_eq!(differences(&network, &expected).await, [""; 0]);
        // It stays when its VMM has ended, and is removed like any other.
        drop((vmm, guest));
        assert_eq!(differences(&network, &expected).await, [""; 0]);

        // One that is left of an earlier run gives way.
        let vmm = Vmm::new();
        vmm.make_tap(instance, instance.owner_uid());
        let tap = vmm.open_tap(instance);
        network.take_tap(instance, vmm.pid()).await.unwrap();
        Station::guest_on(tap, instance).fence();
        network.remove_instance(instance).await.unwrap();
        assert_eq!(differences(&network, &node(&[(1, 3)])).await, [""; 0]);
    });
}

#[test]
fn a_tap_is_not_taken_over_somebody_elses_link() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3)])).await.unwrap();
        let instance = instance(1, 4);
        network.admit_instance(instance).await.unwrap();
        ip(&format!("link add {} type bridge", instance.tap()));
        let vmm = Vmm::new();
        vmm.make_tap(instance, instance.owner_uid());
        let refused = network.take_tap(instance, vmm.pid()).await;
        assert!(matches!(refused, Err(NetworkError::Taken { .. })), "{refused:?}");
    });
}

#[test]
fn a_running_microvm_that_lost_its_tap_is_known_also_once_there_is_another() {
    in_namespace(|| async {
        let machine = Machine::new();
        let network = machine.agent("a");
        network.ensure(&node(&[(1, 3), (1, 4)])).await.unwrap();
        let running = [instance(1, 3), instance(1, 4)];
        // Their VMMs have them open.
        let taps = running.map(|instance| open_tap(&instance.tap()));
        let cut_off = || async { network.cut_off(&running).await.unwrap() };
        assert_eq!(cut_off().await, BTreeSet::new());
        ip("link del tn1i3");
        assert_eq!(cut_off().await, BTreeSet::from([running[0]]));
        assert!(network.mend_links().await.unwrap());
        assert_eq!(differences(&network, &node(&[(1, 3), (1, 4)])).await, [""; 0]);
        assert_eq!(cut_off().await, BTreeSet::from([running[0]]), "the new one leads nowhere");
        // A VMM that was started again has the new one.
        let _again = open_tap("tn1i3");
        assert_eq!(cut_off().await, BTreeSet::new());
        // A bridge that was made anew has all taps on it, and they are whole.
        ip("link del br-tenant-1");
        assert!(network.mend_links().await.unwrap());
        assert_eq!(differences(&network, &node(&[(1, 3), (1, 4)])).await, [""; 0]);
        assert_eq!(cut_off().await, BTreeSet::new());
        drop(taps);
    });
}

#[test]
fn a_route_that_comes_to_overlap_a_tenants_subnet_is_told() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (a, b) = (machine.agent("a"), machine.agent("b"));
        a.ensure(&node(&[(1, 3)])).await.unwrap();
        b.ensure(&node(&[(2, 3)])).await.unwrap();
        assert_eq!(differences(&a, &node(&[(1, 3)])).await, [""; 0]);
        assert_eq!(route_conflicts().await.unwrap(), []);
        ip("link add name vpn type bridge");
        ip("link set vpn up");
        ip("route add 10.240.0.0/16 dev vpn");
        let expected =
            "the subnet 10.240.1.0/24 overlaps 10.240.0.0/16, which this machine routes elsewhere";
        assert_eq!(differences(&a, &node(&[(1, 3)])).await, [expected]);
        assert_eq!(route_conflicts().await.unwrap().len(), 2);
    });
}
