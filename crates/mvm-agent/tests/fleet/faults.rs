//! What goes wrong: launches, guests, agents, records.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::death::Cause;
use mvm_core::lifecycle::State;
use mvm_core::name::{PoolPath, Selector};
use mvm_core::spec::{Document, PoolSpec, RestartPolicy};
use mvm_host::vmm::TapPlace;
use mvm_host::vmm::sim::SimFault;
use mvm_store::Transaction;
use mvm_wire::{Call, ErrorCode, Reply};

use crate::node::{Agent, Machine, is_running};

async fn pool(agent: &Agent, spec: PoolSpec) -> PoolPath {
    let document: Document = serde_json::from_str(r#"{"tenant":"demo"}"#).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    let path: PoolPath = "demo/hello".parse().unwrap();
    agent.submit(Request::PoolCreate { path: path.clone(), spec: spec.into() }).await.unwrap();
    path
}

async fn create_stopped(agent: &Agent, pool: &PoolPath) -> Selector {
    let request = Request::InstanceCreate {
        pool: pool.clone(),
        count: 1,
        start: false,
        disks: vec![],
        cold: false,
    };
    let accepted = agent.submit(request).await.unwrap();
    accepted.instances[0].path.id.as_str().parse().unwrap()
}

async fn start(agent: &Agent, selector: &Selector) {
    let request = Request::InstanceStart { selector: selector.clone(), all: false };
    agent.submit(request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_cannot_start_is_retried_and_never_replaced() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let pool = pool(&agent, PoolSpec::default()).await;
    let selector = create_stopped(&agent, &pool).await;
    let id = agent.instances().await[0].path.id.clone();
    for _ in 0..4 {
        machine.world.inject(&id, SimFault::LaunchFails("no luck".to_owned()));
    }
    start(&agent, &selector).await;
    let failed = agent.until("two failures", |all| all[0].failures >= 2).await;
    assert_eq!(failed.len(), 1, "replaced");
    let cause = &failed[0].last_death.as_ref().unwrap().cause;
    assert!(
        matches!(cause, Cause::StartFailed { error, .. } if error.contains("no luck")),
        "{cause}"
    );
    let running = agent.until_running(1).await;
    assert_eq!(running[0].path.id, id);
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_its_vmm_makes_is_connected_or_the_microvm_ended() {
    let mut machine = Machine::new();
    machine.world = machine.world.clone().with_taps(TapPlace::Own);
    let agent = machine.agent().await;
    let pool = pool(&agent, PoolSpec::default()).await;
    let selector = create_stopped(&agent, &pool).await;
    // Its rules, its tap, and so on, in each of the attempts.
    for failing in 1..=4 {
        machine.network.fail_next(failing);
        start(&agent, &selector).await;
        let running = agent.until_running(1).await;
        assert!(machine.network.links().contains(running[0].tap.as_ref().unwrap()));
        assert_eq!(machine.world.running().len(), 1, "one that was not connected runs");
        let one = selector.clone();
        let sleep = Request::InstanceSleep { selector: one, all: false, hooks_ms: 1_000 };
        agent.submit(sleep).await.unwrap();
        agent.until("asleep", |all| all[0].state == State::Sleeping).await;
        machine.network.fail_next(failing);
        start(&agent, &selector).await;
        agent.until_running(1).await;
        let one = selector.clone();
        let stop = Request::InstanceStop { selector: one, all: false, grace_ms: 1_000 };
        agent.submit(stop).await.unwrap();
        agent.until("stopped", |all| all[0].state == State::Stopped).await;
        assert!(machine.world.running().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_guest_floods_is_kept_small_however_busy_the_agent_is() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let pool = pool(&agent, PoolSpec::default()).await;
    let selector = create_stopped(&agent, &pool).await;
    start(&agent, &selector).await;
    let id = agent.until_running(1).await[0].path.id.clone();
    let dir = machine.dir.path().join("instances").join(id.as_str());
    let files = ["console.log", "vmm.log"].map(|name| {
        let path = dir.join(name);
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        file.write_all(&vec![b'x'; 10 << 20]).unwrap();
        file
    });
    // Each wish is a round of its own, and they come more often than time alone makes one.
    for _ in 0..6 {
        start(&agent, &selector).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    for file in files {
        let metadata = file.metadata().unwrap();
        assert!(metadata.len() >= 10 << 20, "{metadata:?}");
        assert!(metadata.blocks() * 512 < 2 << 20, "{metadata:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_has_failed_after_its_time_limit() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let spec = PoolSpec { boot_timeout_s: 5, restart: RestartPolicy::Never, ..PoolSpec::default() };
    let pool = pool(&agent, spec).await;
    let selector = create_stopped(&agent, &pool).await;
    let id = agent.instances().await[0].path.id.clone();
    machine.world.inject(&id, SimFault::NeverSaysHello);
    start(&agent, &selector).await;
    let failed = agent
        .until("failed", |all| all[0].state == State::Failed && all[0].activity.is_none())
        .await;
    let death = failed[0].last_death.as_ref().unwrap();
    assert_eq!(death.cause, Cause::BootTimeout);
    assert!(!death.console_tail.is_empty(), "the console's last lines are kept");
    assert!(machine.world.running().is_empty());
    let Reply::Why(why) = agent.call(Call::Why { selector }).await.unwrap() else { panic!() };
    assert!(why.summary.contains("did not answer"), "{}", why.summary);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_panics_is_started_again_and_why_tells() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let pool = pool(&agent, PoolSpec::default()).await;
    let selector = create_stopped(&agent, &pool).await;
    let id = agent.instances().await[0].path.id.clone();
    machine.world.inject(&id, SimFault::PanicsAfter(Duration::from_secs(20)));
    start(&agent, &selector).await;
    let again = agent.until("booted twice", |all| is_running(&all[0]) && all[0].boots == 2).await;
    assert_eq!(again[0].last_death.as_ref().unwrap().cause, Cause::GuestPanic);
}

#[tokio::test(start_paused = true)]
async fn a_build_that_fails_is_reported_and_tried_again() {
    let machine = Machine::new();
    machine.images.fail_builds(Some("no space"));
    let agent = machine.agent().await;
    let pool = pool(&agent, PoolSpec::default()).await;
    let selector = create_stopped(&agent, &pool).await;
    start(&agent, &selector).await;
    let waiting = agent
        .until("waits for its image", |all| {
            matches!(&all[0].waiting, Some(mvm_core::plan::Waiting::Image { error: Some(_) }))
        })
        .await;
    assert_eq!(waiting[0].state, State::Created);
    machine.images.fail_builds(None);
    agent.until_running(1).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_was_rebooted_starts_its_instances_again() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let document = serde_json::from_str(r#"{"tenant":"demo","pools":{"hello":{"running":2}}}"#);
    agent.submit(Request::Apply { document: document.unwrap() }).await.unwrap();
    agent.until_running(2).await;
    agent.node.end().await;
    machine.world.reboot_host();
    let agent = machine.agent().await;
    let again =
        agent.until("booted twice", |all| all.iter().all(|i| is_running(i) && i.boots == 2)).await;
    assert_eq!(again.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_killed_at_any_moment_loses_and_doubles_nothing() {
    for moment_ms in [0, 1, 5, 30, 61, 70, 500, 1700, 1861, 1900, 2500, 4000] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        let document = serde_json::from_str(r#"{"tenant":"demo","pools":{"hello":{"running":3}}}"#);
        agent.submit(Request::Apply { document: document.unwrap() }).await.unwrap();
        tokio::time::sleep(Duration::from_millis(moment_ms)).await;
        // Ending a node aborts its loop and actors wherever they are.
        agent.node.end().await;

        let agent = machine.agent().await;
        let instances = agent.until_running(3).await;
        assert_eq!(machine.world.running().len(), 3, "killed at {moment_ms} ms");
        let slots: std::collections::BTreeSet<_> = instances.iter().map(|i| i.address).collect();
        assert_eq!(slots.len(), 3);

        let down = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
        agent.submit(down).await.unwrap();
        tokio::time::sleep(Duration::from_millis(moment_ms)).await;
        agent.node.end().await;
        let agent = machine.agent().await;
        agent.until("gone", |all| all.is_empty()).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(machine.leftovers().await, Vec::<String>::new(), "killed at {moment_ms} ms");
        agent.node.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_does_not_parse_is_left_alone_until_it_is_mended() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    for tenant in ["demo", "other"] {
        let text = format!(r#"{{"tenant":"{tenant}","pools":{{"hello":{{"running":1}}}}}}"#);
        let document = serde_json::from_str(&text).unwrap();
        agent.submit(Request::Apply { document }).await.unwrap();
    }
    agent.until_running(2).await;
    agent.node.end().await;
    let entries = machine.store.list("observed/instance/demo/").await.unwrap().entries;
    let (key, good) = (entries[0].key.clone(), entries[0].value.clone());
    machine.store.commit(Transaction::new().put(key.clone(), "{\"phase\":")).await.unwrap();

    let agent = machine.agent().await;
    let Reply::Node(node) = agent.call(Call::Node).await.unwrap() else { panic!() };
    assert_eq!(node.bad_records[0].key, key);
    let scale = |tenant: &str| Request::PoolScale {
        path: format!("{tenant}/hello").parse().unwrap(),
        running: 2,
        warm: None,
        sleeping: None,
    };
    let error = agent.submit(scale("demo")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::BadRecord);
    assert!(error.message.contains(&key) && error.hint.unwrap().contains("mvm node record"));
    agent.submit(scale("other")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(machine.world.running().len(), 3, "the one that is not understood still runs");

    let text = Some(String::from_utf8(good).unwrap());
    agent.call(Call::RecordMend { key, text }).await.unwrap();
    agent.submit(scale("demo")).await.unwrap();
    agent.until_running(4).await;
    assert_eq!(machine.world.running().len(), 4);
}
