//! QEMU's `microvm` machine, on KVM or in software (TCG).
//!
//! ```text
//!  agent (root)                                   qemu (own uid, seccomp, no new privileges)
//!    opens kernel, initrd, disks, tap, memory  ──>  inherits them as descriptors: it can reach
//!    binds qmp.sock and agent.sock                  no path of the state directory
//! ```
//!
//! **How an end is learned.** QEMU exits by itself when the guest powers off, resets or panics, so
//! that the memory of a dead microVM is free at once, whether an agent runs or not. Why it ended is
//! in the [`journal`]: a second QMP monitor that writes its events to a file and needs no client.
//! So an agent that was away reads the same cause as one that watched.
//!
//! The instance actors use it through the [`Vmm`] trait.

mod args;
mod blocks;
mod handover;
mod journal;
mod launch;
mod save;
mod tap;
mod tsc;
mod version;
mod vm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{Accel, ProcessEnd, VmExit, VmHandle, VmmKind};
use tokio::sync::OnceCell;

pub use version::{MINIMUM_VERSION, parse_version};

use super::qmp::{QmpClient, QmpError, Version};
use super::{Restore, Vm, VmSpec, Vmm, VmmError, this_processor};
use crate::process::{self, ProcessIdentity};
use crate::state_dir::InstanceDir;
use crate::unix_socket;

/// QEMU's program for guests of this machine's architecture.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// How long an adopted QEMU has to answer on QMP before it is taken for hung.
const ADOPT_LIMIT: Duration = Duration::from_secs(2);

/// How the driver runs QEMU.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The program, by path or by a name to be found in `PATH`.
    pub program: PathBuf,
    /// What executes the guests' instructions.
    pub accel: Accel,
    /// How long a fresh QEMU has until its guest runs.
    pub start_limit: Duration,
}

impl QemuConfig {
    /// The installed QEMU with this accelerator.
    pub fn new(accel: Accel) -> Self {
        Self { program: PROGRAM.into(), accel, start_limit: Duration::from_secs(30) }
    }
}

/// The QEMU driver.
#[derive(Debug)]
pub struct QemuVmm {
    config: QemuConfig,
    version: OnceCell<Version>,
    tsc_khz: OnceCell<Option<u64>>,
}

impl QemuVmm {
    /// A driver; nothing is started or looked up yet.
    pub fn new(config: QemuConfig) -> Self {
        Self { config, version: OnceCell::new(), tsc_khz: OnceCell::new() }
    }

    /// The installed version, looked up once.
    ///
    /// # Errors
    /// QEMU is not installed, does not run, or is older than [`MINIMUM_VERSION`].
    pub async fn version(&self) -> Result<Version, VmmError> {
        self.version.get_or_try_init(|| version::query(&self.config.program)).await.copied()
    }

    /// The frequency of the guests' time stamp counter, where they cannot measure it themselves.
    async fn tsc_khz(&self) -> Option<u64> {
        match self.config.accel {
            Accel::Kvm => None,
            Accel::Tcg => *self.tsc_khz.get_or_init(tsc::measure_khz).await,
        }
    }
}

#[async_trait]
impl Vmm for QemuVmm {
    fn kind(&self) -> VmmKind {
        VmmKind::Qemu
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        build_of(self.version().await?, self.config.accel)
    }

    async fn build_for(&self, _saved_on: &VmmBuild) -> Result<VmmBuild, VmmError> {
        // There is one QEMU on a machine, which its packages replace.
        self.build().await
    }

    fn host_boot_id(&self) -> String {
        process::boot_id().unwrap_or_default()
    }

    async fn end_strays(&self, spec: &VmSpec) -> Result<(), VmmError> {
        match process::end_all_of(spec.uid, &spec.dir).await {
            Ok(0) => Ok(()),
            Ok(count) => {
                tracing::warn!(instance = %spec.id, count, "ended a microVM that no record knew");
                Ok(())
            }
            Err(source) => Err(VmmError::System {
                operation: format!("end the processes of user {}", spec.uid),
                source,
            }),
        }
    }

    async fn launch(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, VmmError> {
        let (version, tsc_khz) = tokio::join!(self.version(), self.tsc_khz());
        version?;
        let vm = launch::launch(&self.config, tsc_khz, spec).await?;
        Ok(Arc::new(vm))
    }

    async fn restore(&self, spec: &VmSpec, from: &Restore) -> Result<Arc<dyn Vm>, VmmError> {
        let (version, tsc_khz) = tokio::join!(self.version(), self.tsc_khz());
        version?;
        let vm = launch::restore(&self.config, tsc_khz, spec, from).await?;
        Ok(Arc::new(vm))
    }

    async fn adopt(
        &self,
        handle: &VmHandle,
        spec: &VmSpec,
    ) -> Result<Option<Arc<dyn Vm>>, VmmError> {
        let found = process::adopt_holder(ProcessIdentity::from(handle), &spec.dir);
        let process = found.map_err(|source| VmmError::System {
            operation: format!("find process {}", handle.pid),
            source,
        })?;
        let Some(process) = process else { return Ok(None) };
        if let Err(error) = connect_qmp(&spec.dir, ADOPT_LIMIT).await {
            // Its guest may well be served: whether to end it is not for the driver to decide.
            tracing::warn!(instance = %spec.id, %error, "an adopted QEMU does not answer on QMP");
        }
        Ok(Some(Arc::new(vm::QemuVm::new(handle.clone(), process, spec))))
    }

    async fn exit_of(&self, _handle: &VmHandle, spec: &VmSpec) -> VmExit {
        VmExit { process: ProcessEnd::Unobserved, reason: journal::reason(&spec.dir) }
    }
}

fn build_of(version: Version, accel: Accel) -> Result<VmmBuild, VmmError> {
    let cpu = match accel {
        Accel::Tcg => args::EMULATED_CPU.to_owned(),
        Accel::Kvm => this_processor()?,
    };
    Ok(VmmBuild { vmm: VmmKind::Qemu, version: version.to_string(), accel, cpu })
}

/// Opens a QMP session with the QEMU of this directory.
async fn connect_qmp(dir: &InstanceDir, limit: Duration) -> Result<QmpClient, VmmError> {
    let stream = unix_socket::connect(&dir.qmp_socket()).await.map_err(|error| {
        VmmError::Control { operation: "connect to QMP".into(), message: with_source(&error) }
    })?;
    QmpClient::connect(stream, limit).await.map_err(qmp_failed)
}

fn qmp_failed(error: QmpError) -> VmmError {
    VmmError::Control { operation: "control QEMU".into(), message: error.to_string() }
}

fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
