//! Removes what is left of a node from the machine, whatever state it is in.
//!
//! It is used when a test is over, also when it failed, so it goes on past every error and asserts
//! nothing. It does not rely on the product.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mvm_host::net::{CLAIMS_DIR, Owner};
use rustix::process::{Pid, Signal, kill_process};

use crate::host;

/// How long killed processes may take to go.
const LIMIT: Duration = Duration::from_secs(10);

/// Ends all processes of a state directory and removes its network.
pub fn remove_all(dir: &Path, owner: &Owner) {
    let deadline = Instant::now() + LIMIT;
    // The agent first, or it would start again what is ended after it.
    for is_agent in [true, false] {
        loop {
            let processes = host::processes(dir);
            let left: Vec<_> =
                processes.iter().filter(|process| !is_agent || holds_lock(process, dir)).collect();
            if left.is_empty() || Instant::now() >= deadline {
                break;
            }
            for process in left {
                if let Some(pid) = Pid::from_raw(process.pid as i32) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    // A panicking test may be here because one of these tools misbehaves.
    let _ = std::panic::catch_unwind(|| {
        for link in host::links(owner) {
            quietly("ip", &["link", "delete", &link]);
        }
        for (family, name) in host::tables(owner) {
            quietly("nft", &["delete", "table", &family, &name]);
        }
    });
    for claim in host::claims(dir) {
        let _ = fs::remove_file(claim);
    }
    let _ = fs::remove_file(Path::new(CLAIMS_DIR).join("owners").join(owner.mark().to_string()));
    for mount in host::mounts(dir) {
        quietly("umount", &["-l", &mount.to_string_lossy()]);
    }
}

/// Whether a process is the agent of this state directory.
pub fn holds_lock(process: &host::Process, dir: &Path) -> bool {
    process.files.iter().any(|file| *file == dir.join("agent.lock"))
}

fn quietly(program: &str, args: &[&str]) {
    let _ = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
