//! Random steps over several real microVMs, whose memory and disk contents are compared byte for byte
//! after every one: sleep, wake, warm, fork, stop, start, restart, and crashes of VMMs and agents at
//! any moment.
//!
//! `MVM_SOAK_STEPS` says how many (a few by default), `MVM_SOAK_SEED` which. A failure names both.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a failure is read together with the steps before it")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::str::FromStr;
use std::time::Duration;

use mvm_tests::node::{Node, kill};
use mvm_tests::wait::{LIMIT, until};
use rustix::process::Signal;
use serde_json::Value;

/// Most instances at once.
const INSTANCES: usize = 4;
/// Bytes of each content.
const BYTES: u32 = 1_000_000;
/// Longest time into a step at which something is killed, in milliseconds.
const INTO_MS: u64 = 400;

/// Numbers that follow from a seed (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Warm,
    Sleeping,
    Stopped,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Warm => "warm",
            Self::Sleeping => "sleeping",
            Self::Stopped => "stopped",
        }
    }
}

/// What an instance is to be like.
#[derive(Debug, Clone)]
struct Instance {
    state: State,
    boots: u64,
    /// What its memory holds; nothing if it has booted since.
    memory: Option<String>,
    disk: String,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write,
    Sleep,
    Wake,
    Warm,
    Use,
    Fork,
    Stop,
    Start,
    Restart,
    Destroy,
    WakeDuringSleep,
    KillVmm,
    KillVmmDuringSleep,
    KillVmmDuringWake,
    KillAgent,
    KillAgentDuringSleep,
    KillAgentDuringWake,
}

const STEPS: [Step; 17] = [
    Step::Write,
    Step::Sleep,
    Step::Wake,
    Step::Warm,
    Step::Use,
    Step::Fork,
    Step::Stop,
    Step::Start,
    Step::Restart,
    Step::Destroy,
    Step::WakeDuringSleep,
    Step::KillVmm,
    Step::KillVmmDuringSleep,
    Step::KillVmmDuringWake,
    Step::KillAgent,
    Step::KillAgentDuringSleep,
    Step::KillAgentDuringWake,
];

struct Fleet {
    node: Node,
    numbers: Numbers,
    instances: BTreeMap<String, Instance>,
    /// Their paths in the order in which they were made: ids are drawn, and no seed decides them.
    order: Vec<String>,
    contents: u64,
}

impl Fleet {
    fn boot(&mut self) {
        let path = self.node.boot("acme/soak");
        let instance =
            Instance { state: State::Running, boots: 1, memory: None, disk: String::new() };
        self.add(&path, instance);
        self.write(&path);
    }

    fn add(&mut self, path: &str, instance: Instance) {
        self.instances.insert(path.to_owned(), instance);
        self.order.push(path.to_owned());
    }

    /// Gives an instance that runs new contents of its memory and its disk.
    fn write(&mut self, path: &str) {
        self.contents += 1;
        let content = format!("content {}", self.contents);
        let script = format!(
            "yes 'memory of {content}' | head -c {BYTES} > /run/content
             yes 'disk of {content}' | head -c {BYTES} > /root/content; sync"
        );
        self.node.guest(path, &script);
        let instance = self.instances.get_mut(path).unwrap();
        instance.memory = Some(content.clone());
        instance.disk = content;
    }

    fn any(&mut self) -> String {
        let number = self.numbers.below(self.order.len() as u64);
        self.order[number as usize].clone()
    }

    fn state(&self, path: &str) -> State {
        self.instances[path].state
    }

    /// An instance is in another state by wish; what it held in memory is lost if it stopped.
    fn set(&mut self, path: &str, state: State) {
        let instance = self.instances.get_mut(path).unwrap();
        if state == State::Stopped {
            instance.memory = None;
        } else if instance.state == State::Stopped {
            instance.boots += 1;
        }
        instance.state = state;
    }

    /// Waits until an instance has got over the end of this process, and takes over whether it had to
    /// boot.
    fn recover(&mut self, path: &str, state: State, killed: Option<u32>) {
        let boots = self.instances[path].boots;
        let settled = until(&format!("{path} is {} again", state.name()), LIMIT, || {
            let view = self.node.instance(path);
            let is_quiet = view["activity"].is_null() && view["waiting"].is_null();
            // Its agent may not have noticed yet.
            let is_another = killed.is_none() || view["pid"].as_u64() != killed.map(u64::from);
            (view["state"] == state.name() && is_quiet && is_another).then_some(view)
        });
        let instance = self.instances.get_mut(path).unwrap();
        instance.state = state;
        if settled["boots"] != boots {
            assert_eq!(settled["boots"], boots + 1, "{settled}");
            instance.boots += 1;
            instance.memory = None;
        }
    }

    /// The process of an instance that has one.
    fn pid(&self, path: &str) -> Option<u32> {
        let pid = self.node.instance(path)["pid"].as_u64();
        pid.and_then(|pid| u32::try_from(pid).ok())
    }

    fn pause(&mut self) {
        let ms = self.numbers.below(INTO_MS);
        std::thread::sleep(Duration::from_millis(ms));
    }

    /// Takes a step on an instance, or says that it makes no sense now.
    fn take(&mut self, step: Step, path: &str) -> bool {
        let state = self.state(path);
        let is_alive = state != State::Stopped;
        match step {
            Step::Write if state == State::Running => self.write(path),
            Step::Sleep if is_alive => {
                self.node.ok(&["sleep", path]);
                self.set(path, State::Sleeping);
            }
            Step::Wake if is_alive => {
                self.node.ok(&["wake", path]);
                self.set(path, State::Running);
            }
            Step::Warm if is_alive => {
                self.node.ok(&["warm", path]);
                self.set(path, State::Warm);
            }
            Step::Use if is_alive => {
                self.node.guest(path, "true");
                self.set(path, State::Running);
            }
            Step::Fork if is_alive && self.instances.len() < INSTANCES => {
                let forked = self.node.json(&["fork", path]);
                let fork = forked["concerns"]["instances"][0].as_str().unwrap().to_owned();
                let source = self.instances[path].clone();
                let forked = Instance { state: State::Running, boots: 0, ..source };
                self.add(&fork, forked);
            }
            Step::Stop if is_alive => {
                self.node.ok(&["stop", path]);
                self.set(path, State::Stopped);
            }
            Step::Start if !is_alive => {
                self.node.ok(&["start", path]);
                self.set(path, State::Running);
            }
            Step::Restart if is_alive => {
                self.node.ok(&["restart", path]);
                self.set(path, State::Stopped);
                self.set(path, State::Running);
            }
            Step::Destroy if self.instances.len() > 2 => {
                self.node.ok(&["instance", "destroy", path, "--force"]);
                self.instances.remove(path);
                self.order.retain(|other| other != path);
            }
            Step::WakeDuringSleep if state == State::Running => {
                self.node.ok(&["sleep", path, "--no-wait"]);
                self.pause();
                self.node.ok(&["wake", path]);
            }
            Step::KillVmm if matches!(state, State::Running | State::Warm) => {
                let pid = self.pid(path).unwrap();
                kill(pid, Signal::KILL);
                // Its memory is gone, whatever it was to do.
                self.set(path, State::Stopped);
                self.set(path, state);
                self.recover(path, state, Some(pid));
            }
            Step::KillVmmDuringSleep if matches!(state, State::Running | State::Warm) => {
                let pid = self.pid(path).unwrap();
                self.node.ok(&["sleep", path, "--no-wait"]);
                self.pause();
                kill(pid, Signal::KILL);
                self.recover(path, State::Sleeping, Some(pid));
            }
            Step::KillVmmDuringWake if state == State::Sleeping => {
                self.node.ok(&["wake", path, "--no-wait"]);
                self.pause();
                let pid = self.pid(path);
                if let Some(pid) = pid {
                    kill(pid, Signal::KILL);
                }
                self.recover(path, State::Running, pid);
            }
            Step::KillAgent => self.node.kill_agent(),
            Step::KillAgentDuringSleep if state == State::Running => {
                self.node.ok(&["sleep", path, "--no-wait"]);
                self.pause();
                self.node.kill_agent();
                self.node.ok(&["sleep", path]);
                self.set(path, State::Sleeping);
            }
            Step::KillAgentDuringWake if state == State::Sleeping => {
                self.node.ok(&["wake", path, "--no-wait"]);
                self.pause();
                self.node.kill_agent();
                self.node.ok(&["wake", path]);
                self.set(path, State::Running);
            }
            _ => return false,
        }
        true
    }

    /// Compares everything with what it is to be.
    fn check(&self) {
        let mut views: BTreeMap<String, Value> = BTreeMap::new();
        for view in self.node.instances() {
            views.insert(view["path"].as_str().unwrap().to_owned(), view);
        }
        assert!(views.keys().eq(self.instances.keys()), "{views:#?}");
        for (path, instance) in &self.instances {
            let view = &views[path];
            assert_eq!(view["state"], instance.state.name(), "{view}");
            assert_eq!(view["boots"], instance.boots, "it booted although it need not: {view}");
            assert!(view["cold_boot"].is_null() && view["setback"].is_null(), "{view}");
            if instance.state == State::Running {
                self.check_contents(path, instance);
            }
        }
        let with_process = self.instances.values();
        let with_process =
            with_process.filter(|i| matches!(i.state, State::Running | State::Warm)).count();
        assert_eq!(self.node.vmm_pids().len(), with_process, "what sleeps has no process");
    }

    fn check_contents(&self, path: &str, instance: &Instance) {
        let same = |what: &str, content: &str, file: &str| {
            format!("yes '{what} of {content}' | head -c {BYTES} | cmp - {file} || exit 9\n")
        };
        let mut script = same("disk", &instance.disk, "/root/content");
        match &instance.memory {
            Some(content) => script += &same("memory", content, "/run/content"),
            None => script += "! test -e /run/content || exit 8",
        }
        let compared = self.node.mvm(&["exec", path, "--", "sh", "-c", &script]);
        assert_eq!(compared.code, 0, "{path} {instance:?}: {}", compared.stderr);
    }
}

fn variable<T: FromStr<Err: Debug>>(name: &str, default: T) -> T {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn nothing_is_lost_whatever_happens_in_whatever_order() {
    let Some(node) = Node::new() else { return };
    let steps: u64 = variable("MVM_SOAK_STEPS", 40);
    let seed: u64 = variable("MVM_SOAK_SEED", 1);
    println!("MVM_SOAK_SEED={seed} MVM_SOAK_STEPS={steps}");
    node.small_pool("acme/soak", &["--restart", "always"]);
    let numbers = Numbers(seed.max(1));
    let mut fleet = Fleet { node, numbers, instances: BTreeMap::new(), order: vec![], contents: 0 };
    fleet.boot();
    fleet.boot();
    fleet.check();
    let mut taken = 0;
    while taken < steps {
        let step = STEPS[fleet.numbers.below(STEPS.len() as u64) as usize];
        let path = fleet.any();
        println!("{taken}: {step:?} {path} {:?}", fleet.state(&path));
        if fleet.take(step, &path) {
            fleet.check();
            taken += 1;
        }
    }
    // What sleeps is looked at, too.
    for path in fleet.order.clone() {
        let step = if fleet.state(&path) == State::Stopped { Step::Start } else { Step::Wake };
        assert!(fleet.take(step, &path));
    }
    fleet.check();
    fleet.node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(fleet.node.leftovers(), [""; 0]);
}
