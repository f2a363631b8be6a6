//! Stops of every kind, at every moment: a guest that can be reached is asked first.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::death::Cause;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::record::DEFAULT_HOOKS_MS;
use mvm_core::spec::Document;
use mvm_wire::view::InstanceView;

use crate::node::{Agent, Machine, is_running};

const GRACE_MS: u64 = 10_000;
/// What its stop signal, SIGTERM, makes of a program's exit code.
const TERMINATED: i32 = 143;

fn document(running: u32) -> Document {
    let text = format!(
        r#"{{"tenant":"demo","pools":{{"app":{{"running":{running},"command":["sleep","9999"]}}}}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

fn app() -> Selector {
    "demo/app".parse().unwrap()
}

fn stop() -> Request {
    Request::InstanceStop { selector: app(), all: false, grace_ms: GRACE_MS }
}

fn sleep() -> Request {
    Request::InstanceSleep { selector: app(), all: false, hooks_ms: DEFAULT_HOOKS_MS }
}

async fn one_running(agent: &Agent) {
    agent.submit(Request::Apply { document: document(1) }).await.unwrap();
    agent.until_running(1).await;
}

fn is_stopped(all: &[InstanceView]) -> bool {
    all.iter().all(|one| one.state == State::Stopped && one.activity.is_none())
}

#[tokio::test(start_paused = true)]
async fn every_stop_right_after_an_agents_start_asks_the_guest() {
    let path = || "demo/app".parse().unwrap();
    let restart = Request::InstanceRestart { selector: app(), all: false, grace_ms: GRACE_MS };
    for request in [
        stop(),
        restart.clone(),
        Request::InstanceDestroy { selector: app(), all: false, force: true },
        Request::PoolScale { path: path(), running: 0, warm: None, sleeping: None },
        Request::PoolDestroy { path: path(), force: true },
        Request::TenantDestroy { name: "demo".parse().unwrap(), force: true },
        Request::Remove { document: document(1) },
    ] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        one_running(&agent).await;
        agent.node.end().await;

        let agent = machine.agent().await;
        let is_restart = request == restart;
        agent.submit(request.clone()).await.unwrap();
        let is_done = |all: &[InstanceView]| match is_restart {
            true => is_running(&all[0]) && all[0].boots == 2,
            false => is_stopped(all),
        };
        agent.until("done", is_done).await;
        assert_eq!(machine.world.power_cuts(), 0, "{request:?}");
        if let Some(view) = agent.instances().await.first().filter(|_| !is_restart) {
            assert_eq!(view.exit_code, Some(TERMINATED), "{request:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_takes_a_stop_over_asks_the_guest_however_long_it_was_away() {
    for away in [0, 5, 600] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        one_running(&agent).await;
        agent.node.end().await;
        // The wish is recorded, and the agent ends before it gets to the guest.
        let agent = machine.agent().await;
        agent.submit(stop()).await.unwrap();
        agent.node.end().await;
        tokio::time::sleep(Duration::from_secs(away)).await;
        let agent = machine.agent().await;
        agent.until("stopped", is_stopped).await;
        assert_eq!(machine.world.power_cuts(), 0, "after {away} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_of_what_falls_asleep_ends_its_program_in_order() {
    for request in [stop(), Request::InstanceDestroy { selector: app(), all: false, force: true }] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        one_running(&agent).await;
        agent.exec("demo/app", &["prepare", "8"]).await.unwrap();
        agent.submit(sleep()).await.unwrap();
        let is_falling =
            |all: &[InstanceView]| all[0].activity.as_deref() == Some("falling asleep");
        agent.until("it falls asleep", is_falling).await;
        agent.submit(request.clone()).await.unwrap();
        agent.until("it has ended", is_stopped).await;
        assert_eq!(machine.world.power_cuts(), 0, "{request:?}");
        let Some(view) = agent.instances().await.pop() else { continue };
        assert_eq!((view.exit_code, view.wakes), (Some(TERMINATED), 0));
        assert_eq!(view.last_death.unwrap().cause, Cause::Operator);
        agent.submit(Request::InstanceStart { selector: app(), all: false }).await.unwrap();
        let again = agent.until_running(1).await.remove(0);
        assert_eq!((again.boots, again.wakes), (2, 0), "nothing of the sleep is left");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_of_what_stands_still_or_resumes_asks_the_guest() {
    for resumes in [false, true] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        one_running(&agent).await;
        agent.submit(Request::InstanceWarm { selector: app(), all: false }).await.unwrap();
        agent.until("warm", |all| all[0].state == State::Warm).await;
        agent.node.end().await;
        let agent = machine.agent().await;
        if resumes {
            agent.submit(Request::InstanceStart { selector: app(), all: false }).await.unwrap();
        }
        agent.submit(stop()).await.unwrap();
        agent.until("stopped", is_stopped).await;
        assert_eq!(machine.world.power_cuts(), 0, "resumes: {resumes}");
    }
}
