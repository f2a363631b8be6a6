//! PID 1's way from an initial RAM filesystem to a served root, and its end.
//!
//! ```text
//!  mounts ──> modules ──> loopback ──> root (EROFS + ext4 = overlay) ──> port ──> serve ──> power off
//!                                       └─ the other modules of the kernel, below /lib/modules
//! ```
//!
//! Every phase says a line in the kernel's log. A failed root does not end the boot: the host can
//! still say hello, read the log and see why.

mod kernel_modules;
mod modules;
mod mounts;
mod port;
mod power;
mod root;
mod run_dir;
mod vsock;

use std::time::Duration;

use mvm_core::guest::MODULES_ARGUMENT;

use crate::console::{self, complain, note};
use crate::init::Init;
use crate::machine::{Applied, Machine, bring_up_loopback, set_defaults};
use crate::server::{Ending, Server};

/// On the kernel's command line: stay in the initial RAM filesystem.
const NO_ROOT: &str = "mvm.root=none";

/// On the kernel's command line: the image's own init, which becomes process 1.
const INIT: &str = "mvm.init=";

/// Boots, serves and stops the machine.
pub(crate) fn run() -> ! {
    mounts::mount_kernel_filesystems();
    console::use_kernel_log();
    note(concat!("version ", env!("CARGO_PKG_VERSION")));
    modules::load();
    if let Err(error) = bring_up_loopback() {
        complain(&format!("cannot bring up loopback: {error}"));
    }
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let root = match words.split_ascii_whitespace().any(|word| word == NO_ROOT) {
        true => Ok(None),
        false => root::mount_root().map(Some),
    };
    let (writable, root_failure) = match root {
        Ok(writable) => {
            note("root is mounted");
            (writable, None)
        }
        Err(reason) => {
            complain(&format!("root is not mounted: {reason}"));
            (None, Some(reason))
        }
    };
    let value =
        |name: &str| words.split_ascii_whitespace().find_map(|word| word.strip_prefix(name));
    let path = value(INIT);
    let path = path.filter(|_| root_failure.is_none());
    mounts::mount_runtime_filesystems(path.is_some());
    if let Some(device) = value(MODULES_ARGUMENT).filter(|_| root_failure.is_none()) {
        kernel_modules::bring_in(device);
    }
    set_defaults();
    let init = match path.map(Init::make_room).transpose() {
        Ok(init) => init,
        Err(error) => {
            complain(&format!("there is no room for the image's init: {error}"));
            None
        }
    };
    let (identity, clock) = (Box::default(), Box::default());
    let settings = Applied::default();
    let mut machine = Machine::Own { root_failure, init, identity, clock, settings };
    let grace = serve(&mut machine).unwrap_or_else(|reason| {
        complain(&reason);
        Duration::ZERO
    });
    note("stopping");
    let Machine::Own { init: Some(init), .. } = machine else { power::stop(grace, writable) };
    init.power_off(grace);
    power::stop(Duration::ZERO, writable)
}

/// Serves until a shutdown is asked for, and tells its grace.
fn serve(machine: &mut Machine) -> Result<Duration, String> {
    let mut server = Server::new(machine).map_err(|error| error.to_string())?;
    let port = port::open()?;
    note("port is open");
    match server.serve(port) {
        Ok(Ending::Shutdown { grace }) => Ok(grace),
        Ok(Ending::Closed) => Err("the port ended".into()),
        Err(error) => Err(format!("cannot serve: {error}")),
    }
}
