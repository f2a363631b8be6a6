//! The peer: the same microVM on a bare QEMU, started without mvm.
//!
//! Its arguments are those of a QEMU that mvm has started, with a file or socket in the place of
//! each descriptor that mvm hands over. So both boot the same machine, whatever the driver comes to
//! pass. It has none of what mvm adds: no user of its own, no sandbox, no journal, no bridge.

mod arguments;
mod snapshot;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mvm_core::guest::{Configuration, ExecRequest, ExitStatus, NetworkConfiguration};
use mvm_host::guest::{ExecEvent, Session, SessionMode};
use mvm_host::image::build::ImageStore;
use mvm_host::image::disk::{LayerTemplates, create_layer};
use mvm_host::process::{Process, Spawn, spawn};
use mvm_host::unix_socket;
use mvm_wire::view::InstanceView;
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::client::first_program;
use super::lab::Lab;
use super::process::{self, cpu_ms};

pub(super) use snapshot::{RawSave, RawWake};

/// How long a guest has to answer.
const GUEST_LIMIT: Duration = Duration::from_secs(600);
/// How often a QEMU that starts is asked for its socket.
const POLL: Duration = Duration::from_millis(1);
const PROGRAM: &str = "qemu-system-x86_64";
const AGENT_SOCKET: &str = "agent.sock";

/// The files that a machine boots from.
#[derive(Debug, Clone)]
struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
    root: PathBuf,
}

/// When a machine had got where, since it was started.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Milestones {
    /// QEMU's sockets were there.
    pub(super) process: Duration,
    /// The guest agent said hello.
    pub(super) hello: Duration,
    /// The guest had its identity.
    pub(super) configured: Duration,
    /// The first program had ended.
    pub(super) exec: Duration,
    /// Not a moment, but the CPU time that QEMU had used by then.
    pub(super) cpu: Duration,
}

/// What it takes to make machines like one of mvm's.
#[derive(Debug)]
pub(super) struct Peer {
    arguments: Vec<String>,
    files: Files,
    network: NetworkConfiguration,
    template: PathBuf,
    parent: PathBuf,
}

impl Peer {
    /// The peer of an instance that runs.
    pub(super) async fn of(lab: &Lab, view: &InstanceView) -> anyhow::Result<Self> {
        let state_dir = lab.state_dir();
        let revision = view.revision.as_ref().context("the instance has no revision")?;
        let revision = ImageStore::new(state_dir).open(revision)?;
        let address = view.address.context("the instance has no address")?;
        let [a, b, c, _] = address.octets();
        Ok(Self {
            arguments: process::arguments(view.pid.context("the instance has no process")?)?,
            files: Files {
                kernel: revision.vmlinuz(),
                initrd: revision.initrd(),
                root: revision.root(),
            },
            network: NetworkConfiguration {
                address,
                mac: None,
                prefix_len: 24,
                gateway: [a, b, c, 1].into(),
                nameservers: Vec::new(),
                search: Vec::new(),
                resolver_options: Vec::new(),
                mtu: None,
            },
            template: LayerTemplates::new(state_dir).ensure(view.disk_mib.into()).await?,
            parent: state_dir.to_path_buf(),
        })
    }

    /// Prepares one machine, its writable disk included.
    pub(super) fn machine(&self) -> anyhow::Result<RawMachine> {
        let dir = tempfile::Builder::new().prefix("raw-").tempdir_in(&self.parent)?;
        let layer = dir.path().join("layer.ext4");
        create_layer(&self.template, &layer, rustix::process::geteuid().as_raw())?;
        let arguments = arguments::arguments(&self.arguments, &self.files, &layer, dir.path())?;
        let arguments = arguments.into_iter().map(OsString::from).collect();
        Ok(RawMachine { arguments, network: self.network.clone(), dir, process: None })
    }
}

/// A QEMU that is ready to be started. Dropping it ends it and removes its files.
pub(super) struct RawMachine {
    arguments: Vec<OsString>,
    network: NetworkConfiguration,
    dir: TempDir,
    process: Option<Process>,
}

impl RawMachine {
    /// Starts it and waits until its guest has run the first program.
    pub(super) async fn boot(&mut self) -> anyhow::Result<Milestones> {
        let began = Instant::now();
        // A session of its own, as mvm gives to each VMM: where the scheduler shares processors
        // out among sessions, both get the same share.
        let qemu = spawn(&Spawn::new(Path::new(PROGRAM), &self.arguments))
            .with_context(|| format!("cannot run {PROGRAM}"))?;
        self.process = Some(qemu);
        let stream = self.connect(&self.dir.path().join(AGENT_SOCKET)).await?;
        let process = began.elapsed();
        let session = Session::open(Box::new(stream), SessionMode::Fresh, GUEST_LIMIT).await?;
        let hello = began.elapsed();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let configuration = Configuration {
            hostname: "raw".to_owned(),
            network: Some(self.network.clone()),
            wall_clock_unix_ns: Some(u64::try_from(now.as_nanos())?),
            ..Configuration::default()
        };
        session.configure(configuration, GUEST_LIMIT).await?;
        let configured = began.elapsed();
        first_exec(&session).await?;
        let exec = began.elapsed();
        let cpu = Duration::from_secs_f64(cpu_ms(self.qemu()?.identity().pid)? / 1000.0);
        Ok(Milestones { process, hello, configured, exec, cpu })
    }

    /// Runs a program in its guest, over a session of its own.
    pub(super) async fn run(&self, program: ExecRequest) -> anyhow::Result<()> {
        let stream = self.connect(&self.dir.path().join(AGENT_SOCKET)).await?;
        let session = Session::open(Box::new(stream), SessionMode::Existing, GUEST_LIMIT).await?;
        run(&session, program).await
    }

    fn qemu(&self) -> anyhow::Result<&Process> {
        self.process.as_ref().context("the machine does not run")
    }

    /// Connects to a socket of a QEMU that starts.
    async fn connect(&self, socket: &Path) -> anyhow::Result<UnixStream> {
        let qemu = self.qemu()?;
        loop {
            match unix_socket::connect(socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    if !qemu.is_running()? {
                        bail!("{PROGRAM} ended with {:?}: {error}", qemu.wait().await);
                    }
                    tokio::time::sleep(POLL).await;
                }
            }
        }
    }

    /// Ends it and waits for its end.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        if let Some(qemu) = self.process.take() {
            qemu.kill().await?;
        }
        Ok(())
    }
}

/// Runs the first program to its end.
async fn first_exec(session: &Session) -> anyhow::Result<()> {
    run(session, first_program()).await
}

/// Runs a program to its end.
pub(super) async fn run(session: &Session, program: ExecRequest) -> anyhow::Result<()> {
    let mut exec = session.exec(program, GUEST_LIMIT).await?.split().0;
    loop {
        match exec.next().await.context("the guest's session ended")?? {
            ExecEvent::Exit(ExitStatus::Exited { code: 0 }) => return Ok(()),
            ExecEvent::Exit(status) => bail!("a program ended with {status:?}"),
            _ => {}
        }
    }
}

impl Drop for RawMachine {
    fn drop(&mut self) {
        let pid = self.process.as_ref().and_then(|qemu| {
            i32::try_from(qemu.identity().pid).ok().and_then(rustix::process::Pid::from_raw)
        });
        if let Some(pid) = pid {
            // It is a child that nobody has waited for, so the pid is still its own.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}
