//! A machine with a neighbour on it, and instances brought into each state.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use mvm_core::admit::{DEFAULT_GRACE_MS, Request};
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::record::{DEFAULT_HOOKS_MS, Purpose};
use mvm_core::sleep_policy::SleepPolicy;
use mvm_core::spec::{PoolSpec, Quota, RestartPolicy};
use mvm_habits::{Agent as Age, Beside, Client, Combination, Situation, Verb, expected};
use mvm_host::vmm::sim::SimFault;
use mvm_wire::view::InstanceView;
use mvm_wire::{Accepted, Call, Connection, ErrorCode, Reply};
use tokio::time::timeout;

use super::asking::{self, Heard};
use crate::node::{Agent, Machine, is_running};

/// The data disk's name, size, and place in the guest.
pub(super) const DISK: &str = "data";
pub(super) const DISK_MIB: u64 = 16;
const DISK_DIR: &str = "/data";
/// The sleep policy's time; nothing that is walked takes as long.
pub(super) const IDLE_S: u32 = 3_600;
/// Files in the guest: what was synced, and what was not.
pub(super) const SYNCED: &str = "synced";
pub(super) const UNSYNCED: &str = "unsynced";
/// How long a guest takes for what holds it in a state, in seconds.
const LINGERS_S: &str = "3";
/// How long a step of the setting up may take.
const SETTING_UP: Duration = Duration::from_secs(100);
/// Starts that fail before a failed instance is left alone for a minute.
const FAILURES: u32 = 7;

/// The instance that a verb is asked of.
pub(super) struct Subject {
    pub(super) path: InstancePath,
    pub(super) spec: PoolSpec,
    pub(super) situation: Situation,
    /// Whether its guest's programs have written something.
    pub(super) has_files: bool,
    /// Somebody who is attached to it.
    pub(super) attached: Option<Connection>,
    /// What it was like before the verb.
    pub(super) before: Option<InstanceView>,
}

impl Subject {
    /// Directories in the guest that its programs write to.
    pub(super) fn dirs(&self) -> Vec<&'static str> {
        match self.spec.disks.is_empty() {
            true => vec!["/root"],
            false => vec!["/root", DISK_DIR],
        }
    }
}

pub(super) struct Scene {
    pub(super) machine: Machine,
    agent: Option<Agent>,
    /// An instance of another tenant, which nothing is to happen to.
    pub(super) neighbour: InstanceView,
    /// What is there because of the neighbour.
    pub(super) before: Vec<String>,
    /// The fewest tasks that an agent had with nothing but the neighbour.
    pub(super) fewest_tasks: usize,
}

impl Scene {
    pub(super) async fn new() -> Self {
        let machine = Machine::new();
        let agent = machine.agent().await;
        let text = r#"{"tenant":"other","pools":{"web":{"running":1,"mem_mib":96}}}"#;
        let document = serde_json::from_str(text).unwrap();
        agent.submit(Request::Apply { document }).await.unwrap();
        let neighbour = agent.until_running(1).await.remove(0);
        let before = machine.leftovers().await;
        let agent = Some(agent);
        Self { machine, agent, neighbour, before, fewest_tasks: usize::MAX }
    }

    pub(super) fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("one agent takes the place of the other")
    }

    /// Replaces the agent.
    async fn restart(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.node.end().await;
        }
        self.agent = Some(self.machine.agent().await);
        self.fewest_tasks = usize::MAX;
    }

    /// Walks combinations that one instance is enough for.
    pub(super) async fn walk(&mut self, combinations: &[Combination]) -> Result<(), String> {
        let Some(&combination) = combinations.first() else { return Ok(()) };
        let Combination { verb, situation, moment, beside } = combination;
        let subject = self.set_up(situation, beside).await?;
        if moment.agent == Age::JustStarted {
            self.restart().await;
        }
        for &combination in combinations {
            let verb = combination.verb;
            self.ask(combination, &subject).await.map_err(|error| format!("{verb}: {error}"))?;
        }
        if verb == Verb::AgentStop {
            self.restart().await;
        }
        let expected = expected(combination);
        self.check_end(&subject, combination, &expected).await?;
        self.check_files(&subject, verb, expected.loss).await?;
        self.clean_up(subject).await
    }

    async fn ask(&self, combination: Combination, subject: &Subject) -> Result<(), String> {
        let heard = match combination.moment.client {
            Client::Stays => asking::ask(self, combination.verb, subject).await?,
            Client::Interrupted => asking::interrupt(self, combination.verb, subject).await,
        };
        match (&heard, expected(combination).refused) {
            (Heard::Nothing, _) | (Heard::Fine, None) => Ok(()),
            (Heard::Refused(error), Some(code)) if error.code == code => Ok(()),
            (heard, refused) => Err(format!("{heard:?}, expected {refused:?}")),
        }
    }

    /// The call of a verb.
    pub(super) fn call(&self, verb: Verb, subject: &Subject) -> Call {
        match (asking::call(verb, &subject.path, &subject.spec), &self.neighbour.revision) {
            (Call::ImageRemove { .. }, Some(revision)) => {
                Call::ImageRemove { revision: revision.clone() }
            }
            (call, _) => call,
        }
    }

    pub(super) async fn submit(&self, request: Request) -> Result<Accepted, String> {
        let asked = format!("{request:?}");
        self.agent().submit(request).await.map_err(|error| format!("{asked}: {error}"))
    }

    /// The instances of the tenant.
    pub(super) async fn instances(&self) -> Result<Vec<InstanceView>, String> {
        let selector = Selector::Tenant("demo".parse().unwrap());
        match self.agent().call(Call::Instances { selector }).await {
            Ok(Reply::Instances { instances, .. }) => Ok(instances),
            Err(error) if error.code == ErrorCode::NotFound => Ok(vec![]),
            other => Err(format!("{other:?}")),
        }
    }

    /// Waits until an instance, or its absence, is as wanted.
    pub(super) async fn until(
        &self,
        what: &str,
        path: &InstancePath,
        limit: Duration,
        wanted: impl Fn(Option<&InstanceView>) -> bool,
    ) -> Result<Option<InstanceView>, String> {
        let mut connection = self.agent().node.connect();
        let (instances, pools) = (vec![path.clone()], vec![]);
        let call = Call::Watch { instances, pools, tenant: None, disks: vec![], changes: false };
        let mut last = None;
        let watching = async {
            connection.write.message(&call).await?;
            loop {
                match connection.read.message().await? {
                    Reply::Snapshot { mut instances, .. } => last = instances.pop(),
                    other => return Ok(Err(format!("{other:?}"))),
                }
                if wanted(last.as_ref()) {
                    return Ok::<_, mvm_wire::ConnectionError>(Ok(()));
                }
            }
        };
        match timeout(limit, watching).await {
            Ok(Ok(seen)) => seen.map(|()| last),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                Err(format!("not within {} s: {what}; it is {}", limit.as_secs(), told(&last)))
            }
        }
    }

    async fn until_state(&self, path: &InstancePath, state: State) -> Result<InstanceView, String> {
        let is_there = |view: Option<&InstanceView>| view.is_some_and(|view| is(view, state));
        let view = self.until(&format!("{state}"), path, SETTING_UP, is_there).await?;
        view.ok_or_else(|| "gone".to_owned())
    }

    async fn until_activity(&self, path: &InstancePath, activity: &str) -> Result<(), String> {
        let is_there = |view: Option<&InstanceView>| {
            view.is_some_and(|view| view.activity.as_deref() == Some(activity))
        };
        self.until(activity, path, SETTING_UP, is_there).await.map(drop)
    }

    /// Runs a program in a guest that must succeed.
    pub(super) async fn exec(&self, path: &InstancePath, argv: &[&str]) -> Result<String, String> {
        match self.agent().exec(&path.to_string(), argv).await {
            Ok((output, 0)) => Ok(output),
            other => Err(format!("{argv:?} in {path}: {other:?}")),
        }
    }

    async fn set_up(&mut self, situation: Situation, beside: Beside) -> Result<Subject, String> {
        let name = "demo".parse().unwrap();
        let quota = Quota::default();
        self.submit(Request::TenantCreate { name, quota, subnet: None }).await?;
        let spec = spec(beside);
        if beside == Beside::DataDisk {
            let path = format!("demo/{DISK}").parse().unwrap();
            self.submit(Request::DiskCreate { path, size_mib: DISK_MIB }).await?;
        }
        let pool: mvm_core::name::PoolPath = "demo/app".parse().unwrap();
        let request = Request::PoolCreate { path: pool.clone(), spec: spec.clone().into() };
        self.submit(request).await?;
        if matches!(beside, Beside::Base | Beside::Spare) {
            let warmed = self.agent().call(Call::WarmUp { pool: pool.clone() }).await;
            warmed.map_err(|error| format!("warm-up: {error}"))?;
        }
        let (count, start, disks, cold) = (1, false, vec![], false);
        let create = Request::InstanceCreate { pool, count, start, disks, cold };
        let accepted = self.submit(create).await?;
        let path = accepted.instances[0].path.clone();
        if beside == Beside::Spare {
            self.until_one_stands_by().await?;
        }
        let mut subject =
            Subject { path, spec, situation, has_files: false, attached: None, before: None };
        self.bring(&mut subject, beside).await?;
        if beside == Beside::AttachedClient {
            subject.attached = Some(self.attach(&subject.path).await?);
        }
        let is_there = |view: Option<&InstanceView>| view.is_some();
        subject.before = self.until("it is there", &subject.path, SETTING_UP, is_there).await?;
        Ok(subject)
    }

    async fn until_one_stands_by(&self) -> Result<(), String> {
        for _ in 0..200 {
            let all = self.instances().await?;
            if all.iter().any(|view| view.purpose == Purpose::Spare && is(view, State::Warm)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err("none stands by".to_owned())
    }

    /// Brings an instance that was just created into its state, with files in it.
    async fn bring(&self, subject: &mut Subject, beside: Beside) -> Result<(), String> {
        let path = &subject.path.clone();
        let selector = || Selector::from(path);
        let all = false;
        let start = || Request::InstanceStart { selector: selector(), all };
        let stop =
            || Request::InstanceStop { selector: selector(), all, grace_ms: DEFAULT_GRACE_MS };
        let sleep =
            || Request::InstanceSleep { selector: selector(), all, hooks_ms: DEFAULT_HOOKS_MS };
        if subject.situation == Situation::Created {
            return Ok(());
        }
        self.submit(start()).await?;
        if subject.situation == Situation::Starting && beside == Beside::AutoRemove {
            // It starts once only.
            return self.until_activity(path, "starting").await;
        }
        self.until_state(path, State::Running).await?;
        for dir in subject.dirs() {
            self.exec(path, &["write", &format!("{dir}/{SYNCED}"), "kept"]).await?;
        }
        self.exec(path, &["sync"]).await?;
        for dir in subject.dirs() {
            self.exec(path, &["write", &format!("{dir}/{UNSYNCED}"), "kept"]).await?;
        }
        subject.has_files = true;
        match subject.situation {
            Situation::Created | Situation::Running => {}
            Situation::Starting => {
                self.submit(stop()).await?;
                self.until_state(path, State::Stopped).await?;
                self.submit(start()).await?;
                self.until_activity(path, "starting").await?;
            }
            Situation::Warm => {
                self.submit(Request::InstanceWarm { selector: selector(), all }).await?;
                self.until_state(path, State::Warm).await?;
            }
            Situation::Sleeping => {
                self.submit(sleep()).await?;
                self.until_state(path, State::Sleeping).await?;
            }
            Situation::FallingAsleep => {
                self.exec(path, &["prepare", LINGERS_S]).await?;
                self.submit(sleep()).await?;
                self.until_activity(path, "falling asleep").await?;
            }
            Situation::Stopping => {
                self.exec(path, &["linger", LINGERS_S]).await?;
                self.submit(stop()).await?;
                self.until_activity(path, "stopping").await?;
            }
            Situation::Stopped => {
                self.submit(stop()).await?;
                self.until_state(path, State::Stopped).await?;
            }
            Situation::Failed => {
                self.submit(stop()).await?;
                self.until_state(path, State::Stopped).await?;
                let failures = if beside == Beside::RestartNever { 1 } else { FAILURES };
                for _ in 0..failures {
                    let fault = SimFault::LaunchFails("no luck".to_owned());
                    self.machine.world.inject(&path.id, fault);
                }
                self.submit(start()).await?;
                let has_failed = |view: Option<&InstanceView>| {
                    view.is_some_and(|v| is(v, State::Failed) && v.failures >= failures)
                };
                self.until("failed", path, SETTING_UP, has_failed).await?;
            }
            Situation::Destroying => {
                self.exec(path, &["linger", LINGERS_S]).await?;
                let destroy = Request::InstanceDestroy { selector: selector(), all, force: true };
                self.submit(destroy).await?;
                self.until_activity(path, "destroying").await?;
            }
        }
        Ok(())
    }

    async fn attach(&self, path: &InstancePath) -> Result<Connection, String> {
        let mut connection = self.agent().node.connect();
        let call = Call::Attach { selector: Selector::from(path), wait: true };
        connection.write.message(&call).await.map_err(|error| error.to_string())?;
        match connection.read.reply().await {
            Ok(Reply::Attached { .. }) => Ok(connection),
            other => Err(format!("attach: {other:?}")),
        }
    }
}

/// What an instance is like, in a few words.
pub(super) fn told(view: &Option<InstanceView>) -> String {
    let Some(view) = view else { return "gone".to_owned() };
    let InstanceView { state, activity, desired, waiting, boots, wakes, failures, .. } = view;
    format!(
        "{state} ({activity:?}), desired {desired:?}, waiting {waiting:?}, {boots} boots, {wakes} wakes, {failures} failures"
    )
}

/// Whether an instance is in a state, with nothing under way.
pub(super) fn is(view: &InstanceView, state: State) -> bool {
    match state {
        State::Running => is_running(view),
        _ => view.state == state && view.activity.is_none(),
    }
}

fn spec(beside: Beside) -> PoolSpec {
    let mut spec = PoolSpec { mem_mib: 96, ..PoolSpec::default() };
    spec.process.command = Some(["sleep", "1000000"].map(str::to_owned).into());
    match beside {
        Beside::Nothing | Beside::AttachedClient | Beside::Base => {}
        Beside::DataDisk => spec.disks = vec![format!("{DISK}:{DISK_DIR}").parse().unwrap()],
        Beside::PublishedPort => {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
            spec.publish = vec![format!("{free}:80").parse().unwrap()];
        }
        Beside::Spare => spec.ready = 1,
        Beside::SleepPolicy => {
            spec.sleep_policy =
                SleepPolicy { sleep_after_s: Some(IDLE_S), ..SleepPolicy::default() };
        }
        Beside::RestartAlways => spec.restart = RestartPolicy::Always,
        Beside::RestartNever => spec.restart = RestartPolicy::Never,
        Beside::AutoRemove => {
            spec.restart = RestartPolicy::Never;
            spec.auto_remove = true;
            spec.ephemeral = true;
        }
    }
    spec
}
