//! What hangs holds up nobody else: an instance, a tenant's network and a disk stand still for minutes.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::net::NetId;
use mvm_wire::view::InstanceView;
use tokio::time::Instant;

use crate::node::{Agent, Machine, is_running};

fn document(tenant: &str, more: &str) -> Request {
    let text = format!(r#"{{"tenant":"{tenant}","pools":{{"p":{{"running":1}}}}{more}}}"#);
    Request::Apply { document: serde_json::from_str(&text).unwrap() }
}

fn of<'a>(all: &'a [InstanceView], tenant: &str) -> Vec<&'a InstanceView> {
    all.iter().filter(|view| view.path.pool.tenant.as_str() == tenant).collect()
}

/// How long a tenant takes for a whole life: made, started, asked, put to sleep, woken, stopped, removed.
async fn life(agent: &Agent, tenant: &str) -> Duration {
    let began = Instant::now();
    agent.submit(document(tenant, "")).await.unwrap();
    let is_up = |all: &[InstanceView]| {
        let own = of(all, tenant);
        own.len() == 1 && is_running(own[0])
    };
    let all = agent.until("it runs", is_up).await;
    let path = of(&all, tenant)[0].path.clone();
    let selector = Selector::from(&path);
    let name = path.to_string();
    assert_eq!(agent.exec(&name, &["true"]).await.unwrap().1, 0);
    let sleep = Request::InstanceSleep { selector: selector.clone(), all: false, hooks_ms: 100 };
    agent.submit(sleep).await.unwrap();
    agent.until("it sleeps", |all| of(all, tenant)[0].state == State::Sleeping).await;
    assert_eq!(agent.exec(&name, &["true"]).await.unwrap().1, 0);
    let stop = Request::InstanceStop { selector, all: false, grace_ms: 5_000 };
    agent.submit(stop).await.unwrap();
    agent.until("it is stopped", |all| of(all, tenant)[0].state == State::Stopped).await;
    let destroy = Request::TenantDestroy { name: tenant.parse().unwrap(), force: true };
    agent.submit(destroy).await.unwrap();
    agent.until("it is gone", |all| of(all, tenant).is_empty()).await;
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn an_instance_a_network_and_a_disk_that_hang_hold_up_nobody_else() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let usual = life(&agent, "usual").await;
    agent.submit(document("stuck", "")).await.unwrap();
    let stuck: InstancePath = agent.until_running(1).await[0].path.clone();
    agent.node.end().await;

    // Its actor hangs as soon as the next agent looks for its microVM.
    machine.world.hold(&stuck.id, true);
    let agent = machine.agent().await;
    let net_ids: Vec<NetId> = (2..6).map(NetId).collect();
    machine.network.hold(net_ids[0], true);
    agent.submit(document("mute", "")).await.unwrap();
    let disk: mvm_core::name::DiskPath = "full/data".parse().unwrap();
    machine.disks.hold(disk.clone(), true);
    let with_disk = r#","disks":{"data":{"size_mib":64}}"#;
    let text = format!(
        r#"{{"tenant":"full"{with_disk},"pools":{{"p":{{"running":1,"disks":[{{"name":"data","path":"/d"}}]}}}}}}"#
    );
    let full = Request::Apply { document: serde_json::from_str(&text).unwrap() };
    agent.submit(full).await.unwrap();

    // Whatever is asked of what hangs, again and again.
    let selector = Selector::from(&stuck);
    for round in 0..200 {
        let request = match round % 3 {
            0 => Request::InstanceStop { selector: selector.clone(), all: false, grace_ms: 10 },
            1 => Request::InstanceStart { selector: selector.clone(), all: false },
            _ => Request::InstanceRestart { selector: selector.clone(), all: false, grace_ms: 10 },
        };
        agent.submit(request).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let destroy = Request::InstanceDestroy { selector, all: false, force: true };
    agent.submit(destroy).await.unwrap();

    for minute in 0..3 {
        let took = life(&agent, &format!("other{minute}")).await;
        assert!(took <= usual + usual / 2, "{took:?} instead of {usual:?}");
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    let all = agent.instances().await;
    assert!(all.iter().any(|view| view.path == stuck), "it is still to go");
    assert!(!of(&all, "mute").iter().any(|view| is_running(view)));
    assert!(!of(&all, "full").iter().any(|view| is_running(view)));

    machine.world.hold(&stuck.id, false);
    machine.network.hold(net_ids[0], false);
    machine.disks.hold(disk, false);
    let is_well = |all: &[InstanceView]| all.len() == 2 && all.iter().all(is_running);
    agent.until("all goes on", is_well).await;
    let pool: PoolPath = "mute/p".parse().unwrap();
    agent.submit(Request::PoolDestroy { path: pool, force: true }).await.unwrap();
}
