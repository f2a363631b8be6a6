//! Finds the way to the host: a virtio-serial port, or vsock where the VMM has that instead.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use mvm_core::guest::{PORT_NAME, VSOCK_PORT};

use super::vsock;
use crate::session::{Port, PortKind};

const PORTS: &str = "/sys/class/virtio-ports";
const DEVICES: &str = "/sys/bus/virtio/devices";
/// A vsock device's number in the virtio specification, as the kernel writes it.
const VSOCK_DEVICE: &str = "0x0013";
/// A port appears, and lets itself be opened, some milliseconds after its driver was loaded.
const DEADLINE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(2);

/// Opens the port; waits for it to appear.
pub(super) fn open() -> Result<Port, String> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match try_open() {
            Ok(port) => return Ok(port),
            Err(reason) if Instant::now() >= deadline => {
                return Err(format!("no port to the host: {reason}"));
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

fn try_open() -> Result<Port, String> {
    if has_vsock() {
        let listener = vsock::listen(VSOCK_PORT);
        return listener.map(Port::listening).map_err(|error| format!("vsock: {error}"));
    }
    let device = find().map_err(|error| format!("{PORTS}: {error}"))?;
    let device = device.ok_or_else(|| format!("no port is named {PORT_NAME}"))?;
    let file = OpenOptions::new().read(true).write(true).open(&device);
    let file = file.map_err(|error| format!("{}: {error}", device.display()))?;
    Ok(Port::new(file.into(), PortKind::VirtioSerial))
}

fn has_vsock() -> bool {
    let entries = fs::read_dir(DEVICES).into_iter().flatten().filter_map(Result::ok);
    let mut kinds = entries.map(|entry| fs::read_to_string(entry.path().join("device")));
    kinds.any(|kind| kind.is_ok_and(|kind| kind.trim() == VSOCK_DEVICE))
}

fn find() -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(PORTS)? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(Some(PathBuf::from("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}
