//! Lists that are longer than one piece.

use mvm_core::admit::Request;
use mvm_core::name::Selector;
use mvm_core::spec::{PoolSpec, Quota};
use mvm_wire::{Call, ErrorCode, INSTANCES_AT_ONCE, Reply};

use crate::node::{Agent, Machine};

/// More than two pieces, and not a whole number of them.
const COUNT: u32 = 2 * INSTANCES_AT_ONCE as u32 + 3;

async fn crowd(machine: &Machine) -> Agent {
    let agent = machine.agent().await;
    let (name, quota) = ("demo".parse().unwrap(), Quota::default());
    let subnet = Some("10.128.0.0/20".parse().unwrap());
    agent.submit(Request::TenantCreate { name, quota, subnet }).await.unwrap();
    let (path, spec) = ("demo/hello".parse().unwrap(), PoolSpec::default());
    agent.submit(Request::PoolCreate { path, spec: spec.into() }).await.unwrap();
    let pool = "demo/hello".parse().unwrap();
    let create =
        Request::InstanceCreate { pool, count: COUNT, start: false, disks: vec![], cold: false };
    agent.submit(create).await.unwrap();
    agent
}

#[tokio::test(start_paused = true)]
async fn a_long_list_comes_in_pieces_and_whole() {
    let machine = Machine::new();
    let agent = crowd(&machine).await;
    let mut connection = agent.node.connect();
    connection.write.message(&Call::Instances { selector: Selector::All }).await.unwrap();
    let (mut sizes, mut paths) = (Vec::new(), Vec::new());
    loop {
        let reply = connection.read.message::<Reply>().await.unwrap();
        let Reply::Instances { instances, more } = reply else { panic!("{reply:?}") };
        sizes.push(instances.len());
        paths.extend(instances.into_iter().map(|view| view.path));
        if !more {
            break;
        }
    }
    assert_eq!(sizes, [INSTANCES_AT_ONCE, INSTANCES_AT_ONCE, 3]);
    assert!(paths.is_sorted());
    paths.dedup();
    assert_eq!(paths.len(), COUNT as usize);
    assert_eq!(agent.instances().await.len(), COUNT as usize);
}

#[tokio::test(start_paused = true)]
async fn a_list_of_nothing_is_one_empty_piece_and_of_no_tenant_an_error() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    assert_eq!(agent.instances().await, []);
    let selector = Selector::Tenant("nobody".parse().unwrap());
    let error = agent.call(Call::Instances { selector }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}
