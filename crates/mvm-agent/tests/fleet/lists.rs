//! Lists that are longer than one piece.

use std::collections::BTreeMap;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
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

/// Follows a thousand instances and one that starts, falls asleep and goes; says how many views came after the
/// first reply.
async fn views_of_a_life(agent: &Agent, changes: bool) -> usize {
    let all = agent.instances().await;
    let one = all[7].path.clone();
    let instances = all.into_iter().map(|view| view.path).collect();
    let call = Call::Watch { instances, pools: vec![], tenant: None, disks: vec![], changes };
    let mut watch = agent.node.connect();
    watch.write.message(&call).await.unwrap();
    let first = watch.read.message::<Reply>().await.unwrap();
    let Reply::Snapshot { instances, .. } = first else { panic!("{first:?}") };
    let mut seen: BTreeMap<_, _> = instances.into_iter().map(|it| (it.path.clone(), it)).collect();
    let mut views = 0;
    let selector = Selector::from(&one);
    let start = Request::InstanceStart { selector: selector.clone(), all: false };
    let sleep = Request::InstanceSleep { selector: selector.clone(), all: false, hooks_ms: 1_000 };
    let destroy = Request::InstanceDestroy { selector, all: false, force: true };
    for (request, wanted) in
        [(start, Some(State::Running)), (sleep, Some(State::Sleeping)), (destroy, None)]
    {
        agent.submit(request).await.unwrap();
        while seen.get(&one).map(|it| (it.state, it.activity.is_some()))
            != wanted.map(|state| (state, false))
        {
            match watch.read.message::<Reply>().await.unwrap() {
                Reply::Snapshot { instances, .. } => {
                    assert!(!changes, "once is enough");
                    views += instances.len();
                    seen = instances.into_iter().map(|it| (it.path.clone(), it)).collect();
                }
                Reply::Changed { instances, gone, .. } => {
                    assert!(changes, "an older command does not know that");
                    assert!(instances.iter().all(|it| it.path == one), "{instances:?}");
                    views += instances.len();
                    seen.extend(instances.into_iter().map(|it| (it.path.clone(), it)));
                    gone.iter().for_each(|path| drop(seen.remove(path)));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(seen.len() > 2 * INSTANCES_AT_ONCE, "the others are as they were");
    views
}

#[tokio::test(start_paused = true)]
async fn a_watch_of_many_tells_of_the_one_that_changes() {
    let machine = Machine::new();
    let agent = crowd(&machine).await;
    let told = views_of_a_life(&agent, true).await;
    assert!((3..50).contains(&told), "{told}");
    assert!(views_of_a_life(&agent, false).await > INSTANCES_AT_ONCE, "everything each time");
}
