//! A whole node on the simulated host, in this process, in virtual time.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mvm_agent::{Clock, Host, NodeConfig, RunningNode};
use mvm_core::admit::{Capacity, Request};
use mvm_core::document::NodeDocument;
use mvm_core::frame;
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::vmm::Accel;
use mvm_host::disks::SimDisks;
use mvm_host::images::SimImages;
use mvm_host::net::{SimMachine, SimNetwork};
use mvm_host::platform::MemoryGauge;
use mvm_host::vmm::sim::{SimTimes, SimVmm, SimWorld, guest_agents};
use mvm_store::{MemoryStore, Store};
use mvm_wire::view::InstanceView;
use mvm_wire::{Accepted, ApiError, Call, Item, Reply};

/// The parts of a simulated machine that outlive its agent.
pub(crate) struct Machine {
    pub(crate) world: SimWorld,
    pub(crate) network: SimMachine,
    pub(crate) images: SimImages,
    pub(crate) disks: SimDisks,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) capacity: Capacity,
    pub(crate) memory: MemoryGauge,
    pub(crate) open_files: u64,
    pub(crate) clock: Clock,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            world: SimWorld::new(SimTimes::default()).with_guests(guest_agents()),
            network: SimMachine::new(),
            images: SimImages::new(dir.path()),
            disks: SimDisks::new(dir.path()),
            store: Arc::new(MemoryStore::new()),
            dir,
            capacity: Capacity { vcpus: 10_000, mem_mib: 10_000_000, disk_mib: 100_000_000 },
            memory: MemoryGauge::simulated(),
            open_files: 65_536,
            clock: Clock::start(),
        }
    }

    fn network(&self) -> SimNetwork {
        self.network.agent(self.dir.path())
    }

    /// Starts an agent on the machine.
    pub(crate) async fn agent(&self) -> Agent {
        let (config, host) = self.parts();
        Agent { node: RunningNode::start(config, host, self.store.clone()).await.unwrap() }
    }

    /// What control keeps, without control.
    pub(crate) async fn kept(&self) -> mvm_control::Kept {
        let nothing = Box::new(|| false);
        mvm_control::Kept::load(self.store.clone(), nothing).await.unwrap()
    }

    /// Starts a node without control.
    pub(crate) async fn node_alone(&self, document: &NodeDocument) -> mvm_node::RunningNode {
        let (config, host) = self.parts();
        let store = self.store.clone();
        mvm_node::RunningNode::start(config, host, store, document).await.unwrap()
    }

    fn parts(&self) -> (NodeConfig, Host) {
        let config = NodeConfig {
            state_dir: self.dir.path().into(),
            capacity: self.capacity,
            max_starting: 8,
            chosen_because: "simulated".to_owned(),
            accel: Accel::Tcg,
            open_files: self.open_files,
            clock: self.clock,
        };
        let host = Host {
            vmm: Arc::new(SimVmm::new(self.world.clone())),
            network: Arc::new(self.network()),
            images: Arc::new(self.images.clone()),
            disks: Arc::new(self.disks.clone()),
            memory: self.memory.clone(),
        };
        (config, host)
    }

    /// What is left on the machine: microVMs, links, claims, files, records.
    pub(crate) async fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = self.world.running().iter().map(ToString::to_string).collect();
        left.extend(self.network.links());
        left.extend(self.network.claims());
        for dir in ["instances", "snapshots", "disks", "ssh"] {
            left.extend(directories(&self.dir.path().join(dir)));
        }
        let keys = self.store.list("").await.unwrap().entries.into_iter().map(|entry| entry.key);
        // What a request was answered is known for an hour.
        let is_kept = |key: &String| ["scope/", "request/"].iter().any(|it| key.starts_with(it));
        left.extend(keys.filter(|key| !is_kept(key)));
        left
    }
}

fn directories(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

/// A running agent.
pub(crate) struct Agent {
    pub(crate) node: RunningNode,
}

impl Agent {
    pub(crate) async fn call(&self, call: Call) -> Result<Reply, ApiError> {
        let mut connection = self.node.connect();
        connection.write.message(&call).await.unwrap();
        match connection.read.reply().await.unwrap() {
            Reply::Error(error) => Err(error),
            reply => Ok(reply),
        }
    }

    pub(crate) async fn submit(&self, request: Request) -> Result<Accepted, ApiError> {
        match self.call(Call::Submit(request)).await? {
            Reply::Accepted(accepted) => Ok(accepted),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn instances(&self) -> Vec<InstanceView> {
        match self.call(Call::Instances { selector: Selector::All }).await.unwrap() {
            Reply::Instances { instances, .. } => instances,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the instances are as wanted; virtual time passes meanwhile.
    pub(crate) async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&[InstanceView]) -> bool,
    ) -> Vec<InstanceView> {
        for _ in 0..20_000 {
            let instances = self.instances().await;
            if wanted(&instances) {
                return instances;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("never: {what}; {:#?}", self.instances().await);
    }

    pub(crate) async fn until_running(&self, count: usize) -> Vec<InstanceView> {
        self.until(&format!("{count} running"), |instances| {
            instances.len() == count && instances.iter().all(is_running)
        })
        .await
    }

    /// Runs a program and returns its standard output and its shell exit code.
    pub(crate) async fn exec(
        &self,
        selector: &str,
        argv: &[&str],
    ) -> Result<(String, i32), ApiError> {
        let request = ExecRequest {
            argv: argv.iter().map(ToString::to_string).collect(),
            ..ExecRequest::default()
        };
        self.run(selector, request).await
    }

    /// The same with a whole request.
    pub(crate) async fn run(
        &self,
        selector: &str,
        request: ExecRequest,
    ) -> Result<(String, i32), ApiError> {
        let mut connection = self.node.connect();
        let call = Call::Exec { selector: selector.parse().unwrap(), request };
        connection.write.message(&call).await.unwrap();
        let mut output = Vec::new();
        loop {
            match connection.read.next().await.unwrap().expect("an exec ends with a reply") {
                Item::Data { kind: frame::KIND_STDOUT, bytes } => output.extend(bytes),
                Item::Data { .. } => {}
                message => match message.parse::<Reply>().unwrap() {
                    Reply::ExecStarted { .. } => {}
                    Reply::ExecExit(status) => {
                        return Ok((String::from_utf8(output).unwrap(), status.shell_code()));
                    }
                    Reply::Error(error) => return Err(error),
                    other => panic!("{other:?}"),
                },
            }
        }
    }
}

pub(crate) fn is_running(view: &InstanceView) -> bool {
    view.state == State::Running && view.activity.is_none()
}
