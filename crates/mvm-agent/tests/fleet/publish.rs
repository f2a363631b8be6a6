//! Published ports: the listeners follow what is desired. What is carried is tested with real guests.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use mvm_core::admit::Request;
use mvm_wire::view::PoolView;
use mvm_wire::{Call, Reply};

use crate::node::{Agent, Machine};

/// An address that nobody listens on, as far as can be told.
fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

async fn publish(agent: &Agent, address: SocketAddr) {
    let text = format!(
        r#"{{"tenant":"demo","pools":{{"web":{{"running":0,"publish":["{address}:80"]}}}}}}"#
    );
    agent.submit(Request::Apply { document: serde_json::from_str(&text).unwrap() }).await.unwrap();
}

async fn pool(agent: &Agent) -> PoolView {
    let path = Some("demo/web".parse().unwrap());
    match agent.call(Call::Pools { tenant: None, path }).await.unwrap() {
        Reply::Pools(mut pools) => pools.remove(0),
        other => panic!("{other:?}"),
    }
}

/// Real connections take real time, which virtual time does not wait for.
async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..10_000 {
        if is_so().await {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("in vain waited until {what}");
}

#[tokio::test(start_paused = true)]
async fn a_port_is_listened_on_as_long_as_its_pool_has_it() {
    let machine = Machine::new();
    let (first, second) = (free_address(), free_address());
    let agent = machine.agent().await;
    publish(&agent, first).await;
    eventually("the port is open", async || TcpStream::connect(first).is_ok()).await;
    publish(&agent, second).await;
    eventually("the new port is open", async || TcpStream::connect(second).is_ok()).await;
    eventually("the old port is closed", async || TcpStream::connect(first).is_err()).await;
    agent.node.end().await;
    eventually("the agent's ports are closed", async || TcpStream::connect(second).is_err()).await;
    let agent = machine.agent().await;
    eventually("the port is open again", async || TcpStream::connect(second).is_ok()).await;
    agent
        .submit(Request::TenantDestroy { name: "demo".parse().unwrap(), force: true })
        .await
        .unwrap();
    eventually("the port is closed", async || TcpStream::connect(second).is_err()).await;
}

#[tokio::test(start_paused = true)]
async fn a_port_that_another_program_has_is_told_and_taken_once_it_is_free() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = other.local_addr().unwrap();
    publish(&agent, address).await;
    let says = format!("{address}:80: cannot listen: Address already in use");
    eventually("it is told", async || {
        pool(&agent).await.publish_problems.iter().any(|problem| problem.starts_with(&says))
    })
    .await;
    drop(other);
    eventually("the port is open", async || TcpStream::connect(address).is_ok()).await;
    assert_eq!(pool(&agent).await.publish_problems, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_pool_without_instances_says_why_a_connection_failed() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    publish(&agent, address).await;
    eventually("the port is open", async || TcpStream::connect(address).is_ok()).await;
    eventually("it is told", async || {
        pool(&agent).await.publish_problems.iter().any(|problem| problem.contains("demo/web"))
    })
    .await;
}
