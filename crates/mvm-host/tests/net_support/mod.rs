//! What the network tests share: throw-away network namespaces, agents in them, and raw packets.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(unreachable_pub, reason = "a module of test binaries")]

pub mod guest;
pub mod packet;
pub mod world;

use std::future::Future;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use mvm_core::net::{InstanceNetwork, NetId, NodeNetwork, Slot, TenantNetwork};
use mvm_host::net::{Difference, LinuxNetwork, Network, Owner};

/// Runs a test in a network namespace of its own, on a thread of its own.
pub fn in_namespace<F>(body: impl FnOnce() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    if !rustix::process::geteuid().is_root() {
        return skip("network namespaces need root");
    }
    let thread = std::thread::spawn(move || {
        unshare_network();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[allow(clippy::print_stderr, reason = "a skipped test says why")]
pub fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

#[allow(unsafe_code)]
fn unshare_network() {
    // SAFETY: only the network namespace of this thread changes; no memory or files are unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
}

/// The directories of a machine with one or more agents.
pub struct Machine {
    root: tempfile::TempDir,
}

impl Machine {
    pub fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    pub fn state_dir(&self, name: &str) -> PathBuf {
        let state_dir = self.root.path().join(name);
        std::fs::create_dir_all(&state_dir).unwrap();
        state_dir
    }

    pub fn owner(&self, name: &str) -> Owner {
        Owner::of(&self.state_dir(name)).unwrap()
    }

    pub fn claims_dir(&self) -> PathBuf {
        self.root.path().join("run/net")
    }

    /// An agent; asking again for the same one is like restarting it.
    pub fn agent(&self, name: &str) -> LinuxNetwork {
        LinuxNetwork::new(self.owner(name), self.claims_dir()).unwrap()
    }
}

pub fn tenant(net_id: u16) -> TenantNetwork {
    let net_id = NetId(net_id);
    TenantNetwork { net_id, subnet: TenantNetwork::default_subnet(net_id) }
}

pub fn instance(net_id: u16, slot: u16) -> InstanceNetwork {
    InstanceNetwork::new(tenant(net_id), Slot(slot))
}

/// The node with these instances and their tenants.
pub fn node(instances: &[(u16, u16)]) -> NodeNetwork {
    let instances = instances.iter().map(|&(net_id, slot)| instance(net_id, slot));
    NodeNetwork::of([], instances).unwrap()
}

/// How the machine differs from what is expected, in words.
pub async fn differences(network: &dyn Network, expected: &NodeNetwork) -> Vec<String> {
    let differences = network.verify(expected).await.unwrap();
    differences.iter().map(Difference::to_string).collect()
}

/// Runs `ip` and returns what it prints.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs an nft batch and returns what it prints.
pub fn nft(batch: &str) -> String {
    let mut child = Command::new("nft")
        .args(["-a", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(batch.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "nft refused {batch}");
    String::from_utf8(output.stdout).unwrap()
}

/// Reads a setting under `/proc/sys/net`.
pub fn sysctl(path: &str) -> Option<String> {
    let value = std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok()?;
    Some(value.trim().to_owned())
}

/// Changes a setting under `/proc/sys/net`.
pub fn set_sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
}
