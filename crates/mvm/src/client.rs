//! Calls to the agent: one connection each, and one typed function per call.
//!
//! If no agent runs, it has one started by [`crate::agent`], unless the command forbids it.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::name::{
    DiskPath, InstancePath, PoolPath, RequestId, RevisionId, Selector, TenantName,
};
use mvm_core::vmm::{Accel, VmmKind};
use mvm_wire::view::{
    CollectedView, DiskView, ImageView, InstanceView, NodeView, PoolView, RecordView, SshView,
    StatsView, TenantView, VerifyView, WhyView,
};
use mvm_wire::{Accepted, Call, Connection, ConnectionError, ErrorCode, Hello, Reply};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::agent;
use crate::error::{Error, Result};
use crate::output::Ui;
use mvm_host::state_dir::StateDir;

/// How long an agent has to answer a question; calls whose answers are streams have no limit.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How often a change is asked for whose agents go away before they answer.
const ATTEMPTS: u32 = 5;
/// How often it is looked for an agent that comes back.
const AGENT_POLL: Duration = Duration::from_millis(50);

/// The VMM and accelerator that were asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The VMM, if one was named.
    pub(crate) vmm: Option<VmmKind>,
    /// The accelerator, if one was named.
    pub(crate) accel: Option<Accel>,
}

impl Wanted {
    /// Whether an agent that uses these will do.
    fn accepts(self, node: &NodeView) -> bool {
        self.vmm.is_none_or(|vmm| node.vmm == vmm) && self.accel.is_none_or(|a| node.accel == a)
    }

    fn text(self) -> String {
        let names = [self.vmm.map(|vmm| vmm.to_string()), self.accel.map(|a| a.to_string())];
        names.into_iter().flatten().collect::<Vec<_>>().join(" with ")
    }
}

/// What to do when no agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenAbsent {
    /// Start one in the background.
    Start,
    /// Report it.
    Fail,
}

/// The way to one state directory's agent.
pub(crate) struct Client {
    state_dir: StateDir,
    wanted: Wanted,
    log_filter: Option<String>,
    ui: Rc<Ui>,
    is_checked: Cell<bool>,
    /// The tenant that this command is confined to.
    scope: Option<TenantName>,
    /// Whether the agent is one of an earlier version, which understands only calls.
    is_older: Cell<bool>,
}

/// Connects to the agent's socket.
async fn connect(socket: &Path) -> Result<UnixStream, mvm_host::unix_socket::SocketError> {
    mvm_host::unix_socket::connect(socket).await
}

impl Client {
    /// For the agent of this (absolute) state directory.
    pub(crate) fn new(
        state_dir: StateDir,
        wanted: Wanted,
        log_filter: Option<String>,
        scope: Option<TenantName>,
        ui: Rc<Ui>,
    ) -> Self {
        let (is_checked, is_older) = (Cell::new(false), Cell::new(false));
        Self { state_dir, wanted, log_filter, ui, is_checked, scope, is_older }
    }

    /// The agent's state directory.
    pub(crate) fn state_dir(&self) -> &StateDir {
        &self.state_dir
    }

    /// The VMM and accelerator that were asked for.
    pub(crate) fn wanted(&self) -> Wanted {
        self.wanted
    }

    /// The log level that was asked for.
    pub(crate) fn log_filter(&self) -> Option<&str> {
        self.log_filter.as_deref()
    }

    /// The agent's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.state_dir.socket()
    }

    /// Connects to an agent that runs, and greets it; `None` if none does.
    async fn try_connect(&self) -> Result<Option<Connection>> {
        let hello = Hello::new(self.scope.clone(), u64::try_from(ANSWER_LIMIT.as_millis()).ok());
        let hello = Call::Hello(hello);
        for _ in 0..ATTEMPTS {
            let Some(mut connection) = self.connect().await? else { return Ok(None) };
            if self.is_older.get() {
                return Ok(Some(connection));
            }
            match self.answer(&mut connection, &hello).await {
                Ok(Reply::Welcome(_)) => return Ok(Some(connection)),
                // One of an earlier version does not know the word, and hangs up. It would not be confined.
                Ok(Reply::Error(error))
                    if error.code == ErrorCode::Unsupported && self.scope.is_none() =>
                {
                    self.is_older.set(true);
                }
                Ok(Reply::Error(error)) => return Err(error.into()),
                Ok(other) => return Err(unexpected(&other)),
                // It ended before it answered.
                Err(Error::Connection(error)) if is_lost(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn connect(&self) -> Result<Option<Connection>> {
        let socket = self.socket();
        match connect(&socket).await {
            Ok(stream) => Ok(Some(Connection::new(stream))),
            Err(error) => match error.kind() {
                // Reset: it ended before it accepted.
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset => Ok(None),
                kind => Err(Error::Unreachable {
                    socket,
                    source: Box::new(io::Error::new(kind, error)),
                }),
            },
        }
    }

    /// The agent's own account of itself, or `None` if no agent runs.
    pub(crate) async fn running_agent(&self) -> Result<Option<NodeView>> {
        let Some(mut connection) = self.try_connect().await? else { return Ok(None) };
        match self.answer(&mut connection, &Call::Node).await? {
            Reply::Node(node) => Ok(Some(*node)),
            Reply::Error(error) => Err(error.into()),
            other => Err(unexpected(&other)),
        }
    }

    async fn open(&self, when_absent: WhenAbsent) -> Result<Connection> {
        let no_agent = || Error::NoAgent { state_dir: self.state_dir.to_path_buf() };
        if when_absent == WhenAbsent::Fail {
            // Whatever it runs: who stops an agent need not name its VMM.
            return self.try_connect().await?.ok_or_else(no_agent);
        }
        if !self.is_checked.replace(true) {
            self.check_wanted().await?;
        }
        if let Some(connection) = self.try_connect().await? {
            return Ok(connection);
        }
        agent::start(self, &self.ui).await?;
        // Another command's agent may have come first.
        self.check_wanted().await?;
        self.try_connect().await?.ok_or_else(no_agent)
    }

    async fn check_wanted(&self) -> Result<()> {
        if self.wanted == Wanted::default() {
            return Ok(());
        }
        match self.running_agent().await? {
            Some(node) if !self.wanted.accepts(&node) => Err(Error::OtherVmm {
                runs: format!("{} with {}", node.vmm, node.accel),
                wanted: self.wanted.text(),
            }),
            _ => Ok(()),
        }
    }

    /// Sends a call whose answers the caller reads.
    pub(crate) async fn start(&self, call: &Call) -> Result<Connection> {
        let mut connection = self.open(WhenAbsent::Start).await?;
        connection.write.message(call).await?;
        Ok(connection)
    }

    /// Sends a call again whose agent went away in the middle. One that was ended on purpose is left
    /// so: the next one is waited for. One that died is replaced, as by any command.
    pub(crate) async fn start_again(&self, call: &Call) -> Result<Connection> {
        loop {
            if let Some(mut connection) = self.try_connect().await? {
                match connection.write.message(call).await {
                    Ok(()) => return Ok(connection),
                    Err(error) if is_unread(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            } else if self.socket().exists() {
                // An agent that ends in order takes its socket away.
                return self.start(call).await;
            } else if !self.state_dir.exists() {
                return Err(Error::NoAgent { state_dir: self.state_dir.to_path_buf() });
            }
            tokio::time::sleep(AGENT_POLL).await;
        }
    }

    /// Changes what is desired. An agent that went away before it answered may have made the change durable: the
    /// next one is asked the same, with the same id, which changes nothing twice.
    pub(crate) async fn submit(&self, request: Request) -> Result<Accepted> {
        let id = RequestId::from_bits(random_bits());
        let call = Call::SubmitOnce { id, change: request.clone() };
        let answered = until_answered(async || self.call(&call, WhenAbsent::Start).await).await;
        accepted(match answered {
            // An agent of an earlier version.
            Err(Error::Api(error)) if error.code == ErrorCode::Unsupported => {
                self.call(&Call::Submit(request), WhenAbsent::Start).await?
            }
            answered => answered?,
        })
    }

    /// The running instance that a selector means; one that starts is waited for.
    pub(crate) async fn locate(&self, selector: Selector) -> Result<InstancePath> {
        match self.ask(&Call::Locate { selector }).await? {
            Reply::Connected { instance } => Ok(instance),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a guest ready for an SSH client; a guest that starts is waited for.
    pub(crate) async fn prepare_ssh(&self, selector: Selector) -> Result<SshView> {
        match self.ask(&Call::Ssh { selector }).await? {
            Reply::Ssh(view) => Ok(view),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes instances that begin where another is; saving that takes as long as its memory is
    /// large.
    pub(crate) async fn fork(&self, selector: Selector, count: u32) -> Result<Accepted> {
        let id = RequestId::from_bits(random_bits());
        let call = Call::ForkOnce { id, selector, count };
        accepted(until_answered(async || self.ask(&call).await).await?)
    }

    /// Sends a question and takes its one answer, however long the agent works on it.
    async fn ask(&self, call: &Call) -> Result<Reply> {
        let mut connection = self.start(call).await?;
        match connection.read.message().await? {
            Reply::Error(error) => Err(error.into()),
            reply => Ok(reply),
        }
    }

    async fn call(&self, call: &Call, when_absent: WhenAbsent) -> Result<Reply> {
        let mut connection = self.open(when_absent).await?;
        let answered = match self.answer(&mut connection, call).await {
            Err(Error::Connection(error)) if is_unread(&error) => {
                connection = self.open(when_absent).await?;
                self.answer(&mut connection, call).await
            }
            answered => answered,
        };
        match answered? {
            Reply::Error(error) => Err(error.into()),
            reply => Ok(reply),
        }
    }

    /// Sends a question and takes its one answer, which an agent gives at once.
    async fn answer(&self, connection: &mut Connection, call: &Call) -> Result<Reply> {
        let answer = async {
            connection.write.message(call).await?;
            connection.read.reply().await
        };
        match timeout(ANSWER_LIMIT, answer).await {
            Ok(reply) => Ok(reply?),
            Err(_) => Err(Error::NoAnswer { socket: self.socket(), limit: ANSWER_LIMIT }),
        }
    }
}

/// Asks the next agent the same if one went away before it answered.
async fn until_answered(mut ask: impl AsyncFnMut() -> Result<Reply>) -> Result<Reply> {
    let mut attempts = 1;
    loop {
        match ask().await {
            Err(Error::Connection(error)) if is_lost(&error) && attempts < ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(AGENT_POLL).await;
            }
            answered => return answered,
        }
    }
}

fn accepted(reply: Reply) -> Result<Accepted> {
    match reply {
        Reply::Accepted(accepted) => Ok(accepted),
        other => Err(unexpected(&other)),
    }
}

/// Bits that nobody else draws.
fn random_bits() -> u128 {
    let mut bytes = [0; 16];
    // Without random bits, the time and the process are as good as unique.
    if getrandom::fill(&mut bytes).is_err() {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        return now << 32 | u128::from(std::process::id());
    }
    u128::from_le_bytes(bytes)
}

/// Whether the agent went away before it answered.
pub(crate) fn is_lost(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::HungUp | ConnectionError::Io(_))
}

/// Whether the agent ended before it read the call: the system says so of data that nobody took. An
/// agent that is killed may leave its socket open for a moment, in a process that it has just made.
fn is_unread(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::Io(error)
        if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
}

/// An answer of another kind than the call's.
pub(crate) fn unexpected(reply: &Reply) -> Error {
    Error::UnexpectedReply(match reply {
        Reply::Welcome(_) => "welcome",
        Reply::Done => "done",
        Reply::Accepted(_) => "accepted",
        Reply::Node(_) => "node",
        Reply::Tenants(_) => "tenants",
        Reply::Pools(_) => "pools",
        Reply::Disks(_) => "disks",
        Reply::Images(_) => "images",
        Reply::Collected(_) => "collected",
        Reply::Instances { .. } => "instances",
        Reply::Snapshot { .. } => "snapshot",
        Reply::Changed { .. } => "changed",
        Reply::Attached { .. } => "attached",
        Reply::ExecStarted { .. } => "exec_started",
        Reply::ExecDetached => "exec detached",
        Reply::Connected { .. } => "connected",
        Reply::Ssh(_) => "ssh",
        Reply::ExecExit(_) => "exec_exit",
        Reply::Stats(_) => "stats",
        Reply::Why(_) => "why",
        Reply::Verify(_) => "verify",
        Reply::Records(_) => "records",
        Reply::Error(_) => "error",
    })
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) -> $result:ty:
       $call:expr, $when:ident, $reply:pat => $value:expr;)+) => {
        impl Client {$(
            $(#[$doc])*
            pub(crate) async fn $name(&self, $($arg: $type),*) -> Result<$result> {
                match self.call(&$call, WhenAbsent::$when).await? {
                    $reply => Ok($value),
                    other => Err(unexpected(&other)),
                }
            }
        )+}
    };
}

calls! {
    /// The agent and its machine.
    node() -> NodeView: Call::Node, Start, Reply::Node(node) => *node;
    /// Tenants, all or one.
    tenants(name: Option<TenantName>) -> Vec<TenantView>:
        Call::Tenants { name }, Start, Reply::Tenants(tenants) => tenants;
    /// Pools, all, a tenant's or one.
    pools(tenant: Option<TenantName>, path: Option<PoolPath>) -> Vec<PoolView>:
        Call::Pools { tenant, path }, Start, Reply::Pools(pools) => pools;
    /// Data disks, all, a tenant's or one.
    disks(tenant: Option<TenantName>, path: Option<DiskPath>) -> Vec<DiskView>:
        Call::Disks { tenant, path }, Start, Reply::Disks(disks) => disks;
    /// Built images.
    images() -> Vec<ImageView>: Call::Images, Start, Reply::Images(images) => images;
    /// Removes a built image.
    image_remove(revision: RevisionId) -> CollectedView:
        Call::ImageRemove { revision }, Start, Reply::Collected(collected) => collected;
    /// Removes everything of images that nothing uses.
    image_collect(dry_run: bool) -> CollectedView:
        Call::ImageCollect { dry_run }, Start, Reply::Collected(collected) => collected;
    /// Instances.
    instances(selector: Selector) -> Vec<InstanceView>:
        Call::Instances { selector }, Start, Reply::Instances { instances, .. } => instances;
    /// What instances use.
    stats(selector: Selector) -> Vec<StatsView>:
        Call::Stats { selector }, Start, Reply::Stats(stats) => stats;
    /// Why an instance is in its state.
    why(selector: Selector) -> WhyView: Call::Why { selector }, Start, Reply::Why(why) => *why;
    /// The comparison of the network.
    net_verify() -> VerifyView: Call::NetVerify, Start, Reply::Verify(verify) => verify;
    /// Records as stored.
    records(prefix: String) -> Vec<RecordView>:
        Call::Records { prefix }, Start, Reply::Records(records) => records;
    /// Replaces or removes a record.
    mend_record(key: String, text: Option<String>) -> ():
        Call::RecordMend { key, text }, Start, Reply::Done => ();
    /// Ends the agent.
    stop_agent() -> (): Call::AgentStop, Fail, Reply::Done => ();
}

impl Client {
    /// Whether nobody listens on the agent's socket.
    pub(crate) async fn is_absent(&self) -> Result<bool> {
        Ok(self.try_connect().await?.is_none())
    }
}

/// The one object of an answer about one.
pub(crate) fn only<T>(mut list: Vec<T>) -> Result<T> {
    match (list.pop(), list.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(ConnectionError::HungUp.into()),
    }
}
