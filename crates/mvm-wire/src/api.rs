//! Calls and replies.

use mvm_core::admit::Request;
use mvm_core::guest::{ExecRequest, ExitStatus, ForwardTarget, TerminalSize};
use mvm_core::name::{
    DiskPath, InstancePath, PoolPath, RequestId, RevisionId, Selector, TenantName,
};
use serde::{Deserialize, Serialize};

use crate::hello::{Hello, Welcome};
use crate::view::{
    CollectedView, DiskView, ImageView, InstanceView, NodeView, PoolView, RecordView, SshView,
    StatsView, TenantView, VerifyView, WhyView,
};

/// What a caller asks of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub enum Call {
    /// Says who calls and how; the call follows at once. Reply: `welcome`, and then the call's.
    Hello(Hello),
    /// Changes what is desired. Reply: `accepted`.
    Submit(Request),
    /// The same, once: with an id that was used lately, nothing is changed, and the answer is what it was
    /// then. Reply: `accepted`.
    SubmitOnce {
        /// The id, drawn by the caller.
        id: RequestId,
        /// The request.
        change: Request,
    },
    /// The agent and its machine. Reply: `node`.
    Node,
    /// Tenants, all or one. Reply: `tenants`.
    Tenants {
        /// Only this one; an error if it does not exist.
        name: Option<TenantName>,
    },
    /// Pools, all, a tenant's or one. Reply: `pools`.
    Pools {
        /// Only this tenant's.
        tenant: Option<TenantName>,
        /// Only this one; an error if it does not exist.
        path: Option<PoolPath>,
    },
    /// Data disks, all, a tenant's or one. Reply: `disks`.
    Disks {
        /// Only this tenant's.
        tenant: Option<TenantName>,
        /// Only this one; an error if it does not exist.
        path: Option<DiskPath>,
    },
    /// Built images. Reply: `images`.
    Images,
    /// Removes a built image that nothing uses. Reply: `collected`.
    ImageRemove {
        /// The revision.
        revision: RevisionId,
    },
    /// Removes everything of images that nothing uses. Reply: `collected`.
    ImageCollect {
        /// Whether nothing is removed, but only told.
        dry_run: bool,
    },
    /// The same as `fork_once`, of an older caller. Reply: `accepted`.
    Fork {
        /// The instance.
        selector: Selector,
        /// How many.
        count: u32,
    },
    /// Makes instances that begin where another is; answered when they are asked for, once that is saved. With an
    /// id that was used lately, nothing is changed, and the answer is what it was then, or will be. Reply:
    /// `accepted`.
    ForkOnce {
        /// The id, drawn by the caller.
        id: RequestId,
        /// The instance.
        selector: Selector,
        /// How many.
        count: u32,
    },
    /// Makes a pool's base, or makes it anew; answered when new instances begin with it. Newer callers submit a
    /// request and watch. Reply: `pools`.
    WarmUp {
        /// The pool.
        pool: PoolPath,
    },
    /// Instances. Replies: `instances`, in pieces.
    Instances {
        /// Which.
        selector: Selector,
    },
    /// Instances and pools, now and after each change, until the caller hangs up.
    /// Replies: `snapshot`, or `snapshot` once and then `changed`.
    Watch {
        /// Which instances; those that are gone are left out.
        instances: Vec<InstancePath>,
        /// Which pools.
        pools: Vec<PoolPath>,
        /// Whether to watch this tenant's existence too.
        tenant: Option<TenantName>,
        /// Which data disks.
        #[serde(default)]
        disks: Vec<DiskPath>,
        /// Whether what has changed is enough; an older agent sends everything each time.
        #[serde(default)]
        changes: bool,
    },
    /// Runs a program in a guest. Replies: `exec_started`, data, `exec_exit`. The caller sends
    /// standard input as data frames and ends it with an empty one.
    Exec {
        /// Which instance; any running one of a pool will do.
        selector: Selector,
        /// The program.
        request: ExecRequest,
    },
    /// Sends a signal to this connection's exec. No reply.
    Signal {
        /// The Linux signal number.
        signal: i32,
    },
    /// Changes the size of the terminal of this connection's exec. No reply.
    Resize {
        /// The new size.
        size: TerminalSize,
    },
    /// Lets the program of this connection's exec run on without the caller. Reply:
    /// `exec_detached`.
    Detach,
    /// Looks for a running instance; one that starts is waited for. Reply: `connected`.
    Locate {
        /// Which instance; any running one of a pool will do.
        selector: Selector,
    },
    /// Makes a guest ready for an SSH client: its tenant's key may log in, and its host keys are
    /// known. Reply: `ssh`.
    Ssh {
        /// Which instance; any running one of a pool will do.
        selector: Selector,
    },
    /// Connects to a socket in a guest. Replies: `connected`, data of the kind of standard output,
    /// `done`. The caller sends data of the kind of standard input; in both directions an empty
    /// piece means that no more will come.
    Forward {
        /// Which instance; any running one of a pool will do.
        selector: Selector,
        /// The socket.
        target: ForwardTarget,
    },
    /// A log of one instance. Replies: data, then `done`.
    Logs {
        /// Which instance.
        selector: Selector,
        /// Which log.
        kind: LogKind,
        /// Whether to go on with what comes later.
        follow: bool,
        /// Only the last lines.
        tail: Option<u32>,
        /// Only what came at or after this time, in milliseconds since the Unix epoch; for logs of
        /// the main process.
        #[serde(default)]
        since_unix_ms: Option<u64>,
        /// Whether each line begins with the time at which it came; for logs of the main process.
        #[serde(default)]
        timestamps: bool,
    },
    /// Attaches to an instance's main process, from now on. Replies: `attached`, `exec_started`,
    /// data, `exec_exit`. The caller sends standard input as data frames and ends it with an empty
    /// one. Whoever hangs up leaves the process as it is.
    Attach {
        /// Which instance.
        selector: Selector,
        /// Whether to wait for a start; else the instance has to run.
        wait: bool,
    },
    /// What instances use. Reply: `stats`.
    Stats {
        /// Which instances.
        selector: Selector,
    },
    /// Why one instance is in its state. Reply: `why`.
    Why {
        /// Which instance.
        selector: Selector,
    },
    /// Compares the kernel's network state with the expected one. Reply: `verify`.
    NetVerify,
    /// The store's records under a prefix, as stored. Reply: `records`.
    Records {
        /// The beginning of the keys.
        prefix: String,
    },
    /// Replaces (or removes) one record, to mend what does not parse. Reply: `done`.
    RecordMend {
        /// The key.
        key: String,
        /// The new JSON text; the record is removed if absent.
        text: Option<String>,
    },
    /// Ends the agent; microVMs keep running. Reply: `done`.
    AgentStop,
    /// A call of a newer caller.
    #[serde(other)]
    Unknown,
}

impl Call {
    /// Which instances it is about, if it selects some.
    pub fn selector_mut(&mut self) -> Option<&mut Selector> {
        match self {
            Self::Submit(request) | Self::SubmitOnce { change: request, .. } => {
                request.selector_mut()
            }
            Self::Fork { selector, .. }
            | Self::ForkOnce { selector, .. }
            | Self::Instances { selector }
            | Self::Exec { selector, .. }
            | Self::Locate { selector }
            | Self::Ssh { selector }
            | Self::Forward { selector, .. }
            | Self::Logs { selector, .. }
            | Self::Attach { selector, .. }
            | Self::Stats { selector }
            | Self::Why { selector } => Some(selector),
            Self::Hello(_)
            | Self::Node
            | Self::Tenants { .. }
            | Self::Pools { .. }
            | Self::Disks { .. }
            | Self::Images
            | Self::ImageRemove { .. }
            | Self::ImageCollect { .. }
            | Self::WarmUp { .. }
            | Self::Watch { .. }
            | Self::Signal { .. }
            | Self::Resize { .. }
            | Self::Detach
            | Self::NetVerify
            | Self::Records { .. }
            | Self::RecordMend { .. }
            | Self::AgentStop
            | Self::Unknown => None,
        }
    }
}

/// Which log of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogKind {
    /// The main process's output if the instance has, or had, one, else the console.
    Auto,
    /// The main process's standard output.
    Stdout,
    /// The main process's standard error.
    Stderr,
    /// What mvm has to say about the main process: boots, ends, what was dropped.
    Agent,
    /// All of the three.
    All,
    /// The serial console, kept on the host.
    Console,
    /// The guest kernel's ring buffer, from the guest.
    Kernel,
    /// What the VMM itself printed.
    Vmm,
}

/// What is asked of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogQuery {
    /// Which log.
    pub kind: LogKind,
    /// Whether to go on with what comes later.
    pub follow: bool,
    /// Only the last lines.
    pub tail: Option<u32>,
    /// Only what came at or after this time, in milliseconds since the Unix epoch.
    pub since_unix_ms: Option<u64>,
    /// Whether each line begins with its time.
    pub timestamps: bool,
}

/// What an agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "body", rename_all = "snake_case")]
pub enum Reply {
    /// The caller is understood.
    Welcome(Welcome),
    /// It was done.
    Done,
    /// The wish is recorded; wait for the targets with a watch.
    Accepted(Accepted),
    /// The agent and its machine.
    Node(Box<NodeView>),
    /// Tenants.
    Tenants(Vec<TenantView>),
    /// Pools.
    Pools(Vec<PoolView>),
    /// Data disks.
    Disks(Vec<DiskView>),
    /// Built images.
    Images(Vec<ImageView>),
    /// What was removed.
    Collected(CollectedView),
    /// A piece of a list of instances, of at most
    /// [`INSTANCES_AT_ONCE`](crate::INSTANCES_AT_ONCE).
    Instances {
        /// The next ones of the list.
        instances: Vec<InstanceView>,
        /// Whether another piece follows: a list without a last piece was cut off.
        #[serde(default)]
        more: bool,
    },
    /// What a watch sees.
    Snapshot {
        /// The instances that exist.
        instances: Vec<InstanceView>,
        /// The pools that exist.
        pools: Vec<PoolView>,
        /// Whether the tenant exists.
        tenant_exists: bool,
        /// The data disks that exist.
        #[serde(default)]
        disks: Vec<DiskView>,
    },
    /// What has changed since the reply before.
    Changed {
        /// The instances that are new, or differ.
        instances: Vec<InstanceView>,
        /// The instances that are gone.
        gone: Vec<InstancePath>,
        /// All pools that exist.
        pools: Vec<PoolView>,
        /// Whether the tenant exists.
        tenant_exists: bool,
        /// All data disks that exist.
        disks: Vec<DiskView>,
    },
    /// The caller will see all that the main process does from now on.
    Attached {
        /// Of which instance.
        instance: InstancePath,
    },
    /// The program runs.
    ExecStarted {
        /// In which instance.
        instance: InstancePath,
        /// Its process id inside the guest.
        pid: u32,
    },
    /// The program ended.
    ExecExit(ExitStatus),
    /// The program runs on without the caller.
    ExecDetached,
    /// What an SSH client needs.
    Ssh(SshView),
    /// The instance runs and, if that was asked for, the connection to its socket is open.
    Connected {
        /// Which instance.
        instance: InstancePath,
    },
    /// What instances use.
    Stats(Vec<StatsView>),
    /// Why an instance is in its state.
    Why(Box<WhyView>),
    /// The comparison of the network.
    Verify(VerifyView),
    /// Records as stored.
    Records(Vec<RecordView>),
    /// The call failed.
    Error(ApiError),
}

/// An accepted request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The store's revision with the wish in it.
    pub revision: u64,
    /// Instances that the request concerns.
    pub instances: Vec<InstanceTarget>,
    /// Pools that the request concerns.
    pub pools: Vec<PoolTarget>,
    /// Data disks that the request concerns.
    #[serde(default)]
    pub disks: Vec<DiskTarget>,
    /// What to tell the person.
    pub notes: Vec<String>,
}

/// An instance and the wish to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceTarget {
    /// The instance.
    pub path: InstancePath,
    /// The generation of the wish.
    pub generation: u64,
}

/// A pool and the build to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolTarget {
    /// The pool.
    pub path: PoolPath,
    /// The generation of the build request.
    pub build_generation: u64,
    /// The generation of the request for a base.
    #[serde(default)]
    pub base_generation: u64,
}

/// A data disk and the size to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTarget {
    /// The disk.
    pub path: DiskPath,
    /// The size in MiB that it is to have.
    pub size_mib: u64,
}

/// Why a call failed: what, why, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The class of the failure.
    pub code: ErrorCode,
    /// What went wrong and why.
    pub message: String,
    /// What to type next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Classes of failures; the command line turns them into exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The agent does not know the call.
    Unsupported,
    /// The request makes no sense.
    Invalid,
    /// The object does not exist.
    NotFound,
    /// The object is not in a state that allows it.
    Conflict,
    /// A quota or capacity is reached.
    OverLimit,
    /// There is no version of the contract that both sides speak.
    Protocol,
    /// It is outside of what the caller confined itself to.
    OutOfScope,
    /// There was no answer in the time that the caller waits.
    Late,
    /// The guest does not answer, or refused.
    Guest,
    /// The program, directory or user does not exist in the guest.
    GuestNotFound,
    /// The guest refused to run the program.
    GuestDenied,
    /// A stored record does not parse.
    BadRecord,
    /// Something failed inside the agent or on its machine.
    Internal,
    /// A class of a newer agent.
    #[serde(other)]
    Unknown,
}

impl ApiError {
    /// A failure without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// A failure of the machine, or of mvm itself.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(ErrorCode::Internal, chain(error))
    }

    /// A record that does not parse, as people see it.
    pub fn bad_record(key: &str, reason: &str) -> Self {
        let message = format!(
            "the stored record `{key}` does not parse ({reason}); what it describes is left alone until it is mended"
        );
        Self::new(ErrorCode::BadRecord, message).hint(format!(
            "look at it with `mvm node record show {key}`, write a corrected one with `mvm node record set {key} FILE`"
        ))
    }

    /// The same with what to type next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// An error with all its sources, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_a_newer_caller_are_understood_as_unknown() {
        let call: Call = serde_json::from_str(r#"{"call":"teleport","to":"mars"}"#).unwrap();
        assert_eq!(call, Call::Unknown);
    }

    #[test]
    fn a_request_round_trips_inside_a_call() {
        let call = Call::Submit(Request::PoolScale {
            path: "demo/hello".parse().unwrap(),
            running: 3,
            warm: None,
            sleeping: None,
        });
        let text = serde_json::to_string(&call).unwrap();
        assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
    }
}
