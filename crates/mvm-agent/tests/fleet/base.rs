//! Bases: new instances that begin where an instance of their pool has booted.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::PoolPath;
use mvm_wire::view::{BaseView, InstanceView, PoolView};
use mvm_wire::{ApiError, Call, ErrorCode, Reply};

use crate::node::{Agent, Machine};

fn hello() -> PoolPath {
    "demo/hello".parse().unwrap()
}

async fn apply(agent: &Agent, running: u32, mem_mib: u32) {
    let text = format!(
        r#"{{"tenant":"demo","pools":{{"hello":{{"running":{running},"mem_mib":{mem_mib}}}}}}}"#
    );
    agent.submit(Request::Apply { document: serde_json::from_str(&text).unwrap() }).await.unwrap();
}

async fn warm_up(agent: &Agent) -> Result<PoolView, ApiError> {
    match agent.call(Call::WarmUp { pool: hello() }).await? {
        Reply::Pools(mut pools) => Ok(pools.remove(0)),
        other => panic!("{other:?}"),
    }
}

fn snapshots(machine: &Machine) -> usize {
    let entries = std::fs::read_dir(machine.dir.path().join("snapshots"));
    entries.into_iter().flatten().count()
}

#[tokio::test(start_paused = true)]
async fn new_instances_begin_with_the_base_of_their_pool() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    apply(&agent, 1, 256).await;
    let booted = agent.until_running(1).await.remove(0);
    let pool = warm_up(&agent).await.unwrap();
    assert!(pool.base.as_ref().is_some_and(|base| base.in_use), "{pool:?}");
    assert_eq!(pool.desired_running, 1);

    apply(&agent, 3, 256).await;
    let all = agent.until_running(3).await;
    for view in all.iter().filter(|view| view.path != booted.path) {
        assert_eq!((view.boots, view.wakes), (0, 1), "it never booted");
        assert_eq!(agent.exec(view.path.id.as_str(), &["echo", "x"]).await.unwrap().0, "x\n");
    }
    agent.until("the template is gone", |all| all.len() == 3).await;

    // A second base takes the place of the first, which is kept for those that began with it.
    let again = warm_up(&agent).await.unwrap();
    assert_ne!(again.base.unwrap().id, pool.base.unwrap().id);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(snapshots(&machine), 2);

    // What is different boots.
    apply(&agent, 4, 300).await;
    let all = agent.until_running(4).await;
    assert_eq!(all.iter().filter(|view| view.boots == 1).count(), 2);

    let request = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
    agent.submit(request).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine), 0);
}

/// Asks for a base, and does not wait for it.
async fn ask(agent: &Agent) -> u64 {
    let asked = agent.submit(Request::PoolWarmUp { path: hello() }).await.unwrap();
    assert!(asked.instances.is_empty());
    asked.pools[0].base_generation
}

async fn pool(agent: &Agent) -> PoolView {
    match agent.call(Call::Pools { tenant: None, path: Some(hello()) }).await.unwrap() {
        Reply::Pools(mut pools) => pools.remove(0),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_base_that_an_agent_was_in_the_middle_of_is_made_by_the_next() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    apply(&agent, 0, 256).await;
    let first = warm_up(&agent).await.unwrap().base.unwrap().id;
    agent.node.end().await;
    // Killed at any moment of it.
    for (round, after_ms) in [0, 1, 50, 500, 2_000].into_iter().enumerate() {
        let agent = machine.agent().await;
        let asked = ask(&agent).await;
        assert_eq!(asked, 2 + round as u64);
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        agent.node.end().await;

        let agent = machine.agent().await;
        agent.until("nothing is left of making it", |all| all.is_empty()).await;
        let view = pool(&agent).await;
        assert_eq!((view.base_generation, view.base_failure), (asked, None));
        assert!(view.base.is_some_and(|base| base.in_use && base.id != first));
        agent.node.end().await;
    }
    let agent = machine.agent().await;
    apply(&agent, 1, 256).await;
    let view = agent.until_running(1).await.remove(0);
    assert_eq!((view.boots, view.wakes), (0, 1));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine), 1, "what nobody begins with is removed");
}

#[tokio::test(start_paused = true)]
async fn a_request_for_a_base_is_over_with_the_one_that_took_its_place_or_with_its_instance() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    apply(&agent, 0, 256).await;
    let (first, second) = tokio::join!(warm_up(&agent), warm_up(&agent));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert!(first.base.is_some_and(|base| base.in_use));
    assert_eq!((second.base_generation, second.base_failure), (2, None));

    // Somebody removes the instance that it is to be saved from.
    ask(&agent).await;
    let made = agent.instances().await.remove(0);
    let selector = mvm_core::name::Selector::from(&made.path);
    let destroy = Request::InstanceDestroy { selector, all: false, force: true };
    agent.submit(destroy).await.unwrap();
    agent.until("it is gone", |all| all.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let view = pool(&agent).await;
    assert_eq!(view.base_generation, 3);
    assert!(view.base_failure.is_some_and(|error| error.contains("removed")));
    assert!(view.base.is_some_and(|base| base.in_use), "the one before still serves");
}

#[tokio::test(start_paused = true)]
async fn a_base_that_cannot_be_restored_makes_a_boot() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    apply(&agent, 0, 256).await;
    warm_up(&agent).await.unwrap();
    for entry in std::fs::read_dir(machine.dir.path().join("snapshots")).unwrap().flatten() {
        std::fs::write(entry.path().join("manifest.json"), "{").unwrap();
    }
    apply(&agent, 1, 256).await;
    let view = agent.until_running(1).await.remove(0);
    assert_eq!((view.boots, view.wakes), (1, 0));
    assert!(view.cold_boot.is_some(), "and tells why: {view:?}");
}

#[tokio::test(start_paused = true)]
async fn a_base_that_is_refused_leaves_nothing() {
    let mut machine = Machine::new();
    machine.capacity.mem_mib = 300;
    let agent = machine.agent().await;
    apply(&agent, 1, 256).await;
    agent.until_running(1).await;
    assert_eq!(warm_up(&agent).await.unwrap_err().code, ErrorCode::OverLimit);
    assert_eq!(agent.instances().await.len(), 1);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(snapshots(&machine), 0);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_built_makes_no_base_and_is_built_when_asked_again() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    apply(&agent, 0, 256).await;
    machine.images.fail_builds(Some("no space"));
    let error = warm_up(&agent).await.unwrap_err();
    assert!(error.message.contains("no space"), "{error:?}");
    machine.images.fail_builds(None);
    assert!(warm_up(&agent).await.unwrap().base.is_some());
}

/// Writes to a disk's file as a writer's microVM does, at a time that differs.
fn write_to_disk(machine: &Machine, at_s: u64) {
    let file = machine.dir.path().join("disks/demo/data.ext4");
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(at_s)).unwrap();
}

async fn base(agent: &Agent) -> BaseView {
    match agent.call(Call::Pools { tenant: None, path: Some(hello()) }).await.unwrap() {
        Reply::Pools(mut pools) => pools.remove(0).base.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_base_is_given_up_once_a_disk_that_it_reads_was_written_to() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let apply = async |running: u32| {
        let document = serde_json::json!({
            "tenant": "demo",
            "disks": { "data": { "size_mib": 64 } },
            "pools": { "hello": {
                "running": running,
                "disks": [{ "name": "data", "path": "/data", "read_only": true }],
            } },
        });
        let document = serde_json::from_value(document).unwrap();
        agent.submit(Request::Apply { document }).await.unwrap();
        agent.until_running(running as usize).await
    };
    apply(1).await;
    write_to_disk(&machine, 1_000);
    warm_up(&agent).await.unwrap();
    let all = apply(2).await;
    assert_eq!(all.iter().filter(|view| view.boots == 0).count(), 1, "one begins with the base");

    write_to_disk(&machine, 2_000);
    let bases = std::fs::read_dir(machine.dir.path().join("snapshots")).unwrap();
    // A copy keeps that.
    let rare = std::fs::Permissions::from_mode(0o640);
    for base in bases {
        let layer = base.unwrap().path().join("layer.ext4");
        std::fs::set_permissions(layer, rare.clone()).unwrap();
    }
    let all = apply(3).await;
    let cold = all.iter().find(|view| view.cold_boot.is_some()).unwrap();
    let layer = machine.dir.path().join("instances").join(cold.path.id.as_str());
    let layer = std::fs::metadata(layer.join("layer.ext4")).unwrap().permissions();
    assert_ne!(layer.mode() & 0o777, 0o640, "it boots as without a base");
    let cold: Vec<_> = all.iter().filter_map(|view| view.cold_boot.as_ref()).collect();
    let reason = "disk data, which it only reads, was written to or grown since";
    assert_eq!(cold.iter().map(|cold| cold.reason.as_str()).collect::<Vec<_>>(), [reason]);
    let given_up = base(&agent).await;
    assert_eq!((given_up.in_use, given_up.given_up.as_deref()), (false, Some(reason)));
    let all = apply(4).await;
    assert_eq!(all.iter().filter(|view| view.cold_boot.is_some()).count(), 1, "none tries again");

    // A sleeper remembers the disk, too.
    let sleeper = all[0].path.clone();
    let selector = mvm_core::name::Selector::from(&sleeper);
    let sleep = Request::InstanceSleep { selector, all: false, hooks_ms: 1_000 };
    agent.submit(sleep).await.unwrap();
    let is_asleep = |view: &InstanceView| view.path == sleeper && view.state == State::Sleeping;
    agent.until("one sleeps", |all| all.iter().any(is_asleep)).await;
    write_to_disk(&machine, 3_000);
    let selector = mvm_core::name::Selector::from(&sleeper);
    agent.submit(Request::InstanceStart { selector, all: false }).await.unwrap();
    let all = agent.until_running(4).await;
    let woken = all.iter().find(|view| view.path == sleeper).unwrap();
    assert_eq!(woken.cold_boot.as_ref().unwrap().reason, reason);

    assert!(warm_up(&agent).await.unwrap().base.unwrap().in_use, "a new one is as good as any");
}
