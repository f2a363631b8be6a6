//! The verbs: one for each call and request that a client may send, or several where an option makes
//! another habit of it.

use std::fmt;

use mvm_core::admit::Request;
use mvm_wire::{Call, LogKind};

use crate::combination::listed;

listed! {
    /// What a client asks for.
    pub enum Verb {
        /// `mvm start`, `mvm wake`.
        Start = "start, wake",
        /// `mvm stop`.
        Stop = "stop",
        /// `mvm kill`, `mvm stop --grace 0`.
        Kill = "kill, stop --grace 0",
        /// `mvm restart`.
        Restart = "restart",
        /// `mvm warm`.
        Warm = "warm",
        /// `mvm sleep`.
        Sleep = "sleep",
        /// `mvm sleep --force`.
        SleepForce = "sleep --force",
        /// `mvm instance pin`.
        Pin = "instance pin",
        /// `mvm instance unpin`.
        Unpin = "instance unpin",
        /// `mvm rm`.
        Destroy = "rm",
        /// `mvm rm --force`.
        DestroyForce = "rm --force",
        /// `mvm fork`.
        Fork = "fork",
        /// `mvm exec`, `mvm cp`.
        Exec = "exec, cp",
        /// Looking for a running instance, as `mvm forward` does.
        Locate = "locate",
        /// `mvm ssh`.
        Ssh = "ssh",
        /// `mvm forward`, and each connection to a published port.
        Forward = "forward",
        /// `mvm attach`.
        Attach = "attach",
        /// Attaching before a start, as `mvm run` does.
        AttachEarly = "attach before a start",
        /// `mvm logs`.
        Logs = "logs",
        /// `mvm logs --follow`.
        LogsFollow = "logs --follow",
        /// `mvm logs --source kernel`.
        LogsKernel = "logs --source kernel",
        /// `mvm stats`.
        Stats = "stats",
        /// `mvm why`.
        Why = "why",
        /// `mvm ps`.
        Instances = "ps",
        /// Waiting for an instance, as most verbs do.
        Watch = "waiting",
        /// `mvm instance create`.
        Create = "instance create",
        /// `mvm instance create --start`, `mvm run`.
        CreateStarted = "instance create --start",
        /// `mvm pool create` of a pool that is there.
        PoolCreate = "pool create (again)",
        /// `mvm pool build`.
        PoolBuild = "pool build",
        /// `mvm pool update`.
        PoolUpdate = "pool update",
        /// `mvm pool rollback`.
        PoolRollback = "pool rollback",
        /// `mvm pool scale --running 1`.
        ScaleToOne = "pool scale --running 1",
        /// `mvm pool scale --running 0`.
        ScaleToNone = "pool scale --running 0",
        /// The `--ready` of `mvm pool warm-up`.
        PoolReady = "pool warm-up --ready",
        /// `mvm pool policy`.
        PoolPolicy = "pool policy",
        /// `mvm pool warm-up`.
        WarmUp = "pool warm-up",
        /// `mvm pool list`, `mvm pool info`.
        Pools = "pool list, info",
        /// `mvm pool destroy`.
        PoolDestroy = "pool destroy",
        /// `mvm pool destroy --force`.
        PoolDestroyForce = "pool destroy --force",
        /// `mvm tenant create` of a tenant that is there.
        TenantCreate = "tenant create (again)",
        /// `mvm tenant update`.
        TenantUpdate = "tenant update",
        /// `mvm tenant update --subnet`.
        TenantMove = "tenant update --subnet",
        /// `mvm tenant list`, `mvm tenant info`.
        Tenants = "tenant list, info",
        /// `mvm tenant destroy`.
        TenantDestroy = "tenant destroy",
        /// `mvm tenant destroy --force`.
        TenantDestroyForce = "tenant destroy --force",
        /// `mvm disk create` of another disk.
        DiskCreate = "disk create (another)",
        /// `mvm disk resize` of the instance's disk.
        DiskResize = "disk resize",
        /// `mvm disk rm` of the instance's disk.
        DiskRemove = "disk rm",
        /// `mvm disk list`, `mvm disk info`.
        Disks = "disk list, info",
        /// `mvm up` with a document in which one instance of the pool runs.
        Up = "up",
        /// `mvm down` with the same document.
        Down = "down",
        /// `mvm image list`.
        Images = "image list",
        /// `mvm image rm` of the image that the instance's neighbours use.
        ImageRemove = "image rm (in use)",
        /// `mvm image gc`.
        ImageCollect = "image gc",
        /// `mvm node info`.
        Node = "node info",
        /// `mvm net verify`.
        NetVerify = "net verify",
        /// `mvm node record show`.
        Records = "node record show",
        /// `mvm node record set` of a record that is in order.
        RecordMend = "node record set (in order)",
        /// `mvm agent stop`.
        AgentStop = "agent stop",
        /// A call that makes no sense by itself, or of a newer client.
        Unknown = "an unknown call",
    }
}

/// What sort of call a verb is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It changes nothing, whatever the answer is.
    Question,
    /// It needs the guest, which is woken for it.
    Use,
    /// It changes what is desired, or the agent.
    Act,
}

impl Verb {
    /// What sort of call it is.
    pub fn kind(self) -> Kind {
        match self {
            Self::Logs
            | Self::LogsFollow
            | Self::Stats
            | Self::Why
            | Self::Instances
            | Self::Watch
            | Self::AttachEarly
            | Self::Pools
            | Self::Tenants
            | Self::Disks
            | Self::Images
            | Self::Node
            | Self::NetVerify
            | Self::Records
            | Self::Unknown => Kind::Question,
            Self::Exec
            | Self::Locate
            | Self::Ssh
            | Self::Forward
            | Self::Attach
            | Self::LogsKernel => Kind::Use,
            _ => Kind::Act,
        }
    }
}

/// The row of a call. Requests that only the agent itself makes, on behalf of another verb, have none.
pub fn verb_of(call: &Call) -> Option<Verb> {
    Some(match call {
        Call::Submit(request) | Call::SubmitOnce { change: request, .. } => {
            return verb_of_request(request);
        }
        Call::Node => Verb::Node,
        Call::Tenants { .. } => Verb::Tenants,
        Call::Pools { .. } => Verb::Pools,
        Call::Disks { .. } => Verb::Disks,
        Call::Images => Verb::Images,
        Call::ImageRemove { .. } => Verb::ImageRemove,
        Call::ImageCollect { .. } => Verb::ImageCollect,
        Call::Fork { .. } | Call::ForkOnce { .. } => Verb::Fork,
        Call::WarmUp { .. } => Verb::WarmUp,
        Call::Instances { .. } => Verb::Instances,
        Call::Watch { .. } => Verb::Watch,
        Call::Exec { .. } => Verb::Exec,
        Call::Locate { .. } => Verb::Locate,
        Call::Ssh { .. } => Verb::Ssh,
        Call::Forward { .. } => Verb::Forward,
        Call::Logs { kind: LogKind::Kernel, .. } => Verb::LogsKernel,
        Call::Logs { follow: true, .. } => Verb::LogsFollow,
        Call::Logs { .. } => Verb::Logs,
        Call::Attach { wait: true, .. } => Verb::AttachEarly,
        Call::Attach { .. } => Verb::Attach,
        Call::Stats { .. } => Verb::Stats,
        Call::Why { .. } => Verb::Why,
        Call::NetVerify => Verb::NetVerify,
        Call::Records { .. } => Verb::Records,
        Call::RecordMend { .. } => Verb::RecordMend,
        Call::AgentStop => Verb::AgentStop,
        Call::Hello(_)
        | Call::Signal { .. }
        | Call::Resize { .. }
        | Call::Detach
        | Call::Unknown => Verb::Unknown,
    })
}

/// The same of a request.
pub fn verb_of_request(request: &Request) -> Option<Verb> {
    Some(match request {
        Request::TenantCreate { .. } => Verb::TenantCreate,
        Request::TenantUpdate { .. } => Verb::TenantUpdate,
        Request::TenantMove { .. } => Verb::TenantMove,
        Request::TenantDestroy { force: false, .. } => Verb::TenantDestroy,
        Request::TenantDestroy { .. } => Verb::TenantDestroyForce,
        Request::PoolCreate { .. } => Verb::PoolCreate,
        Request::PoolBuild { .. } => Verb::PoolBuild,
        Request::PoolUpdate { .. } => Verb::PoolUpdate,
        Request::PoolRollback { .. } => Verb::PoolRollback,
        Request::PoolScale { running: 0, .. } => Verb::ScaleToNone,
        Request::PoolScale { .. } => Verb::ScaleToOne,
        Request::PoolDestroy { force: false, .. } => Verb::PoolDestroy,
        Request::PoolDestroy { .. } => Verb::PoolDestroyForce,
        Request::PoolReady { .. } => Verb::PoolReady,
        Request::PoolPolicy { .. } => Verb::PoolPolicy,
        Request::InstanceCreate { start: false, .. } => Verb::Create,
        Request::InstanceCreate { .. } => Verb::CreateStarted,
        Request::InstanceStart { .. } => Verb::Start,
        Request::InstanceStop { grace_ms: 0, .. } => Verb::Kill,
        Request::InstanceStop { .. } => Verb::Stop,
        Request::InstanceWarm { .. } => Verb::Warm,
        Request::InstanceSleep { hooks_ms: 0, .. } => Verb::SleepForce,
        Request::InstanceSleep { .. } => Verb::Sleep,
        Request::InstancePin { pinned: true, .. } => Verb::Pin,
        Request::InstancePin { .. } => Verb::Unpin,
        Request::InstanceRestart { .. } => Verb::Restart,
        Request::InstanceDestroy { force: false, .. } => Verb::Destroy,
        Request::InstanceDestroy { .. } => Verb::DestroyForce,
        Request::DiskCreate { .. } => Verb::DiskCreate,
        Request::DiskResize { .. } => Verb::DiskResize,
        Request::DiskRemove { .. } => Verb::DiskRemove,
        Request::Apply { .. } => Verb::Up,
        Request::Remove { .. } => Verb::Down,
        Request::PoolWarmUp { .. } => Verb::WarmUp,
    })
}
