//! Published ports: the listeners follow what is desired, and strangers keep nobody out. Connections are
//! real ones, to simulated guests; what is carried is tested with real guests.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::guest::MAX_PUBLISHED;
use mvm_core::lifecycle::State;
use mvm_host::vmm::sim::SimFault;
use mvm_wire::view::{NodeView, PoolView};
use mvm_wire::{ApiError, Call, ErrorCode, Reply};

use crate::node::{Agent, Machine};

/// An address that nobody listens on, as far as can be told.
fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

async fn try_publish(
    agent: &Agent,
    tenant: &str,
    running: u32,
    address: SocketAddr,
) -> Result<(), ApiError> {
    let text = format!(
        r#"{{"tenant":"{tenant}","pools":{{"web":{{"running":{running},"publish":["{address}:80"]}}}}}}"#
    );
    let document = serde_json::from_str(&text).unwrap();
    agent.submit(Request::Apply { document }).await.map(drop)
}

async fn publish(agent: &Agent, address: SocketAddr) {
    try_publish(agent, "demo", 0, address).await.unwrap();
}

async fn pool(agent: &Agent) -> PoolView {
    let path = Some("demo/web".parse().unwrap());
    match agent.call(Call::Pools { tenant: None, path }).await.unwrap() {
        Reply::Pools(mut pools) => pools.remove(0),
        other => panic!("{other:?}"),
    }
}

async fn node(agent: &Agent) -> NodeView {
    match agent.call(Call::Node).await.unwrap() {
        Reply::Node(node) => *node,
        other => panic!("{other:?}"),
    }
}

/// Real connections take real time, which virtual time does not wait for.
async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..10_000 {
        if is_so().await {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("in vain waited until {what}");
}

/// A client that has said something and looks for the answer now and then.
struct Client(TcpStream);

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_nonblocking(true).unwrap();
        // It may have been refused already.
        let _ = socket.write_all(b"!");
        Self(socket)
    }

    /// Whether it was answered; `None` if that is not known yet.
    fn is_served(&mut self) -> Option<bool> {
        match self.0.read(&mut [0]) {
            Ok(len) => Some(len > 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(_) => Some(false),
        }
    }
}

/// Connects as often as it is served, up to a number, and keeps the connections.
async fn occupy(address: SocketAddr, most: usize) -> Vec<Client> {
    let mut clients = Vec::new();
    while clients.len() < most {
        let mut client = Client::connect(address);
        let mut served = None;
        eventually("a client is served or refused", async || {
            served = client.is_served();
            served.is_some()
        })
        .await;
        if served == Some(false) {
            break;
        }
        clients.push(client);
    }
    clients
}

#[tokio::test(start_paused = true)]
async fn a_port_is_listened_on_as_long_as_its_pool_has_it() {
    let machine = Machine::new();
    let (first, second) = (free_address(), free_address());
    let agent = machine.agent().await;
    publish(&agent, first).await;
    assert!(TcpStream::connect(first).is_ok(), "it is there when the request is answered");
    publish(&agent, second).await;
    assert!(TcpStream::connect(second).is_ok());
    eventually("the old port is closed", async || TcpStream::connect(first).is_err()).await;
    agent.node.end().await;
    eventually("the agent's ports are closed", async || TcpStream::connect(second).is_err()).await;
    let agent = machine.agent().await;
    assert!(TcpStream::connect(second).is_ok(), "it is there when the agent is");
    agent
        .submit(Request::TenantDestroy { name: "demo".parse().unwrap(), force: true })
        .await
        .unwrap();
    eventually("the port is closed", async || TcpStream::connect(second).is_err()).await;
}

#[tokio::test(start_paused = true)]
async fn a_port_that_another_program_has_fails_the_request_and_leaves_nothing() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = other.local_addr().unwrap();
    let error = try_publish(&agent, "demo", 0, address).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict, "{error:?}");
    let this = format!("(process {}) listens there", std::process::id());
    assert!(error.message.starts_with(&format!("pool demo/web cannot have port {address}: ")));
    assert!(error.message.ends_with(&this), "{error:?}");
    assert_eq!(machine.leftovers().await, [""; 0]);
    let elsewhere = SocketAddr::new("198.51.100.7".parse().unwrap(), address.port());
    let error = try_publish(&agent, "demo", 0, elsewhere).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict, "{error:?}");
    assert!(error.message.contains("does not have the address 198.51.100.7"), "{error:?}");
    drop(other);
    // What was reserved for a request that fails is given back.
    let free = free_address();
    let both = format!(
        r#"{{"tenant":"demo","pools":{{
            "api":{{"running":0,"publish":["{free}:80"]}},
            "web":{{"running":0,"publish":["{elsewhere}:80"]}}}}}}"#
    );
    let document = serde_json::from_str(&both).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap_err();
    assert!(TcpStream::connect(free).is_err());
    publish(&agent, address).await;
    assert!(TcpStream::connect(address).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_port_that_was_taken_while_there_was_no_agent_is_told_and_had_once_it_is_free() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    publish(&agent, address).await;
    agent.node.end().await;
    eventually("the port is closed", async || TcpStream::connect(address).is_err()).await;
    let other = TcpListener::bind(address).unwrap();
    let agent = machine.agent().await;
    let problems = pool(&agent).await.publish_problems;
    let says = |problem: &String| {
        problem.starts_with(&format!("{address}:80: ")) && problem.ends_with(" listens there")
    };
    assert!(problems.iter().any(says), "{problems:?}");
    // It is no reason to refuse something else.
    try_publish(&agent, "demo", 1, address).await.unwrap();
    drop(other);
    eventually("the port is open", async || TcpStream::connect(address).is_ok()).await;
    eventually("no problem is left", async || pool(&agent).await.publish_problems.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_comes_with_a_new_agent_waits_for_the_guest() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    try_publish(&agent, "demo", 1, address).await.unwrap();
    agent.until_running(1).await;
    agent.node.end().await;
    eventually("the port is closed", async || TcpStream::connect(address).is_err()).await;
    let _agent = machine.agent().await;
    assert_eq!(occupy(address, 1).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pool_without_instances_says_why_a_connection_failed() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    publish(&agent, address).await;
    assert!(TcpStream::connect(address).is_ok());
    eventually("it is told", async || {
        pool(&agent).await.publish_problems.iter().any(|problem| problem.contains("demo/web"))
    })
    .await;
    assert_eq!(pool(&agent).await.refused_connections, 1);
}

#[tokio::test(start_paused = true)]
async fn all_connections_that_there_may_be_keep_neither_the_operator_nor_another_client_out() {
    mvm_host::process::raise_open_files();
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    try_publish(&agent, "demo", 1, address).await.unwrap();
    agent.until_running(1).await;
    let mut clients = occupy(address, usize::MAX).await;
    assert_eq!(clients.len(), MAX_PUBLISHED);
    assert_eq!(pool(&agent).await.connections, MAX_PUBLISHED as u64);
    assert!(node(&agent).await.refused_connections > 0);
    assert_eq!(agent.exec("demo/web", &["echo", "room"]).await.unwrap().0, "room\n");
    let stop =
        Request::InstanceStop { selector: "demo/web".parse().unwrap(), all: false, grace_ms: 5000 };
    // One place that is given back is somebody else's.
    clients.pop();
    eventually("there is room", async || occupy(address, 1).await.len() == 1).await;
    agent.submit(stop).await.unwrap();
    agent.until("stopped", |all| all[0].state == State::Stopped).await;
    eventually("nothing is counted", async || node(&agent).await.connections == 0).await;
}

#[tokio::test(start_paused = true)]
async fn with_few_descriptors_one_tenants_clients_leave_room_for_anothers() {
    mvm_host::process::raise_open_files();
    let machine = Machine { open_files: 256, ..Machine::new() };
    let agent = machine.agent().await;
    let (demo, other) = (free_address(), free_address());
    try_publish(&agent, "demo", 1, demo).await.unwrap();
    try_publish(&agent, "other", 1, other).await.unwrap();
    agent.until_running(2).await;
    assert_eq!(node(&agent).await.connections_max, 128);
    let many = occupy(demo, usize::MAX).await;
    assert!(many.len() < 64, "{}", many.len());
    let problems = pool(&agent).await.publish_problems;
    assert!(problems.iter().any(|it| it.contains("connections are open already")), "{problems:?}");
    assert!(!occupy(other, 16).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_while_it_waits_is_counted_no_more() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let address = free_address();
    publish(&agent, address).await;
    let create = Request::InstanceCreate {
        pool: "demo/web".parse().unwrap(),
        count: 1,
        start: false,
        disks: vec![],
        cold: false,
    };
    agent.submit(create).await.unwrap();
    let id = agent.instances().await[0].path.id.clone();
    machine.world.inject(&id, SimFault::NeverSaysHello);
    let start = Request::InstanceStart { selector: id.as_str().parse().unwrap(), all: false };
    agent.submit(start).await.unwrap();
    let client = TcpStream::connect(address).unwrap();
    eventually("it waits", async || pool(&agent).await.connections == 1).await;
    // Reset at once, as when its program was killed with the answer unread.
    client.set_nonblocking(true).unwrap();
    tokio::net::TcpStream::from_std(client).unwrap().set_zero_linger().unwrap();
    eventually("it has gone", async || pool(&agent).await.connections == 0).await;
}
