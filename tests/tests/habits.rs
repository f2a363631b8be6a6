//! Some of what each verb does in each state, on real microVMs: a sample of the table that is walked
//! as a whole on the simulated host, one combination of each state.
//!
//! The sample changes from day to day. `MVM_HABITS_SEED` has one again (each run prints its own),
//! and `MVM_HABITS_ROUNDS` says how often all states are gone through.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_habits::{
    Agent, Beside, Client, Combination, End, Expected, Loss, Moment, Numbers, Situation, Verb,
    expected,
};
use mvm_tests::{LIMIT, Node, Output, Running, until};
use mvm_wire::ErrorCode;
use rustix::process::Signal;
use serde_json::Value;

/// How far into a command a client is interrupted at most, in milliseconds.
const INTO_MS: usize = 300;
/// The exit code of an interrupted command.
const INTERRUPTED: i32 = 130;
/// What holds a guest where it is, for some seconds.
const LINGERS: &str = "sleep 4";
/// A main process that lingers when it is asked to end, and fails once, where files say so. Ctrl-C of
/// who is attached to it is nothing to it.
const PROGRAM: &str = "test -e /root/fails && rm /root/fails && exit 1; trap '' INT; \
    trap 'test -e /root/lingers && sleep 4; exit 0' TERM; while :; do sleep 0.1; done";

/// A subject: its tenant, its path, and who is attached to it.
struct Subject {
    tenant: String,
    path: String,
    disk: bool,
    has_files: bool,
    attached: Option<Running>,
}

impl Subject {
    fn pool(&self) -> &str {
        self.path.rsplit_once('/').unwrap().0
    }
}

/// The command of a verb, if it has one that ends by itself or can be interrupted.
fn command(verb: Verb, subject: &Subject) -> Option<Vec<&str>> {
    let (path, pool, tenant) = (subject.path.as_str(), subject.pool(), subject.tenant.as_str());
    Some(match verb {
        Verb::Start => vec!["start", path],
        Verb::Stop => vec!["stop", path],
        Verb::Kill => vec!["stop", path, "--grace", "0"],
        Verb::Restart => vec!["restart", path],
        Verb::Warm => vec!["warm", path],
        Verb::Sleep => vec!["sleep", path],
        Verb::SleepForce => vec!["sleep", path, "--force"],
        Verb::Pin => vec!["instance", "pin", path],
        Verb::Unpin => vec!["instance", "unpin", path],
        Verb::Destroy => vec!["rm", path],
        Verb::DestroyForce => vec!["rm", path, "--force"],
        Verb::Fork => vec!["fork", path],
        Verb::Exec => vec!["exec", path, "--", "true"],
        Verb::Attach => vec!["attach", path],
        Verb::Logs => vec!["logs", path],
        Verb::LogsFollow => vec!["logs", path, "--follow"],
        Verb::LogsKernel => vec!["logs", path, "--source", "kernel"],
        Verb::Stats => vec!["stats", path],
        Verb::Why => vec!["why", path],
        Verb::Instances => vec!["ps", path],
        Verb::Create => vec!["instance", "create", pool],
        Verb::CreateStarted => vec!["instance", "create", pool, "--start"],
        Verb::PoolCreate => vec!["pool", "create", pool],
        Verb::PoolBuild => vec!["pool", "build", pool],
        Verb::PoolUpdate => vec!["pool", "update", pool],
        Verb::PoolRollback => vec!["pool", "rollback", pool],
        Verb::ScaleToOne => vec!["pool", "scale", pool, "--running", "1"],
        Verb::ScaleToNone => vec!["pool", "scale", pool, "--running", "0"],
        Verb::PoolPolicy => vec!["pool", "policy", pool, "--sleep-after", "1h"],
        Verb::WarmUp => vec!["pool", "warm-up", pool],
        Verb::Pools => vec!["pool", "info", pool],
        Verb::PoolDestroy => vec!["pool", "destroy", pool],
        Verb::PoolDestroyForce => vec!["pool", "destroy", pool, "--force"],
        Verb::TenantCreate => vec!["tenant", "create", tenant],
        Verb::TenantUpdate => vec!["tenant", "update", tenant, "--running", "1000"],
        Verb::Tenants => vec!["tenant", "info", tenant],
        Verb::TenantDestroy => vec!["tenant", "destroy", tenant],
        Verb::TenantDestroyForce => vec!["tenant", "destroy", tenant, "--force"],
        Verb::Disks => vec!["disk", "list", tenant],
        Verb::Images => vec!["image", "list"],
        Verb::ImageCollect => vec!["image", "gc"],
        Verb::Node => vec!["node", "info"],
        Verb::NetVerify => vec!["net", "verify"],
        Verb::Records => vec!["node", "record", "show"],
        Verb::AgentStop => vec!["agent", "stop"],
        // Needs more than a verb, a path and a neighbour, or no person types it.
        Verb::Locate
        | Verb::Ssh
        | Verb::Forward
        | Verb::AttachEarly
        | Verb::Watch
        | Verb::PoolReady
        | Verb::TenantMove
        | Verb::DiskCreate
        | Verb::DiskResize
        | Verb::DiskRemove
        | Verb::Up
        | Verb::Down
        | Verb::ImageRemove
        | Verb::RecordMend
        | Verb::Unknown => return None,
    })
}

/// Whether a combination can be brought about by commands, within seconds.
fn is_possible(combination: Combination) -> bool {
    let Combination { verb, situation, beside, .. } = combination;
    let placeholder = "t/p/i-0".to_owned();
    let (tenant, path) = ("t".to_owned(), placeholder);
    let nobody = Subject { tenant, path, disk: false, has_files: false, attached: None };
    // What fails is started again and again, unless it is never.
    let stays_failed = situation != Situation::Failed || beside == Beside::RestartNever;
    // `mvm run` starts what it makes.
    let is_run = beside != Beside::AutoRemove || situation != Situation::Created;
    command(verb, &nobody).is_some() && stays_failed && is_run
}

fn exit_code(refused: Option<ErrorCode>) -> i32 {
    match refused {
        None => 0,
        Some(ErrorCode::NotFound) => 3,
        Some(ErrorCode::Conflict) => 5,
        Some(_) => 1,
    }
}

struct Scene {
    node: Node,
    numbers: Numbers,
    neighbour: String,
    /// What is there because of the neighbour.
    before: Vec<String>,
    count: usize,
}

impl Scene {
    fn walk(&mut self, combination: Combination) {
        let Combination { verb, situation, moment, beside } = combination;
        let mut subject = self.set_up(situation, beside);
        if moment.agent == Agent::JustStarted {
            self.node.ok(&["agent", "stop"]);
            if verb == Verb::AgentStop {
                // The others start the next one themselves.
                self.node.ok(&["node", "info"]);
            }
        }
        let expected = expected(combination);
        let command = command(verb, &subject).unwrap();
        let output = self.ask(&command, verb, moment.client);
        let mut codes = vec![exit_code(expected.refused)];
        // It may be gone before a command has come to it.
        if situation == Situation::Destroying && expected.refused.is_some() {
            codes.push(exit_code(Some(ErrorCode::NotFound)));
        }
        if moment.client == Client::Interrupted || is_endless(verb) {
            codes.push(INTERRUPTED);
        }
        assert!(codes.contains(&output.code), "{combination}: expected {codes:?}: {output}");
        self.check_end(&subject, &expected, combination);
        self.check_files(&subject, expected.loss);
        self.clean_up(&mut subject);
    }

    /// Runs a command to its end, or interrupts it.
    fn ask(&mut self, command: &[&str], verb: Verb, client: Client) -> Output {
        let mut running = self.node.spawn(command);
        let into = match client {
            Client::Interrupted => Duration::from_millis(self.numbers.below(INTO_MS) as u64),
            Client::Stays if is_endless(verb) => Duration::from_secs(6),
            Client::Stays => return running.wait(LIMIT),
        };
        std::thread::sleep(into);
        running.signal(Signal::INT);
        if is_endless(verb) {
            // The first one is for the program, if there is one already.
            std::thread::sleep(Duration::from_millis(300));
            running.signal(Signal::INT);
        }
        running.wait(LIMIT)
    }

    fn set_up(&mut self, situation: Situation, beside: Beside) -> Subject {
        self.count += 1;
        let tenant = format!("t{}", self.count);
        let pool = format!("{tenant}/app");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let publish = format!("{port}:80");
        let options: &[&str] = match beside {
            Beside::DataDisk => &["--disk-attach", "data:/data"],
            Beside::PublishedPort => &["--publish", &publish],
            Beside::SleepPolicy => &["--sleep-after", "1h"],
            Beside::RestartAlways => &["--restart", "always"],
            Beside::RestartNever => &["--restart", "never"],
            _ => &[],
        };
        let program = ["--", "sh", "-c", PROGRAM];
        self.node.ok(&["tenant", "create", &tenant]);
        let path = if beside == Beside::AutoRemove {
            let run = ["run", "-d", "--rm", "--name", "app", "--tenant", &tenant, "--mem", "192M"];
            self.node.ok(&[&run[..], &["builtin"], &program].concat()).trim().to_owned()
        } else {
            if beside == Beside::DataDisk {
                self.node.ok(&["disk", "create", &format!("{tenant}/data"), "--size", "32M"]);
            }
            let create = ["pool", "create", &pool, "--mem", "192M"];
            self.node.ok(&[&create[..], options, &program].concat());
            match beside {
                Beside::Base => drop(self.node.ok(&["pool", "warm-up", &pool])),
                Beside::Spare => drop(self.node.ok(&["pool", "warm-up", &pool, "--ready", "1"])),
                _ => {}
            }
            self.node.ok(&["instance", "create", &pool]).trim().to_owned()
        };
        let disk = beside == Beside::DataDisk;
        let mut subject = Subject { tenant, path, disk, has_files: false, attached: None };
        self.bring(&mut subject, situation);
        if beside == Beside::AttachedClient {
            subject.attached = Some(self.node.spawn(&["attach", &subject.path]));
        }
        subject
    }

    fn bring(&self, subject: &mut Subject, situation: Situation) {
        let node = &self.node;
        let path = subject.path.clone();
        let guest = |script: &str| drop(node.guest(&path, script));
        let until_activity = |activity: &str| {
            until(&format!("{path} is {activity}"), LIMIT, || {
                (node.instance(&path)["activity"] == activity).then_some(())
            });
        };
        match situation {
            Situation::Created => return,
            Situation::Starting => {
                node.ok(&["start", &path, "--no-wait"]);
                return;
            }
            _ => {}
        }
        node.ok(&["start", &path]);
        let dirs = if subject.disk { "/root /data" } else { "/root" };
        guest(&format!("for d in {dirs}; do echo kept >$d/synced; done; sync"));
        guest(&format!("for d in {dirs}; do echo kept >$d/unsynced; done"));
        subject.has_files = true;
        match situation {
            Situation::Created | Situation::Starting | Situation::Running => {}
            Situation::Warm => drop(node.ok(&["warm", &path])),
            Situation::Sleeping => drop(node.ok(&["sleep", &path])),
            Situation::FallingAsleep => {
                let hooks = "/etc/mvm/hooks/pre-sleep.d";
                guest(&format!(
                    "mkdir -p {hooks}; printf '#!/bin/sh\\n{LINGERS}\\n' >{hooks}/lingers; chmod +x {hooks}/lingers"
                ));
                node.ok(&["sleep", &path, "--no-wait"]);
                until_activity("falling asleep");
            }
            Situation::Stopping => {
                guest("touch /root/lingers");
                node.ok(&["stop", &path, "--no-wait"]);
                until_activity("stopping");
            }
            Situation::Stopped => drop(node.ok(&["stop", &path])),
            Situation::Failed => {
                guest("touch /root/fails");
                node.ok(&["stop", &path]);
                node.mvm(&["start", &path]);
                node.until_state(&path, "failed");
            }
            Situation::Destroying => {
                guest("touch /root/lingers");
                node.ok(&["rm", &path, "--force", "--no-wait"]);
                until_activity("destroying");
            }
        }
    }

    fn find(&self, path: &str) -> Option<Value> {
        self.node.instances().into_iter().find(|view| view["path"] == path)
    }

    fn check_end(&self, subject: &Subject, expected: &Expected, combination: Combination) {
        let mut ends = vec![expected.end];
        ends.extend(expected.or);
        let names: Vec<_> = ends.iter().map(|end| name(*end)).collect();
        until(&format!("{combination}: {} is {names:?}", subject.path), LIMIT, || {
            let view = self.find(&subject.path);
            let is_there = match &view {
                None => names.contains(&None),
                Some(view) => {
                    view["activity"].is_null()
                        && names.iter().flatten().any(|name| view["state"] == *name)
                }
            };
            is_there.then_some(())
        });
    }

    fn check_files(&self, subject: &Subject, loss: Loss) {
        if !subject.has_files || self.find(&subject.path).is_none() {
            return;
        }
        if subject.disk {
            // Whoever came besides has its disk.
            let others = self.node.instances().into_iter();
            let of_pool = format!("{}/", subject.pool());
            for other in others.filter_map(|view| view["path"].as_str().map(str::to_owned)) {
                if other.starts_with(&of_pool) && other != subject.path {
                    self.node.ok(&["rm", &other, "--force"]);
                }
            }
        }
        self.node.ok(&["start", &subject.path]);
        let dirs = if subject.disk { "/root /data" } else { "/root" };
        let files = if loss == Loss::Nothing { "synced unsynced" } else { "synced" };
        let look = format!(
            "for d in {dirs}; do for f in {files}; do echo kept | cmp - $d/$f || exit 9; done; done"
        );
        self.node.mvm(&["exec", &subject.path, "--", "sh", "-c", &look]).ok();
    }

    fn clean_up(&self, subject: &mut Subject) {
        let destroyed = self.node.mvm(&["tenant", "destroy", &subject.tenant, "--force"]);
        assert!([0, 3].contains(&destroyed.code), "{destroyed}");
        if let Some(attached) = subject.attached.take() {
            // Its agent, and then its instance, is gone.
            attached.wait(Duration::from_secs(20));
        }
        let mut left = Vec::new();
        for _ in 0..200 {
            left = self.node.leftovers();
            left.retain(|it| !self.before.contains(it));
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(left, [""; 0], "left behind");
        let neighbour = self.node.instance(&self.neighbour);
        assert_eq!((&neighbour["state"], &neighbour["boots"]), (&"running".into(), &1.into()));
    }
}

/// Whether a command goes on until it is interrupted.
fn is_endless(verb: Verb) -> bool {
    matches!(verb, Verb::Attach | Verb::LogsFollow)
}

fn name(end: End) -> Option<&'static str> {
    Some(match end {
        End::Gone => return None,
        End::Created => "created",
        End::Running => "running",
        End::Warm => "warm",
        End::Sleeping => "sleeping",
        End::Stopped => "stopped",
        End::Failed => "failed",
    })
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Not captured, as what is printed by a test that passes is.
fn tell(line: &str) {
    let mut stderr = std::io::stderr();
    writeln!(stderr, "{line}").unwrap();
}

#[test]
fn verbs_do_on_real_microvms_what_the_table_says() {
    let Some(node) = Node::new() else { return };
    let today = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 86_400;
    let seed = number("MVM_HABITS_SEED", today);
    let rounds = number("MVM_HABITS_ROUNDS", 1);
    let mut numbers = Numbers::new(seed);
    let mut sample = Vec::new();
    for _ in 0..rounds {
        for &situation in Situation::ALL {
            let all: Vec<_> = Combination::all()
                .filter(|it| it.situation == situation && is_possible(*it))
                .collect();
            sample.push(all[numbers.below(all.len())]);
        }
    }
    node.small_pool("other/web", &[]);
    let neighbour = node.boot("other/web");
    let before = node.leftovers();
    let mut scene = Scene { node, numbers, neighbour, before, count: 0 };
    tell(&format!("MVM_HABITS_SEED={seed} MVM_HABITS_ROUNDS={rounds}"));
    for (at, combination) in sample.iter().enumerate() {
        tell(&format!("{at}: {combination}"));
        scene.walk(*combination);
    }
    tell(&format!("habits on real microVMs: {} combinations, 0 failing", sample.len()));
}

/// A command that has still much to send when it is refused hears why, each time.
#[test]
fn whatever_is_refused_says_why() {
    let Some(node) = Node::new() else { return };
    node.ok(&["--vmm", "sim", "tenant", "create", "demo"]);
    let big = tempfile::NamedTempFile::new().unwrap();
    big.as_file().set_len(8 << 20).unwrap();
    let file = big.path().to_str().unwrap();
    let subject = |situation, beside: &[&str], program: &[&str]| {
        let pool = format!("demo/{situation}");
        node.ok(&[&["pool", "create", &pool], beside, &["--"], program].concat());
        node.ok(&["instance", "create", &pool]).trim().to_owned()
    };
    let created = subject("created", &[], &["sleep", "100000"]);
    let stopped = subject("stopped", &[], &["sleep", "100000"]);
    node.ok(&["start", &stopped]);
    node.ok(&["stop", &stopped]);
    let failed = subject("failed", &["--restart", "never"], &["false"]);
    node.mvm(&["start", &failed]);
    node.until_state(&failed, "failed");
    let cases = [
        (created.as_str(), Some(Situation::Created), "created"),
        (&stopped, Some(Situation::Stopped), "stopped"),
        (&failed, Some(Situation::Failed), "failed"),
        ("demo/nobody", None, "demo/nobody"),
        ("nobody", None, "nobody"),
        ("i-ffffffff", None, "i-ffffffff"),
    ];
    let moment = Moment { agent: Agent::Settled, client: Client::Stays };
    for (path, situation, word) in cases {
        let [into, out] = ["/tmp/", "/tmp/file"].map(|place| format!("{path}:{place}"));
        for (verb, command) in [
            (Verb::Exec, &["exec", path, "--", "true"][..]),
            (Verb::Exec, &["exec", "-i", path, "--", "cat"]),
            (Verb::Exec, &["cp", file, &into]),
            (Verb::Exec, &["cp", &out, "."]),
            (Verb::Attach, &["attach", path]),
            (Verb::Fork, &["fork", path]),
            (Verb::LogsKernel, &["logs", path, "--source", "kernel"]),
        ] {
            let code = match situation {
                None => 3,
                Some(situation) => {
                    let beside = Beside::RestartNever;
                    let asked = Combination { verb, situation, moment, beside };
                    exit_code(expected(asked).refused)
                }
            };
            for _ in 0..3 {
                let input = vec![0; 1 << 20];
                let output = node.mvm_with_input(command, &input).fails_with(code);
                output.says(&["error: ", word]);
            }
        }
    }
}
