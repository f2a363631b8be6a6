//! Instances that stand by: made ahead, taken at once, replaced, and given back.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath};
use mvm_core::record::Purpose;
use mvm_core::sleep_policy::HostMemory;
use mvm_wire::Call;
use mvm_wire::view::InstanceView;

use crate::node::{Agent, Machine, is_running};

fn web() -> PoolPath {
    "demo/web".parse().unwrap()
}

/// An agent whose pool `demo/web` has a base, and so many instances that stand by.
async fn with_spares(machine: &Machine, ready: usize) -> Agent {
    let agent = machine.agent().await;
    let text = format!(r#"{{"tenant":"demo","pools":{{"web":{{"running":0,"ready":{ready}}}}}}}"#);
    agent.submit(Request::Apply { document: serde_json::from_str(&text).unwrap() }).await.unwrap();
    agent.call(Call::WarmUp { pool: web() }).await.unwrap();
    until_spares(&agent, ready).await;
    agent
}

fn spares(all: &[InstanceView]) -> Vec<InstancePath> {
    let spares = all.iter().filter(|view| view.purpose == Purpose::Spare);
    let warm = spares.filter(|view| view.state == State::Warm && view.activity.is_none());
    warm.map(|view| view.path.clone()).collect()
}

async fn until_spares(agent: &Agent, count: usize) -> Vec<InstancePath> {
    let what = format!("{count} stand by");
    let all = agent
        .until(&what, |all| {
            let there = all.iter().filter(|view| view.purpose == Purpose::Spare).count();
            spares(all).len() == count && there == count
        })
        .await;
    spares(&all)
}

fn create() -> Request {
    Request::InstanceCreate { pool: web(), count: 1, start: true, disks: vec![], cold: false }
}

#[tokio::test(start_paused = true)]
async fn one_that_stands_by_is_taken_and_another_takes_its_place() {
    let machine = Machine::new();
    let agent = with_spares(&machine, 2).await;
    let before = until_spares(&agent, 2).await;
    let taken = agent.submit(create()).await.unwrap().instances.remove(0).path;
    assert!(before.contains(&taken));
    let all = agent
        .until("it runs", |all| all.iter().any(|view| view.path == taken && is_running(view)))
        .await;
    let view = all.iter().find(|view| view.path == taken).unwrap();
    assert_eq!((view.boots, view.purpose.clone()), (0, Purpose::Use.into()));
    let hostname = agent.exec(&taken.to_string(), &["hostname"]).await.unwrap().0;
    assert_eq!(hostname.trim(), format!("web-{}", taken.id), "it is its own");
    let after = until_spares(&agent, 2).await;
    assert!(!after.contains(&taken) && after.iter().any(|path| before.contains(path)));
}

#[tokio::test(start_paused = true)]
async fn nobody_is_sent_to_one_that_stands_by() {
    let machine = Machine::new();
    let agent = with_spares(&machine, 1).await;
    let error = agent.exec("demo/web", &["echo"]).await.unwrap_err();
    assert!(error.message.contains("demo/web"), "{error}");
    assert_eq!(until_spares(&agent, 1).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_base_replaces_them_and_none_are_kept_without_a_wish() {
    let machine = Machine::new();
    let agent = with_spares(&machine, 2).await;
    let before = until_spares(&agent, 2).await;
    agent.call(Call::WarmUp { pool: web() }).await.unwrap();
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = spares(&agent.instances().await);
        if now.len() == 2 && !now.iter().any(|path| before.contains(path)) {
            break;
        }
    }
    let after = until_spares(&agent, 2).await;
    assert!(!after.iter().any(|path| before.contains(path)), "they began with the base before");
    agent.submit(Request::PoolReady { path: web(), ready: 0 }).await.unwrap();
    until_spares(&agent, 0).await;
    agent.until("nothing is left", |all| all.is_empty()).await;
    assert!(machine.world.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn short_memory_takes_them_first_and_they_come_back() {
    let machine = Machine::new();
    let agent = with_spares(&machine, 2).await;
    machine.memory.simulate(Some(HostMemory { available_mib: 10, wanted_mib: 512 }));
    until_spares(&agent, 0).await;
    // There is room for one of 256 MiB, and not for two, which are made together or not at all.
    machine.memory.simulate(Some(HostMemory { available_mib: 800, wanted_mib: 512 }));
    tokio::time::sleep(Duration::from_secs(60)).await;
    until_spares(&agent, 0).await;
    machine.memory.simulate(Some(HostMemory { available_mib: 1024, wanted_mib: 512 }));
    until_spares(&agent, 2).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_comes_back_finds_them() {
    let machine = Machine::new();
    let agent = with_spares(&machine, 2).await;
    let before = until_spares(&agent, 2).await;
    agent.node.end().await;
    let agent = machine.agent().await;
    assert_eq!(until_spares(&agent, 2).await, before);
    let taken = agent.submit(create()).await.unwrap().instances.remove(0).path;
    assert!(before.contains(&taken));
    agent.exec(&taken.to_string(), &["echo"]).await.unwrap();
    agent
        .submit(Request::TenantDestroy { name: "demo".parse().unwrap(), force: true })
        .await
        .unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(machine.leftovers().await, [""; 0]);
}
