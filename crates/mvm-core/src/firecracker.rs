//! The requests of Firecracker's API that change something: the driver makes them, and the program that
//! stands in for Firecracker in tests takes them, so that neither knows a field that the other does not.
//!
//! Nothing unknown is taken, as by the real one, and what is left out is not sent: an earlier Firecracker
//! may not know it.

#![allow(missing_docs, reason = "the description of the API says what each field is")]

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A request, with its body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Change {
    Machine(MachineConfig),
    /// As the operator wrote it.
    CpuTemplate(Value),
    BootSource(BootSource),
    Drive(Drive),
    Network(Network),
    Vsock(Vsock),
    Entropy(Entropy),
    Balloon(Balloon),
    Metrics(Metrics),
    Action(Action),
    State(VmState),
    Save(CreateSnapshot),
    Load(LoadSnapshot),
}

impl Change {
    /// The HTTP method.
    pub fn method(&self) -> &'static str {
        match self {
            Self::State(_) => "PATCH",
            _ => "PUT",
        }
    }

    /// The path of what is changed.
    pub fn path(&self) -> String {
        let path = match self {
            Self::Machine(_) => "/machine-config",
            Self::CpuTemplate(_) => "/cpu-config",
            Self::BootSource(_) => "/boot-source",
            Self::Drive(drive) => return format!("/drives/{}", drive.drive_id),
            Self::Network(network) => return format!("/network-interfaces/{}", network.iface_id),
            Self::Vsock(_) => "/vsock",
            Self::Entropy(_) => "/entropy",
            Self::Balloon(_) => "/balloon",
            Self::Metrics(_) => "/metrics",
            Self::Action(_) => "/actions",
            Self::State(_) => "/vm",
            Self::Save(_) => "/snapshot/create",
            Self::Load(_) => "/snapshot/load",
        };
        path.to_owned()
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    pub vcpu_count: u8,
    pub mem_size_mib: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub smt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub track_dirty_pages: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub huge_pages: HugePages,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    #[default]
    None,
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    pub kernel_image_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    pub is_root_device: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache_type: CacheType,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_read_only: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    #[default]
    Unsafe,
    Writeback,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    Async,
    Sync,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    pub size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// In milliseconds.
    pub refill_time: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub iface_id: String,
    pub host_dev_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    pub guest_cid: u32,
    pub uds_path: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub stats_polling_interval_s: u16,
    #[serde(default, skip_serializing_if = "is_default")]
    pub free_page_hinting: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub free_page_reporting: bool,
}

/// The real one lets unknown fields pass here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    pub metrics_path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub action_type: ActionType,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    pub state: WantedState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantedState {
    Paused,
    Resumed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    pub snapshot_path: String,
    pub mem_file_path: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    Diff,
    #[default]
    Full,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    pub snapshot_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub enable_diff_snapshots: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub track_dirty_pages: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub resume_vm: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub network_overrides: Vec<NetworkOverride>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub clock_realtime: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    pub backend_type: BackendType,
    pub backend_path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendType {
    File,
    Uffd,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
}
