//! One running QEMU.

use std::io;

use async_trait::async_trait;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{VmExit, VmHandle};

use super::super::{
    GuestStream, SaveChanges, Saved, Vm, VmCounters, VmSpec, VmUsage, VmmError, file_error,
};
use super::{blocks, build_of, connect_qmp, journal, save, with_source};
use crate::process::Process;
use crate::space::free_bytes;
use crate::state_dir::{InstanceDir, SnapshotDir};
use crate::unix_socket;

/// Free space below which QEMU is asked whether its guest stands still: its journal may have had none
/// to say so.
const SHORT: u64 = 64 << 20;

/// A microVM in a QEMU process, launched or adopted.
#[derive(Debug)]
pub(super) struct QemuVm {
    handle: VmHandle,
    process: Process,
    dir: InstanceDir,
    mem_mib: u32,
}

impl QemuVm {
    pub(super) fn new(handle: VmHandle, process: Process, spec: &VmSpec) -> Self {
        Self { handle, process, dir: spec.dir.clone(), mem_mib: spec.mem_mib }
    }

    fn failed(&self, operation: &str) -> impl FnOnce(io::Error) -> VmmError {
        let operation = format!("{operation} QEMU process {}", self.handle.pid);
        move |source| VmmError::System { operation, source }
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn handle(&self) -> &VmHandle {
        &self.handle
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        let qmp = connect_qmp(&self.dir, save::COMMAND_LIMIT).await?;
        build_of(qmp.greeting().version, self.handle.accel)
    }

    async fn wait(&self) -> VmExit {
        let process = self.process.wait().await;
        VmExit { process, reason: journal::reason(&self.dir) }
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.process.kill().await.map_err(self.failed("end"))
    }

    async fn pause(&self) -> Result<(), VmmError> {
        save::pause(&self.dir).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        save::resume(&self.dir).await
    }

    async fn lacks_space(&self) -> Result<bool, VmmError> {
        let is_short = free_bytes(&self.dir).map_err(file_error(&self.dir))? < SHORT;
        match is_short || journal::has_stopped(&self.dir) {
            true => save::lacks_space(&self.dir).await,
            false => Ok(false),
        }
    }

    async fn save(&self, dest: &SnapshotDir, changes: SaveChanges) -> Result<Saved, VmmError> {
        save::save(&self.dir, self.handle.pid, u64::from(self.mem_mib) << 20, changes, dest).await
    }

    async fn connect_guest(&self) -> Result<Box<dyn GuestStream>, VmmError> {
        let stream = unix_socket::connect(&self.dir.agent_socket()).await;
        match stream {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(VmmError::Control {
                operation: "connect to the guest agent's port".into(),
                message: with_source(&error),
            }),
        }
    }

    async fn usage(&self) -> Result<VmUsage, VmmError> {
        self.process.usage().map_err(self.failed("measure")).map(VmUsage::from)
    }

    async fn counters(&self) -> Result<VmCounters, VmmError> {
        let disk_io = blocks::disk_io(&self.dir).await?;
        Ok(VmCounters { disk_io, ..VmCounters::default() })
    }

    async fn tidy(&self) -> Result<(), VmmError> {
        journal::bound(&self.dir).map_err(file_error(&self.dir))
    }
}
