//! Starting one QEMU, with every failure unwound.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use mvm_core::vmm::{Accel, VmHandle, VmmKind};
use serde::Deserialize;
use tokio::time::Instant;

use super::super::memory;
use super::super::qmp::QmpClient;
use super::super::starting::{Starting, or_last_words};
use super::super::{Restore, VmSpec, VmmError};
use super::handover::Handover;
use super::vm::QemuVm;
use super::{QemuConfig, args, connect_qmp, qmp_failed, save};
use crate::process::{Spawn, spawn};
use crate::state_dir::InstanceDir;

/// How often a QEMU that is still setting up is asked again.
const STATUS_INTERVAL: Duration = Duration::from_millis(10);

/// Starts QEMU and waits until its guest runs. If this fails or is given up, no process and no
/// socket is left.
pub(super) async fn launch(
    config: &QemuConfig,
    tsc_khz: Option<u64>,
    spec: &VmSpec,
) -> Result<QemuVm, VmmError> {
    let (handover, starting) = start(config, tsc_khz, spec, None).await?;
    let running = ask_until_running(&spec.dir, config.start_limit);
    or_last_words(starting.process()?, spec, running).await?;
    finish(config, spec, handover, starting)
}

/// Starts QEMU with the memory and the devices of a saved microVM, which is paused on return. If
/// this fails or is given up, no process and no socket is left.
pub(super) async fn restore(
    config: &QemuConfig,
    tsc_khz: Option<u64>,
    spec: &VmSpec,
    from: &Restore,
) -> Result<QemuVm, VmmError> {
    let began = Instant::now();
    let (handover, starting) = start(config, tsc_khz, spec, Some(from)).await?;
    let process = starting.process()?;
    let ms = || began.elapsed().as_secs_f64() * 1000.0;
    let loading = async {
        let qmp = connect_qmp(&spec.dir, config.start_limit).await?;
        let process_ms = ms();
        let pid = process.identity().pid;
        memory::restore_changes(pid, u64::from(spec.mem_mib) << 20, &from.dir).await?;
        let memory_ms = ms() - process_ms;
        tracing::debug!(instance = %spec.id, process_ms, memory_ms, "QEMU waits for its devices");
        match handover.descriptors().device_state {
            Some(descriptor) => save::load_devices(&qmp, descriptor).await,
            None => Ok(()),
        }
    };
    or_last_words(process, spec, loading).await?;
    finish(config, spec, handover, starting)
}

/// A failure ends the process first, and then what was made for it goes: the last is dropped first.
async fn start(
    config: &QemuConfig,
    tsc_khz: Option<u64>,
    spec: &VmSpec,
    restore: Option<&Restore>,
) -> Result<(Handover, Starting), VmmError> {
    spec.check()?;
    let groups = match config.accel {
        Accel::Kvm => kvm_groups(Path::new("/dev/kvm"))?,
        Accel::Tcg => Vec::new(),
    };
    let handover = Handover::open(spec, restore).await?;
    let args = args::arguments(spec, config.accel, tsc_khz, &handover.descriptors());
    let process = spawn(&Spawn {
        uid: Some(spec.uid),
        groups: &groups,
        keep: &handover.to_keep(),
        output: Some(handover.log()),
        ..Spawn::new(&config.program, &args)
    })
    .map_err(|source| VmmError::Spawn {
        program: config.program.to_string_lossy().into_owned(),
        source,
    })?;
    Ok((handover, Starting::new(process)))
}

fn finish(
    config: &QemuConfig,
    spec: &VmSpec,
    handover: Handover,
    starting: Starting,
) -> Result<QemuVm, VmmError> {
    let process = starting.succeed()?;
    handover.complete();
    let identity = process.identity().clone();
    let handle = VmHandle {
        vmm: VmmKind::Qemu,
        accel: config.accel,
        pid: identity.pid,
        start_ticks: identity.start_ticks,
        host_boot_id: identity.host_boot_id,
    };
    Ok(QemuVm::new(handle, process, spec))
}

/// The groups that QEMU's user must be in to open this device.
fn kvm_groups(device: &Path) -> Result<Vec<u32>, VmmError> {
    let error = |source| VmmError::File { path: device.to_owned(), source };
    let metadata = std::fs::metadata(device).map_err(error)?;
    match metadata.mode() {
        mode if mode & 0o006 == 0o006 => Ok(Vec::new()),
        mode if mode & 0o060 == 0o060 => Ok(vec![metadata.gid()]),
        _ => {
            let message = "only root may use it: `chgrp kvm` and `chmod 0660` make it usable";
            Err(error(std::io::Error::new(std::io::ErrorKind::PermissionDenied, message)))
        }
    }
}

async fn ask_until_running(dir: &InstanceDir, limit: Duration) -> Result<(), VmmError> {
    #[derive(Deserialize)]
    struct Status {
        status: String,
    }
    let deadline = Instant::now() + limit;
    let qmp: QmpClient = connect_qmp(dir, limit).await?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Status { status } = qmp.query("query-status", left).await.map_err(qmp_failed)?;
        match status.as_str() {
            "running" => return Ok(()),
            "prelaunch" | "inmigrate" | "restore-vm" if !left.is_zero() => {
                tokio::time::sleep(STATUS_INTERVAL).await;
            }
            _ => {
                return Err(VmmError::Control {
                    operation: "start the guest".into(),
                    message: format!("QEMU says that it is `{status}`"),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_device_decides_which_group_qemu_needs() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let gid = device.as_file().metadata().unwrap().gid();
        let set = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(device.path(), permissions).unwrap();
            kvm_groups(device.path())
        };
        assert_eq!(set(0o666).unwrap(), [0; 0]);
        assert_eq!(set(0o660).unwrap(), [gid]);
        assert!(set(0o600).unwrap_err().to_string().starts_with("cannot use "));
        assert!(kvm_groups(Path::new("/dev/no-such-kvm")).is_err());
    }
}
