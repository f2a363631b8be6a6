//! Which instances differ from what their pool's spec would make now.
//!
//! An instance keeps the spec and the image that it was made with for life, whatever starts it again. This is
//! how views say so; nothing is decided by it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::RevisionId;
use crate::record::{DesiredState, InstanceRecord, PoolRecord};
use crate::spec::PoolSpec;

/// A part of a spec, with the name that the spec gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecPart {
    /// What it boots.
    Image,
    /// Virtual CPUs.
    Vcpus,
    /// Guest memory.
    MemMib,
    /// The writable layer's size.
    DiskMib,
    /// Whether it has a network.
    Net,
    /// What happens when it ends by itself.
    Restart,
    /// How long a start may take.
    BootTimeoutS,
    /// What it runs on.
    Vmm,
    /// How fast it may use the network and its disks.
    Rates,
    /// Data disks.
    Disks,
    /// The main process.
    Process,
    /// What is set in the guest's kernel.
    Settings,
    /// A part of a newer version.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for SpecPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Image => "image",
            Self::Vcpus => "vcpus",
            Self::MemMib => "mem_mib",
            Self::DiskMib => "disk_mib",
            Self::Net => "net",
            Self::Restart => "restart",
            Self::BootTimeoutS => "boot_timeout_s",
            Self::Vmm => "vmm",
            Self::Rates => "rates",
            Self::Disks => "disks",
            Self::Process => "process",
            Self::Settings => "settings",
            Self::Unknown => "unknown",
        })
    }
}

/// In what an instance differs from a new one of its pool. `boots` is the revision that it booted, if it ever
/// did, and `builds` the one that a new instance would boot. What stands by or is for a base is replaced by
/// itself and never outdated.
pub fn outdated(
    instance: &InstanceRecord,
    boots: Option<&RevisionId>,
    pool: &PoolRecord,
    builds: Option<&RevisionId>,
) -> Vec<SpecPart> {
    if !instance.purpose.is_use() || instance.desired == DesiredState::Destroyed {
        return Vec::new();
    }
    let PoolSpec {
        // The revision says what it boots, whatever the image is called.
        image: _,
        vcpus,
        mem_mib,
        disk_mib,
        net,
        restart,
        boot_timeout_s,
        vmm,
        rates,
        disks: _,
        process,
        settings,
        // These are the pool's, and hold for all of its instances at once.
        publish: _,
        sleep_policy: _,
        ready: _,
        auto_remove: _,
        ephemeral: _,
    } = &instance.spec;
    let boots = boots.or(instance.revision.as_ref());
    let is_older = matches!((boots, builds), (Some(boots), Some(builds)) if boots != builds);
    let now = &pool.spec;
    let parts = [
        (SpecPart::Image, is_older),
        (SpecPart::Vcpus, *vcpus != now.vcpus),
        (SpecPart::MemMib, *mem_mib != now.mem_mib),
        (SpecPart::DiskMib, *disk_mib != now.disk_mib),
        (SpecPart::Net, *net != now.net),
        (SpecPart::Restart, *restart != now.restart),
        (SpecPart::BootTimeoutS, *boot_timeout_s != now.boot_timeout_s),
        (SpecPart::Vmm, *vmm != now.vmm),
        (SpecPart::Rates, *rates != now.rates),
        (SpecPart::Disks, has_other_disks(instance, now)),
        (SpecPart::Process, *process != now.process),
        (SpecPart::Settings, *settings != now.settings),
    ];
    parts.into_iter().filter_map(|(part, differs)| differs.then_some(part)).collect()
}

/// Whether it lacks a disk of its pool, or has one that is neither its pool's nor its own.
fn has_other_disks(instance: &InstanceRecord, now: &PoolSpec) -> bool {
    let has = &instance.spec.disks;
    let lacks = now.disks.iter().any(|disk| !has.contains(disk));
    lacks || has.iter().any(|disk| !now.disks.contains(disk) && !instance.own_disks.contains(disk))
}
