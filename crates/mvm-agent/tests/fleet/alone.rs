//! A node without control: it goes on with the document that it has.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::document::{NodeDocument, NodeReport};
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::record::DesiredState;
use mvm_core::spec::Document;
use mvm_wire::door::Channel;
use mvm_wire::{Connection, NeverHangsUp, Reply};

use crate::node::{Machine, is_running};

async fn until(node: &mvm_node::RunningNode, what: &str, is: impl Fn(&NodeReport) -> bool) {
    let mut reports = node.reports();
    let limit = Duration::from_secs(600);
    let seen = tokio::time::timeout(limit, reports.wait_for(|report| is(report))).await;
    assert!(seen.is_ok(), "never: {what}; {:#?}", node.reports().borrow());
}

fn state(report: &NodeReport, path: &InstancePath) -> Option<State> {
    report.observed.instances.get(path).map(|status| status.state())
}

/// Runs a program in an instance over the node's door.
async fn exec(node: &mvm_node::RunningNode, path: &InstancePath) -> Reply {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let request = ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
    let (selector, channel) = (Selector::from(path), Channel::Exec { request });
    let connection = Connection::new(theirs);
    let carried = node.open(&selector, channel, connection, &NeverHangsUp);
    let mut ours = Connection::new(ours);
    let read = async {
        loop {
            match ours.read.message::<Reply>().await.unwrap() {
                Reply::ExecStarted { .. } => {}
                reply => return reply,
            }
        }
    };
    let (reply, carried) = tokio::join!(read, carried);
    carried.unwrap();
    reply
}

#[tokio::test(start_paused = true)]
async fn a_node_wakes_and_rests_by_itself_durably_and_hears_of_it_when_control_is_back() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let text = r#"{"tenant":"demo","pools":{"web":{"running":1,
        "sleep_policy":{"sleep_after_s":60,"min_running_s":1}}}}"#;
    let document: Document = serde_json::from_str(text).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    let path = agent.until_running(1).await[0].path.clone();
    let sleep = Request::InstanceSleep { selector: Selector::from(&path), all: false, hooks_ms: 0 };
    agent.submit(sleep).await.unwrap();
    agent.until("it sleeps", |all| all[0].state == State::Sleeping).await;
    agent.node.end().await;

    // What control would hand to the node.
    let kept = machine.kept().await;
    let document: NodeDocument = kept.document();
    assert_eq!(document.desired.instances[&path].desired, DesiredState::Sleeping);
    let node = machine.node_alone(&document).await;
    assert!(matches!(exec(&node, &path).await, Reply::ExecExit(_)));
    until(&node, "it runs", |report| state(report, &path) == Some(State::Running)).await;
    assert_eq!(node.reports().borrow().local[&path].desired, DesiredState::Running);
    // No client uses it now.
    until(&node, "it rests", |report| state(report, &path) == Some(State::Sleeping)).await;
    assert!(matches!(exec(&node, &path).await, Reply::ExecExit(_)));
    until(&node, "it runs again", |report| state(report, &path) == Some(State::Running)).await;
    node.end().await;

    // The next one goes on with what this one decided, and an earlier document changes nothing.
    let node = machine.node_alone(&document).await;
    node.set_document(&NodeDocument::default());
    until(&node, "it still runs", |report| state(report, &path) == Some(State::Running)).await;
    assert_eq!(node.reports().borrow().local[&path].desired, DesiredState::Running);
    node.end().await;

    let agent = machine.agent().await;
    let desired = |all: &[mvm_wire::view::InstanceView]| all[0].desired == DesiredState::Running;
    agent.until("control has taken it over", desired).await;
    agent.until("it runs", |all| is_running(&all[0])).await;
    let local = async || machine.store.list("local/").await.unwrap().entries.len();
    for _ in 0..100 {
        if local().await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the node does not forget what control has taken over");
}
