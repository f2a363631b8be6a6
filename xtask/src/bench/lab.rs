//! Where a benchmark runs: the release binary, a state directory and an agent of its own.
//!
//! The state directory is below `target/bench-state`. What takes long to make (kernel, images,
//! downloaded packages) stays in it between runs; everything else is removed at the end. A run that
//! was killed leaves a state directory that the next run takes over, and so cleans up.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use mvm_core::admit::Request;
use mvm_core::name::{PoolPath, TenantName};
use mvm_core::spec::{PoolSpec, Quota, RestartPolicy};
use mvm_host::state_dir::{InstanceDir, StateDir};
use mvm_wire::Call;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::client::Client;
use crate::cargo::cargo;

/// Names the binary to measure, where it is not to be built.
const PROGRAM_VARIABLE: &str = "MVM_BIN";
/// Names a state directory with a kernel and images, where nothing can be downloaded.
const SEED_VARIABLE: &str = "MVM_TEST_SEED";
/// What stays in the state directory from run to run.
const KEPT: [&str; 4] = ["kernels", "images", "templates", "cache"];
/// What the agent logs: also how long the parts of a sleep and a wake take.
const LOG: &str = "info,mvm_node::sleep=debug,mvm_node::effects=debug,mvm_host::vmm::qemu::launch=debug,\
     mvm_host::vmm::firecracker::launch=debug";
/// How long an agent has to answer after its start, and to end.
const AGENT_LIMIT: Duration = Duration::from_secs(30);
/// How long everything that runs has to be removed.
const REMOVE_LIMIT: Duration = Duration::from_secs(120);
/// How often something that cannot be waited for is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Which microVMs the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Machines {
    /// Real ones, with the VMM and accelerator that the agent picks.
    Real,
    /// Real ones on Firecracker.
    Firecracker,
    /// Simulated ones.
    Simulated,
}

impl Machines {
    fn name(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Firecracker => "firecracker",
            Self::Simulated => "simulated",
        }
    }

    fn are_real(self) -> bool {
        self != Self::Simulated
    }
}

/// A running agent with its state directory.
pub(super) struct Lab {
    program: PathBuf,
    state_dir: StateDir,
    machines: Machines,
    agent: Child,
    client: Client,
}

impl Lab {
    /// Builds the binary, prepares the state directory and starts the agent.
    pub(super) async fn open(machines: Machines) -> anyhow::Result<Self> {
        if machines.are_real() && !rustix::process::geteuid().is_root() {
            bail!("real microVMs and their networks need root");
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent")?;
        let program = match std::env::var_os(PROGRAM_VARIABLE) {
            Some(program) => program.into(),
            None => build(root).await?,
        };
        let state_dir: StateDir = root.join("target/bench-state").join(machines.name()).into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&state_dir)
            .with_context(|| format!("cannot create {}", state_dir.display()))?;
        match std::env::var_os(SEED_VARIABLE) {
            _ if !machines.are_real() => {}
            Some(seed) => {
                let all = PathBuf::from(seed).join(".");
                run(Command::new("cp").arg("-a").arg(all).arg(&state_dir)).await?;
            }
            None => {
                let arguments = ["bootstrap", "--yes", "--state-dir"];
                run(Command::new(&program).args(arguments).arg(&state_dir)).await?;
            }
        }
        let client = Client::new(&state_dir);
        if client.call(&Call::AgentStop).await.is_ok() {
            let agent_is_gone = async { while client.call(&Call::Node).await.is_ok() {} };
            timeout(AGENT_LIMIT, agent_is_gone).await.context("an earlier agent does not end")?;
        }
        let agent = spawn_agent(&program, &state_dir, machines)?;
        let mut lab = Self { program, state_dir, machines, agent, client };
        lab.wait_until_it_answers().await?;
        // What a run that was killed has left.
        lab.remove_tenants().await?;
        Ok(lab)
    }

    /// The binary under test.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// The agent's state directory.
    pub(super) fn state_dir(&self) -> &StateDir {
        &self.state_dir
    }

    /// The directory of an instance.
    pub(super) fn instance_dir(&self, instance: &mvm_core::name::InstancePath) -> InstanceDir {
        self.state_dir.instance(&instance.id)
    }

    /// The way to the agent.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The agent's process id.
    pub(super) fn agent_pid(&self) -> anyhow::Result<u32> {
        self.agent.id().context("the agent has ended")
    }

    /// Makes a tenant with one pool, whose image is built on real machines. Instances that end stay
    /// ended: a benchmark is about starts that succeed.
    pub(super) async fn pool(&self) -> anyhow::Result<PoolPath> {
        self.pool_of(PoolSpec::default()).await
    }

    /// The same of another kind of instances.
    pub(super) async fn pool_of(&self, spec: PoolSpec) -> anyhow::Result<PoolPath> {
        let path: PoolPath = "bench/boot".parse()?;
        let request = Request::TenantCreate {
            name: path.tenant.clone(),
            quota: Quota::default(),
            subnet: match self.machines {
                Machines::Real | Machines::Firecracker => None,
                // Room for a thousand instances and more.
                Machines::Simulated => Some("10.128.0.0/20".parse()?),
            },
        };
        self.client.submit(request).await?;
        let spec = PoolSpec { restart: RestartPolicy::Never, boot_timeout_s: 600, ..spec };
        self.client.submit(Request::PoolCreate { path: path.clone(), spec: spec.into() }).await?;
        self.client.build(&path).await?;
        Ok(path)
    }

    /// Removes everything but the cache. If that fails the agent's log is kept, and the error says
    /// where.
    pub(super) async fn close(mut self) -> anyhow::Result<()> {
        let removed = self.remove_tenants().await;
        let stopped = self.stop_agent().await;
        let place = format!("look at {}", self.state_dir.log().display());
        removed.with_context(|| format!("microVMs may still run: {place}"))?;
        stopped.context(place)?;
        remove_all_but(&self.state_dir, &KEPT)
            .with_context(|| format!("cannot clear {}", self.state_dir.display()))
    }

    async fn wait_until_it_answers(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + AGENT_LIMIT;
        while self.client.call(&Call::Node).await.is_err() {
            let ended = self.agent.try_wait()?;
            if ended.is_some() || Instant::now() >= deadline {
                let log = self.state_dir.log();
                bail!("the agent does not answer (ended: {ended:?}): look at {}", log.display());
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn remove_tenants(&self) -> anyhow::Result<()> {
        let remove = async {
            for tenant in self.client.tenants().await? {
                let name: TenantName = tenant.name;
                self.client.destroy_tenant(&name).await?;
            }
            Ok(())
        };
        timeout(REMOVE_LIMIT, remove).await.context("what runs is not removed in time")?
    }

    async fn stop_agent(&mut self) -> anyhow::Result<()> {
        self.client.call(&Call::AgentStop).await?;
        let ended = timeout(AGENT_LIMIT, self.agent.wait()).await;
        let status = ended.context("the agent does not end")??;
        if !status.success() {
            bail!("the agent ended with {status}");
        }
        Ok(())
    }
}

fn spawn_agent(program: &Path, state_dir: &StateDir, machines: Machines) -> anyhow::Result<Child> {
    let log_path = state_dir.log();
    let log = fs::File::create(&log_path)
        .with_context(|| format!("cannot create {}", log_path.display()))?;
    let mut command = Command::new(program);
    command.args(["agent", "serve", "--log", LOG, "--state-dir"]).arg(state_dir);
    match machines {
        Machines::Real => {}
        Machines::Firecracker => drop(command.args(["--vmm", "firecracker"])),
        Machines::Simulated => drop(command.args(["--vmm", "sim"])),
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // A Ctrl-C is for the benchmark, which then ends the agent in its own order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))
}

/// Builds the release binary; returns its path.
async fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let arguments = ["build", "--release", "--locked", "-p", "mvm"];
    run(Command::from(cargo()).current_dir(root).args(arguments)).await?;
    Ok(root.join("target/release/mvm"))
}

/// Runs a program to its end; its messages go where ours go, its output too.
async fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = format!("{:?}", command.as_std());
    // Standard output is the report's.
    let output = rustix::io::dup(rustix::stdio::stderr())?;
    command.stdin(Stdio::null()).stdout(output).kill_on_drop(true);
    let status = command.status().await.with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} ended with {status}");
    }
    Ok(())
}

fn remove_all_but(dir: &Path, kept: &[&str]) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if kept.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Disk space in bytes that the state takes, without what is kept between runs.
pub(super) fn state_bytes(state_dir: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    let mut dirs = vec![state_dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if dir == state_dir && KEPT.iter().any(|name| entry.file_name() == *name) {
                continue;
            }
            let metadata = entry.metadata()?;
            bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_and_the_rest_goes() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["images/r1", "instances/i-00000001"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        for path in ["images/r1/root", "instances/i-00000001/layer", "mvm.db"] {
            fs::write(dir.path().join(path), [1; 100_000]).unwrap();
        }
        let before = state_bytes(dir.path()).unwrap();
        assert!((200_000..300_000).contains(&before), "{before}");
        remove_all_but(dir.path(), &KEPT).unwrap();
        assert!(dir.path().join("images/r1/root").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(state_bytes(dir.path()).unwrap(), 0);
    }
}
