//! Sleep policies: who is put to rest, who is left alone, and how it is told.

use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::sleep_policy::{HostMemory, Rest, RestReason, Rested, SleepPolicy, Use};
use mvm_wire::view::{InstanceView, StatsView, WhyView};
use mvm_wire::{Call, Reply};

use crate::node::{Agent, Machine, is_running};

fn policy() -> SleepPolicy {
    SleepPolicy { warm_after_s: Some(60), sleep_after_s: Some(300), ..SleepPolicy::default() }
}

/// Instances that run in the pool `demo/web`, which has a policy.
async fn running(agent: &Agent, count: u32, policy: &SleepPolicy) -> Vec<InstanceView> {
    let policy = serde_json::to_string(policy).unwrap();
    let text = format!(
        r#"{{"tenant":"demo","pools":{{"web":{{"running":{count},"sleep_policy":{policy}}}}}}}"#
    );
    agent.submit(Request::Apply { document: serde_json::from_str(&text).unwrap() }).await.unwrap();
    agent.until_running(count as usize).await
}

async fn set(agent: &Agent, policy: SleepPolicy) {
    let path = "demo/web".parse().unwrap();
    agent.submit(Request::PoolPolicy { path, policy }).await.unwrap();
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

async fn states(agent: &Agent) -> Vec<State> {
    agent.instances().await.iter().map(|view| view.state).collect()
}

async fn stats(agent: &Agent) -> StatsView {
    let selector = Selector::All;
    match agent.call(Call::Stats { selector }).await.unwrap() {
        Reply::Stats(mut stats) => stats.remove(0),
        other => panic!("{other:?}"),
    }
}

async fn why(agent: &Agent) -> WhyView {
    let selector = "demo/web".parse().unwrap();
    match agent.call(Call::Why { selector }).await.unwrap() {
        Reply::Why(why) => *why,
        other => panic!("{other:?}"),
    }
}

fn rested(view: &InstanceView) -> Rested {
    *view.rested.as_ref().unwrap().known().unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_idle_instance_is_warm_then_sleeps_and_wakes_for_whoever_needs_it() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    running(&agent, 1, &policy()).await;
    pass(50).await;
    assert_eq!(states(&agent).await, [State::Running]);
    let activity = stats(&agent).await.activity.unwrap();
    assert!(activity.idle_since_unix_ms.is_some() && activity.used_by.is_none(), "{activity:?}");
    pass(30).await;
    assert_eq!(states(&agent).await, [State::Warm]);
    assert_eq!(rested(&agent.instances().await[0]).rest, Rest::Warm);
    pass(200).await;
    assert_eq!(states(&agent).await, [State::Warm]);
    pass(40).await;
    assert_eq!(states(&agent).await, [State::Sleeping]);
    let rested = rested(&why(&agent).await.instance);
    let RestReason::Idle { idle_s, after_s: 300 } = rested.reason else { panic!("{rested:?}") };
    assert!((300..=310).contains(&idle_s), "{idle_s}");
    assert!(machine.world.running().is_empty());

    assert_eq!(agent.exec("demo/web", &["echo", "x"]).await.unwrap().0, "x\n");
    let view = agent.until("awake", |all| is_running(&all[0])).await.remove(0);
    assert_eq!((view.wakes, view.rested), (1, None));
    pass(400).await;
    assert_eq!(states(&agent).await, [State::Sleeping], "and again");
}

#[tokio::test(start_paused = true)]
async fn whatever_uses_an_instance_keeps_it_awake() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    running(&agent, 1, &policy()).await;

    for _ in 0..40 {
        agent.exec("demo/web", &["compute", "2000"]).await.unwrap();
        pass(10).await;
    }
    assert_eq!(states(&agent).await, [State::Running], "it computes");
    for _ in 0..40 {
        agent.exec("demo/web", &["talk", "20000"]).await.unwrap();
        pass(10).await;
    }
    assert_eq!(states(&agent).await, [State::Running], "it talks");
    agent.exec("demo/web", &["busy", "on"]).await.unwrap();
    pass(400).await;
    assert_eq!(states(&agent).await, [State::Running], "it is busy");
    let activity = why(&agent).await.activity.unwrap();
    assert_eq!(activity.used_by.unwrap().to_string(), "its guest says that it is busy");
    agent.exec("demo/web", &["busy", "off"]).await.unwrap();
    let argv = ["sleep", "400"].map(str::to_owned).into();
    let ended = agent.run("demo/web", ExecRequest { argv, ..ExecRequest::default() }).await;
    assert_eq!(ended.unwrap().1, 0, "nobody cut it off");
    assert_eq!(states(&agent).await, [State::Running], "it runs an exec");
    pass(400).await;
    assert_eq!(states(&agent).await, [State::Sleeping]);
}

#[tokio::test(start_paused = true)]
async fn pinned_instances_and_critical_pools_run_on_and_so_does_what_has_just_started() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let policy = SleepPolicy { min_running_s: 1_000, ..policy() };
    let views = running(&agent, 2, &policy).await;
    let pin = |pinned| Request::InstancePin {
        selector: Selector::from(&views[0].path),
        all: false,
        pinned,
    };
    agent.submit(pin(true)).await.unwrap();
    pass(900).await;
    assert_eq!(states(&agent).await, [State::Running, State::Running]);
    pass(200).await;
    assert_eq!(states(&agent).await, [State::Running, State::Sleeping]);
    set(&agent, SleepPolicy { critical: true, ..policy.clone() }).await;
    agent.submit(pin(false)).await.unwrap();
    pass(2_000).await;
    assert_eq!(states(&agent).await, [State::Running, State::Sleeping]);
    set(&agent, policy).await;
    pass(400).await;
    assert_eq!(states(&agent).await, [State::Sleeping, State::Sleeping]);
}

#[tokio::test(start_paused = true)]
async fn short_memory_puts_the_coldest_to_sleep_until_there_is_enough() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let policy = SleepPolicy { warm_after_s: None, sleep_after_s: Some(9_000), ..policy() };
    let views = running(&agent, 3, &policy).await;
    pass(60).await;
    // The third is the coldest, then the first.
    for view in [&views[1], &views[0]] {
        agent.exec(&view.path.to_string(), &["compute", "9000"]).await.unwrap();
        if view.path == views[1].path {
            agent.exec(&view.path.to_string(), &["busy", "on"]).await.unwrap();
        }
    }
    pass(60).await;
    assert_eq!(states(&agent).await, [State::Running; 3]);
    machine.memory.simulate(Some(HostMemory { available_mib: 100, wanted_mib: 512 }));
    let asleep = |all: &[InstanceView], many: usize| {
        all.iter().filter(|view| view.state == State::Sleeping).count() == many
    };
    let all = agent.until("one sleeps", |all| asleep(all, 1)).await;
    assert_eq!(all[2].state, State::Sleeping);
    assert!(matches!(
        rested(&all[2]).reason,
        RestReason::Memory { available_mib: 100, wanted_mib: 512, .. }
    ));
    let all = agent.until("two sleep", |all| asleep(all, 2)).await;
    assert_eq!(all[0].state, State::Sleeping);
    pass(600).await;
    assert_eq!(all[1].state, State::Running, "what is in use is not put to sleep for memory");
    machine.memory.simulate(Some(HostMemory { available_mib: 600, wanted_mib: 512 }));
    agent.exec(&views[0].path.to_string(), &["echo"]).await.unwrap();
    pass(600).await;
    assert_eq!(states(&agent).await[0], State::Running, "there is enough again");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_answer_is_not_taken_for_idle() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    running(&agent, 1, &policy()).await;
    agent.exec("demo/web", &["silence"]).await.unwrap();
    pass(2_000).await;
    assert_eq!(states(&agent).await, [State::Running]);
    let activity = why(&agent).await.activity.unwrap();
    assert_eq!(activity.used_by, Some(Use::Unknown));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_comes_back_goes_on_with_the_policy() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    running(&agent, 1, &policy()).await;
    pass(100).await;
    assert_eq!(states(&agent).await, [State::Warm]);
    agent.node.end().await;
    let agent = machine.agent().await;
    // Its clock is behind that of the one before, by the time that passed only virtually.
    pass(450).await;
    assert_eq!(states(&agent).await, [State::Sleeping]);
}
