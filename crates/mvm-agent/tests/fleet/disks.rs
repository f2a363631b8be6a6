//! Data disks through an agent: made, waited for, handed on and removed.

use mvm_core::admit::Request;
use mvm_core::name::DiskPath;
use mvm_core::plan::Waiting;
use mvm_core::spec::Document;
use mvm_wire::view::DiskView;
use mvm_wire::{Call, Reply};

use crate::node::{Agent, Machine};

fn disk() -> DiskPath {
    "demo/data".parse().unwrap()
}

fn document() -> Document {
    serde_json::from_value(serde_json::json!({
        "tenant": "demo",
        "disks": { "data": { "size_mib": 64 } },
        "pools": { "web": { "disks": [{ "name": "data", "path": "/data" }] } },
    }))
    .unwrap()
}

async fn the_disk(agent: &Agent) -> Option<DiskView> {
    match agent.call(Call::Disks { tenant: None, path: None }).await.unwrap() {
        Reply::Disks(mut disks) => disks.pop(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_waits_for_a_disk_that_cannot_be_made_yet() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    machine.disks.set_full(true);
    agent.submit(Request::Apply { document: document() }).await.unwrap();
    agent
        .until("waiting for the disk", |all| {
            matches!(&all[0].waiting, Some(Waiting::Disk { error: Some(error), .. })
                if error.contains("no space left"))
        })
        .await;
    assert!(the_disk(&agent).await.unwrap().error.is_some());
    assert!(machine.world.running().is_empty());
    machine.disks.set_full(false);
    agent.until_running(1).await;
    let view = the_disk(&agent).await.unwrap();
    assert_eq!((view.ready, view.error, view.instances.len()), (true, None, 1));
}

#[tokio::test(start_paused = true)]
async fn a_disk_stays_when_everything_else_goes_and_goes_when_it_is_removed() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document() }).await.unwrap();
    agent.until_running(1).await;
    let file = the_disk(&agent).await.unwrap().file;
    std::fs::write(&file, "precious").unwrap();
    agent.submit(Request::Remove { document: document() }).await.unwrap();
    agent.until("no instance", |all| all.is_empty()).await;
    agent.node.end().await;

    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document() }).await.unwrap();
    agent.until_running(1).await;
    assert!(std::fs::read(&file).unwrap().starts_with(b"precious"), "it was not made again");
    let name = "demo".parse().unwrap();
    agent.submit(Request::TenantDestroy { name, force: true }).await.unwrap();
    for _ in 0..1_000 {
        if machine.leftovers().await.is_empty() && !file.exists() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("left behind: {:?}", machine.leftovers().await);
}

#[tokio::test(start_paused = true)]
async fn the_next_writer_starts_as_soon_as_the_last_one_has_stopped() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document() }).await.unwrap();
    let first = agent.until_running(1).await[0].path.clone();
    let request = Request::InstanceCreate {
        pool: first.pool.clone(),
        count: 1,
        start: false,
        disks: vec![],
        cold: false,
    };
    let second = agent.submit(request).await.unwrap().instances[0].path.clone();
    let selector = |path: &mvm_core::name::InstancePath| path.to_string().parse().unwrap();
    let start = || Request::InstanceStart { selector: selector(&second), all: false };
    let denial = agent.submit(start()).await.unwrap_err();
    assert!(denial.message.contains(&format!("while {first} writes it")), "{denial}");
    let stop = Request::InstanceStop { selector: selector(&first), all: false, grace_ms: 5_000 };
    agent.submit(stop).await.unwrap();
    agent.submit(start()).await.unwrap();
    agent
        .until("the second runs", |all| {
            assert!(machine.world.running().len() < 2, "two writers at once");
            all.iter().any(|view| view.path == second && crate::node::is_running(view))
        })
        .await;
    assert_eq!(machine.world.running(), std::slice::from_ref(&second.id));
    assert_eq!(the_disk(&agent).await.unwrap().path, disk());
}
