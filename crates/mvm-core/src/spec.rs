//! What people ask for: quotas, pools, and the document that `mvm up` reads.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::authored::{self, Strict};
use crate::disk::DiskMount;
use crate::image::ImageSpec;
use crate::init::InitMode;
use crate::main_process::{ProcessError, ProcessSpec};
use crate::name::{DiskName, PoolName, TenantName};
use crate::publish::{Publish, PublishError, check_published};
use crate::rates::{RateError, Rates};
use crate::settings::{Settings, SettingsError, Ulimit, sysctls};
use crate::sleep_policy::{PolicyError, SleepPolicy};
use crate::vmm::VmmKind;

/// Smallest guest memory in MiB: below it the kernel and the initrd do not fit.
pub const MEM_MIB_MIN: u32 = 96;
/// Largest guest memory in MiB: 4 TiB, more than any machine gives one microVM.
pub const MEM_MIB_MAX: u32 = 4 << 20;
/// Smallest writable layer in MiB.
pub const DISK_MIB_MIN: u32 = 16;
/// Largest writable layer in MiB: 16 TiB, the most that ext4 holds with blocks of 4 KiB.
pub const DISK_MIB_MAX: u32 = 16 << 20;
/// Most virtual CPUs of one instance.
pub const VCPUS_MAX: u32 = 32;
/// Most instances of one pool that stand by.
pub const READY_MAX: u32 = 64;

/// A tenant's limits; an absent limit means that only the node's capacity limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quota {
    /// Virtual CPUs of all instances that are to run.
    pub vcpus: Option<u64>,
    /// Guest memory in MiB of all instances that are to run.
    pub mem_mib: Option<u64>,
    /// Writable layers of all instances and data disks, in MiB.
    pub disk_mib: Option<u64>,
    /// Instances that are to run.
    pub running: Option<u64>,
    /// Pools.
    pub pools: Option<u64>,
    /// Instances of any one pool.
    pub instances_per_pool: Option<u64>,
}

impl Quota {
    /// The names of the limits, as commands spell them.
    pub const NAMES: [&'static str; 6] =
        ["vcpus", "mem", "disk", "running", "pools", "instances-per-pool"];

    /// The limit with this name.
    pub fn by_name(&mut self, name: &str) -> Option<&mut Option<u64>> {
        match name {
            "vcpus" => Some(&mut self.vcpus),
            "mem" => Some(&mut self.mem_mib),
            "disk" => Some(&mut self.disk_mib),
            "running" => Some(&mut self.running),
            "pools" => Some(&mut self.pools),
            "instances-per-pool" => Some(&mut self.instances_per_pool),
            _ => None,
        }
    }

    /// Takes over the limits that `change` has.
    pub fn merge(&mut self, change: &Self) {
        let mut change = change.clone();
        for name in Self::NAMES {
            if let (Some(mine), Some(Some(theirs))) = (self.by_name(name), change.by_name(name)) {
                *mine = Some(*theirs);
            }
        }
    }
}

/// Whether instances have a network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NetMode {
    /// An interface on the tenant's bridge.
    #[default]
    Tenant,
    /// No interface but loopback.
    None,
}

impl FromStr for NetMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tenant" => Ok(Self::Tenant),
            "none" => Ok(Self::None),
            _ => Err(format!("`{text}` is not a network mode: expected tenant or none")),
        }
    }
}

impl fmt::Display for NetMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tenant => "tenant",
            Self::None => "none",
        })
    }
}

/// What happens when a running instance ends by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestartPolicy {
    /// It is started again, with backoff, however it ended.
    Always,
    /// It is started again, with backoff, unless its main process exited with code 0 or the guest
    /// powered itself off; a reboot counts as the wish to come back.
    #[default]
    OnFailure,
    /// It stays ended.
    Never,
}

impl FromStr for RestartPolicy {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "always" => Ok(Self::Always),
            "on-failure" => Ok(Self::OnFailure),
            "never" => Ok(Self::Never),
            _ => Err(format!(
                "`{text}` is not a restart policy: expected always, on-failure or never"
            )),
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Always => "always",
            Self::OnFailure => "on-failure",
            Self::Never => "never",
        })
    }
}

crate::serde_as_text!(NetMode, RestartPolicy);

/// What every instance of a pool is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolSpec {
    /// Where the root filesystem comes from.
    pub image: ImageSpec,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Size of the writable layer in MiB; sparse, so it costs what is written.
    pub disk_mib: u32,
    /// Whether instances have a network.
    pub net: NetMode,
    /// What happens when an instance ends by itself.
    pub restart: RestartPolicy,
    /// Seconds from launch to a guest agent that answers, before the start has failed.
    pub boot_timeout_s: u32,
    /// The VMM that instances run on; the node's if absent.
    pub vmm: Option<VmmKind>,
    /// How fast each instance may use the network and its disks.
    pub rates: Rates,
    /// Data disks of the tenant that each instance has.
    pub disks: Vec<DiskMount>,
    /// What the main process is, as far as the image does not say it.
    pub process: ProcessSpec,
    /// What is set in the guest's kernel before any program runs.
    pub settings: Settings,
    /// Ports that the node listens on for the pool.
    pub publish: Vec<Publish>,
    /// When instances that nobody uses are put to rest.
    pub sleep_policy: SleepPolicy,
    /// New instances that stand by, ready, if the pool has a base.
    pub ready: u32,
    /// Whether each instance is removed when it has ended for good, and the pool with the last one.
    pub auto_remove: bool,
    /// Whether the pool is there for its instances alone, as one of `mvm run` is: it goes with the
    /// last of them that is destroyed.
    pub ephemeral: bool,
}

impl Default for PoolSpec {
    fn default() -> Self {
        Self {
            image: ImageSpec::Builtin,
            vcpus: 1,
            mem_mib: 256,
            disk_mib: 2048,
            net: NetMode::Tenant,
            restart: RestartPolicy::OnFailure,
            boot_timeout_s: 60,
            vmm: None,
            rates: Rates::default(),
            disks: Vec::new(),
            process: ProcessSpec::default(),
            settings: Settings::default(),
            publish: Vec::new(),
            sleep_policy: SleepPolicy::default(),
            ready: 0,
            auto_remove: false,
            ephemeral: false,
        }
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Why a pool's spec makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A field is out of range.
    #[error("{field} is {value}, but must be {expected}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is allowed, in words.
        expected: String,
    },
    /// The main process makes no sense.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The published ports make no sense together.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A rate makes no sense.
    #[error("rates: {0}")]
    Rates(#[from] RateError),
    /// What is set in the guest's kernel makes no sense.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A pool cannot have this VMM.
    #[error("vmm is {vmm}, but must be firecracker or qemu: a node is simulated as a whole")]
    Vmm {
        /// What was given.
        vmm: VmmKind,
    },
    /// The sleep policy makes no sense.
    #[error("sleep_policy: {0}")]
    SleepPolicy(#[from] PolicyError),
}

impl PoolSpec {
    /// Whether an instance of the other spec is the same inside: what the node does with it from
    /// outside does not count.
    pub fn makes_same_guest(&self, other: &Self) -> bool {
        let Self { restart, boot_timeout_s, publish, sleep_policy, ready, auto_remove, .. } =
            other.clone();
        let outside = Self { restart, boot_timeout_s, publish, ready, auto_remove, ..self.clone() };
        Self { sleep_policy, ephemeral: other.ephemeral, ..outside } == *other
    }

    /// Checks the ranges of the numbers, the VMM, the main process, the settings, the published ports,
    /// the sleep policy, and that the image can be found from everywhere.
    ///
    /// # Errors
    /// Names the first field that is out of range or makes no sense.
    pub fn check(&self) -> Result<(), SpecError> {
        let fail = |field, value: u32, expected: String| {
            Err(SpecError::Range { field, value: value.to_string(), expected })
        };
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return fail("vcpus", self.vcpus, format!("1 to {VCPUS_MAX}"));
        }
        if self.mem_mib < MEM_MIB_MIN {
            return fail("mem_mib", self.mem_mib, format!("at least {MEM_MIB_MIN}"));
        }
        if self.mem_mib > MEM_MIB_MAX {
            return fail("mem_mib", self.mem_mib, format!("at most {MEM_MIB_MAX}"));
        }
        if self.disk_mib < DISK_MIB_MIN {
            return fail("disk_mib", self.disk_mib, format!("at least {DISK_MIB_MIN}"));
        }
        if self.disk_mib > DISK_MIB_MAX {
            return fail("disk_mib", self.disk_mib, format!("at most {DISK_MIB_MAX}"));
        }
        if self.ready > READY_MAX {
            return fail("ready", self.ready, format!("at most {READY_MAX}"));
        }
        if self.boot_timeout_s == 0 {
            return fail("boot_timeout_s", 0, "at least 1".to_owned());
        }
        if self.image.path().is_some_and(|path| !path.starts_with('/')) {
            let expected = "an image with an absolute path".to_owned();
            let value = self.image.to_string();
            return Err(SpecError::Range { field: "image", value, expected });
        }
        if let Some(vmm @ VmmKind::Sim) = self.vmm {
            return Err(SpecError::Vmm { vmm });
        }
        self.rates.check()?;
        check_published(&self.publish)?;
        self.sleep_policy.check()?;
        self.settings.check()?;
        Ok(self.process.check()?)
    }
}

/// The document of `mvm up FILE`: a tenant, its pools and how many instances of each run. A field that is
/// not known, of whatever is in it, is refused wherever a document is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Document {
    /// The tenant's name.
    pub tenant: TenantName,
    /// The tenant's subnet; chosen if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Ipv4Net>,
    /// The tenant's limits, all of them; they stay as they are if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// Data disks by name; one that is there grows to its size.
    #[serde(default, alias = "disk", skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<DiskName, DocumentDisk>,
    /// The tenant's pools by name.
    #[serde(default, alias = "pool")]
    pub pools: BTreeMap<PoolName, DocumentPool>,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::deserialize(Strict(from))
    }
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut written = Self::serialize(self, serde_json::value::Serializer)
            .map_err(serde::ser::Error::custom)?;
        authored::leave_out_nulls(&mut written);
        Serialize::serialize(&written, to)
    }
}

/// One data disk of a [`Document`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentDisk {
    /// Its size in MiB; sparse, so it costs what is written.
    pub size_mib: u64,
}

/// One pool of a [`Document`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "DocumentPoolFields", into = "DocumentPoolFields")]
pub struct DocumentPool {
    /// How many instances run.
    pub running: u32,
    /// Whether it names an image; a pool that is there keeps its own otherwise.
    pub names_image: bool,
    /// What they are like.
    pub spec: PoolSpec,
}

/// [`DocumentPool`] as written: flat, without `flatten`, which would hide unknown fields.
#[derive(Serialize, Deserialize)]
#[serde(default)]
struct DocumentPoolFields {
    running: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageSpec>,
    vcpus: u32,
    mem_mib: u32,
    disk_mib: u32,
    net: NetMode,
    restart: RestartPolicy,
    boot_timeout_s: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    vmm: Option<VmmKind>,
    #[serde(serialize_with = "authored::serialize", skip_serializing_if = "Rates::is_default")]
    rates: Rates,
    disks: Vec<DiskMount>,
    publish: Vec<Publish>,
    #[serde(
        serialize_with = "authored::serialize",
        skip_serializing_if = "SleepPolicy::is_default"
    )]
    sleep_policy: SleepPolicy,
    #[serde(skip_serializing_if = "is_zero")]
    ready: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    entrypoint: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workdir: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    init: Option<InitMode>,
    stdin: bool,
    tty: bool,
    #[serde(alias = "sysctls", deserialize_with = "sysctls")]
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    sysctl: BTreeMap<String, String>,
    #[serde(alias = "ulimits", skip_serializing_if = "BTreeMap::is_empty")]
    ulimit: BTreeMap<String, Ulimit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shm_mib: Option<u32>,
}

impl Default for DocumentPoolFields {
    fn default() -> Self {
        DocumentPool { running: 1, names_image: false, spec: PoolSpec::default() }.into()
    }
}

impl From<DocumentPool> for DocumentPoolFields {
    fn from(pool: DocumentPool) -> Self {
        let DocumentPool { running, names_image, spec } = pool;
        let ProcessSpec { entrypoint, command, env, user, workdir, stop_signal, init, stdin, tty } =
            spec.process;
        let Settings { sysctl, ulimit, shm_mib } = spec.settings;
        Self {
            running,
            image: names_image.then_some(spec.image),
            vcpus: spec.vcpus,
            mem_mib: spec.mem_mib,
            disk_mib: spec.disk_mib,
            net: spec.net,
            restart: spec.restart,
            boot_timeout_s: spec.boot_timeout_s,
            vmm: spec.vmm,
            rates: spec.rates,
            disks: spec.disks,
            publish: spec.publish,
            sleep_policy: spec.sleep_policy,
            ready: spec.ready,
            entrypoint,
            command,
            env,
            user,
            workdir,
            stop_signal,
            init,
            stdin,
            tty,
            sysctl,
            ulimit,
            shm_mib,
        }
    }
}

impl From<DocumentPoolFields> for DocumentPool {
    fn from(fields: DocumentPoolFields) -> Self {
        let process = ProcessSpec {
            entrypoint: fields.entrypoint,
            command: fields.command,
            env: fields.env,
            user: fields.user,
            workdir: fields.workdir,
            stop_signal: fields.stop_signal,
            init: fields.init,
            stdin: fields.stdin,
            tty: fields.tty,
        };
        let names_image = fields.image.is_some();
        let settings =
            Settings { sysctl: fields.sysctl, ulimit: fields.ulimit, shm_mib: fields.shm_mib };
        let spec = PoolSpec {
            image: fields.image.unwrap_or_default(),
            vcpus: fields.vcpus,
            mem_mib: fields.mem_mib,
            disk_mib: fields.disk_mib,
            net: fields.net,
            restart: fields.restart,
            boot_timeout_s: fields.boot_timeout_s,
            vmm: fields.vmm,
            rates: fields.rates,
            disks: fields.disks,
            process,
            settings,
            publish: fields.publish,
            sleep_policy: fields.sleep_policy,
            ready: fields.ready,
            // A pool of a document goes with its document.
            auto_remove: false,
            ephemeral: false,
        };
        Self { running: fields.running, names_image, spec }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_document_gets_the_defaults() {
        let document: Document =
            serde_json::from_str(r#"{"tenant":"demo","pools":{"hello":{"running":2}}}"#).unwrap();
        let pool = &document.pools[&"hello".parse().unwrap()];
        assert_eq!((pool.running, &pool.spec), (2, &PoolSpec::default()));
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        for (text, field) in [
            (r#"{"tenant":"demo","pols":{}}"#, "pols"),
            (r#"{"tenant":"demo","pools":{"a":{"memory":3}}}"#, "memory"),
            (r#"{"tenant":"demo","quota":{"cpus":3}}"#, "cpus"),
        ] {
            let error = serde_json::from_str::<Document>(text).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn a_record_may_have_what_another_release_wrote_and_a_document_may_not() {
        for part in [
            r#""sleep_policy":{"sleep_after_s":60,"keep_vmm":true}"#,
            r#""disks":[{"name":"a","path":"/a","cached":true}]"#,
            r#""rates":{"net_packets_s":1}"#,
            r#""numa_node":1"#,
        ] {
            let record = format!(r#"{{"vcpus":2,{part}}}"#);
            assert_eq!(serde_json::from_str::<PoolSpec>(&record).unwrap().vcpus, 2);
            let document = format!(r#"{{"tenant":"demo","pools":{{"a":{record}}}}}"#);
            let error = serde_json::from_str::<Document>(&document).unwrap_err().to_string();
            assert!(error.starts_with("unknown field `"), "{error}");
        }
    }

    #[test]
    fn a_document_round_trips() {
        let text = r#"{"tenant":"demo","pools":{"hello":{"running":2,"net":"none",
            "command":["httpd","-f"],"env":{"A":"b"},"user":"www","workdir":"/srv",
            "vmm":"qemu","rates":{"net_mbit_s":100},"init":"program","shm_mib":64,
            "sysctl":{"net.core.somaxconn":"1024"},"ulimit":{"nofile":"1024:2048","nproc":9}}}}"#;
        let document: Document = serde_json::from_str(text).unwrap();
        let spec = &document.pools[&"hello".parse().unwrap()].spec;
        assert_eq!(spec.process.command.as_ref().unwrap(), &["httpd", "-f"]);
        assert_eq!((spec.vmm, spec.rates.net_mbit_s), (Some(VmmKind::Qemu), Some(100)));
        assert_eq!((spec.process.init, spec.settings.shm_mib), (Some(InitMode::Program), Some(64)));
        assert_eq!(spec.settings.ulimit["nofile"], "1024:2048".parse().unwrap());
        let again = serde_json::to_string(&document).unwrap();
        assert_eq!(serde_json::from_str::<Document>(&again).unwrap(), document);
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        let spec = PoolSpec { mem_mib: 8, ..PoolSpec::default() };
        assert_eq!(spec.check().unwrap_err().to_string(), "mem_mib is 8, but must be at least 96");
        for spec in [
            PoolSpec { mem_mib: MEM_MIB_MAX + 1, ..PoolSpec::default() },
            PoolSpec { disk_mib: u32::MAX, ..PoolSpec::default() },
        ] {
            let error = spec.check().unwrap_err().to_string();
            assert!(error.contains("but must be at most"), "{error}");
        }
    }

    #[test]
    fn a_pool_is_not_simulated_by_itself_and_its_rates_are_checked() {
        let error = |spec: PoolSpec| spec.check().unwrap_err().to_string();
        let text = error(PoolSpec { vmm: Some(VmmKind::Sim), ..PoolSpec::default() });
        assert!(text.starts_with("vmm is sim, but must be firecracker or qemu"), "{text}");
        let rates = Rates { disk_mib_s: Some(0), ..Rates::default() };
        let text = error(PoolSpec { rates, ..PoolSpec::default() });
        assert_eq!(text, "rates: disk_mib_s is 0, but must be 1 to 100000");
    }

    #[test]
    fn an_image_with_a_relative_path_is_refused() {
        let image = "oci:layout:v1".parse().unwrap();
        let error = PoolSpec { image, ..PoolSpec::default() }.check().unwrap_err().to_string();
        assert_eq!(error, "image is oci:layout:v1, but must be an image with an absolute path");
    }
}
