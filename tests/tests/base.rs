//! Base snapshots of real microVMs: new instances of a pool go on from where one of it has booted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use mvm_tests::node::Node;
use mvm_tests::wait::{LIMIT, until};

#[test]
fn new_instances_begin_with_the_base_of_their_pool_and_are_their_own() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let base = node.json(&["pool", "warm-up", "acme/web"])["base"].clone();
    assert_eq!(base["in_use"], true, "{base}");
    assert_eq!(node.instances().len(), 0, "what was booted for it is gone");

    let paths = [node.boot("acme/web"), node.boot("acme/web")];
    let mut own = vec![];
    for path in &paths {
        let view = node.instance(path);
        assert_eq!((&view["boots"], &view["wakes"]), (&0.into(), &1.into()), "{view}");
        let address = view["address"].as_str().unwrap().to_owned();
        let script =
            "ip -4 addr show dev eth0 | grep -o 'inet [0-9.]*'; hostname; cat /etc/machine-id
            cat /run/mvm/woken | grep -o forked; head -c 16 /dev/urandom | md5sum";
        let seen = node.guest(path, script);
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!((lines[0], lines[3]), (format!("inet {address}").as_str(), "forked"), "{seen}");
        own.extend([1, 2, 4].map(|line| lines[line].to_owned()));
        node.guest(path, &format!("echo {path} > /root/mine; sync"));
    }
    own.sort();
    own.dedup();
    assert_eq!(own.len(), 6, "something is not its own: {own:?}");

    // What began with a base sleeps, wakes, stops and boots like any other.
    for path in &paths {
        node.ok(&["sleep", path]);
        assert_eq!(node.guest(path, "cat /root/mine"), *path);
        node.ok(&["stop", path]);
        node.ok(&["start", path]);
        assert_eq!(node.guest(path, "cat /root/mine"), *path);
        assert_eq!(node.instance(path)["boots"], 1);
    }

    let cold = node.json(&["instance", "create", "acme/web", "--start", "--cold"]);
    let cold = cold["concerns"]["instances"][0].as_str().unwrap();
    assert_eq!(node.instance(cold)["boots"], 1);
    assert!(node.ok(&["pool", "info", "acme/web"]).contains(base["id"].as_str().unwrap()));

    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn an_instance_that_stands_by_is_taken_and_is_its_own() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    node.ok(&["pool", "warm-up", "acme/web", "--ready", "1"]);
    let until_ready = || {
        until("one stands by", LIMIT, || {
            let info = node.json(&["pool", "info", "acme/web"]);
            (info["standing_by"] == 1).then_some(())
        });
        let listed = node.instances().into_iter().find(|view| view["purpose"] == "spare");
        listed.unwrap()["path"].as_str().unwrap().to_owned()
    };
    let spare = until_ready();
    assert!(node.ok(&["ps", "-a"]).contains("warm (stands by)"));
    assert_eq!(node.boot("acme/web"), spare);
    let address = node.instance(&spare)["address"].as_str().unwrap().to_owned();
    let seen = node.guest(&spare, "hostname; ip -4 addr show dev eth0; cat /run/mvm/wakes");
    assert!(seen.contains(&format!("web-{}", spare.rsplit('/').next().unwrap())), "{seen}");
    assert!(seen.contains(&address) && seen.ends_with('2'), "{seen}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let guest: u64 = node.guest(&spare, "date +%s").parse().unwrap();
    assert!(guest.abs_diff(now.as_secs()) <= 2, "{guest} against {}", now.as_secs());

    // The next one is made, stands by, and shares nothing with the first.
    let next = until_ready();
    assert_ne!(next, spare);
    assert_eq!(node.boot("acme/web"), next);
    let random = [&spare, &next].map(|path| node.guest(path, "head -c 16 /dev/urandom | md5sum"));
    assert_ne!(random[0], random[1]);
    node.guest(&next, &format!("ping -c 1 -W 5 {address}"));
    // It sleeps and wakes like any other.
    node.ok(&["sleep", &next]);
    assert_eq!(node.guest(&next, "cat /run/mvm/wakes"), "3");
    node.ok(&["pool", "warm-up", "acme/web", "--ready", "0"]);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_guest_that_ends_by_itself_makes_no_base() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/job", &["--restart", "never", "--", "/nowhere/program"]);
    let failed = node.mvm(&["pool", "warm-up", "acme/job"]);
    assert_ne!(failed.code, 0);
    assert!(failed.stderr.contains("acme/job gets no base"), "{}", failed.stderr);
    assert!(failed.stderr.contains("/nowhere/program"), "{}", failed.stderr);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}
