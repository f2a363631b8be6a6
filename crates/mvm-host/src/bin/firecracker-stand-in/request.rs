//! Which requests there are, and what their bodies may hold: nothing unknown, as with the real one.
//!
//! Left out, and answered as such: MMDS, persistent memory, memory hotplug, serial
//! and logger settings, and changes of devices while a microVM runs.

// Fields that are only checked are what the description of the API has, too.
#![allow(dead_code)]

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::http::Asked;

/// A request that can be carried out, as far as its form tells.
pub(crate) enum Request {
    Describe,
    Version,
    GetMachine,
    Machine(MachineConfig),
    BootSource(BootSource),
    Drive(Drive),
    Network(Network),
    Vsock(Vsock),
    CpuTemplate(CpuTemplate),
    Entropy(Entropy),
    Balloon(Balloon),
    BalloonStatistics,
    Metrics(Metrics),
    Action(Action),
    State(VmState),
    Save(CreateSnapshot),
    Load(LoadSnapshot),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineConfig {
    pub(crate) vcpu_count: u8,
    pub(crate) mem_size_mib: usize,
    #[serde(default)]
    pub(crate) smt: bool,
    cpu_template: Option<String>,
    #[serde(default)]
    pub(crate) track_dirty_pages: bool,
    #[serde(default)]
    huge_pages: HugePages,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
enum HugePages {
    #[default]
    None,
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BootSource {
    pub(crate) kernel_image_path: String,
    pub(crate) initrd_path: Option<String>,
    pub(crate) boot_args: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drive {
    pub(crate) drive_id: String,
    partuuid: Option<String>,
    is_root_device: bool,
    #[serde(default)]
    cache_type: CacheType,
    pub(crate) is_read_only: Option<bool>,
    pub(crate) path_on_host: Option<String>,
    rate_limiter: Option<RateLimiter>,
    io_engine: Option<IoEngine>,
    socket: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
enum CacheType {
    #[default]
    Unsafe,
    Writeback,
}

#[derive(Debug, Deserialize)]
enum IoEngine {
    Async,
    Sync,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenBucket {
    size: u64,
    one_time_burst: Option<u64>,
    refill_time: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Network {
    pub(crate) iface_id: String,
    pub(crate) host_dev_name: String,
    pub(crate) guest_mac: Option<String>,
    rx_rate_limiter: Option<RateLimiter>,
    tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vsock {
    vsock_id: Option<String>,
    pub(crate) guest_cid: u32,
    pub(crate) uds_path: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entropy {
    rate_limiter: Option<RateLimiter>,
}

/// What its modifiers are made of is not looked at.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CpuTemplate {
    #[serde(default)]
    kvm_capabilities: Vec<serde_json::Value>,
    #[serde(default)]
    cpuid_modifiers: Vec<serde_json::Value>,
    #[serde(default)]
    msr_modifiers: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Balloon {
    pub(crate) amount_mib: u32,
    deflate_on_oom: bool,
    #[serde(default)]
    pub(crate) stats_polling_interval_s: u16,
    #[serde(default)]
    free_page_hinting: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

/// The real one lets unknown fields pass here.
#[derive(Debug, Deserialize)]
pub(crate) struct Metrics {
    pub(crate) metrics_path: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    pub(crate) action_type: ActionType,
}

#[derive(Debug, Deserialize)]
pub(crate) enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmState {
    pub(crate) state: WantedState,
}

#[derive(Debug, Deserialize)]
pub(crate) enum WantedState {
    Paused,
    Resumed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateSnapshot {
    #[serde(default)]
    pub(crate) snapshot_type: SnapshotType,
    pub(crate) snapshot_path: String,
    pub(crate) mem_file_path: String,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) enum SnapshotType {
    Diff,
    #[default]
    Full,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadSnapshot {
    pub(crate) snapshot_path: String,
    mem_file_path: Option<String>,
    pub(crate) mem_backend: Option<MemBackend>,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    pub(crate) track_dirty_pages: bool,
    #[serde(default)]
    pub(crate) resume_vm: bool,
    #[serde(default)]
    pub(crate) network_overrides: Vec<NetworkOverride>,
    #[serde(default)]
    clock_realtime: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemBackend {
    backend_type: BackendType,
    pub(crate) backend_path: String,
}

#[derive(Debug, Deserialize)]
enum BackendType {
    File,
    Uffd,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkOverride {
    pub(crate) iface_id: String,
    pub(crate) host_dev_name: String,
}

impl Request {
    /// Recognises a request, or says why it is none.
    pub(crate) fn of(asked: &Asked) -> Result<Self, String> {
        let path = asked.path.trim_start_matches('/');
        let (resource, id) = match path.split_once('/') {
            Some((resource @ ("drives" | "network-interfaces"), id)) => (resource, Some(id)),
            _ => (path, None),
        };
        match (asked.method.as_str(), resource) {
            ("PUT" | "PATCH", _) if asked.body.is_empty() => {
                return Err(format!("Empty {} request.", asked.method));
            }
            ("PUT", "drives" | "network-interfaces") if id.is_none_or(str::is_empty) => {
                return Err("The ID cannot be empty.".into());
            }
            _ => {}
        }
        Ok(match (asked.method.as_str(), resource) {
            ("GET", "") => Self::Describe,
            ("GET", "version") => Self::Version,
            ("GET", "machine-config") => Self::GetMachine,
            ("PUT", "machine-config") => Self::Machine(body(asked)?),
            ("PUT", "boot-source") => Self::BootSource(body(asked)?),
            ("PUT", "drives") => {
                let drive: Drive = body(asked)?;
                if id != Some(drive.drive_id.as_str()) {
                    let fault = "The id from the path does not match the id from the body!";
                    return Err(fault.into());
                }
                Self::Drive(drive)
            }
            ("PUT", "network-interfaces") => {
                let network: Network = body(asked)?;
                let (path, body) = (id.unwrap_or_default(), &network.iface_id);
                if path != body {
                    return Err(format!(
                        "The id from the path [{path}] does not match the id from the body [{body}]!"
                    ));
                }
                Self::Network(network)
            }
            ("PUT", "vsock") => Self::Vsock(body(asked)?),
            ("PUT", "entropy") => Self::Entropy(body(asked)?),
            ("PUT", "cpu-config") => Self::CpuTemplate(body(asked)?),
            ("GET", "balloon/statistics") => Self::BalloonStatistics,
            ("PUT", "balloon") => Self::Balloon(body(asked)?),
            ("PUT", "metrics") => Self::Metrics(body(asked)?),
            ("PUT", "actions") => Self::Action(body(asked)?),
            ("PATCH", "vm") => Self::State(body(asked)?),
            ("PUT", "snapshot/create") => Self::Save(body(asked)?),
            ("PUT", "snapshot/load") => {
                let load: LoadSnapshot = body(asked)?;
                if load.mem_backend.is_none() && load.mem_file_path.is_none() {
                    return Err(unreadable(
                        "missing field: either `mem_backend` or `mem_file_path` is required",
                    ));
                }
                Self::Load(load)
            }
            (method, _) => {
                return Err(format!("Invalid request method and/or path: {method} {path}."));
            }
        })
    }
}

fn body<T: DeserializeOwned>(asked: &Asked) -> Result<T, String> {
    serde_json::from_slice(&asked.body).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(problem: &str) -> String {
    format!("An error occurred when deserializing the json body of a request: {problem}.")
}
