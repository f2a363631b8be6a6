//! Networks that somebody else changes, and what guests are told of the machine's.

use std::collections::BTreeSet;

use mvm_core::admit::Request;
use mvm_core::spec::{Document, PoolSpec};
use mvm_wire::view::VerifyView;
use mvm_wire::{Call, Reply};

use crate::node::{Agent, Machine};

async fn run_two(agent: &Agent) {
    let document: Document = serde_json::from_str(r#"{"tenant":"demo"}"#).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();
    let path: mvm_core::name::PoolPath = "demo/hello".parse().unwrap();
    let spec = Box::new(PoolSpec::default());
    agent.submit(Request::PoolCreate { path: path.clone(), spec }).await.unwrap();
    let scale = Request::PoolScale { path, running: 2, warm: None, sleeping: None };
    agent.submit(scale).await.unwrap();
    agent.until_running(2).await;
}

async fn verify(agent: &Agent) -> VerifyView {
    match agent.call(Call::NetVerify).await.unwrap() {
        Reply::Verify(view) => view,
        other => panic!("{other:?}"),
    }
}

async fn problems(agent: &Agent) -> Vec<String> {
    match agent.call(Call::Node).await.unwrap() {
        Reply::Node(view) => view.problems,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_was_deleted_is_told_until_its_instance_is_restarted() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run_two(&agent).await;
    let victim = agent.instances().await.remove(0);
    let tap = victim.tap.clone().unwrap();
    machine.network.remove_link(&tap);
    let seen = agent.until("it is told", |all| all[0].network_problem.is_some()).await;
    let problem = seen[0].network_problem.clone().unwrap();
    assert!(problem.contains(&format!("mvm restart {}", victim.path)), "{problem}");
    assert_eq!(seen[1].network_problem, None);
    assert!(machine.network.links().contains(&tap), "a new one takes its name");
    let told = problems(&agent).await;
    assert!(told.iter().any(|told| told.contains(&victim.path.to_string())), "{told:?}");
    let differences = verify(&agent).await.differences;
    assert!(matches!(&differences[..], [one] if one.contains(&tap)), "{differences:?}");

    let selector = victim.path.id.as_str().parse().unwrap();
    let restart = Request::InstanceRestart { selector, all: false, grace_ms: 1_000 };
    agent.submit(restart).await.unwrap();
    agent.until("it is well", |all| all.iter().all(|it| it.network_problem.is_none())).await;
    agent.until_running(2).await;
    assert_eq!(verify(&agent).await.differences, [""; 0]);
    assert_eq!(problems(&agent).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_bridge_that_was_deleted_is_made_again_without_anybody_asking() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run_two(&agent).await;
    machine.network.remove_link("br-tenant-1");
    let is_back = |_: &[_]| machine.network.links().contains("br-tenant-1");
    agent.until("it is back", is_back).await;
    assert_eq!(verify(&agent).await.differences, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn each_tenant_has_a_name_server_as_long_as_it_exists() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run_two(&agent).await;
    let served = machine.network.served_names();
    assert_eq!(served.iter().map(|tenant| tenant.net_id.0).collect::<Vec<_>>(), [1]);
    let destroy = Request::TenantDestroy { name: "demo".parse().unwrap(), force: true };
    agent.submit(destroy).await.unwrap();
    agent.until("it is gone", |_| machine.network.served_names() == BTreeSet::new()).await;
}

#[tokio::test(start_paused = true)]
async fn a_tenant_is_moved_to_another_subnet_with_what_sleeps_and_what_is_stopped() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    run_two(&agent).await;
    let name: mvm_core::name::TenantName = "demo".parse().unwrap();
    let to = Request::TenantMove { name, subnet: "10.99.0.0/24".parse().unwrap() };
    assert!(agent.submit(to.clone()).await.is_err(), "instances run");
    let scale = Request::PoolScale {
        path: "demo/hello".parse().unwrap(),
        running: 0,
        warm: None,
        sleeping: Some(1),
    };
    agent.submit(scale).await.unwrap();
    let is_down = |all: &[mvm_wire::view::InstanceView]| {
        all.iter().all(|it| it.activity.is_none() && it.pid.is_none())
    };
    agent.until("all is down", is_down).await;
    agent.submit(to).await.unwrap();
    let is_moved = |_: &[_]| {
        let served = machine.network.served_names();
        served.iter().map(|it| it.subnet.to_string()).eq(["10.99.0.0/24"])
    };
    agent.until("it is moved", is_moved).await;
    assert_eq!(verify(&agent).await.differences, [""; 0]);
    let start = Request::InstanceStart { selector: "demo".parse().unwrap(), all: true };
    agent.submit(start).await.unwrap();
    let running = agent.until_running(2).await;
    assert!(running.iter().all(|it| it.address.unwrap().octets()[..3] == [10, 99, 0]));
    assert_eq!(verify(&agent).await.differences, [""; 0]);
}
