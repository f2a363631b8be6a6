//! The ordinary life of tenants, pools and instances.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::frame::KIND_STDIN;
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::PoolPath;
use mvm_core::outdated::SpecPart;
use mvm_core::spec::{Document, PoolSpec, Quota};
use mvm_store::{Fault, FaultyStore, MemoryStore};
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, ErrorCode, Item, Reply};

use crate::node::{Machine, is_running};

fn document(running: u32) -> Document {
    let text = format!(r#"{{"tenant":"demo","pools":{{"hello":{{"running":{running}}}}}}}"#);
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(start_paused = true)]
async fn up_runs_what_the_document_says_and_down_leaves_nothing() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(2) }).await.unwrap();
    let first = agent.until_running(2).await;
    assert_ne!(first[0].address, first[1].address);
    assert_eq!(machine.world.running().len(), 2);

    agent.submit(Request::Apply { document: document(2) }).await.unwrap();
    let second = agent.until_running(2).await;
    assert_eq!(first[0].path, second[0].path);
    assert_eq!(first[0].boots, second[0].boots, "a second up starts nothing anew");

    agent.submit(Request::Apply { document: document(3) }).await.unwrap();
    agent.until_running(3).await;
    agent
        .submit(Request::PoolScale {
            path: "demo/hello".parse().unwrap(),
            running: 1,
            warm: None,
            sleeping: None,
        })
        .await
        .unwrap();
    agent
        .until("one running, two stopped", |all| {
            all.len() == 3
                && all.iter().filter(|i| is_running(i)).count() == 1
                && all.iter().filter(|i| i.state == State::Stopped && i.activity.is_none()).count()
                    == 2
        })
        .await;

    agent.submit(Request::Remove { document: document(2) }).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
    for _ in 0..100 {
        if machine.leftovers().await.is_empty() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("left behind: {:?}", machine.leftovers().await);
}

#[tokio::test(start_paused = true)]
async fn an_instance_keeps_its_address_and_disk_over_stop_and_start() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    let before = agent.until_running(1).await.remove(0);
    let selector: mvm_core::name::Selector = before.path.id.as_str().parse().unwrap();
    let stop = Request::InstanceStop { selector: selector.clone(), all: false, grace_ms: 5000 };
    agent.submit(stop).await.unwrap();
    let stopped = agent
        .until("stopped", |all| all[0].state == State::Stopped && all[0].activity.is_none())
        .await;
    assert!(machine.world.running().is_empty());
    assert_eq!(stopped[0].last_death.as_ref().unwrap().cause, mvm_core::death::Cause::Operator);
    let layer = machine.dir.path().join("instances").join(before.path.id.as_str());
    assert!(layer.join("layer.ext4").exists());
    let error = agent.exec(before.path.id.as_str(), &["echo", "x"]).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.hint.unwrap().contains("mvm start"));

    agent.submit(Request::InstanceStart { selector, all: false }).await.unwrap();
    let after = agent.until_running(1).await.remove(0);
    assert_eq!((before.address, before.mac, before.path), (after.address, after.mac, after.path));
    assert_eq!(after.boots, 2);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_hangs_up_while_a_guest_starts_has_nothing_run() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    let is_starting = |all: &[InstanceView]| all[0].activity.as_deref() == Some("starting");
    agent.until("starting", |all| all.len() == 1 && is_starting(all)).await;
    // Time stands still as long as somebody yields, so that the guest goes on starting.
    let served = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = served();
    let mut connection = agent.node.connect();
    let request = ExecRequest { argv: vec!["true".into()], ..ExecRequest::default() };
    let selector = "demo/hello".parse().unwrap();
    connection.write.message(&Call::Exec { selector, request }).await.unwrap();
    connection.write.data(KIND_STDIN, b"early").await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(served(), before + 1, "the call is not waited for");
    drop(connection);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(served(), before, "the call is still waited for");
}

#[tokio::test(start_paused = true)]
async fn input_that_comes_before_the_guest_runs_is_kept_for_the_program() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    let mut connection = agent.node.connect();
    let request = ExecRequest { argv: vec!["cat".into()], stdin: true, ..ExecRequest::default() };
    let selector = "demo/hello".parse().unwrap();
    connection.write.message(&Call::Exec { selector, request }).await.unwrap();
    for piece in [&b"one "[..], b"two", b""] {
        connection.write.data(KIND_STDIN, piece).await.unwrap();
    }
    let mut output = Vec::new();
    loop {
        match connection.read.next().await.unwrap().unwrap() {
            Item::Data { bytes, .. } => output.extend(bytes),
            message => match message.parse::<Reply>().unwrap() {
                Reply::ExecStarted { .. } => {}
                Reply::ExecExit(status) => break assert_eq!(status.shell_code(), 0),
                other => panic!("{other:?}"),
            },
        }
    }
    assert_eq!(output, b"one two");
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_right_after_the_creation_waits_for_the_start() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    agent.until_running(1).await;
    let pool = "demo/hello".parse().unwrap();
    let create =
        Request::InstanceCreate { pool, count: 1, start: true, disks: vec![], cold: false };
    for _ in 0..5 {
        let made = agent.submit(create.clone()).await.unwrap().instances.remove(0).path;
        let (output, _) = agent.exec(&made.to_string(), &["hostname"]).await.unwrap();
        assert_eq!(output.trim(), format!("hello-{}", made.id));
    }
}

#[tokio::test(start_paused = true)]
async fn restart_boots_again_and_exec_answers_with_output_and_exit_code() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    let before = agent.until_running(1).await.remove(0);
    assert_eq!(
        agent.exec("demo/hello", &["echo", "a", "b"]).await.unwrap(),
        ("a b\n".to_owned(), 0)
    );
    assert_eq!(agent.exec("demo", &["false"]).await.unwrap().1, 1);
    let selector = "demo/hello".parse().unwrap();
    let restart = Request::InstanceRestart { selector, all: false, grace_ms: 1000 };
    agent.submit(restart).await.unwrap();
    let after = agent.until("booted twice", |all| is_running(&all[0]) && all[0].boots == 2).await;
    assert_eq!(before.address, after[0].address);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_replaced_adopts_what_runs() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(3) }).await.unwrap();
    let before = agent.until_running(3).await;
    agent.node.end().await;
    assert_eq!(machine.world.running().len(), 3);

    let agent = machine.agent().await;
    let after = agent.until_running(3).await;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!((before.pid, before.boots), (after.pid, after.boots), "booted anew");
    }
    for instance in &after {
        let id = instance.path.id.as_str();
        let answered = agent.exec(id, &["echo", "still", "here"]).await;
        assert_eq!(answered.unwrap().0, "still here\n", "at once, without a second try");
    }
}

#[tokio::test(start_paused = true)]
async fn denials_say_what_to_do_and_change_nothing() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let mut wanted = document(3);
    wanted.quota = Some(Quota { mem_mib: Some(512), ..Quota::default() });
    let error = agent.submit(Request::Apply { document: wanted }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::OverLimit);
    assert!(error.message.contains("512"), "{}", error.message);
    assert!(machine.leftovers().await.is_empty());

    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    agent.until_running(1).await;
    let path = "demo/hello".parse().unwrap();
    let error = agent.submit(Request::PoolDestroy { path, force: false }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.hint.unwrap().contains("--force"));
    let missing = Call::Pools { tenant: None, path: Some("demo/none".parse().unwrap()) };
    assert_eq!(agent.call(missing).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test(start_paused = true)]
async fn the_network_is_verified_against_what_runs() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    let tap = agent.until_running(1).await[0].tap.clone().unwrap();
    let differences = async || match agent.call(Call::NetVerify).await.unwrap() {
        Reply::Verify(verify) => verify.differences,
        other => panic!("{other:?}"),
    };
    assert_eq!(differences().await, Vec::<String>::new());
    machine.network.remove_link(&tap);
    let found = differences().await;
    assert!(found.iter().any(|difference| difference.contains(&tap)), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_came_over_standard_input_goes_with_its_last_pool() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let dir = machine.dir.path().join("cache/uploads");
    std::fs::create_dir_all(&dir).unwrap();
    let (upload, other) = (dir.join("nginx.abc.tar"), machine.dir.path().join("own.tar"));
    for file in [&upload, &other] {
        std::fs::write(file, "x").unwrap();
    }
    let tenant = Request::TenantCreate {
        name: "demo".parse().unwrap(),
        subnet: None,
        quota: Quota::default(),
    };
    agent.submit(tenant).await.unwrap();
    for (pool, file) in [("demo/a", &upload), ("demo/b", &upload), ("demo/c", &other)] {
        let image = format!("docker-archive:{}", file.display()).parse().unwrap();
        let spec = PoolSpec { image, ..PoolSpec::default() };
        let request = Request::PoolCreate { path: pool.parse().unwrap(), spec: spec.into() };
        agent.submit(request).await.unwrap();
    }
    for (pool, stays) in [("demo/c", true), ("demo/a", true), ("demo/b", false)] {
        let path: PoolPath = pool.parse().unwrap();
        let destroy = Request::PoolDestroy { path: path.clone(), force: true };
        agent.submit(destroy).await.unwrap();
        let gone = Call::Pools { tenant: None, path: Some(path) };
        while agent.call(gone.clone()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The record goes first.
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(upload.exists(), stays, "{pool}");
    }
    assert!(other.exists(), "it is somebody's own");
}

#[tokio::test(start_paused = true)]
async fn what_starts_again_keeps_its_image_and_spec_and_is_shown_as_outdated() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let apply = |image: &str, mem_mib: u32| {
        let pool = serde_json::json!({ "running": 1, "image": image, "mem_mib": mem_mib });
        let document = serde_json::json!({ "tenant": "demo", "pools": { "hello": pool } });
        Request::Apply { document: serde_json::from_value(document).unwrap() }
    };
    let pool = || async {
        let path = Some("demo/hello".parse().unwrap());
        match agent.call(Call::Pools { tenant: None, path }).await.unwrap() {
            Reply::Pools(mut pools) => pools.remove(0),
            other => panic!("{other:?}"),
        }
    };
    agent.submit(apply("app:1", 256)).await.unwrap();
    let old = agent.until_running(1).await.remove(0);
    assert_eq!((old.outdated.len(), pool().await.outdated), (0, 0));

    agent.submit(apply("app:2", 300)).await.unwrap();
    let behind = vec![SpecPart::Image, SpecPart::MemMib];
    agent.until("the new image is built", |all| all[0].outdated == behind).await;
    assert_eq!(pool().await.outdated, 1);

    let selector: mvm_core::name::Selector = old.path.id.as_str().parse().unwrap();
    let restart = Request::InstanceRestart { selector: selector.clone(), all: false, grace_ms: 0 };
    agent.submit(restart).await.unwrap();
    let restarted = agent.until("restarted", |all| is_running(&all[0]) && all[0].boots == 2).await;
    assert_eq!((&restarted[0].revision, restarted[0].mem_mib), (&old.revision, 256));
    assert_eq!(restarted[0].outdated, behind);

    let destroy = Request::InstanceDestroy { selector, all: false, force: true };
    agent.submit(destroy).await.unwrap();
    agent.submit(apply("app:2", 300)).await.unwrap();
    let new = agent.until("a new one", |all| all.len() == 1 && is_running(&all[0])).await;
    assert_ne!(new[0].revision, old.revision);
    assert_eq!((new[0].mem_mib, &*new[0].outdated, pool().await.outdated), (300, &[][..], 0));
}

#[tokio::test(start_paused = true)]
async fn the_same_request_twice_is_one_also_for_the_next_agent() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(0) }).await.unwrap();
    let id = mvm_core::name::RequestId::from_bits(7);
    let create = |start| {
        let pool: PoolPath = "demo/hello".parse().unwrap();
        let change = Request::InstanceCreate { pool, count: 2, start, disks: vec![], cold: false };
        Call::SubmitOnce { id: id.clone(), change }
    };
    let made = |reply: Result<Reply, _>| match reply {
        Ok(Reply::Accepted(accepted)) => accepted.instances,
        other => panic!("{other:?}"),
    };
    let (one, two) = tokio::join!(agent.call(create(true)), agent.call(create(true)));
    let first = made(one);
    assert_eq!(made(two), first);
    agent.node.end().await;
    let agent = machine.agent().await;
    assert_eq!(made(agent.call(create(false)).await), first);
    let all = agent.until_running(2).await;
    let paths: Vec<_> = first.iter().map(|target| &target.path).collect();
    assert!(all.iter().all(|view| paths.contains(&&view.path)), "{paths:?}");
    // One that is refused may be asked for again.
    let id = mvm_core::name::RequestId::from_bits(8);
    let pool: PoolPath = "demo/later".parse().unwrap();
    let change = Request::PoolBuild { path: pool.clone() };
    let build = || Call::SubmitOnce { id: id.clone(), change: change.clone() };
    assert_eq!(agent.call(build()).await.unwrap_err().code, ErrorCode::NotFound);
    let spec = Box::new(PoolSpec::default());
    agent.submit(Request::PoolCreate { path: pool, spec }).await.unwrap();
    agent.call(build()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_commit_was_not_answered_is_one_when_it_is_sent_again() {
    let store = Arc::new(FaultyStore::new(Arc::new(MemoryStore::new())));
    let machine = Machine { store: store.clone(), ..Machine::new() };
    let agent = machine.agent().await;
    agent.submit(Request::Apply { document: document(0) }).await.unwrap();
    let id = mvm_core::name::RequestId::from_bits(7);
    let pool: PoolPath = "demo/hello".parse().unwrap();
    let change =
        Request::InstanceCreate { pool, count: 1, start: true, disks: vec![], cold: false };
    let create = || Call::SubmitOnce { id: id.clone(), change: change.clone() };
    store.inject_at("desired/instance/", Fault::Unacknowledged);
    store.cut_off(true);
    let first = agent.call(create()).await;
    assert_eq!(first.unwrap_err().code, ErrorCode::Internal);
    store.cut_off(false);
    // The node hears of it from the store.
    let running = agent.until_running(1).await;
    let Ok(Reply::Accepted(accepted)) = agent.call(create()).await else { panic!("refused") };
    assert_eq!(accepted.instances[0].path, running[0].path);
    assert_eq!(agent.instances().await.len(), 1);
    assert_eq!(machine.world.running().len(), 1);
}
