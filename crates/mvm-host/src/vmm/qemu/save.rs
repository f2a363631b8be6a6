//! Pausing, saving and restoring a QEMU.
//!
//! QEMU writes the state of its devices alone (tens of KiB); the agent takes the memory out of the
//! process itself, and puts it back before the devices are loaded, because loading them reads the
//! queues in the guest's memory. So a restored guest maps an image that others map too, and saving
//! it again costs the pages that it wrote.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::super::memory::{self, GuestMemory};
use super::super::qmp::QmpClient;
use super::super::{MemoryPart, SaveChanges, Saved, VmmError, file_error};
use super::{connect_qmp, qmp_failed, with_source};
use crate::state_dir::{InstanceDir, SnapshotDir};
use crate::unix_socket;

/// How long QEMU has for one command: writing out what its guest has in flight can take a while.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// What QEMU says it is when a write found no space on the host: other errors go to the guest.
const OUT_OF_SPACE: &str = "io-error";
/// How often a QEMU that loads devices is asked whether it is done.
const LOAD_INTERVAL: Duration = Duration::from_millis(1);

/// Stops the vCPUs; on return nothing that the guest has begun is in flight.
pub(super) async fn pause(dir: &InstanceDir) -> Result<(), VmmError> {
    let qmp = connect_qmp(dir, COMMAND_LIMIT).await?;
    execute(&qmp, "stop", json!({})).await
}

/// Lets the vCPUs run.
pub(super) async fn resume(dir: &InstanceDir) -> Result<(), VmmError> {
    let qmp = connect_qmp(dir, COMMAND_LIMIT).await?;
    execute(&qmp, "cont", json!({})).await
}

/// Whether the vCPUs are stopped because a disk's file could not be written for lack of space.
pub(super) async fn lacks_space(dir: &InstanceDir) -> Result<bool, VmmError> {
    let qmp = connect_qmp(dir, COMMAND_LIMIT).await?;
    Ok(status(&qmp).await? == OUT_OF_SPACE)
}

/// Writes the files of a paused microVM, durably, into `dest`.
pub(super) async fn save(
    dir: &InstanceDir,
    pid: u32,
    memory_bytes: u64,
    changes: SaveChanges,
    dest: &SnapshotDir,
) -> Result<Saved, VmmError> {
    let device = create(&dest.device_state())?;
    let qmp = connect_with(dir, &device).await?;
    let status = status(&qmp).await?;
    if status != "paused" {
        return Err(VmmError::Control {
            operation: "save the microVM".into(),
            message: format!("it is `{status}`, and only a paused one can be saved"),
        });
    }
    let set: FdSet = serde_json::from_value(
        qmp.execute("add-fd", json!({}), COMMAND_LIMIT).await.map_err(qmp_failed)?,
    )
    .map_err(|error| VmmError::Control {
        operation: "hand a file to QEMU".into(),
        message: error.to_string(),
    })?;
    let saved = execute(
        &qmp,
        "xen-save-devices-state",
        json!({ "filename": format!("/dev/fdset/{}", set.id), "live": false }),
    )
    .await;
    execute(&qmp, "remove-fd", json!({ "fdset-id": set.id })).await?;
    saved?;
    drop(qmp);
    let dest = dest.clone();
    let work = move || {
        sync(&device, &dest.device_state())?;
        save_memory(pid, memory_bytes, changes, &dest)
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| system("save memory", error))?
}

#[derive(Deserialize)]
struct FdSet {
    #[serde(rename = "fdset-id")]
    id: u64,
}

fn save_memory(
    pid: u32,
    bytes: u64,
    changes: SaveChanges,
    dest: &SnapshotDir,
) -> Result<Saved, VmmError> {
    let memory = GuestMemory::of(pid, bytes).map_err(|error| system("find the memory", error))?;
    if memory.part() == MemoryPart::Changes {
        return memory::save_changes(&memory, changes, dest);
    }
    let path = dest.memory_image();
    let file = create(&path)?;
    let bytes = memory.copy_to(&file).map_err(file_error(&path))?;
    sync(&file, &path)?;
    Ok(Saved { part: MemoryPart::Whole, bytes, written: Vec::new() })
}

/// Loads the devices' state from an inherited descriptor; the guest is paused then.
pub(super) async fn load_devices(qmp: &QmpClient, descriptor: i32) -> Result<(), VmmError> {
    let uri = format!("fd:{descriptor}");
    execute(qmp, "migrate-incoming", json!({ "uri": uri })).await?;
    let deadline = Instant::now() + COMMAND_LIMIT;
    loop {
        match status(qmp).await?.as_str() {
            "paused" => return Ok(()),
            "inmigrate" | "restore-vm" | "prelaunch" if Instant::now() < deadline => {
                sleep(LOAD_INTERVAL).await;
            }
            status => {
                return Err(VmmError::Control {
                    operation: "load the devices' state".into(),
                    message: format!("QEMU says that it is `{status}`"),
                });
            }
        }
    }
}

async fn status(qmp: &QmpClient) -> Result<String, VmmError> {
    #[derive(Deserialize)]
    struct Status {
        status: String,
    }
    let Status { status } = qmp.query("query-status", COMMAND_LIMIT).await.map_err(qmp_failed)?;
    Ok(status)
}

async fn execute(qmp: &QmpClient, command: &str, arguments: Value) -> Result<(), VmmError> {
    qmp.execute(command, arguments, COMMAND_LIMIT).await.map(drop).map_err(qmp_failed)
}

/// A QMP session whose next `add-fd` or `getfd` takes this file.
async fn connect_with(dir: &InstanceDir, file: &File) -> Result<QmpClient, VmmError> {
    let socket = dir.qmp_socket();
    let control = |message| VmmError::Control { operation: "connect to QMP".into(), message };
    let stream =
        unix_socket::connect(&socket).await.map_err(|error| control(with_source(&error)))?;
    // White space between commands means nothing, and carries the descriptor.
    unix_socket::send_descriptor(&stream, b' ', file)
        .await
        .map_err(|error| control(error.to_string()))?;
    QmpClient::connect(stream, COMMAND_LIMIT).await.map_err(qmp_failed)
}

fn create(path: &Path) -> Result<File, VmmError> {
    // Not for reading: QEMU takes a descriptor only with the very access that it wants.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(file_error(path))
}

fn sync(file: &File, path: &Path) -> Result<(), VmmError> {
    file.sync_all().map_err(file_error(path))
}

fn system(operation: &str, error: impl Into<io::Error>) -> VmmError {
    VmmError::System { operation: operation.to_owned(), source: error.into() }
}
