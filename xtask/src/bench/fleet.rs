//! A whole agent on the simulated host in this process, and a fleet of instances for it: what control and the
//! node cost by themselves, without a VMM or a guest that takes time.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use mvm_agent::{Clock, Host, NodeConfig, RunningNode};
use mvm_core::admit::{Capacity, NodeFacts, Request, admit};
use mvm_core::guest::ExitStatus;
use mvm_core::lifecycle::{InstanceStatus, Phase, State};
use mvm_core::name::{InstancePath, PoolPath, RevisionId, Selector};
use mvm_core::record::{self, BuildState, Desired, DesiredState, Observed, PoolStatus};
use mvm_core::spec::{PoolSpec, Quota};
use mvm_core::stored::versioned;
use mvm_core::vmm::Accel;
use mvm_host::disks::SimDisks;
use mvm_host::images::SimImages;
use mvm_host::net::SimMachine;
use mvm_host::platform::MemoryGauge;
use mvm_host::state_dir::StateDir;
use mvm_host::vmm::sim::{SimTimes, SimVmm, SimWorld, guest_agents};
use mvm_store::{Op, SqliteStore, Store, Transaction, encode};
use mvm_wire::view::InstanceView;
use mvm_wire::{Accepted, Call, Item, Reply};
use tempfile::TempDir;
use tokio::time::sleep;

use super::client::first_program;

/// How many instances a tenant and a pool of a fleet have.
const PER_TENANT: u32 = 200;
const PER_POOL: u32 = 50;
/// What the simulated host can hold.
const CAPACITY: Capacity = Capacity { vcpus: 1 << 20, mem_mib: 1 << 30, disk_mib: 1 << 40 };
/// Starts at once, as an agent on simulated machines has them.
const STARTING: usize = 512;
/// Records that are written at once.
const RECORDS: usize = 500;
/// How often instances are looked at that are to run.
const POLL: Duration = Duration::from_millis(2);

/// Records of a fleet: what is desired, and what is observed of it.
#[derive(Default)]
pub(super) struct Fleet {
    pub(super) desired: Desired,
    pub(super) observed: Observed,
}

impl Fleet {
    /// So many instances that are to run and have never been started, in pools whose images are built.
    pub(super) fn of(count: u32) -> anyhow::Result<Self> {
        let mut fleet = Self::default();
        for first in (0..count).step_by(PER_POOL as usize) {
            let tenant = format!("t{}", first / PER_TENANT).parse()?;
            if first.is_multiple_of(PER_TENANT) {
                let (name, quota) = (tenant, Quota::default());
                fleet.admit(Request::TenantCreate { name, quota, subnet: None }, first)?;
            }
            let path: PoolPath =
                format!("t{}/p{}", first / PER_TENANT, first / PER_POOL).parse()?;
            let spec = PoolSpec::default().into();
            fleet.admit(Request::PoolCreate { path: path.clone(), spec }, first)?;
            let count = PER_POOL.min(count - first);
            let (disks, cold) = (vec![], false);
            let status = fleet.desired.pools.get(&path).context("the pool is not there")?;
            let status = PoolStatus {
                revision: Some(revision()),
                build_generation: status.build_generation,
                build: BuildState::Built { already_there: true, took_ms: 0 },
                ..PoolStatus::default()
            };
            fleet.observed.pools.insert(path.clone(), status);
            let create = Request::InstanceCreate { pool: path, count, start: true, disks, cold };
            fleet.admit(create, first)?;
        }
        Ok(fleet)
    }

    fn admit(&mut self, request: Request, first_id: u32) -> anyhow::Result<()> {
        let facts = NodeFacts { capacity: CAPACITY, ..NodeFacts::default() };
        let mut number = first_id;
        let mut entropy = || {
            number += 1;
            // Each number once, and in no order.
            number.wrapping_mul(0x9e37_79b1)
        };
        self.desired = admit(&self.desired, &facts, &request, &mut entropy, 0)?.desired;
        Ok(())
    }

    /// Makes instances do something else for a long time by now, as `to` says of each number. Those that
    /// are to run are left to the node.
    #[must_use]
    pub(super) fn settled(mut self, to: impl Fn(usize) -> DesiredState) -> Self {
        let paths: Vec<InstancePath> = self.desired.instances.keys().cloned().collect();
        for (number, path) in paths.into_iter().enumerate() {
            let desired = to(number);
            let phase = match desired {
                DesiredState::Running | DesiredState::Warm | DesiredState::Destroyed => continue,
                DesiredState::Sleeping => Phase::Sleeping { since_unix_ms: 1 },
                DesiredState::Stopped => Phase::Stopped,
            };
            let Some(record) = self.desired.instances.get_mut(&path) else { continue };
            record.desired = desired;
            let status = InstanceStatus {
                phase,
                generation: record.generation,
                revision: Some(revision()),
                boots: 1,
                ..InstanceStatus::default()
            };
            self.observed.instances.insert(path, status);
        }
        self
    }

    fn ops(&self) -> impl Iterator<Item = Result<Op, mvm_store::StoreError>> {
        let Self { desired, observed } = self;
        let tenants =
            desired.tenants.iter().map(|(key, it)| encode(record::tenant_key(key), &versioned(it)));
        let pools =
            desired.pools.iter().map(|(key, it)| encode(record::pool_key(key), &versioned(it)));
        let instances = desired.instances.iter();
        let instances =
            instances.map(|(key, it)| encode(record::instance_key(key), &versioned(it)));
        let built = observed.pools.iter();
        let built = built.map(|(key, it)| encode(record::pool_status_key(key), &versioned(it)));
        let seen = observed.instances.iter();
        let seen = seen.map(|(key, it)| encode(record::instance_status_key(key), &versioned(it)));
        tenants.chain(pools).chain(instances).chain(built).chain(seen)
    }
}

/// What all instances boot.
fn revision() -> RevisionId {
    RevisionId::from_digest([1; 8])
}

/// A simulated machine, which outlives its agents.
pub(super) struct Machine {
    world: SimWorld,
    network: SimMachine,
    images: SimImages,
    disks: SimDisks,
    pub(super) store: Arc<dyn Store>,
    dir: TempDir,
}

impl Machine {
    /// A machine with this fleet on record, on SQLite below `target`.
    pub(super) async fn with(fleet: &Fleet) -> anyhow::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent")?;
        let place = root.join("target/bench-state");
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let dir = tempfile::Builder::new().prefix("fleet-").tempdir_in(place)?;
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(StateDir::from(dir.path()).database()).await?);
        let mut ops = fleet.ops();
        loop {
            let some: Result<Vec<Op>, _> = ops.by_ref().take(RECORDS).collect();
            let some = some?;
            if some.is_empty() {
                break;
            }
            store.commit(some.into_iter().fold(Transaction::new(), Transaction::with)).await?;
        }
        drop(ops);
        let times = SimTimes { launch: Duration::ZERO, boot: Duration::ZERO };
        Ok(Self {
            world: SimWorld::new(times).with_guests(guest_agents()),
            network: SimMachine::new(),
            images: SimImages::new(dir.path()),
            disks: SimDisks::new(dir.path()),
            store,
            dir,
        })
    }

    /// How many microVMs run.
    pub(super) fn running(&self) -> usize {
        self.world.running().len()
    }

    /// The directory that everything is in.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts an agent on the machine.
    pub(super) async fn agent(&self) -> anyhow::Result<Agent> {
        let config = NodeConfig {
            state_dir: self.dir.path().into(),
            capacity: CAPACITY,
            max_starting: STARTING,
            chosen_because: "simulated".to_owned(),
            accel: Accel::Tcg,
            open_files: 65_536,
            clock: Clock::start(),
        };
        let host = Host {
            vmm: Arc::new(SimVmm::new(self.world.clone())),
            network: Arc::new(self.network.agent(self.dir.path())),
            images: Arc::new(self.images.clone()),
            disks: Arc::new(self.disks.clone()),
            memory: MemoryGauge::simulated(),
        };
        Ok(Agent { node: RunningNode::start(config, host, self.store.clone()).await? })
    }
}

/// A running agent, asked over connections in memory.
pub(super) struct Agent {
    pub(super) node: RunningNode,
}

impl Agent {
    async fn call(&self, call: &Call) -> anyhow::Result<Reply> {
        let mut connection = self.node.connect();
        connection.write.message(call).await?;
        match connection.read.reply().await? {
            Reply::Error(error) => Err(error.into()),
            reply => Ok(reply),
        }
    }

    /// Changes what is desired.
    pub(super) async fn submit(&self, request: Request) -> anyhow::Result<Accepted> {
        match self.call(&Call::Submit(request)).await? {
            Reply::Accepted(accepted) => Ok(accepted),
            other => bail!("an unexpected reply: {other:?}"),
        }
    }

    /// All instances.
    pub(super) async fn instances(&self) -> anyhow::Result<Vec<InstanceView>> {
        match self.call(&Call::Instances { selector: Selector::All }).await? {
            Reply::Instances { instances, .. } => Ok(instances),
            other => bail!("an unexpected reply: {other:?}"),
        }
    }

    /// Waits until so many instances run.
    pub(super) async fn until_running(&self, count: usize) -> anyhow::Result<Vec<InstancePath>> {
        loop {
            let running = self.instances().await?.into_iter();
            let running = running.filter(|view| view.state == State::Running);
            let paths: Vec<InstancePath> = running.map(|view| view.path).collect();
            if paths.len() >= count {
                return Ok(paths);
            }
            sleep(POLL).await;
        }
    }

    /// Runs the first program in an instance.
    pub(super) async fn exec(&self, path: &InstancePath) -> anyhow::Result<()> {
        let call = Call::Exec { selector: Selector::from(path), request: first_program() };
        let mut connection = self.node.connect();
        connection.write.message(&call).await?;
        while let Some(item) = connection.read.next().await? {
            if matches!(item, Item::Data { .. }) {
                continue;
            }
            match item.parse::<Reply>()? {
                Reply::ExecStarted { .. } => {}
                Reply::ExecExit(ExitStatus::Exited { code: 0 }) => return Ok(()),
                other => bail!("an unexpected reply: {other:?}"),
            }
        }
        bail!("an exec ended without a reply")
    }
}

/// The CPU time that this process has used.
pub(super) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds)
}

/// Resident memory of this process, in bytes.
pub(super) fn resident_bytes() -> anyhow::Result<u64> {
    let path = "/proc/self/statm";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let pages = text.split_ascii_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    let pages = pages.with_context(|| format!("{path} does not parse"))?;
    Ok(pages * rustix::param::page_size() as u64)
}
