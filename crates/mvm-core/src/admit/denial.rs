//! Denials are data: what was refused, why, and what to type next.

use std::fmt;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::disk::MountError;
use crate::name::{DEFAULT_TENANT, DiskPath, InstancePath, PoolPath, Selector, TenantName};
use crate::net::{NetId, SubnetError};
use crate::publish::Publish;
use crate::spec::SpecError;

/// A limit that a request ran into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Whose limit it is, in words.
    pub of: String,
    /// What is limited, with its unit.
    pub what: String,
    /// What the request adds.
    pub asked: u64,
    /// What was reserved before.
    pub used: u64,
    /// The limit.
    pub allowed: u64,
    /// The command that raises the limit, if there is one.
    pub raise: Option<String>,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, what, asked, used, allowed, .. } = self;
        write!(f, "{of} allows {allowed} {what}: {used} in use, {asked} more requested")
    }
}

/// Two instances that would have a disk at once, of which one at least writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConflict {
    /// The disk.
    pub path: DiskPath,
    /// Who was to run with it.
    pub instance: InstancePath,
    /// Whether that one would only read.
    pub read_only: bool,
    /// Who has it.
    pub holder: InstancePath,
    /// Whether that one only reads.
    pub holder_read_only: bool,
    /// Whether that one was to start by the same request.
    pub holder_is_new: bool,
}

impl fmt::Display for DiskConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, instance, holder, .. } = self;
        let wants = if self.read_only { "read" } else { "write" };
        let has = match (self.holder_is_new, self.holder_read_only) {
            (true, true) => "is to read",
            (true, false) => "is to write",
            (false, true) => "reads",
            (false, false) => "writes",
        };
        write!(f, "{instance} cannot {wants} disk {path} while {holder} {has} it")
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The tenant does not exist.
    #[error("there is no tenant {name}")]
    NoSuchTenant {
        /// As given.
        name: TenantName,
    },
    /// The pool does not exist.
    #[error("there is no pool {path}")]
    NoSuchPool {
        /// As given.
        path: PoolPath,
    },
    /// The data disk does not exist.
    #[error("there is no disk {path}")]
    NoSuchDisk {
        /// As given.
        path: DiskPath,
    },
    /// Disks cannot be mounted as asked.
    #[error("{object}: {error}")]
    Mounts {
        /// What was to have them.
        object: String,
        /// Why not.
        error: MountError,
    },
    /// The disk is attached to something.
    #[error("disk {path} is attached to {}", list(to))]
    DiskAttached {
        /// The disk.
        path: DiskPath,
        /// What it is attached to.
        to: Vec<String>,
    },
    /// The disk is held by running instances.
    #[error(
        "disk {path} is held by {}, and a disk grows only while no instance runs with it",
        list(holders)
    )]
    DiskHeld {
        /// The disk.
        path: DiskPath,
        /// Who holds it.
        holders: Vec<InstancePath>,
    },
    /// The disk would become smaller.
    #[error(
        "disk {path} has {has_mib} MiB and cannot shrink to {size_mib} MiB: its file system would lose what lies behind the new end"
    )]
    DiskShrinks {
        /// The disk.
        path: DiskPath,
        /// What it has.
        has_mib: u64,
        /// What was asked for.
        size_mib: u64,
    },
    /// Two instances cannot have the disk at once.
    #[error("{0}")]
    DiskConflict(Box<DiskConflict>),
    /// A fork would write a disk that its source writes.
    #[error("{source_path} cannot be forked: it writes disk {disk}, which only one may do")]
    ForkWrites {
        /// The instance that was to be forked.
        source_path: InstancePath,
        /// The disk.
        disk: DiskPath,
    },
    /// The tenant still has data disks.
    #[error("tenant {name} still has data disks: {}", list(disks))]
    StillHasDisks {
        /// The tenant.
        name: TenantName,
        /// Its disks.
        disks: Vec<DiskPath>,
    },
    /// No instance is meant.
    #[error("no instance matches {selector}")]
    NoSuchInstance {
        /// As given.
        selector: String,
    },
    /// A name alone is neither a tenant's nor a pool's.
    #[error("there is no tenant {name}, and no pool {DEFAULT_TENANT}/{name}")]
    NoSuchName {
        /// As given.
        name: TenantName,
    },
    /// What is meant exists, and no instance of it.
    #[error("{}", no_instances(of))]
    NoInstances {
        /// As given.
        of: Selector,
    },
    /// Nothing runs that could be put to rest.
    #[error(
        "{instance} does not run, so there is nothing of it to keep in memory or to put to sleep"
    )]
    NotAlive {
        /// The instance.
        instance: InstancePath,
    },
    /// Several instances are meant where one is needed.
    #[error("{selector} matches {} instances: {}", matches.len(), list(matches))]
    Ambiguous {
        /// As given.
        selector: String,
        /// Which.
        matches: Vec<InstancePath>,
    },
    /// The object exists already.
    #[error("{object} exists already")]
    Exists {
        /// What and which.
        object: String,
    },
    /// The object is being removed.
    #[error("{object} is being removed")]
    BeingRemoved {
        /// What and which.
        object: String,
    },
    /// Instances run that the request would end.
    #[error("{object} has running instances: {}", list(running))]
    StillRunning {
        /// What and which.
        object: String,
        /// The instances.
        running: Vec<InstancePath>,
        /// The command that goes on regardless.
        force: String,
    },
    /// The tenant still has pools.
    #[error("tenant {name} still has pools: {}", list(pools))]
    StillHasPools {
        /// The tenant.
        name: TenantName,
        /// Its pools.
        pools: Vec<PoolPath>,
    },
    /// A limit is reached.
    #[error("{0}")]
    OverLimit(Limit),
    /// A pool's spec makes no sense.
    #[error("pool {pool}: {error}")]
    Spec {
        /// The pool.
        pool: PoolPath,
        /// Why.
        error: SpecError,
    },
    /// The subnet cannot be a tenant's.
    #[error("subnet {0}")]
    Subnet(SubnetError),
    /// The subnet overlaps another.
    #[error("subnet {subnet} overlaps {other}")]
    SubnetOverlaps {
        /// As given.
        subnet: Ipv4Net,
        /// What it overlaps, in words.
        other: String,
    },
    /// The document wants another subnet than the tenant has.
    #[error("tenant {name} has subnet {has}, and a subnet cannot be changed to {wants}")]
    SubnetFixed {
        /// The tenant.
        name: TenantName,
        /// What it has.
        has: Ipv4Net,
        /// What is wanted.
        wants: Ipv4Net,
    },
    /// Instances have addresses in the subnet that is to change.
    #[error(
        "the subnet of tenant {name} cannot change while instances use it: {}",
        list(instances)
    )]
    SubnetInUse {
        /// The tenant.
        name: TenantName,
        /// The instances.
        instances: Vec<InstancePath>,
    },
    /// Not every instance has an address in the new subnet.
    #[error("{subnet} is too small for the instances of tenant {name}")]
    SubnetTooSmall {
        /// The tenant.
        name: TenantName,
        /// The new subnet.
        subnet: Ipv4Net,
    },
    /// No net id is left.
    #[error("all {} tenant networks of this machine are in use", NetId::COUNT)]
    NoNetwork,
    /// Another pool publishes the port.
    #[error("{publish} cannot be published for pool {pool}: {} listens there already", holder.as_ref().map_or_else(|| "another tenant's pool".to_owned(), |holder| format!("pool {holder}")))]
    PortTaken {
        /// What was asked for.
        publish: Publish,
        /// For which pool.
        pool: PoolPath,
        /// Who has it, if it is of the same tenant.
        holder: Option<PoolPath>,
    },
    /// The pool had no other revision before.
    #[error("pool {pool} has no earlier revision to go back to")]
    NoEarlierRevision {
        /// The pool.
        pool: PoolPath,
    },
    /// The pool's instances cannot begin with a base.
    #[error("pool {pool} cannot have a base, and its instances boot: {why}")]
    NoBase {
        /// The pool.
        pool: PoolPath,
        /// Why, in words.
        why: &'static str,
    },
    /// The number makes no sense.
    #[error("{what} is {value}, but must be {expected}")]
    Number {
        /// What it is.
        what: &'static str,
        /// As given.
        value: u64,
        /// What is allowed, in words.
        expected: String,
    },
    /// The name of a limit to lift is unknown.
    #[error("`{name}` is not a limit: expected one of {}", crate::spec::Quota::NAMES.join(", "))]
    NoSuchLimit {
        /// As given.
        name: String,
    },
}

impl Denial {
    /// What to do about it, with the command to type where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoSuchTenant { name } => {
                Some(format!("create it with `mvm tenant create {name}`, or see `mvm tenant list`"))
            }
            Self::NoSuchPool { path } => {
                Some(format!("create it with `mvm pool create {path}`, or see `mvm pool list`"))
            }
            Self::NoSuchDisk { path } => Some(format!(
                "create it with `mvm disk create {path} --size 1G`, or see `mvm disk list`"
            )),
            Self::DiskAttached { path, .. } => {
                Some(format!("destroy what has it first; `mvm disk info {path}` shows all of it"))
            }
            Self::DiskHeld { holders, .. } => {
                holders.first().map(|holder| format!("stop it first: `mvm stop {holder}`"))
            }
            Self::DiskConflict(conflict) => {
                let first = match conflict.holder_is_new {
                    true => "start one of them".to_owned(),
                    false => format!("stop the other first (`mvm stop {}`)", conflict.holder),
                };
                let attach = "attach the disk read-only to all (--disk-attach NAME:/PATH:ro)";
                Some(format!("{first}, or {attach}"))
            }
            Self::ForkWrites { .. } => Some(
                "fork one that only reads its disks (--disk-attach NAME:/PATH:ro), or has none"
                    .to_owned(),
            ),
            Self::StillHasDisks { name, disks } => Some(format!(
                "remove them first (`mvm disk rm {}`), or everything with `mvm tenant destroy {name} --force`",
                disks.first().map(ToString::to_string).unwrap_or_default()
            )),
            Self::NoSuchInstance { .. } => Some("see `mvm ps -a`".to_owned()),
            Self::NoSuchName { .. } => {
                Some("see `mvm ps -a`, `mvm pool list` and `mvm tenant list`".to_owned())
            }
            Self::NoInstances { of: Selector::Pool(pool) } => Some(format!(
                "`mvm instance create {pool} --start` makes one, `mvm pool destroy {pool}` removes the pool"
            )),
            Self::NoInstances { .. } => Some(
                "`mvm run IMAGE` makes one, and so does `mvm instance create POOL --start`"
                    .to_owned(),
            ),
            Self::NotAlive { instance } => {
                Some(format!("start it first: `mvm start {}`", instance.id))
            }
            Self::Ambiguous { .. } => Some("name one of them, or pass --all".to_owned()),
            Self::Exists { .. } => None,
            Self::BeingRemoved { .. } => {
                Some("wait until it is gone (`mvm ps -a`), then try again".to_owned())
            }
            Self::StillRunning { force, .. } => {
                Some(format!("stop them first, or stop and remove them with `{force}`"))
            }
            Self::StillHasPools { name, .. } => Some(format!(
                "remove them first, or everything with `mvm tenant destroy {name} --force`"
            )),
            Self::OverLimit(limit) => limit.raise.clone(),
            Self::SubnetOverlaps { .. } => {
                Some("pass another --subnet, or none to have one chosen".to_owned())
            }
            Self::SubnetFixed { name, .. } => Some(format!(
                "leave the subnet out of the document, or `mvm tenant destroy {name}` first"
            )),
            Self::SubnetInUse { name, .. } => {
                Some(format!("stop them first: `mvm stop {name} --all`"))
            }
            Self::SubnetTooSmall { .. } => Some("pass a larger --subnet".to_owned()),
            Self::PortTaken { .. } => {
                Some("publish another port or address with --publish".to_owned())
            }
            Self::NoEarlierRevision { pool } => {
                Some(format!("give it another image with `mvm pool update {pool} --image IMAGE`"))
            }
            Self::Spec { .. }
            | Self::Mounts { .. }
            | Self::DiskShrinks { .. }
            | Self::Subnet(_)
            | Self::NoNetwork
            | Self::NoBase { .. }
            | Self::Number { .. }
            | Self::NoSuchLimit { .. } => None,
        }
    }
}

fn no_instances(of: &Selector) -> String {
    match of {
        Selector::All => "there are no instances".to_owned(),
        Selector::Tenant(tenant) => format!("tenant {tenant} has no instances"),
        Selector::Pool(pool) => format!("pool {pool} has no instances"),
        Selector::Id { .. } => format!("no instance matches {of}"),
    }
}

/// A readable list: all of a few, the first of many.
pub(super) fn list<T: fmt::Display>(items: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut text = items.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if items.len() > SHOWN {
        text.push_str(&format!(" and {} more", items.len() - SHOWN));
    }
    text
}
