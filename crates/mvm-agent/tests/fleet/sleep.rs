//! Instances at rest: warm, asleep, and woken by whoever needs them.

use std::path::PathBuf;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::plan::Waiting;
use mvm_core::record::DEFAULT_HOOKS_MS;
use mvm_core::sleep_policy::SleepPolicy;
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, ErrorCode, Reply};

use crate::node::{Agent, Machine, is_running};

async fn one_running(agent: &Agent) -> InstanceView {
    let text = r#"{"tenant":"demo","pools":{"hello":{"running":1}}}"#;
    agent.submit(Request::Apply { document: serde_json::from_str(text).unwrap() }).await.unwrap();
    agent.until_running(1).await.remove(0)
}

fn pool() -> Selector {
    "demo/hello".parse().unwrap()
}

fn sleep() -> Request {
    Request::InstanceSleep { selector: pool(), all: false, hooks_ms: DEFAULT_HOOKS_MS }
}

fn wake() -> Request {
    Request::InstanceStart { selector: pool(), all: false }
}

async fn asleep(agent: &Agent) -> InstanceView {
    agent.submit(sleep()).await.unwrap();
    until(agent, State::Sleeping).await
}

async fn until(agent: &Agent, state: State) -> InstanceView {
    let is_there = |all: &[InstanceView]| all[0].state == state && all[0].activity.is_none();
    agent.until(&format!("it is {state}"), is_there).await.remove(0)
}

fn instance_dir(machine: &Machine, view: &InstanceView) -> PathBuf {
    machine.dir.path().join("instances").join(view.path.id.as_str())
}

#[tokio::test(start_paused = true)]
async fn a_sleeping_instance_holds_nothing_but_its_address_and_its_disk() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let before = one_running(&agent).await;
    for round in 1..=5 {
        let view = asleep(&agent).await;
        assert_eq!((view.address, view.mac), (before.address, before.mac));
        assert_eq!(view.pid, None);
        assert!(machine.world.running().is_empty(), "no process");
        let tap = before.tap.clone().unwrap();
        assert!(!machine.network.links().contains(&tap), "no tap");

        agent.submit(wake()).await.unwrap();
        let view = until(&agent, State::Running).await;
        assert_eq!((view.boots, view.wakes), (1, round));
        assert_eq!(agent.exec("demo/hello", &["echo", "x"]).await.unwrap().0, "x\n");
    }
    agent.submit(sleep()).await.unwrap();
    until(&agent, State::Sleeping).await;
    agent.submit(sleep()).await.unwrap();
    until(&agent, State::Sleeping).await;
    let request = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
    agent.submit(request).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    let dir = instance_dir(&machine, &before);
    assert!(!dir.exists(), "its snapshots go with it");
}

#[tokio::test(start_paused = true)]
async fn what_an_agent_finds_standing_still_can_be_put_to_sleep() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    one_running(&agent).await;
    agent.submit(Request::InstanceWarm { selector: pool(), all: false }).await.unwrap();
    until(&agent, State::Warm).await;
    agent.node.end().await;
    let agent = machine.agent().await;
    let began = tokio::time::Instant::now();
    asleep(&agent).await;
    assert!(began.elapsed() < Duration::from_secs(5), "nobody reached for its guest");
    agent.submit(wake()).await.unwrap();
    let view = until(&agent, State::Running).await;
    assert_eq!((view.boots, view.wakes), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn whoever_needs_an_instance_wakes_it() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    one_running(&agent).await;
    asleep(&agent).await;
    assert_eq!(agent.exec("demo/hello", &["echo", "x"]).await.unwrap().0, "x\n");
    let view = until(&agent, State::Running).await;
    assert_eq!(view.wakes, 1);

    agent.submit(Request::InstanceWarm { selector: pool(), all: false }).await.unwrap();
    let warm = until(&agent, State::Warm).await;
    assert!(warm.pid.is_some() && warm.pid == view.pid, "its VM stays");
    // A command that meets it on its way down waits for it to come up again.
    agent.submit(sleep()).await.unwrap();
    assert_eq!(agent.exec("demo/hello", &["echo", "y"]).await.unwrap().0, "y\n");
    until(&agent, State::Running).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_comes_back_finds_the_sleeping_and_the_warm() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let before = one_running(&agent).await;
    asleep(&agent).await;
    agent.node.end().await;
    let agent = machine.agent().await;
    until(&agent, State::Sleeping).await;
    agent.submit(Request::InstanceWarm { selector: pool(), all: false }).await.unwrap();
    let warm = until(&agent, State::Warm).await;
    assert_eq!(warm.wakes, 1, "only what runs can stand still");
    agent.node.end().await;
    let agent = machine.agent().await;
    assert_eq!(until(&agent, State::Warm).await.pid, warm.pid);
    assert_eq!(agent.exec("demo/hello", &["echo", "x"]).await.unwrap().0, "x\n");
    assert_eq!(agent.instances().await[0].boots, before.boots);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_does_not_fit_gives_way_to_a_boot_and_says_why() {
    type Spoil = fn(PathBuf, &Machine);
    let spoils: [(&str, Spoil); 4] = [
        ("device.state is damaged", |dir, _| {
            let path = dir.join("sleep-1/device.state");
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[0] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }),
        ("manifest.json", |dir, _| {
            std::fs::remove_file(dir.join("sleep-1/manifest.json")).unwrap()
        }),
        ("cannot", |dir, _| std::fs::remove_dir_all(dir.join("sleep-1")).unwrap()),
        ("the writable layer", |dir, _| {
            let file = std::fs::File::options().write(true).open(dir.join("layer.ext4")).unwrap();
            let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
            file.set_modified(later).unwrap();
        }),
    ];
    for (expected, spoil) in spoils {
        let machine = Machine::new();
        let agent = machine.agent().await;
        let before = one_running(&agent).await;
        asleep(&agent).await;
        spoil(instance_dir(&machine, &before), &machine);
        agent.submit(wake()).await.unwrap();
        let view = until(&agent, State::Running).await;
        assert_eq!((view.boots, view.wakes), (2, 0), "{expected}");
        let reason = view.cold_boot.unwrap().reason;
        assert!(reason.contains(expected), "{reason}");
        let left = std::fs::read_dir(instance_dir(&machine, &before)).unwrap().flatten();
        let names: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| name.starts_with("sleep-")), "{names:?}");
    }
}

/// The snapshot is not to blame for what is missing besides it.
#[tokio::test(start_paused = true)]
async fn a_wake_without_its_image_is_tried_again_and_then_gives_way_to_the_disk() {
    for comes_back_in_time in [true, false] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        one_running(&agent).await;
        asleep(&agent).await;
        let images = machine.dir.path().join("images");
        std::fs::remove_dir_all(&images).unwrap();
        std::fs::write(&images, "in the way").unwrap();
        agent.submit(wake()).await.unwrap();
        let is_told = |all: &[InstanceView]| {
            let told = match comes_back_in_time {
                true => all[0].setback.as_ref().map(|setback| setback.error.clone()),
                false => all[0].last_death.as_ref().map(|death| death.cause.to_string()),
            };
            told.is_some_and(|told| told.contains("images"))
        };
        agent.until("it says what is missing", is_told).await;
        std::fs::remove_file(&images).unwrap();
        let view = until(&agent, State::Running).await;
        match comes_back_in_time {
            true => assert_eq!((view.boots, view.wakes), (1, 1)),
            false => {
                assert_eq!(view.wakes, 0);
                let reason = view.cold_boot.unwrap().reason;
                assert!(reason.contains("images"), "{reason}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_is_destroyed_at_any_moment_of_its_wake_leaves_nothing() {
    for ms in [0, 1, 5, 20, 50, 100, 300, 1000] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        let before = one_running(&agent).await;
        asleep(&agent).await;
        agent.submit(wake()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        let destroy = Request::InstanceDestroy { selector: pool(), all: false, force: true };
        agent.submit(destroy).await.unwrap();
        agent.until("gone", |all| all.is_empty()).await;
        assert!(machine.world.running().is_empty(), "after {ms} ms: a process");
        assert!(!machine.network.links().contains(&before.tap.clone().unwrap()), "{ms} ms: a tap");
        assert!(!instance_dir(&machine, &before).exists(), "after {ms} ms: files");
    }
}

#[tokio::test(start_paused = true)]
async fn a_sleep_that_fails_leaves_the_instance_running_and_is_tried_again() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let before = one_running(&agent).await;
    // A file where the snapshot's directory is to be.
    let block = instance_dir(&machine, &before).join("sleep-1");
    std::fs::create_dir(&block).unwrap();
    std::fs::write(block.join("in the way"), "").unwrap();
    agent.submit(sleep()).await.unwrap();
    let is_set_back =
        |all: &[InstanceView]| matches!(all[0].waiting, Some(Waiting::Setback { .. }));
    let view = agent.until("it could not", is_set_back).await.remove(0);
    assert!(is_running(&view));
    assert!(view.setback.unwrap().error.contains("sleep-1"));
    std::fs::remove_dir_all(&block).unwrap();
    until(&agent, State::Sleeping).await;
    agent.submit(wake()).await.unwrap();
    assert_eq!(until(&agent, State::Running).await.setback, None);
}

#[tokio::test(start_paused = true)]
async fn a_pool_is_scaled_to_so_many_running_warm_and_sleeping() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    one_running(&agent).await;
    let path: mvm_core::name::PoolPath = "demo/hello".parse().unwrap();
    for (running, warm, sleeping) in [(1, 1, 2), (0, 0, 4), (4, 0, 0), (2, 2, 0)] {
        let (path, warm_wish, sleeping_wish) = (path.clone(), Some(warm), Some(sleeping));
        let request =
            Request::PoolScale { path, running, warm: warm_wish, sleeping: sleeping_wish };
        agent.submit(request).await.unwrap();
        let all = agent
            .until(&format!("{running}, {warm}, {sleeping}"), |all| {
                let count = |state| {
                    let there = all.iter().filter(|i| i.state == state && i.activity.is_none());
                    there.count() as u32
                };
                count(State::Running) == running
                    && count(State::Warm) == warm
                    && count(State::Sleeping) == sleeping
            })
            .await;
        assert_eq!(all.len(), 4, "nothing is made or thrown away");
        assert!(all.iter().all(|view| view.boots == 1), "{all:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_run_cannot_be_put_to_sleep_and_what_sleeps_takes_no_memory() {
    let machine = Machine {
        capacity: mvm_core::admit::Capacity { mem_mib: 300, ..Machine::new().capacity },
        ..Machine::new()
    };
    let agent = machine.agent().await;
    one_running(&agent).await;
    let create = Request::InstanceCreate {
        pool: "demo/hello".parse().unwrap(),
        count: 1,
        start: true,
        disks: vec![],
        cold: false,
    };
    assert_eq!(agent.submit(create.clone()).await.unwrap_err().code, ErrorCode::OverLimit);
    asleep(&agent).await;
    agent.submit(create).await.unwrap();
    agent.until("both are there", |all| all.iter().any(is_running)).await;
    let all = agent.instances().await;
    let sleeper = all.iter().find(|view| view.state == State::Sleeping).unwrap().path.clone();
    let error = agent
        .submit(Request::InstanceStart { selector: Selector::from(&sleeper), all: false })
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::OverLimit, "there is no memory to wake it");
    let other = all.iter().find(|view| is_running(view)).unwrap().path.clone();
    let selector = Selector::from(&other);
    let stop = Request::InstanceStop { selector: selector.clone(), all: false, grace_ms: 0 };
    agent.submit(stop).await.unwrap();
    let sleep = Request::InstanceSleep { selector: selector.clone(), all: false, hooks_ms: 0 };
    let error = agent.submit(sleep).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.hint.unwrap().contains("mvm start"));
    match agent.call(Call::Instances { selector: Selector::from(&sleeper) }).await.unwrap() {
        Reply::Instances { instances, .. } => assert_eq!(instances[0].state, State::Sleeping),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_neighbours_packet_wakes_what_rests_unless_its_pool_says_otherwise() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let view = one_running(&agent).await;
    let net_id = mvm_core::net::NetId(1);
    let subnet = mvm_core::net::TenantNetwork::default_subnet(net_id);
    let tenant = mvm_core::net::TenantNetwork { net_id, subnet };
    let slot = mvm_core::net::Slot(u16::from(view.address.unwrap().octets()[3]));
    let place = mvm_core::net::InstanceNetwork::new(tenant, slot);
    assert!(!machine.network.visit(place), "it is awake");
    for rest in [sleep(), Request::InstanceWarm { selector: pool(), all: false }] {
        agent.submit(rest).await.unwrap();
        agent.until("it rests", |all| all[0].resting_since_unix_ms.is_some()).await;
        agent.until("it is noticed", |_| machine.network.visit(place)).await;
        until(&agent, State::Running).await;
    }
    let path = "demo/hello".parse().unwrap();
    let policy = SleepPolicy { ignore_neighbours: true, ..SleepPolicy::default() };
    agent.submit(Request::PoolPolicy { path, policy }).await.unwrap();
    asleep(&agent).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!machine.network.visit(place));
    assert_eq!(agent.instances().await[0].state, State::Sleeping);
}
