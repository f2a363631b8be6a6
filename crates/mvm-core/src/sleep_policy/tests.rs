use super::*;
use crate::lifecycle::InstanceStatus;
use crate::name::{InstanceId, PoolPath};
use crate::net::Slot;
use crate::record::{DEFAULT_HOOKS_MS, PoolRecord, Purpose};
use crate::spec::PoolSpec;
use imbl::OrdMap;

const NOW: u64 = 1_000_000_000;

fn pool() -> PoolPath {
    "demo/web".parse().unwrap()
}

fn path(number: u32) -> InstancePath {
    pool().instance(InstanceId::from_bits(number))
}

fn policy() -> SleepPolicy {
    SleepPolicy { warm_after_s: Some(60), sleep_after_s: Some(300), ..SleepPolicy::default() }
}

/// A node with instances that have run for an hour, each idle for so many seconds.
struct Node {
    desired: Desired,
    observed: Observed,
    activities: BTreeMap<InstancePath, Activity>,
    memory: Option<HostMemory>,
}

impl Node {
    fn new(policy: SleepPolicy, idle_s: &[u64]) -> Self {
        let spec = PoolSpec { sleep_policy: policy, ..PoolSpec::default() };
        let record = PoolRecord {
            path: pool(),
            spec: spec.clone(),
            running: 0,
            build_generation: 0,
            base_generation: 0,
            rolled_back_to: None,
            created_unix_ms: 0,
            existence: Existence::Kept,
        };
        let mut node = Self {
            desired: Desired { pools: OrdMap::unit(pool(), record), ..Desired::default() },
            observed: Observed::default(),
            activities: BTreeMap::new(),
            memory: None,
        };
        for (number, idle_s) in (1..).zip(idle_s) {
            let record = InstanceRecord {
                path: path(number),
                spec: spec.clone(),
                own_disks: vec![],
                slot: Slot(3),
                desired: DesiredState::Running,
                generation: 1,
                grace_ms: 0,
                sleep_request: 0,
                hooks_ms: DEFAULT_HOOKS_MS,
                origin: None,
                revision: None,
                intent: 0,
                local_number: 0,
                purpose: Purpose::Use,
                pinned: false,
                rested: None,
                created_unix_ms: 0,
            };
            node.desired.instances.insert(path(number), record);
            node.set_phase(number, Phase::Running { since_unix_ms: NOW - 3_600_000 });
            let sample = sample(NOW, 0, 0);
            let idle_since_unix_ms = Some(NOW - idle_s * 1000);
            let idle = Activity { idle_since_unix_ms, used_by: None, ..Activity::first(sample) };
            node.activities.insert(path(number), idle);
        }
        node
    }

    fn set_phase(&mut self, number: u32, phase: Phase) {
        let status = InstanceStatus { phase, ..InstanceStatus::default() };
        self.observed.instances.insert(path(number), status);
    }

    fn record(&mut self, number: u32) -> &mut InstanceRecord {
        self.desired.instances.get_mut(&path(number)).unwrap()
    }

    fn warm(&mut self, number: u32, since_unix_ms: u64) {
        self.record(number).desired = DesiredState::Warm;
        self.set_phase(number, Phase::Warm { since_unix_ms });
    }

    fn short_of_memory(mut self) -> Self {
        self.memory = Some(HostMemory { available_mib: 400, wanted_mib: 512 });
        self
    }

    fn decide(&self) -> Vec<(u32, Rest)> {
        let actions = decide(&self.desired, &self.observed, &self.activities, self.memory, NOW);
        let number =
            |action: &RestAction| (1..9).find(|number| path(*number) == action.instance).unwrap();
        actions.iter().map(|action| (number(action), action.rest)).collect()
    }
}

fn sample(at_unix_ms: u64, cpu_ms: u64, net_bytes: u64) -> Sample {
    Sample { at_unix_ms, cpu_ms, net_bytes, streams: 0, is_busy: false }
}

#[test]
fn what_a_guest_does_is_told_from_two_measurements() {
    let first = Activity::first(sample(NOW, 500, 9_000));
    assert_eq!((first.used_by, first.idle_since_unix_ms), (Some(Use::Unknown), None));
    let after = |sample: Sample| first.observe(sample).used_by;
    let quiet = sample(NOW + 2_000, 600, 9_200);
    assert_eq!(after(quiet), None, "5 % and 100 B/s are nothing");
    assert_eq!(after(Sample { cpu_ms: 602, ..quiet }), Some(Use::Cpu { permille: 51 }));
    let talks = Sample { net_bytes: 9_202, ..quiet };
    assert_eq!(after(talks), Some(Use::Network { bytes_per_s: 101 }));
    assert_eq!(after(Sample { streams: 2, ..quiet }), Some(Use::Streams { count: 2 }));
    assert_eq!(after(Sample { is_busy: true, ..quiet }), Some(Use::Busy));
}

#[test]
fn a_guest_is_idle_since_the_last_moment_at_which_it_may_have_done_something() {
    let activity = Activity::first(sample(NOW, 0, 0)).observe(sample(NOW + 1_000, 0, 0));
    assert_eq!(activity.idle_since_unix_ms, Some(NOW));
    let activity = activity.observe(sample(NOW + 2_000, 0, 0));
    assert_eq!(activity.idle_since_unix_ms, Some(NOW));
    let activity = activity.observe(sample(NOW + 3_000, 900, 0));
    assert_eq!(activity.idle_since_unix_ms, None);
    let activity = activity.observe(sample(NOW + 4_000, 900, 0));
    assert_eq!(activity.idle_since_unix_ms, Some(NOW + 3_000));
}

#[test]
fn counters_and_clocks_that_run_backwards_begin_anew() {
    let idle = Activity::first(sample(NOW, 900, 900)).observe(sample(NOW + 1_000, 900, 900));
    for later in [sample(NOW + 2_000, 3, 900), sample(NOW + 2_000, 900, 3), sample(NOW, 900, 900)] {
        let activity = idle.observe(later);
        assert_eq!((activity.used_by, activity.idle_since_unix_ms), (Some(Use::Unknown), None));
    }
    let lost = Activity::unknown(NOW + 2_000);
    assert_eq!(lost.observe(sample(NOW + 9_000, 900, 900)).used_by, Some(Use::Unknown));
}

#[test]
fn a_guest_agent_that_does_not_tell_is_not_taken_for_idle() {
    let tells = Health {
        cpu_ms: Some(1),
        net_bytes: Some(2),
        connections: 1,
        execs: 2,
        ..Health::default()
    };
    let sample = Sample::of(&tells, NOW).unwrap();
    assert_eq!((sample.cpu_ms, sample.net_bytes, sample.streams), (1, 2, 3));
    assert_eq!(Sample::of(&Health { cpu_ms: None, ..tells.clone() }, NOW), None);
    assert_eq!(Sample::of(&Health { net_bytes: None, ..tells }, NOW), None);
}

#[test]
fn an_idle_instance_is_warm_first_and_sleeps_later() {
    let mut node = Node::new(policy(), &[59, 60, 299, 300]);
    assert_eq!(node.decide(), [(2, Rest::Warm), (3, Rest::Warm), (4, Rest::Sleep)]);
    node.warm(2, NOW - 1);
    node.warm(3, NOW - 1);
    assert_eq!(node.decide(), [(4, Rest::Sleep)], "what is warm stays so until it sleeps");
    node.activities.clear();
    node.warm(2, NOW - 300_000);
    assert_eq!(node.decide(), [(2, Rest::Sleep)], "an agent that has just started knows it too");
}

#[test]
fn one_time_alone_is_a_policy_too() {
    let only_sleep = SleepPolicy { warm_after_s: None, ..policy() };
    assert_eq!(Node::new(only_sleep, &[299, 300]).decide(), [(2, Rest::Sleep)]);
    let only_warm = SleepPolicy { sleep_after_s: None, ..policy() };
    assert_eq!(Node::new(only_warm, &[59, 90_000]).decide(), [(2, Rest::Warm)]);
}

#[test]
fn what_is_used_exempt_or_just_started_is_left_alone() {
    let left_alone = |change: fn(&mut Node)| {
        let mut node = Node::new(policy(), &[3_000]).short_of_memory();
        assert_eq!(node.decide(), [(1, Rest::Sleep)]);
        change(&mut node);
        assert_eq!(node.decide(), []);
    };
    left_alone(|node| node.record(1).pinned = true);
    left_alone(|node| node.record(1).purpose = Purpose::Base);
    left_alone(|node| node.record(1).purpose = Purpose::Spare);
    left_alone(|node| node.record(1).desired = DesiredState::Stopped);
    left_alone(|node| {
        node.desired.pools.get_mut(&pool()).unwrap().spec.sleep_policy.critical = true;
    });
    left_alone(|node| {
        node.desired.pools.get_mut(&pool()).unwrap().spec.sleep_policy = SleepPolicy::default();
    });
    left_alone(|node| node.desired.pools.get_mut(&pool()).unwrap().existence = Existence::Removed);
    left_alone(|node| node.set_phase(1, Phase::Running { since_unix_ms: NOW - 29_999 }));
    left_alone(|node| node.set_phase(1, Phase::Suspending { since_unix_ms: 0 }));
    left_alone(|node| node.activities.clear());
    left_alone(|node| {
        let activity = node.activities.get_mut(&path(1)).unwrap();
        *activity = Activity::unknown(NOW);
    });
}

#[test]
fn the_policy_of_the_pool_counts_and_not_the_one_that_the_instance_was_made_with() {
    let mut node = Node::new(SleepPolicy::default(), &[3_000]);
    assert_eq!(node.decide(), []);
    node.desired.pools.get_mut(&pool()).unwrap().spec.sleep_policy = policy();
    assert_eq!(node.decide(), [(1, Rest::Sleep)]);
}

#[test]
fn short_memory_puts_the_coldest_to_sleep_one_by_one() {
    let mut node = Node::new(policy(), &[10, 50, 20]).short_of_memory();
    assert_eq!(node.decide(), [(2, Rest::Sleep)]);
    node.record(2).desired = DesiredState::Sleeping;
    node.set_phase(2, Phase::Suspending { since_unix_ms: 0 });
    assert_eq!(node.decide(), [], "it has given nothing back yet");
    node.set_phase(2, Phase::Sleeping { since_unix_ms: NOW });
    assert_eq!(node.decide(), [(3, Rest::Sleep)]);
    node.memory = Some(HostMemory { available_mib: 512, wanted_mib: 512 });
    assert_eq!(node.decide(), []);
}

#[test]
fn what_is_idle_long_enough_sleeps_before_memory_asks_for_more() {
    let node = Node::new(policy(), &[10, 300, 60]).short_of_memory();
    assert_eq!(node.decide(), [(2, Rest::Sleep), (3, Rest::Warm)]);
    let node = Node::new(policy(), &[10, 60]).short_of_memory();
    assert_eq!(node.decide(), [(2, Rest::Sleep)], "rather than warm");
}

#[test]
fn times_that_make_no_sense_are_refused() {
    let check = |warm_after_s, sleep_after_s| {
        let policy = SleepPolicy { warm_after_s, sleep_after_s, ..SleepPolicy::default() };
        policy.check().map_err(|error| error.to_string())
    };
    assert_eq!(check(Some(1), Some(2)), Ok(()));
    assert_eq!(check(None, None), Ok(()));
    let zero = "sleep_after_s is 0, but must be at least 1 second";
    assert_eq!(check(None, Some(0)), Err(zero.to_owned()));
    assert!(check(Some(0), None).is_err());
    let order = "sleep_after_s is 5, but must be more than warm_after_s, which is 5";
    assert_eq!(check(Some(5), Some(5)), Err(order.to_owned()));
}

#[test]
fn short_times_are_measured_often() {
    let every = |warm_after_s, sleep_after_s| {
        SleepPolicy { warm_after_s, sleep_after_s, ..SleepPolicy::default() }.sample_ms()
    };
    assert_eq!(every(Some(1), Some(600)), 1_000);
    assert_eq!(every(None, Some(20)), 5_000);
    assert_eq!(every(Some(3_600), Some(7_200)), 10_000);
    assert_eq!(every(None, None), 10_000);
}
