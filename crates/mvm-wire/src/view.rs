//! What commands show: the same fields in tables, JSON and YAML.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use mvm_core::admit::{Capacity, Usage};
use mvm_core::death::Death;
use mvm_core::disk::{DiskMount, MountPath};
use mvm_core::image::ImageConfig;
use mvm_core::lifecycle::{ColdBoot, Setback, State};
use mvm_core::name::{DiskPath, InstancePath, PoolPath, RevisionId, SnapshotId, TenantName};
use mvm_core::net::{MacAddr, Traffic};
use mvm_core::outdated::SpecPart;
use mvm_core::plan::Waiting;
use mvm_core::record::{BuildState, DesiredState, PastRevision, Purpose};
use mvm_core::shown::Shown;
use mvm_core::sleep_policy::{Activity, Rested};
use mvm_core::spec::{Quota, RestartPolicy};
use mvm_core::vmm::{Accel, DiskIo, VmmKind};
use serde::{Deserialize, Serialize};

use crate::shown_spec::ShownSpec;

/// The agent and its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// The agent's version.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// When the agent started, in milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// The agent's state directory.
    pub state_dir: PathBuf,
    /// The machine's host name.
    pub hostname: String,
    /// The VMM for new microVMs.
    pub vmm: Shown<VmmKind>,
    /// The accelerator for new microVMs.
    pub accel: Shown<Accel>,
    /// Why these were chosen.
    pub chosen_because: String,
    /// What the node can hold.
    pub capacity: Capacity,
    /// What is reserved.
    pub reserved: Usage,
    /// Tenants.
    pub tenants: u64,
    /// Records that do not parse: their objects are not touched until they are mended.
    pub bad_records: Vec<BadRecordView>,
    /// Failures of the node's own work (such as the network) that are being retried.
    pub problems: Vec<String>,
    /// Connections to published ports that are open, or wait for an instance.
    #[serde(default)]
    pub connections: u64,
    /// How many of them there may be. No tenant, pool or client may have more than are left for others.
    #[serde(default)]
    pub connections_max: u64,
    /// Those that were not let in or could not be carried, since the agent's start.
    #[serde(default)]
    pub refused_connections: u64,
}

/// A record that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRecordView {
    /// The record's key.
    pub key: String,
    /// Why it does not parse.
    pub reason: String,
}

/// A record as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordView {
    /// The record's key.
    pub key: String,
    /// The record's text.
    pub text: String,
}

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantView {
    /// The tenant's name.
    pub name: TenantName,
    /// The tenant's subnet.
    pub subnet: String,
    /// The tenant's gateway.
    pub gateway: Ipv4Addr,
    /// The tenant's bridge.
    pub bridge: String,
    /// The tenant's limits.
    pub quota: Quota,
    /// What is reserved.
    pub reserved: Usage,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolView {
    /// The pool's path.
    pub path: PoolPath,
    /// What its instances are like.
    #[serde(flatten)]
    pub spec: ShownSpec,
    /// How many of its instances are to run.
    pub desired_running: u32,
    /// How many run.
    pub running: u32,
    /// How many exist.
    pub instances: u32,
    /// How many differ from what a new one would be: they were made before the spec or the image changed.
    #[serde(default)]
    pub outdated: u32,
    /// How many stand by, ready to be taken for new ones.
    #[serde(default)]
    pub standing_by: u32,
    /// The revision that new instances get.
    pub revision: Option<RevisionId>,
    /// Earlier revisions, the latest last: a rollback goes back to that.
    #[serde(default)]
    pub history: Vec<PastRevision>,
    /// Whether new instances get an earlier revision than the last that was built.
    #[serde(default)]
    pub rolled_back: bool,
    /// The state of its image.
    pub build: BuildState,
    /// The last build request that was carried out.
    pub build_generation: u64,
    /// What new instances begin with instead of booting.
    #[serde(default)]
    pub base: Option<BaseView>,
    /// The last request for a base that was carried out, and of which nothing is left over.
    #[serde(default)]
    pub base_generation: u64,
    /// Why that request came to nothing, if it did.
    #[serde(default)]
    pub base_failure: Option<String>,
    /// The ports that its image says it serves, `PORT` or `PORT/tcp|udp` each.
    #[serde(default)]
    pub exposed_ports: BTreeSet<String>,
    /// Directories that its image wants to keep apart from the rest. They are part of each
    /// instance's own layer, unless a data disk is mounted there.
    #[serde(default)]
    pub volumes: BTreeSet<String>,
    /// Whether its image has a health check, which mvm does not run.
    #[serde(default)]
    pub has_healthcheck: bool,
    /// Connections to its published ports that are open, or wait for an instance.
    #[serde(default)]
    pub connections: u64,
    /// Connections to its published ports that were not let in or could not be carried, since the
    /// agent's start.
    #[serde(default)]
    pub refused_connections: u64,
    /// What keeps published ports from being served, each with its port, in words.
    #[serde(default)]
    pub publish_problems: Vec<String>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
}

/// A pool's base snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseView {
    /// The snapshot.
    pub id: SnapshotId,
    /// Whether new instances begin with it; they boot if the image or the spec has changed since, or it
    /// was given up.
    pub in_use: bool,
    /// When it was made, in milliseconds since the Unix epoch.
    pub made_unix_ms: u64,
    /// Why it was given up.
    #[serde(default)]
    pub given_up: Option<String>,
}

/// A built image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// The revision.
    pub revision: RevisionId,
    /// What it was made from, in words; empty if that cannot be told.
    pub source: String,
    /// The disk space that it takes, in bytes.
    pub bytes: u64,
    /// When it was built, in milliseconds since the Unix epoch.
    pub built_unix_ms: u64,
    /// The release of its kernel.
    pub kernel: String,
    /// How it wants to be run.
    pub config: Shown<ImageConfig>,
    /// The layers that it was made of, from the bottom.
    pub layers: Vec<String>,
    /// The pools and instances that use it.
    pub used_by: Vec<String>,
    /// What is wrong with it.
    pub damage: Option<String>,
}

/// What a collection of images removed, or would remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectedView {
    /// Whether nothing was removed.
    pub dry_run: bool,
    /// The disk space of all of it, in bytes.
    pub bytes: u64,
    /// Each thing.
    pub items: Vec<CollectedItem>,
}

/// One thing that a collection of images removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectedItem {
    /// `revision`, `layer`, `download`, `upload` or `leftover`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The disk space that it took, in bytes.
    pub bytes: u64,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceView {
    /// The instance's path.
    pub path: InstancePath,
    /// The state.
    pub state: State,
    /// What it is in the middle of.
    pub activity: Option<String>,
    /// Whether it stands still because what it writes finds no space on the host's filesystem.
    #[serde(default)]
    pub lacks_space: bool,
    /// What it is there for.
    #[serde(default)]
    pub purpose: Shown<Purpose>,
    /// What it is to do.
    pub desired: Shown<DesiredState>,
    /// The generation of the wish that the state answers.
    pub generation: u64,
    /// Why it is not where it is wished to be.
    pub waiting: Option<Waiting>,
    /// Its address, if it has an interface.
    pub address: Option<Ipv4Addr>,
    /// Its interface's MAC.
    pub mac: Option<MacAddr>,
    /// Its tap on the host.
    pub tap: Option<String>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Size of the writable layer in MiB.
    pub disk_mib: u32,
    /// Data disks.
    #[serde(default)]
    pub disks: Vec<DiskMount>,
    /// The revision that it boots.
    pub revision: Option<RevisionId>,
    /// What of its pool's spec has changed since it was made: it keeps what it was made with.
    #[serde(default)]
    pub outdated: Vec<SpecPart>,
    /// The ports that its image says it serves, `PORT` or `PORT/tcp|udp` each.
    #[serde(default)]
    pub exposed_ports: BTreeSet<String>,
    /// The VMM that runs it.
    pub vmm: Option<Shown<VmmKind>>,
    /// The VMM's process id.
    pub pid: Option<u32>,
    /// What executes its instructions.
    pub accel: Option<Shown<Accel>>,
    /// When it became ready, in milliseconds since the Unix epoch.
    pub running_since_unix_ms: Option<u64>,
    /// When it became warm or fell asleep, in milliseconds since the Unix epoch.
    #[serde(default)]
    pub resting_since_unix_ms: Option<u64>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Boots that reached a running guest.
    pub boots: u64,
    /// Times that it went on from a snapshot.
    #[serde(default)]
    pub wakes: u64,
    /// What went wrong when it was last put to sleep or woken, until that succeeds.
    #[serde(default)]
    pub setback: Option<Setback>,
    /// What its pool's sleep policy did to it, until somebody asks something else of it.
    #[serde(default)]
    pub rested: Option<Shown<Rested>>,
    /// Whether its pool's sleep policy leaves it alone.
    #[serde(default)]
    pub pinned: bool,
    /// Why its last start was a boot although there was a snapshot.
    #[serde(default)]
    pub cold_boot: Option<ColdBoot>,
    /// What happens when it ends by itself.
    #[serde(default)]
    pub restart: Shown<RestartPolicy>,
    /// Why it has no network although it runs.
    #[serde(default)]
    pub network_problem: Option<String>,
    /// Failures in a row.
    pub failures: u32,
    /// How its last run ended.
    pub last_death: Option<Death>,
    /// What the main process of its last run ended with: its exit code, or 128 + the signal.
    #[serde(default)]
    pub exit_code: Option<i32>,
}

/// A data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskView {
    /// The disk's path.
    pub path: DiskPath,
    /// Its size in MiB, as asked for.
    pub size_mib: u64,
    /// Whether its file is there and has that size.
    pub ready: bool,
    /// Why it could not be made or grown at last.
    pub error: Option<String>,
    /// What it takes on the host, in KiB.
    pub host_kib: u64,
    /// Its file on the host.
    pub file: PathBuf,
    /// The instances that have it.
    pub instances: Vec<DiskUserView>,
    /// The pools whose new instances get it.
    pub pools: Vec<PoolPath>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
}

/// An instance that has a data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUserView {
    /// The instance.
    pub instance: InstancePath,
    /// Where it is mounted.
    pub path: MountPath,
    /// Whether it may only be read.
    pub read_only: bool,
    /// The instance's state.
    pub state: State,
}

/// What one instance uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatsView {
    /// The instance.
    pub path: InstancePath,
    /// CPU time of the VMM since it started, in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory of the VMM, guest memory included, in KiB.
    pub host_rss_kib: u64,
    /// Disk space that the writable layer takes on the host, in KiB.
    pub host_disk_kib: u64,
    /// What was read from the host's storage for its disks since the VMM started, in KiB.
    #[serde(default)]
    pub disk_read_kib: u64,
    /// What was written to its disks since the VMM started, in KiB.
    #[serde(default)]
    pub disk_written_kib: u64,
    /// What the guest has asked of its disks since the VMM started; absent if the VMM did not tell.
    #[serde(default)]
    pub disk_io: Option<DiskIo>,
    /// What the VMM counts besides, by its own names, since it started, and what the guest's kernel told
    /// its balloon: those that are not zero, and of Firecracker alone.
    #[serde(default)]
    pub vmm_counters: BTreeMap<String, u64>,
    /// What its interface has carried; absent if it has none.
    #[serde(default)]
    pub traffic: Option<Traffic>,
    /// What it is used for, as far as its pool has a sleep policy that it is measured for.
    #[serde(default)]
    pub activity: Option<Activity>,
    /// What the guest says of itself; absent if it did not answer.
    pub guest: Option<mvm_core::guest::Health>,
    /// Why the guest did not answer.
    pub guest_error: Option<String>,
}

/// Why an instance is in its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyView {
    /// The instance.
    pub instance: InstanceView,
    /// One sentence.
    pub summary: String,
    /// What it is used for, as far as its pool has a sleep policy that it is measured for.
    #[serde(default)]
    pub activity: Option<Activity>,
    /// The last lines that the main process of its last run wrote, newest last.
    #[serde(default)]
    pub output_tail: Vec<String>,
    /// The console's last lines, newest last.
    pub console_tail: Vec<String>,
}

/// The comparison of the kernel's network state with the expected one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyView {
    /// Tenant networks that were compared.
    pub tenants: u64,
    /// Interfaces that were compared.
    pub instances: u64,
    /// What differs, one line each; empty if all is as expected.
    pub differences: Vec<String>,
}

/// What an SSH client needs to log in to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshView {
    /// The instance.
    pub instance: InstancePath,
    /// The file with the tenant's private key.
    pub identity_file: String,
    /// The file with the guest's host keys, under [`SshView::host`].
    pub known_hosts_file: String,
}

impl SshView {
    /// The name of an instance for SSH clients.
    pub fn host(instance: &InstancePath) -> String {
        format!("{}-{}-{}.mvm", instance.pool.tenant, instance.pool.pool, instance.id)
    }
}
