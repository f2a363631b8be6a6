//! Which VMM runs an instance, with which accelerator, and how a running one is known again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A virtual machine monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmmKind {
    /// Firecracker, on KVM only.
    Firecracker,
    /// QEMU's `microvm` machine, on KVM or in software.
    Qemu,
    /// The simulated VMM of tests and of the large-fleet benchmarks.
    Sim,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

macro_rules! word_enum {
    ($name:ident, $what:literal, $($variant:ident = $word:literal),+) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word),+ })
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!(concat!("`{}` is not ", $what, ": expected one of {}"), text, [$($word),+].join(", "))),
                }
            }
        }
    };
}
word_enum!(VmmKind, "a VMM", Firecracker = "firecracker", Qemu = "qemu", Sim = "sim");
word_enum!(Accel, "an accelerator", Kvm = "kvm", Tcg = "tcg");

/// What a guest has asked of its disks since its VMM started, also what the host's page cache answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIo {
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// Requests to make durable what was written.
    pub flushes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// How often requests had to wait because of a rate; absent where the VMM does not count it.
    pub throttled: Option<u64>,
}

/// How a running VMM process is known again after the agent restarts: never by a bare PID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHandle {
    /// The VMM that runs.
    pub vmm: VmmKind,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// The VMM's process id.
    pub pid: u32,
    /// The process's start time in clock ticks since the host booted (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
    /// The host's boot id when the process was started.
    pub host_boot_id: String,
}

/// How a microVM's run ended, as far as its node's agent could see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExit {
    /// How the VMM's process ended.
    #[serde(flatten)]
    pub process: ProcessEnd,
    /// What the VMM said about it before.
    #[serde(default)]
    pub reason: Option<ShutdownReason>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum ProcessEnd {
    /// The process exited with this code.
    Exited {
        /// The exit code.
        code: i32,
    },
    /// A signal ended the process.
    Signaled {
        /// The Linux signal number.
        signal: i32,
    },
    /// The process went away while no agent watched: its status was lost.
    Unobserved,
}

/// Why a microVM stopped running, in the VMM's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownReason {
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset the machine.
    GuestReset,
    /// The guest's kernel reported a panic.
    GuestPanic,
    /// The VMM received a signal that asks it to end.
    HostSignal,
    /// The VMM was told to quit over its control interface.
    HostQuit,
}
