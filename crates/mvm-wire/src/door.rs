//! What passes between control and a node besides documents and reports
//! ([`mvm_core::document`]): byte streams to instances, and questions about the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ipnet::Ipv4Net;
use mvm_core::admit::Capacity;
use mvm_core::guest::{ExecRequest, ForwardTarget};
use mvm_core::image::ImageConfig;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, RevisionId, Selector};
use mvm_core::net::NetId;
use mvm_core::sleep_policy::Activity;
use mvm_core::vmm::{Accel, VmmKind};
use serde::{Deserialize, Serialize};

use crate::api::{ApiError, ErrorCode, LogQuery};
use crate::view::{CollectedView, ImageView, RecordView, SshView, StatsView, VerifyView};

/// A byte stream to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "channel", rename_all = "snake_case")]
pub enum Channel {
    /// A program, as in [`Call::Exec`](crate::Call::Exec).
    Exec {
        /// The program.
        request: ExecRequest,
    },
    /// A socket in the guest, as in [`Call::Forward`](crate::Call::Forward).
    Forward {
        /// The socket.
        target: ForwardTarget,
    },
    /// The main process, as in [`Call::Attach`](crate::Call::Attach).
    Attach {
        /// Whether to wait for a start.
        wait: bool,
    },
    /// A log, as in [`Call::Logs`](crate::Call::Logs).
    Logs(LogQuery),
}

/// What control asks of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "question", rename_all = "snake_case")]
pub enum Question {
    /// What it is. Answer: `machine`.
    Machine,
    /// What other software has of its network. Answer: `occupied`.
    Occupied,
    /// What is known of published ports. Answer: `published`.
    Published,
    /// Where data disks are. Answer: `disk_files`.
    DiskFiles {
        /// Which.
        disks: Vec<DiskPath>,
    },
    /// What an image says about being run. Answer: `image_config`.
    ImageConfig {
        /// The image.
        revision: RevisionId,
    },
    /// Built images. Answer: `images`.
    Images,
    /// Removes an image that nothing uses. Answer: `collected`.
    ImageRemove {
        /// The image.
        revision: RevisionId,
    },
    /// Removes everything of images that nothing uses. Answer: `collected`.
    ImageCollect {
        /// Whether nothing is removed, but only told.
        dry_run: bool,
    },
    /// What running instances use. Answer: `stats`.
    Stats {
        /// Which.
        instances: Vec<InstancePath>,
    },
    /// What there is to explain the state of an instance with. Answer: `traces`.
    Traces {
        /// Which.
        instance: InstancePath,
    },
    /// Compares the kernel's network state with the expected one. Answer: `verified`.
    Verify,
    /// Looks for an instance that answers, and wakes one if none does. Answer: `located`.
    Locate {
        /// Which; any running one of a pool will do.
        selector: Selector,
    },
    /// Makes a guest ready for an SSH client. Answer: `ssh`.
    Ssh {
        /// Which; any running one of a pool will do.
        selector: Selector,
    },
    /// The node's own records, as stored. Answer: `records`.
    Records {
        /// The beginning of their keys.
        prefix: String,
    },
    /// Replaces (or removes) one of them that does not parse. Answer: `done`.
    RecordMend {
        /// The key.
        key: String,
        /// The new text; the record is removed if absent.
        text: Option<String>,
    },
}

/// What a node answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", content = "body", rename_all = "snake_case")]
pub enum Answer {
    /// It was done.
    Done,
    /// What it is.
    Machine(Box<Machine>),
    /// What other software has.
    Occupied(Occupied),
    /// Published ports.
    Published(Published),
    /// Data disks that have a place.
    DiskFiles(BTreeMap<DiskPath, DiskFile>),
    /// What an image says; nothing while it cannot be read.
    ImageConfig(Option<Box<ImageConfig>>),
    /// Built images.
    Images(Vec<ImageView>),
    /// What was removed.
    Collected(CollectedView),
    /// What instances use.
    Stats(Vec<StatsView>),
    /// What explains an instance's state.
    Traces(Traces),
    /// The comparison of the network.
    Verified(VerifyView),
    /// An instance that answers.
    Located(InstancePath),
    /// What an SSH client needs.
    Ssh(SshView),
    /// Records as stored.
    Records(Vec<RecordView>),
}

impl Answer {
    /// The failure of a node that answers something else than it was asked.
    pub fn unexpected(self) -> ApiError {
        let message = format!("the node answered something else than it was asked: {self:?}");
        ApiError::new(ErrorCode::Internal, message)
    }
}

/// A node, and the machine that it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its state directory.
    pub state_dir: PathBuf,
    /// The machine's host name.
    pub hostname: String,
    /// The VMM for new microVMs.
    pub vmm: VmmKind,
    /// The accelerator for new microVMs.
    pub accel: Accel,
    /// Why these were chosen.
    pub chosen_because: String,
    /// What it can hold.
    pub capacity: Capacity,
    /// What fails at present.
    pub problems: Vec<String>,
}

/// What other software, or another agent, has of a machine's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Occupied {
    /// Net ids that are taken.
    pub net_ids: BTreeSet<NetId>,
    /// Subnets that the host is connected to or routes.
    pub subnets: Vec<Ipv4Net>,
}

/// What is known of published ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Connections that are open, or wait for an instance.
    pub open: u64,
    /// How many of them there may be.
    pub max: u64,
    /// Those that were not let in, since the node's start.
    pub refused: u64,
    /// By pool.
    pub pools: BTreeMap<PoolPath, PublishedPool>,
}

/// What is known of a pool's published ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPool {
    /// Connections that are open, or wait for an instance.
    pub open: u64,
    /// Those that were not let in, since the node's start.
    pub refused: u64,
    /// What keeps ports from being served, each with its port.
    pub problems: Vec<String>,
}

/// The file of a data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// Its path on the node.
    pub file: PathBuf,
    /// What it takes there, in KiB.
    pub host_kib: u64,
}

/// What explains an instance's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traces {
    /// What it does, if its pool has a sleep policy.
    pub activity: Option<Activity>,
    /// The last lines of its present console.
    pub console_tail: Vec<String>,
    /// The last lines of its main process.
    pub output_tail: Vec<String>,
    /// What standing still for lack of space means, if it does.
    pub lacks_space: Option<String>,
}

/// Why a node cannot have what a request would lead to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Veto {
    /// Somebody else took a net id a moment ago: another one may do.
    Taken(String),
    /// It cannot.
    Refused(ApiError),
}
