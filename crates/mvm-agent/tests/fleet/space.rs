//! The host's filesystem is full: guests stand still and go on, and nobody waits for ever.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstanceId, Selector};
use mvm_core::vmm::ShutdownReason;
use mvm_wire::{Call, ErrorCode, Reply};

use crate::node::{Agent, Machine};

async fn run_one(agent: &Agent) -> (InstanceId, Selector) {
    let document = serde_json::from_str(r#"{"tenant":"demo","pools":{"hello":{"running":1}}}"#);
    agent.submit(Request::Apply { document: document.unwrap() }).await.unwrap();
    let running = agent.until_running(1).await;
    (running[0].path.id.clone(), Selector::from(&running[0].path))
}

async fn problems(agent: &Agent) -> String {
    let Reply::Node(node) = agent.call(Call::Node).await.unwrap() else { panic!() };
    node.problems.join("\n")
}

async fn tells(agent: &Agent, id: &InstanceId, selector: &Selector) {
    let why = agent.call(Call::Why { selector: selector.clone() }).await.unwrap();
    let Reply::Why(why) = why else { panic!("{why:?}") };
    assert!(why.summary.contains("stands still"), "{}", why.summary);
    let told = problems(agent).await;
    assert!(told.contains(id.as_str()) && told.contains("stands still"), "{told}");
    let refused = agent.exec(id.as_str(), &["true"]).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict, "{refused:?}");
    assert!(refused.message.contains("no space"), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_on_a_full_disk_stands_still_is_told_of_and_goes_on() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let (id, selector) = run_one(&agent).await;
    let name = id.as_str();
    agent.exec(name, &["echo", "before"]).await.unwrap();
    machine.world.set_full(&id, true);
    agent.until("stands still", |all| all[0].lacks_space).await;
    tells(&agent, &id, &selector).await;
    // The next agent finds it so.
    agent.node.end().await;
    let agent = machine.agent().await;
    agent.until("still stands still", |all| all[0].lacks_space).await;
    tells(&agent, &id, &selector).await;
    // Putting it to sleep fails in words.
    let sleep = Request::InstanceSleep { selector, all: false, hooks_ms: 1_000 };
    agent.submit(sleep).await.unwrap();
    let all = agent.until("not asleep", |all| all[0].setback.is_some()).await;
    let setback = all[0].setback.as_ref().unwrap();
    assert!(setback.error.contains("no space"), "{}", setback.error);
    assert_eq!(all[0].state, State::Running);
    let start = Request::InstanceStart { selector: name.parse().unwrap(), all: false };
    agent.submit(start).await.unwrap();

    machine.world.set_full(&id, false);
    let all = agent.until("goes on", |all| !all[0].lacks_space).await;
    assert_eq!(problems(&agent).await, "");
    assert_eq!(agent.exec(name, &["echo", "after"]).await.unwrap(), ("after\n".to_owned(), 0));
    assert_eq!((all[0].boots, all[0].wakes), (1, 0), "it is the same run");
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_space_and_then_is_orderly_or_ends_with_its_time() {
    for comes_back in [true, false] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        let (id, selector) = run_one(&agent).await;
        machine.world.set_full(&id, true);
        let stop = Request::InstanceStop { selector, all: false, grace_ms: 30_000 };
        agent.submit(stop).await.unwrap();
        tokio::time::sleep(Duration::from_secs(20)).await;
        let waits = agent.instances().await;
        assert_eq!(waits[0].activity.as_deref(), Some("stopping"), "{waits:?}");
        assert!(waits[0].lacks_space);
        machine.world.set_full(&id, !comes_back);
        let stopped = agent.until("stopped", |all| all[0].state == State::Stopped).await;
        let exit = stopped[0].last_death.as_ref().and_then(|death| death.exit.clone()).unwrap();
        let exit = *exit.known().unwrap();
        let is_orderly = exit.reason == Some(ShutdownReason::GuestShutdown);
        assert_eq!(is_orderly, comes_back, "{exit:?}");
        assert!(!stopped[0].lacks_space);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_finds_no_space_as_it_boots_or_wakes_has_all_the_time_that_it_takes() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let (id, selector) = run_one(&agent).await;
    agent.exec(id.as_str(), &["echo", "before"]).await.unwrap();
    let wish = |is_sleep: bool| match is_sleep {
        true => Request::InstanceSleep { selector: selector.clone(), all: false, hooks_ms: 1_000 },
        false => Request::InstanceStop { selector: selector.clone(), all: false, grace_ms: 5_000 },
    };
    for (is_sleep, state) in [(true, State::Sleeping), (false, State::Stopped)] {
        agent.submit(wish(is_sleep)).await.unwrap();
        agent.until("at rest", |all| all[0].state == state && all[0].activity.is_none()).await;
        machine.world.fill_next(&id);
        let start = Request::InstanceStart { selector: selector.clone(), all: false };
        agent.submit(start).await.unwrap();
        agent.until("stands still", |all| all[0].lacks_space).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        machine.world.set_full(&id, false);
        let all = agent.until_running(1).await;
        assert_eq!((all[0].failures, &all[0].cold_boot), (0, &None), "{state}");
    }
    let all = agent.instances().await;
    assert_eq!((all[0].boots, all[0].wakes), (2, 1));
}
