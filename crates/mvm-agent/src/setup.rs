//! Puts a real node together: what this machine is, which VMM runs on it, and where things are kept.

use std::path::PathBuf;
use std::sync::Arc;

use mvm_core::admit::Capacity;
use mvm_core::vmm::{Accel, VmmKind};
use mvm_host::disks::{Disks, LocalDisks, SimDisks};
use mvm_host::images::{Images, LocalImages, SimImages};
use mvm_host::net::{CLAIMS_DIR, LinuxNetwork, Network, NetworkError, Owner, Registry, SimMachine};
use mvm_host::platform::{self, Choice, Facts, MemoryGauge, PlatformError, facts};
use mvm_host::state_dir::{self, StateDir, StateDirError};
use mvm_host::vmm::firecracker::{FirecrackerConfig, FirecrackerVmm, Isolation};
use mvm_host::vmm::qemu::{QemuConfig, QemuVmm};
use mvm_host::vmm::sim::{SimTimes, SimVmm, SimWorld, guest_agents};
use mvm_host::vmm::{NodeVmm, Vmm};

use mvm_node::{Clock, Host, NodeConfig};

/// Starts at once per processor: more would only wait for each other.
const STARTING_PER_CPU: usize = 4;
/// The same of simulated ones, which take no processor.
const SIMULATED_STARTING: usize = 512;

/// What the agent is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeOptions {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// The VMM to use; chosen from what the machine has if absent.
    pub vmm: Option<VmmKind>,
    /// The accelerator to use; chosen from what the machine has if absent.
    pub accel: Option<Accel>,
    /// Memory of the machine that is to stay available, in MiB: below it, pools' sleep policies put
    /// idle instances to sleep early.
    pub keep_free_mib: u64,
    /// What a microVM must not lack to run.
    pub isolation: Isolation,
    /// A compiled seccomp filter for Firecracker in place of its own.
    pub seccomp_filter: Option<PathBuf>,
    /// A template of the processor that guests on Firecracker see.
    pub cpu_template: Option<PathBuf>,
    /// Whether guests on Firecracker hand back the memory that they free.
    pub free_page_reporting: bool,
}

/// Why a node cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The state directory cannot be made or examined.
    #[error("cannot use the state directory {path}")]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file that Firecracker is to be given cannot be read.
    #[error("cannot use the {what} {path}")]
    File {
        /// What it is.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is a copy of another one, or cannot be told from one.
    #[error(transparent)]
    Identity(#[from] StateDirError),
    /// What was asked for does not work here.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The machine's network cannot be managed.
    #[error("cannot manage this machine's network")]
    Network(#[from] NetworkError),
}

/// Examines the machine and makes the node's parts.
pub(crate) async fn set_up(options: &ServeOptions) -> Result<(NodeConfig, Host), SetupError> {
    let failed = |source| SetupError::StateDir { path: options.state_dir.clone(), source };
    let settled = state_dir::settle(&options.state_dir, &Registry::of_machine())?;
    if let Some(from) = &settled.moved_from {
        tracing::info!(from = %from.display(), to = %settled.dir.display(), "the state directory was moved");
    }
    let state_dir = settled.dir.clone();
    let facts = facts::gather(&state_dir).await;
    let production = options.isolation == Isolation::Production;
    let vmm = options.vmm.or(production.then_some(VmmKind::Firecracker));
    let choice = platform::choose(vmm, options.accel, &facts)?;
    if production {
        platform::for_production(&choice, &facts)?;
    }
    for (what, path) in
        [("seccomp filter", &options.seccomp_filter), ("CPU template", &options.cpu_template)]
    {
        if let Some(path) = path {
            std::fs::File::open(path).map_err(|source| SetupError::File {
                what,
                path: path.clone(),
                source,
            })?;
        }
    }
    let capacity = match choice.vmm {
        // Simulated microVMs take nothing of the machine.
        VmmKind::Sim => Capacity { vcpus: 1 << 20, mem_mib: 1 << 30, disk_mib: 1 << 40 },
        VmmKind::Qemu | VmmKind::Firecracker => platform::capacity(&state_dir).map_err(failed)?,
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let max_starting = match choice.vmm {
        VmmKind::Sim => SIMULATED_STARTING,
        VmmKind::Qemu | VmmKind::Firecracker => STARTING_PER_CPU * cpus,
    };
    let images = LocalImages::new(&state_dir);
    if let Err(error) = images.sweep().await {
        tracing::warn!(error = mvm_wire::chain(&error), "cannot remove what builds left behind");
    }
    let host = match choice.vmm {
        VmmKind::Sim => simulated(&state_dir),
        VmmKind::Qemu | VmmKind::Firecracker => Host {
            vmm: real(&choice, &state_dir, options, &facts),
            network: real_network(Owner::settled(&settled))?,
            images: Arc::new(images) as Arc<dyn Images>,
            disks: Arc::new(LocalDisks::new(&state_dir)) as Arc<dyn Disks>,
            memory: MemoryGauge::Machine { wanted_mib: options.keep_free_mib },
        },
    };
    let config = NodeConfig {
        state_dir,
        capacity,
        max_starting,
        chosen_because: choice.why,
        accel: choice.accel,
        open_files: mvm_host::process::raise_open_files(),
        clock: Clock::start(),
    };
    Ok((config, host))
}

/// The chosen VMM, and the other for what it has started before and for pools that name it.
fn real(
    choice: &Choice,
    state_dir: &StateDir,
    options: &ServeOptions,
    facts: &Facts,
) -> Arc<dyn Vmm> {
    let qemu: Arc<dyn Vmm> = Arc::new(QemuVmm::new(QemuConfig::new(choice.accel)));
    let firecracker = FirecrackerVmm::new(FirecrackerConfig {
        isolation: options.isolation,
        seccomp_filter: options.seccomp_filter.clone(),
        cpu_template: options.cpu_template.clone(),
        free_page_reporting: options.free_page_reporting,
        ..FirecrackerConfig::of(state_dir)
    });
    let firecracker: Arc<dyn Vmm> = Arc::new(firecracker);
    let (chosen, other) = match choice.vmm {
        VmmKind::Firecracker => (firecracker, qemu),
        VmmKind::Qemu | VmmKind::Sim => (qemu, firecracker),
    };
    let obstacle = platform::obstacle_to(other.kind(), facts);
    let node = NodeVmm::new(chosen).and(other, obstacle);
    Arc::new(match options.isolation {
        Isolation::Available => node,
        Isolation::Production => node.with_none_but_the_chosen(),
    })
}

/// The network of the machine, as this agent has it.
pub(crate) fn real_network(owner: Owner) -> Result<Arc<dyn Network>, NetworkError> {
    Ok(Arc::new(LinuxNetwork::new(owner, CLAIMS_DIR.into())?))
}

fn simulated(state_dir: &StateDir) -> Host {
    let world = SimWorld::new(SimTimes::default()).with_guests(guest_agents());
    Host {
        vmm: Arc::new(SimVmm::new(world)),
        network: Arc::new(SimMachine::new().agent(state_dir.to_path_buf())),
        images: Arc::new(SimImages::new(state_dir)),
        disks: Arc::new(SimDisks::new(state_dir)),
        memory: MemoryGauge::simulated(),
    }
}
