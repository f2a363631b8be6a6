//! Main processes: what their ends mean to their instances.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::death::{Cause, ProgramFault};
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::plan::{Waiting, backoff_ms};
use mvm_core::spec::Document;
use mvm_host::vmm::sim::SimFault;
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, Reply};
use serde_json::json;

use crate::node::{Agent, Machine, is_running};

/// A pool with one running instance that runs this.
async fn run(agent: &Agent, command: &[&str], more: serde_json::Value) {
    let mut pool = json!({ "running": 1, "command": command });
    pool.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let document = json!({ "tenant": "demo", "pools": { "app": pool } });
    let document: Document = serde_json::from_value(document).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
}

fn has_ended(view: &InstanceView) -> bool {
    matches!(view.state, State::Stopped | State::Failed) && view.activity.is_none()
}

fn cause(view: &InstanceView) -> Cause {
    view.last_death.as_ref().unwrap().cause.clone()
}

async fn until_ended(agent: &Agent) -> InstanceView {
    let wanted = |all: &[InstanceView]| all.len() == 1 && has_ended(&all[0]);
    agent.until("it has ended", wanted).await.remove(0)
}

/// Whether an instance stays as it is for an hour.
async fn is_left_so(agent: &Agent, view: &InstanceView) -> bool {
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let after = agent.instances().await.remove(0);
    (after.boots, after.state, after.exit_code) == (view.boots, view.state, view.exit_code)
}

#[tokio::test(start_paused = true)]
async fn a_success_ends_the_instance_and_is_left_so_by_default() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["echo", "done"], json!({})).await;
    let view = until_ended(&agent).await;
    assert_eq!((view.state, view.exit_code, view.failures), (State::Stopped, Some(0), 0));
    assert_eq!(cause(&view), Cause::Exited { code: 0 });
    assert!(is_left_so(&agent, &view).await);
    let Reply::Why(why) =
        agent.call(Call::Why { selector: "demo/app".parse().unwrap() }).await.unwrap()
    else {
        panic!("no answer")
    };
    assert_eq!(why.output_tail, ["done"]);
}

#[tokio::test(start_paused = true)]
async fn what_has_ended_for_good_reserves_nothing_but_its_disk() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    for (restart, running) in [("on-failure", 0), ("never", 0), ("always", 1)] {
        run(&agent, &["echo", "done"], json!({ "restart": restart })).await;
        let view = until_ended(&agent).await;
        let Reply::Node(node) = agent.call(Call::Node).await.unwrap() else { panic!() };
        let reserved = node.reserved;
        assert_eq!((reserved.running, reserved.vcpus, reserved.instances), (running, running, 1));
        let selector = view.path.to_string().parse().unwrap();
        agent.submit(Request::InstanceDestroy { selector, all: false, force: true }).await.unwrap();
        agent.until("it is gone", <[InstanceView]>::is_empty).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_kept_with_its_exit_code_if_nothing_is_to_start_again() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["exit", "3"], json!({ "restart": "never" })).await;
    let view = until_ended(&agent).await;
    assert_eq!((view.state, view.exit_code), (State::Failed, Some(3)));
    assert_eq!(cause(&view), Cause::Exited { code: 3 });
    assert!(matches!(view.waiting, Some(Waiting::RestartPolicy { .. })), "{view:#?}");
    assert!(is_left_so(&agent, &view).await);
    assert_eq!(view.boots, 1);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_started_again_with_growing_pauses() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["exit", "3"], json!({ "restart": "on-failure" })).await;
    for failures in 1..=5 {
        let waits = |all: &[InstanceView]| {
            let waiting = all.first().and_then(|view| view.waiting.as_ref());
            matches!(waiting, Some(Waiting::Backoff { failures: so_far, .. }) if *so_far == failures)
        };
        let view = agent.until("it waits", waits).await.remove(0);
        assert_eq!((view.state, view.exit_code), (State::Failed, Some(3)));
        assert_eq!(view.boots, u64::from(failures));
        let died = view.last_death.unwrap().at_unix_ms;
        let Some(Waiting::Backoff { until_unix_ms, .. }) = view.waiting else { panic!() };
        assert_eq!(until_unix_ms - died, backoff_ms(failures));
    }
    // One instance all the while, and one microVM at most.
    assert_eq!(agent.instances().await.len(), 1);
    assert!(machine.world.running().len() <= 1);
}

#[tokio::test(start_paused = true)]
async fn a_long_run_ends_a_series_of_failures() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["sleep", "600"], json!({ "running": 0 })).await;
    let pool = "demo/app".parse().unwrap();
    let create =
        Request::InstanceCreate { pool, count: 1, start: false, disks: vec![], cold: false };
    agent.submit(create).await.unwrap();
    let path = agent.instances().await.remove(0).path;
    machine.world.inject(&path.id, SimFault::PanicsAfter(Duration::from_secs(20)));
    agent.submit(Request::InstanceStart { selector: (&path).into(), all: false }).await.unwrap();
    let again = agent.until("it runs again", |all| is_running(&all[0]) && all[0].boots == 2).await;
    assert_eq!((again[0].failures, again[0].exit_code), (1, None));
    let view = until_ended(&agent).await;
    assert_eq!((view.exit_code, view.failures), (Some(0), 0));
}

#[tokio::test(start_paused = true)]
async fn a_success_is_started_again_with_growing_pauses_if_the_policy_says_always() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["true"], json!({ "restart": "always" })).await;
    for ends in 1..=5 {
        let waits = |all: &[InstanceView]| {
            let waiting = all.first().and_then(|view| view.waiting.as_ref());
            matches!(waiting, Some(Waiting::Backoff { short_runs, .. }) if *short_runs == ends)
        };
        let view = agent.until("it waits", waits).await.remove(0);
        assert_eq!((view.state, view.exit_code, view.failures), (State::Stopped, Some(0), 0));
        let died = view.last_death.unwrap().at_unix_ms;
        let Some(Waiting::Backoff { until_unix_ms, .. }) = view.waiting else { panic!() };
        assert_eq!(until_unix_ms - died, backoff_ms(ends), "as after failures");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_sends_the_stop_signal_and_is_not_a_failure() {
    for (signal, code) in [(None, 143), (Some("SIGINT"), 130), (Some("10"), 138)] {
        let machine = Machine::new();
        let agent = machine.agent().await;
        run(&agent, &["sleep", "3600"], json!({ "stop_signal": signal })).await;
        agent.until_running(1).await;
        let selector = "demo/app".parse().unwrap();
        let stop = Request::InstanceStop { selector, all: false, grace_ms: 60_000 };
        agent.submit(stop).await.unwrap();
        let view = until_ended(&agent).await;
        assert_eq!((view.state, view.exit_code), (State::Stopped, Some(code)), "{signal:?}");
        assert_eq!((cause(&view), view.failures), (Cause::Operator, 0));
        assert!(is_left_so(&agent, &view).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_ends_while_no_agent_runs_is_known_to_the_next_one() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["sleep", "600"], json!({})).await;
    agent.until_running(1).await;
    agent.node.end().await;
    tokio::time::sleep(Duration::from_secs(1200)).await;
    let agent = machine.agent().await;
    let view = until_ended(&agent).await;
    assert_eq!((view.state, view.exit_code, view.boots), (State::Stopped, Some(0), 1));
}

#[tokio::test(start_paused = true)]
async fn programs_have_the_main_processs_variables_under_their_own() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["sleep", "3600"], json!({ "env": { "A": "pool", "B": "pool" } })).await;
    agent.until_running(1).await;
    let own = vec![("B".to_owned(), "own".to_owned())];
    let request = ExecRequest { argv: vec!["env".to_owned()], env: own, ..ExecRequest::default() };
    assert_eq!(agent.run("demo/app", request).await.unwrap().0, "A=pool\nB=own\n");
    let long = vec!["echo".to_owned(), "x".repeat(100_000)];
    let request = ExecRequest { argv: long, ..ExecRequest::default() };
    assert_eq!(agent.run("demo/app", request).await.unwrap().0.len(), 100_001);
    let long = vec![("A".to_owned(), "x".repeat(200_000))];
    let request = ExecRequest { argv: vec!["env".to_owned()], env: long, ..ExecRequest::default() };
    let error = agent.run("demo/app", request).await.unwrap_err();
    assert!(error.to_string().contains("variable A has 200002 bytes"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_program_that_is_not_there_is_a_failed_start() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["no-such"], json!({ "restart": "never" })).await;
    let view = until_ended(&agent).await;
    assert_eq!((view.state, view.exit_code), (State::Failed, None));
    let Cause::StartFailed { error, program } = cause(&view) else { panic!("{view:#?}") };
    assert_eq!(program, Some(ProgramFault::NotFound));
    assert!(error.contains("`no-such` was not found"), "{error}");
}
