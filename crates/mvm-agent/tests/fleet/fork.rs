//! Forks: new instances that begin where another one is.

use std::collections::BTreeSet;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{RequestId, Selector};
use mvm_store::Transaction;
use mvm_wire::view::InstanceView;
use mvm_wire::{Accepted, ApiError, Call, ErrorCode, Reply};

use crate::node::{Agent, Machine, is_running};

async fn one_running(agent: &Agent) -> InstanceView {
    let text = r#"{"tenant":"demo","pools":{"hello":{"running":1}}}"#;
    agent.submit(Request::Apply { document: serde_json::from_str(text).unwrap() }).await.unwrap();
    agent.until_running(1).await.remove(0)
}

async fn fork(agent: &Agent, source: &InstanceView, count: u32) -> Result<Accepted, ApiError> {
    let selector = Selector::from(&source.path);
    match agent.call(Call::Fork { selector, count }).await? {
        Reply::Accepted(accepted) => Ok(accepted),
        other => panic!("{other:?}"),
    }
}

fn snapshots(machine: &Machine) -> Vec<String> {
    let entries = std::fs::read_dir(machine.dir.path().join("snapshots")).into_iter().flatten();
    entries.flatten().map(|entry| entry.file_name().into_string().unwrap()).collect()
}

async fn sleep(agent: &Agent, view: &InstanceView) {
    let selector = Selector::from(&view.path);
    agent.submit(Request::InstanceSleep { selector, all: false, hooks_ms: 0 }).await.unwrap();
    let path = &view.path;
    let sleeps = |all: &[InstanceView]| {
        all.iter().any(|i| i.path == *path && i.state == State::Sleeping && i.activity.is_none())
    };
    agent.until("it sleeps", sleeps).await;
}

#[tokio::test(start_paused = true)]
async fn forks_begin_where_their_source_is_and_are_their_own() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    assert_eq!(fork(&agent, &source, 3).await.unwrap().instances.len(), 3);
    let all = agent.until_running(4).await;
    let addresses: BTreeSet<_> = all.iter().map(|view| view.address).collect();
    assert_eq!(addresses.len(), 4);
    for view in all.iter().filter(|view| view.path != source.path) {
        assert_eq!((view.boots, view.wakes), (0, 1), "it never booted");
        assert_eq!(agent.exec(view.path.id.as_str(), &["echo", "x"]).await.unwrap().0, "x\n");
    }
    let after = all.iter().find(|view| view.path == source.path).unwrap();
    assert_eq!((after.boots, after.pid), (source.boots, source.pid), "the source goes on");

    // A fork sleeps, wakes and is forked again; its image is kept for it.
    let one = all.iter().find(|view| view.path != source.path).unwrap();
    sleep(&agent, one).await;
    assert_eq!(agent.exec(one.path.id.as_str(), &["echo", "y"]).await.unwrap().0, "y\n");
    sleep(&agent, one).await;
    fork(&agent, one, 1).await.unwrap();
    agent
        .until("the fork of a sleeping fork", |all| {
            all.iter().filter(|i| is_running(i)).count() == 4
        })
        .await;

    let request = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
    agent.submit(request).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    for _ in 0..100 {
        if snapshots(&machine).is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("snapshots that nobody needs: {:?}", snapshots(&machine));
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_is_refused_leaves_nothing() {
    let mut machine = Machine::new();
    machine.capacity.mem_mib = 300;
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    assert_eq!(fork(&agent, &source, 1).await.unwrap_err().code, ErrorCode::OverLimit);
    let selector = Selector::from(&source.path);
    agent.submit(Request::InstanceStop { selector, all: false, grace_ms: 0 }).await.unwrap();
    agent.until("stopped", |all| all[0].state == State::Stopped && all[0].activity.is_none()).await;
    let error = fork(&agent, &source, 1).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains("not running"), "{error:?}");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(snapshots(&machine), [""; 0]);
}

async fn fork_once(agent: &Agent, id: u128, source: &InstanceView) -> Result<Accepted, ApiError> {
    let (id, selector) = (RequestId::from_bits(id), Selector::from(&source.path));
    match agent.call(Call::ForkOnce { id, selector, count: 2 }).await? {
        Reply::Accepted(accepted) => Ok(accepted),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_an_agent_was_in_the_middle_of_is_made_by_the_next_and_once() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    agent.node.end().await;
    // Killed at any moment of it.
    for (round, after_ms) in [0, 1, 5, 20, 100].into_iter().enumerate() {
        let agent = machine.agent().await;
        agent.until_running(1 + 2 * round).await;
        let id = round as u128;
        let asked = tokio::time::timeout(Duration::from_millis(after_ms), async {
            drop(fork_once(&agent, id, &source).await);
        });
        // Whoever asked is gone.
        drop(asked.await);
        agent.node.end().await;

        let agent = machine.agent().await;
        let forks = fork_once(&agent, id, &source).await.unwrap();
        assert_eq!(forks.instances.len(), 2);
        let again = fork_once(&agent, id, &source).await.unwrap();
        assert_eq!(again.instances, forks.instances, "the same again");
        assert!(forks.revision > 0);
        let all = agent.until_running(3 + 2 * round).await;
        assert_eq!(all.len(), 3 + 2 * round);
        agent.node.end().await;
    }
    let agent = machine.agent().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let left = machine.store.list("desired/fork/").await.unwrap().entries;
    let saved = machine.store.list("observed/capture/").await.unwrap().entries;
    assert_eq!((left.len(), saved.len()), (0, 0));
    let request = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
    agent.submit(request).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_same_fork_asked_for_many_times_at_once_is_one() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    let mut asking = tokio::task::JoinSet::new();
    for after_ms in 0..20 {
        let mut connection = agent.node.connect();
        let (id, selector) = (RequestId::from_bits(5), Selector::from(&source.path));
        asking.spawn(async move {
            tokio::time::sleep(Duration::from_millis(after_ms * 3)).await;
            connection.write.message(&Call::ForkOnce { id, selector, count: 2 }).await.unwrap();
            connection.read.message::<Reply>().await.unwrap()
        });
    }
    let answers = asking.join_all().await.into_iter();
    let made: Vec<_> = answers
        .map(|answer| match answer {
            Reply::Accepted(accepted) => accepted.instances,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(made.iter().all(|forks| forks.len() == 2 && *forks == made[0]), "{made:?}");
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(agent.until_running(3).await.len(), 3);
    assert_eq!(machine.store.list("desired/fork/").await.unwrap().entries.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_came_to_nothing_is_answered_the_same_again() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    let selector = Selector::from(&source.path);
    agent.submit(Request::InstanceStop { selector, all: false, grace_ms: 0 }).await.unwrap();
    agent.until("stopped", |all| all[0].state == State::Stopped && all[0].activity.is_none()).await;
    let error = fork_once(&agent, 7, &source).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    let selector = Selector::from(&source.path);
    agent.submit(Request::InstanceStart { selector, all: false }).await.unwrap();
    agent.until_running(1).await;
    assert_eq!(fork_once(&agent, 7, &source).await.unwrap_err(), error);
    assert_eq!(fork_once(&agent, 8, &source).await.unwrap().instances.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_kept_while_it_is_not_known_who_needs_it() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    fork(&agent, &source, 1).await.unwrap();
    let all = agent.until_running(2).await;
    let fork = all.iter().find(|view| view.path != source.path).unwrap().path.clone();
    agent.node.end().await;
    let key = format!("observed/instance/{fork}");
    let entries = machine.store.list("observed/instance/").await.unwrap().entries;
    let good = entries.into_iter().find(|entry| entry.key == key).unwrap().value;
    machine.store.commit(Transaction::new().put(key.clone(), "{\"phase\":")).await.unwrap();

    let agent = machine.agent().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine).len(), 1);
    let text = Some(String::from_utf8(good).unwrap());
    agent.call(Call::RecordMend { key, text }).await.unwrap();
    agent.until_running(2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine).len(), 1, "its memory is relative to it");
    let selector = Selector::from(&fork);
    let destroy = Request::InstanceDestroy { selector, all: false, force: true };
    agent.submit(destroy).await.unwrap();
    agent.until("the fork is gone", |all| all.len() == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshots(&machine), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_snapshot_is_not_passed_on_to_forks() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let source = one_running(&agent).await;
    sleep(&agent, &source).await;
    let dir = machine.dir.path().join("instances").join(source.path.id.as_str());
    let state = dir.join("sleep-1/device.state");
    let good = std::fs::read(&state).unwrap();
    let mut bad = good.clone();
    bad[0] ^= 1;
    std::fs::write(&state, bad).unwrap();
    let error = fork(&agent, &source, 1).await.unwrap_err();
    assert!(error.message.contains("device.state is damaged"), "{error:?}");
    std::fs::write(&state, good).unwrap();

    let later = std::time::SystemTime::now() + Duration::from_secs(3600);
    let layer = std::fs::File::options().write(true).open(dir.join("layer.ext4")).unwrap();
    layer.set_modified(later).unwrap();
    let error = fork(&agent, &source, 1).await.unwrap_err();
    assert!(error.message.contains("the writable layer"), "{error:?}");
    assert_eq!(agent.instances().await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_fork_of_what_goes_at_its_end_goes_on_and_the_pool_goes_with_the_last() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let tenant = serde_json::from_str(r#"{"tenant":"demo"}"#).unwrap();
    agent.submit(Request::Apply { document: tenant }).await.unwrap();
    let mut spec = mvm_core::spec::PoolSpec { auto_remove: true, ..Default::default() };
    spec.process.command = Some(vec!["sleep".to_owned(), "9999".to_owned()]);
    spec.restart = mvm_core::spec::RestartPolicy::Never;
    let path: mvm_core::name::PoolPath = "demo/run".parse().unwrap();
    agent.submit(Request::PoolCreate { path: path.clone(), spec: spec.into() }).await.unwrap();
    let pool = path.clone();
    let create =
        Request::InstanceCreate { pool, count: 1, start: true, disks: vec![], cold: false };
    agent.submit(create).await.unwrap();
    let source = agent.until_running(1).await.remove(0);
    let forks = fork(&agent, &source, 1).await.unwrap();
    agent.until_running(2).await;

    let stop = |selector| Request::InstanceStop { selector, all: false, grace_ms: 5_000 };
    agent.submit(stop(Selector::from(&source.path))).await.unwrap();
    let fork_path = &forks.instances[0].path;
    let is_alone = |all: &[InstanceView]| all.len() == 1 && all[0].path == *fork_path;
    let left = agent.until("its source is gone", is_alone).await;
    assert!(is_running(&left[0]), "{left:#?}");
    agent.submit(stop(Selector::from(fork_path))).await.unwrap();
    agent.until("it is gone, too", |all| all.is_empty()).await;
    for _ in 0..100 {
        if agent.call(Call::Pools { tenant: None, path: Some(path.clone()) }).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("its pool stays");
}

#[tokio::test(start_paused = true)]
async fn a_fork_of_what_starts_waits_for_it() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let text = r#"{"tenant":"demo","pools":{"hello":{"running":1}}}"#;
    let document = serde_json::from_str(text).unwrap();
    let made = agent.submit(Request::Apply { document }).await.unwrap();
    let selector = Selector::from(&made.instances[0].path);
    let Reply::Accepted(forks) = agent.call(Call::Fork { selector, count: 1 }).await.unwrap()
    else {
        panic!("no fork")
    };
    assert_eq!(forks.instances.len(), 1);
    agent.until_running(2).await;
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_cannot_go_on_boots_with_the_disk_that_it_was_forked_with() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let document = serde_json::json!({
        "tenant": "demo",
        "disks": { "data": { "size_mib": 64 } },
        "pools": { "hello": {
            "running": 1,
            "disks": [{ "name": "data", "path": "/data", "read_only": true }],
        } },
    });
    let document = serde_json::from_value(document).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    let source = agent.until_running(1).await.remove(0);
    let dir =
        |view: &InstanceView| machine.dir.path().join("instances").join(view.path.id.as_str());
    std::fs::write(dir(&source).join("layer.ext4"), "synced").unwrap();

    // Its first start fails for another reason, and meanwhile a disk that it reads is written to. Once
    // its copy of the layer is there, and once it is not.
    for (is_there, at_s) in [(true, 1_000), (false, 2_000)] {
        machine.network.fail_next(1);
        let forked = fork(&agent, &source, 1).await.unwrap().instances[0].path.clone();
        let has_failed = |view: &InstanceView| view.path == forked && view.failures > 0;
        let all = agent.until("its start fails", |all| all.iter().any(has_failed)).await;
        let view = all.iter().find(|view| has_failed(view)).unwrap();
        if !is_there {
            std::fs::remove_file(dir(view).join("layer.ext4")).unwrap();
        }
        let disk = machine.dir.path().join("disks/demo/data.ext4");
        let disk = std::fs::File::options().write(true).open(disk).unwrap();
        disk.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(at_s)).unwrap();

        let runs = |view: &InstanceView| view.path == forked && is_running(view);
        let all = agent.until("it runs", |all| all.iter().any(runs)).await;
        let view = all.iter().find(|view| runs(view)).unwrap();
        let cold = view.cold_boot.as_ref().unwrap();
        assert!(cold.reason.contains("was written to"), "{}", cold.reason);
        assert_eq!((view.boots, view.wakes), (1, 0));
        assert_eq!(std::fs::read_to_string(dir(view).join("layer.ext4")).unwrap(), "synced");
    }
}
