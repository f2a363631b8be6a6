//! What every network backend promises its callers, simulated and real.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::collections::BTreeSet;

use mvm_core::net::{NetId, NodeNetwork};
use mvm_host::net::{Network, NetworkError, SimMachine};
use net_support::{Machine, differences, in_namespace, instance, ip, node, tenant};

/// A machine with two agents, and ways to change it behind their backs.
struct Host {
    a: Box<dyn Network>,
    b: Box<dyn Network>,
    take_down: Box<dyn Fn(&str)>,
    remove_link: Box<dyn Fn(&str)>,
    add_foreign_bridge: Box<dyn Fn(&str)>,
}

/// Runs a promise on both backends.
fn on_each_backend(promise: fn(Host) -> futures_util::future::LocalBoxFuture<'static, ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let machine = SimMachine::new();
    let (down, remove, add) = (machine.clone(), machine.clone(), machine.clone());
    runtime.block_on(promise(Host {
        a: Box::new(machine.agent("/a")),
        b: Box::new(machine.agent("/b")),
        take_down: Box::new(move |link| down.take_down(link)),
        remove_link: Box::new(move |link| remove.remove_link(link)),
        add_foreign_bridge: Box::new(move |link| add.add_foreign_link(link)),
    }));
    in_namespace(move || async move {
        let machine = Machine::new();
        promise(Host {
            a: Box::new(machine.agent("a")),
            b: Box::new(machine.agent("b")),
            take_down: Box::new(|link| drop(ip(&format!("link set {link} down")))),
            remove_link: Box::new(|link| drop(ip(&format!("link del {link}")))),
            add_foreign_bridge: Box::new(|link| drop(ip(&format!("link add {link} type bridge")))),
        })
        .await;
    });
}

#[test]
fn what_was_ensured_is_verified() {
    on_each_backend(|host| {
        Box::pin(async move {
            let expected = node(&[(1, 3), (1, 4), (2, 3)]);
            host.a.ensure(&expected).await.unwrap();
            host.a.ensure(&expected).await.unwrap();
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
            host.a.ensure(&node(&[(2, 3)])).await.unwrap();
            assert_eq!(differences(&*host.a, &node(&[(2, 3)])).await, [""; 0]);
        })
    });
}

#[test]
fn instances_come_and_go() {
    on_each_backend(|host| {
        Box::pin(async move {
            let refused = host.a.add_instance(instance(1, 3)).await;
            assert!(matches!(refused, Err(NetworkError::NotEnsured)), "{refused:?}");
            host.a.ensure(&NodeNetwork::default()).await.unwrap();
            for slot in [3, 4, 3] {
                host.a.add_instance(instance(1, slot)).await.unwrap();
            }
            assert_eq!(differences(&*host.a, &node(&[(1, 3), (1, 4)])).await, [""; 0]);
            // Where a VMM makes the tap, the rest is there before it.
            host.a.admit_instance(instance(1, 5)).await.unwrap();
            let missing = differences(&*host.a, &node(&[(1, 3), (1, 4), (1, 5)])).await;
            assert_eq!(missing.len(), 1, "{missing:?}");
            host.a.remove_instance(instance(1, 5)).await.unwrap();
            for _ in 0..2 {
                host.a.remove_instance(instance(1, 3)).await.unwrap();
            }
            assert_eq!(differences(&*host.a, &node(&[(1, 4)])).await, [""; 0]);
            for _ in 0..2 {
                host.a.remove_tenant(tenant(1)).await.unwrap();
            }
            assert_eq!(differences(&*host.a, &NodeNetwork::default()).await, [""; 0]);
            host.b.claim(NetId(1)).await.unwrap();
        })
    });
}

#[test]
fn what_sleeps_has_its_rules_and_no_tap() {
    on_each_backend(|host| {
        Box::pin(async move {
            host.a.ensure(&node(&[(1, 3), (1, 4)])).await.unwrap();
            let mut expected = node(&[(1, 4)]);
            expected.add_asleep(instance(1, 3)).unwrap();
            let differs = differences(&*host.a, &expected).await;
            assert_eq!(differs, ["tn1i3 is left over"]);
            for _ in 0..2 {
                host.a.remove_tap(instance(1, 3)).await.unwrap();
            }
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
            host.a.ensure(&expected).await.unwrap();
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
            host.a.add_instance(instance(1, 3)).await.unwrap();
            assert_eq!(differences(&*host.a, &node(&[(1, 3), (1, 4)])).await, [""; 0]);
            host.a.ensure(&expected).await.unwrap();
            host.a.remove_instance(instance(1, 3)).await.unwrap();
            assert_eq!(differences(&*host.a, &node(&[(1, 4)])).await, [""; 0]);
        })
    });
}

#[test]
fn a_tenant_whose_subnet_is_in_use_is_refused() {
    on_each_backend(|host| {
        Box::pin(async move {
            host.a.ensure(&node(&[(1, 3)])).await.unwrap();
            let mut overlapping = instance(2, 3);
            overlapping.tenant.subnet = tenant(1).subnet;
            let refused = host.a.add_instance(overlapping).await;
            assert!(matches!(refused, Err(NetworkError::Conflict(_))), "{refused:?}");
            assert_eq!(differences(&*host.a, &node(&[(1, 3)])).await, [""; 0]);
        })
    });
}

#[test]
fn a_net_id_is_one_agents() {
    on_each_backend(|host| {
        Box::pin(async move {
            host.a.claim(NetId(1)).await.unwrap();
            host.a.claim(NetId(1)).await.unwrap();
            let refused = host.b.claim(NetId(1)).await;
            assert!(matches!(refused, Err(NetworkError::Claimed { .. })), "{refused:?}");
            assert_eq!(host.b.occupied().await.unwrap().net_ids, BTreeSet::from([NetId(1)]));
            assert_eq!(host.a.occupied().await.unwrap().net_ids, BTreeSet::new());
            let refused = host.b.ensure(&node(&[(1, 3), (2, 3)])).await;
            assert!(matches!(refused, Err(NetworkError::Claimed { .. })), "{refused:?}");
            host.b.release(NetId(1)).await.unwrap();
            host.a.ensure(&node(&[(1, 3)])).await.unwrap();
            host.b.ensure(&node(&[(2, 3)])).await.unwrap();
            assert_eq!(differences(&*host.a, &node(&[(1, 3)])).await, [""; 0]);
            assert_eq!(differences(&*host.b, &node(&[(2, 3)])).await, [""; 0]);
            host.a.remove_tenant(tenant(1)).await.unwrap();
            host.b.claim(NetId(1)).await.unwrap();
        })
    });
}

#[test]
fn tampering_is_seen_and_mended() {
    on_each_backend(|host| {
        Box::pin(async move {
            let expected = node(&[(1, 3), (1, 4)]);
            host.a.ensure(&expected).await.unwrap();
            (host.take_down)("br-tenant-1");
            (host.remove_link)("tn1i3");
            let found = differences(&*host.a, &expected).await;
            assert_eq!(found, ["br-tenant-1 is down", "tn1i3 is missing"]);
            host.a.ensure(&expected).await.unwrap();
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
        })
    });
}

#[test]
fn links_that_somebody_changed_are_put_back() {
    on_each_backend(|host| {
        Box::pin(async move {
            let mut expected = node(&[(1, 3), (1, 4)]);
            assert!(!host.a.mend_links().await.unwrap(), "nothing is known");
            host.a.ensure(&expected).await.unwrap();
            assert!(!host.a.mend_links().await.unwrap());
            // With the bridge go its ports' places on it.
            (host.remove_link)("br-tenant-1");
            (host.remove_link)("tn1i4");
            assert!(host.a.mend_links().await.unwrap());
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
            // What has gone since is not made again.
            host.a.remove_instance(instance(1, 4)).await.unwrap();
            host.a.remove_tap(instance(1, 3)).await.unwrap();
            (host.take_down)("br-tenant-1");
            assert!(host.a.mend_links().await.unwrap());
            expected = node(&[]);
            expected.add_asleep(instance(1, 3)).unwrap();
            assert_eq!(differences(&*host.a, &expected).await, [""; 0]);
            // It has its tap again once it is awake.
            host.a.add_instance(instance(1, 3)).await.unwrap();
            (host.remove_link)("tn1i3");
            assert!(host.a.mend_links().await.unwrap());
            assert_eq!(differences(&*host.a, &node(&[(1, 3)])).await, [""; 0]);
        })
    });
}

#[test]
fn somebody_elses_link_is_refused_and_the_rest_is_done() {
    on_each_backend(|host| {
        Box::pin(async move {
            (host.add_foreign_bridge)("br-tenant-1");
            let refused = host.a.ensure(&node(&[(1, 3), (2, 3)])).await;
            assert!(matches!(refused, Err(NetworkError::Taken { .. })), "{refused:?}");
            assert_eq!(host.a.occupied().await.unwrap().net_ids, BTreeSet::from([NetId(1)]));
            let refused = host.a.add_instance(instance(1, 3)).await;
            assert!(matches!(refused, Err(NetworkError::Taken { .. })), "{refused:?}");
            host.a.remove_tenant(tenant(1)).await.unwrap();
            assert_eq!(differences(&*host.a, &node(&[(2, 3)])).await, [""; 0]);
        })
    });
}

#[test]
fn a_simulated_failure_is_reported_and_the_next_round_mends_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let machine = SimMachine::new();
        let (network, expected) = (machine.agent("/a"), node(&[(1, 3), (2, 3)]));
        for failures in 1..8 {
            network.ensure(&NodeNetwork::default()).await.unwrap();
            machine.fail_next(failures);
            assert!(network.ensure(&expected).await.is_err());
            machine.fail_next(0);
            network.ensure(&expected).await.unwrap();
            assert_eq!(differences(&network, &expected).await, [""; 0]);
        }
        machine.fail_next(100);
        let failed = network.remove_tenant(tenant(1)).await;
        assert!(matches!(failed, Err(NetworkError::Several(errors)) if errors.len() == 2));
        assert!(machine.links().contains("br-tenant-1"));
    });
}
