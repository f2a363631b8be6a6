//! Callers that are attached to a main process, or run a program, while something else happens.

use mvm_core::admit::Request;
use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::record::DEFAULT_HOOKS_MS;
use mvm_core::spec::Document;
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, Connection, ErrorCode, Item, Reply};
use serde_json::json;

use crate::node::{Agent, Machine};

fn app() -> Selector {
    "demo/app".parse().unwrap()
}

async fn run(agent: &Agent, command: &[&str]) {
    let pool = json!({ "running": 1, "command": command, "stdin": true });
    let document = json!({ "tenant": "demo", "pools": { "app": pool } });
    let document: Document = serde_json::from_value(document).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    agent.until_running(1).await;
}

async fn attach(agent: &Agent, wait: bool) -> Connection {
    let mut connection = agent.node.connect();
    connection.write.message(&Call::Attach { selector: app(), wait }).await.unwrap();
    connection
}

/// Reads until the process has said this.
async fn until_said(connection: &mut Connection, expected: &str) {
    let mut said = String::new();
    while !said.contains(expected) {
        match connection.read.next().await.unwrap().expect("it goes on") {
            Item::Data { kind: KIND_STDOUT, bytes } => {
                said.push_str(std::str::from_utf8(&bytes).unwrap());
            }
            Item::Data { .. } => {}
            message => match message.parse::<Reply>().unwrap() {
                Reply::Attached { .. } | Reply::ExecStarted { .. } => {}
                other => panic!("{other:?} after {said:?}"),
            },
        }
    }
}

async fn until_error(connection: &mut Connection) -> mvm_wire::ApiError {
    loop {
        match connection.read.next().await.unwrap().expect("an error") {
            Item::Data { .. } => {}
            message => match message.parse::<Reply>().unwrap() {
                Reply::Attached { .. } | Reply::ExecStarted { .. } => {}
                Reply::Error(error) => return error,
                other => panic!("{other:?}"),
            },
        }
    }
}

fn is(state: State) -> impl Fn(&[InstanceView]) -> bool {
    move |all| all[0].state == state && all[0].activity.is_none()
}

#[tokio::test(start_paused = true)]
async fn whoever_was_attached_goes_on_with_the_next_agent() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["cat"]).await;
    let mut connection = attach(&agent, false).await;
    connection.write.data(KIND_STDIN, b"one").await.unwrap();
    until_said(&mut connection, "one").await;
    drop(connection);
    agent.node.end().await;
    let agent = machine.agent().await;
    let mut connection = attach(&agent, true).await;
    connection.write.data(KIND_STDIN, b"two").await.unwrap();
    until_said(&mut connection, "two").await;
}

#[tokio::test(start_paused = true)]
async fn what_is_typed_wakes_an_instance_at_rest() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["cat"]).await;
    let mut connection = attach(&agent, false).await;
    let sleep = Request::InstanceSleep { selector: app(), all: false, hooks_ms: DEFAULT_HOOKS_MS };
    let warm = Request::InstanceWarm { selector: app(), all: false };
    for (rest, state, text) in [
        (&sleep, State::Sleeping, "after a sleep"),
        (&warm, State::Warm, "after standing still"),
        (&sleep, State::Sleeping, "after another"),
    ] {
        agent.submit(rest.clone()).await.unwrap();
        agent.until("it rests", is(state)).await;
        connection.write.data(KIND_STDIN, text.as_bytes()).await.unwrap();
        until_said(&mut connection, text).await;
        agent.until("it runs", is(State::Running)).await;
    }
    // So does whoever comes to one that rests.
    agent.submit(sleep).await.unwrap();
    agent.until("it rests", is(State::Sleeping)).await;
    let mut connection = attach(&agent, false).await;
    connection.write.data(KIND_STDIN, b"hello").await.unwrap();
    until_said(&mut connection, "hello").await;
}

#[tokio::test(start_paused = true)]
async fn whoever_attaches_to_an_instance_without_a_program_is_told() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let document = json!({ "tenant": "demo", "pools": { "app": { "running": 0 } } });
    let document: Document = serde_json::from_value(document).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    let pool = "demo/app".parse().unwrap();
    let create =
        Request::InstanceCreate { pool, count: 1, start: false, disks: vec![], cold: false };
    agent.submit(create).await.unwrap();
    let mut connection = attach(&agent, true).await;
    let attached: Reply = connection.read.message().await.unwrap();
    assert!(matches!(attached, Reply::Attached { .. }), "{attached:?}");
    agent.submit(Request::InstanceStart { selector: app(), all: false }).await.unwrap();
    let error = until_error(&mut connection).await;
    assert_eq!(error.code, ErrorCode::Invalid);
    assert!(error.message.contains("names none"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_program_whose_instance_falls_asleep_is_told_so() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["cat"]).await;
    let mut connection = agent.node.connect();
    let argv = vec!["sleep".to_owned(), "9999".to_owned()];
    let request = ExecRequest { argv, ..ExecRequest::default() };
    connection.write.message(&Call::Exec { selector: app(), request }).await.unwrap();
    let started: Reply = connection.read.message().await.unwrap();
    assert!(matches!(started, Reply::ExecStarted { .. }), "{started:?}");
    let sleep = Request::InstanceSleep { selector: app(), all: false, hooks_ms: DEFAULT_HOOKS_MS };
    agent.submit(sleep).await.unwrap();
    let error = until_error(&mut connection).await;
    assert!(error.message.contains("fell asleep"), "{error}");
    assert!(error.hint.unwrap().contains("exec -d"));
}

#[tokio::test(start_paused = true)]
async fn what_stands_still_is_not_asked_how_it_is() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run(&agent, &["cat"]).await;
    agent.submit(Request::InstanceWarm { selector: app(), all: false }).await.unwrap();
    agent.until("it is warm", is(State::Warm)).await;
    let asked = tokio::time::Instant::now();
    let Reply::Stats(stats) = agent.call(Call::Stats { selector: app() }).await.unwrap() else {
        panic!("no answer")
    };
    assert!(stats[0].guest_error.as_ref().unwrap().contains("it is warm"), "{stats:?}");
    // The clock stands still as long as nobody waits.
    assert_eq!(asked.elapsed(), std::time::Duration::ZERO);
}
