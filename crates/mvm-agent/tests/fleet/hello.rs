//! What a caller says of itself before its call: versions, what it is confined to, and how long it waits.

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{Selector, TenantName};
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, ConnectionError, ErrorCode, Hello, NEWEST_PROTOCOL, Reply, Welcome};

use crate::node::{Agent, Machine, is_running};

/// Greets, calls, and returns the last reply.
async fn ask(agent: &Agent, hello: Hello, call: &Call) -> Reply {
    let mut connection = agent.node.connect();
    connection.write.message(&Call::Hello(hello)).await.unwrap();
    match connection.read.message::<Reply>().await.unwrap() {
        Reply::Welcome(Welcome { protocol, principal, .. }) => {
            assert_eq!((protocol, principal.as_str()), (NEWEST_PROTOCOL, "the agent itself"));
        }
        other => return other,
    }
    connection.write.message(call).await.unwrap();
    connection.read.message().await.unwrap()
}

fn refusal(reply: Reply) -> (ErrorCode, String) {
    match reply {
        Reply::Error(error) => (error.code, error.message),
        other => panic!("{other:?}"),
    }
}

async fn two_tenants(agent: &Agent) {
    for tenant in ["acme", "bolt"] {
        let text = format!(r#"{{"tenant":"{tenant}","pools":{{"web":{{"running":1}}}}}}"#);
        let document = serde_json::from_str(&text).unwrap();
        agent.submit(Request::Apply { document }).await.unwrap();
    }
    agent.until_running(2).await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_confined_sees_and_changes_its_tenants_alone() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    two_tenants(&agent).await;
    let acme: TenantName = "acme".parse().unwrap();
    let hello = || Hello::new(Some(acme.clone()), None);
    let all = Call::Instances { selector: Selector::All };
    let Reply::Instances { instances, .. } = ask(&agent, hello(), &all).await else { panic!() };
    assert_eq!(instances.len(), 1);
    assert_eq!(instances[0].path.pool.tenant, acme);
    let Reply::Instances { instances, .. } = ask(&agent, Hello::new(None, None), &all).await else {
        panic!()
    };
    assert_eq!(instances.len(), 2);

    let stop = |selector: &str| {
        let selector = selector.parse().unwrap();
        Call::Submit(Request::InstanceStop { selector, all: true, grace_ms: 0 })
    };
    let (code, message) = refusal(ask(&agent, hello(), &stop("bolt")).await);
    assert_eq!(code, ErrorCode::OutOfScope);
    assert_eq!(message, "this command is confined to tenant acme, and asks for bolt");
    assert!(matches!(ask(&agent, hello(), &stop("acme")).await, Reply::Accepted(_)));
    let is_as_asked = |it: &InstanceView| match it.path.pool.tenant == acme {
        true => it.state == State::Stopped && it.activity.is_none(),
        false => is_running(it),
    };
    agent.until("its own alone is stopped", |all| all.iter().all(is_as_asked)).await;
}

#[tokio::test(start_paused = true)]
async fn a_greeting_that_is_wrong_is_refused_and_nothing_behind_it_is_done() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    two_tenants(&agent).await;
    let destroy =
        || Call::Submit(Request::TenantDestroy { name: "acme".parse().unwrap(), force: true });
    let newer = Hello { oldest_protocol: 7, newest_protocol: 9, ..Hello::new(None, None) };
    let (code, message) = refusal(ask(&agent, newer, &destroy()).await);
    assert_eq!(code, ErrorCode::Protocol);
    assert!(message.contains("versions 7 to 9"), "{message}");

    for text in [
        r#"{"call":"hello"}"#,
        r#"{"call":"hello","version":"1","oldest_protocol":"x","newest_protocol":1}"#,
        r#"{"call":"hello","version":"1","oldest_protocol":1,"newest_protocol":1,"scope":"../x"}"#,
        r#"{"call":"hello","version":"1","oldest_protocol":1,"newest_protocol":-1}"#,
    ] {
        let mut connection = agent.node.connect();
        let hello: serde_json::Value = serde_json::from_str(text).unwrap();
        connection.write.message(&hello).await.unwrap();
        let (code, _) = refusal(connection.read.message().await.unwrap());
        assert_eq!(code, ErrorCode::Invalid, "{text}");
        drop(connection.write.message(&destroy()).await);
        let after = connection.read.message::<Reply>().await;
        assert!(matches!(after, Err(ConnectionError::HungUp | ConnectionError::Io(_))), "{text}");
    }
    // Nor is one that comes twice a call.
    let again = Call::Hello(Hello::new(None, None));
    let (code, _) = refusal(ask(&agent, Hello::new(None, None), &again).await);
    assert_eq!(code, ErrorCode::Unsupported);
    assert_eq!(agent.instances().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_comes_too_late_is_not_waited_for() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    two_tenants(&agent).await;
    // Its guest does not answer.
    let stuck = agent.instances().await.remove(0).path;
    machine.world.set_full(&stuck.id, true);
    let stats = Call::Stats { selector: Selector::from(&stuck) };
    let hurried = || Hello::new(None, Some(1_000));
    let (code, message) = refusal(ask(&agent, hurried(), &stats).await);
    assert_eq!(code, ErrorCode::Late);
    assert!(message.contains("within the 1000 ms"), "{message}");
    let patient = ask(&agent, Hello::new(None, None), &stats).await;
    assert!(matches!(patient, Reply::Stats(_)), "{patient:?}");
    machine.world.set_full(&stuck.id, false);

    let warm_up = Call::WarmUp { pool: "acme/web".parse().unwrap() };
    // What takes as long as it takes is waited for.
    assert!(matches!(ask(&agent, hurried(), &warm_up).await, Reply::Pools(_)));
    let in_time = ask(&agent, hurried(), &Call::Node).await;
    assert!(matches!(in_time, Reply::Node(_)));
}
