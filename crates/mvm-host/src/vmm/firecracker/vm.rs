//! One running Firecracker.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::firecracker::{Action, ActionType, Change, VmState, WantedState};
use mvm_core::guest::VSOCK_PORT;
use mvm_core::name::InstanceId;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{VmExit, VmHandle};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::super::{GuestStream, SaveChanges, Saved, Vm, VmCounters, VmSpec, VmUsage, VmmError};
use super::api::Api;
use super::jail::{self, API_SOCKET, VSOCK};
use super::{build_of, cgroup, metrics, reason, save};
use crate::process::Process;
use crate::state_dir::{InstanceDir, SnapshotDir};
use crate::unix_socket;

/// How long a guest has to listen: it may have just begun to boot, emulated on a busy machine.
const LISTEN_LIMIT: Duration = Duration::from_secs(120);
/// How long one attempt to reach the guest may take, and how soon the next one follows.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(10);
/// What Firecracker calls a microVM whose vCPUs run.
const RUNNING: &str = "Running";
/// A port on which nothing ever listens in a guest: above those that are given out.
const UNUSED_PORT: u32 = u32::MAX - 1;
/// How long a resumed guest may take to handle what came while it stood still.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);
/// The longest line that Firecracker answers a `CONNECT` with.
const ANSWER_MAX: usize = 32;

/// A microVM in a Firecracker process, launched or adopted.
#[derive(Debug)]
pub(super) struct FirecrackerVm {
    handle: VmHandle,
    process: Process,
    id: InstanceId,
    uid: u32,
    dir: InstanceDir,
    root: PathBuf,
    mem_mib: u32,
    request_limit: Duration,
    /// Whether the guest runs and has dropped the connections of before it stood still. Held while
    /// that changes.
    is_settled: Mutex<bool>,
}

impl FirecrackerVm {
    pub(super) fn new(
        handle: VmHandle,
        process: Process,
        spec: &VmSpec,
        request_limit: Duration,
    ) -> Self {
        let root = jail::root_of(spec);
        Self {
            handle,
            process,
            id: spec.id.clone(),
            uid: spec.uid,
            dir: spec.dir.clone(),
            root,
            mem_mib: spec.mem_mib,
            request_limit,
            is_settled: Mutex::new(false),
        }
    }

    /// What Firecracker says that the microVM is doing.
    pub(super) async fn state(&self) -> Result<String, VmmError> {
        self.info().await.map(|info| info.state)
    }

    async fn info(&self) -> Result<Info, VmmError> {
        self.api().get("/").await
    }

    fn api(&self) -> Api {
        Api::new(self.root.join(API_SOCKET), self.request_limit)
    }

    async fn set_state(&self, state: WantedState) -> Result<(), VmmError> {
        self.api().make(&Change::State(VmState { state })).await
    }

    /// Whether a connection to the guest would last: one that is made before a guest that goes on
    /// has dropped those of before would be dropped with them.
    async fn is_settled(&self) -> Result<bool, VmmError> {
        let mut is_settled = self.is_settled.lock().await;
        if !*is_settled {
            // One that was launched or adopted runs without ever having been resumed from here.
            *is_settled = self.state().await? == RUNNING;
        }
        Ok(*is_settled)
    }

    /// Connects to the guest agent's port, if the guest is in a state to keep the connection.
    async fn try_connect(&self) -> io::Result<UnixStream> {
        if !self.is_settled().await.map_err(io::Error::other)? {
            return Err(io::Error::other("its vCPUs do not run"));
        }
        connect(&self.root.join(VSOCK), VSOCK_PORT).await
    }

    fn failed(&self, operation: &str) -> impl FnOnce(io::Error) -> VmmError {
        let operation = format!("{operation} Firecracker process {}", self.handle.pid);
        move |source| VmmError::System { operation, source }
    }
}

/// What Firecracker says of itself.
#[derive(Deserialize)]
struct Info {
    state: String,
    vmm_version: String,
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn handle(&self) -> &VmHandle {
        &self.handle
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        build_of(&self.info().await?.vmm_version)
    }

    async fn wait(&self) -> VmExit {
        let process = self.process.wait().await;
        cgroup::remove(self.uid, &self.id);
        VmExit { process, reason: reason::of(&self.dir) }
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.process.kill().await.map_err(self.failed("end"))?;
        cgroup::remove(self.uid, &self.id);
        Ok(())
    }

    async fn pause(&self) -> Result<(), VmmError> {
        let mut is_settled = self.is_settled.lock().await;
        *is_settled = false;
        self.set_state(WantedState::Paused).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let mut is_settled = self.is_settled.lock().await;
        self.set_state(WantedState::Resumed).await?;
        if timeout(SETTLE_LIMIT, settle(&self.root.join(VSOCK))).await.is_err() {
            tracing::warn!(instance = %self.id, "a resumed guest does not answer over vsock yet");
        }
        *is_settled = true;
        Ok(())
    }

    async fn save(&self, dest: &SnapshotDir, changes: SaveChanges) -> Result<Saved, VmmError> {
        let state = self.state().await?;
        if state != "Paused" {
            return Err(VmmError::Control {
                operation: "save the microVM".into(),
                message: format!("it is `{state}`, and only a paused one can be saved"),
            });
        }
        let memory_bytes = u64::from(self.mem_mib) << 20;
        let vm = save::Paused {
            api: self.api(),
            root: &self.root,
            uid: self.uid,
            pid: self.handle.pid,
            memory_bytes,
        };
        vm.save(dest, changes).await
    }

    async fn connect_guest(&self) -> Result<Box<dyn GuestStream>, VmmError> {
        let failed = |message: String| VmmError::Control {
            operation: "connect to the guest agent's port".into(),
            message,
        };
        let deadline = Instant::now() + LISTEN_LIMIT;
        loop {
            let attempt = timeout(ATTEMPT_LIMIT, self.try_connect());
            let problem = tokio::select! {
                biased;
                _ = self.process.wait() => return Err(failed("the microVM has ended".into())),
                attempt = attempt => match attempt {
                    Ok(Ok(stream)) => return Ok(Box::new(stream)),
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "the guest does not answer".to_owned(),
                },
            };
            if Instant::now() >= deadline {
                return Err(failed(problem));
            }
            sleep(ATTEMPT_INTERVAL).await;
        }
    }

    fn has_connections(&self) -> bool {
        true
    }

    async fn usage(&self) -> Result<VmUsage, VmmError> {
        self.process.usage().map_err(self.failed("measure")).map(VmUsage::from)
    }

    async fn counters(&self) -> Result<VmCounters, VmmError> {
        let flush = Action { action_type: ActionType::FlushMetrics };
        self.api().make(&Change::Action(flush)).await?;
        let mut counters = metrics::counters(jail::dir_of(&self.root)).await?;
        // What the guest's kernel has told the balloon, where there is one: numbers like any others.
        let told: Option<Map<String, Value>> = self.api().get_if_any("/balloon/statistics").await?;
        let numbers = told.into_iter().flatten().filter_map(|(name, value)| {
            let value = value.as_u64().filter(|value| *value > 0)?;
            Some((format!("balloon_statistics.{name}"), value))
        });
        counters.own.extend(numbers);
        Ok(counters)
    }

    async fn tidy(&self) -> Result<(), VmmError> {
        metrics::bound(jail::dir_of(&self.root)).await
    }
}

/// Waits until a guest that goes on has dropped the connections of before.
///
/// Saving leaves word in the guest's event queue that all connections are gone. A connection that
/// is made before the guest has read it is dropped with them. Firecracker announces that queue no
/// later than the first request for a connection, and the guest handles both in order: once it has
/// refused two requests, one after the other, it has read the word.
async fn settle(socket: &Path) {
    for _ in 0..2 {
        // A refusal is what is waited for; whatever else happens shows when the guest is reached.
        let _ = connect(socket, UNUSED_PORT).await;
    }
}

/// Opens a connection to the guest's port; Firecracker hangs up if nobody listens there.
async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = unix_socket::connect(socket).await.map_err(io::Error::other)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    while answer.last() != Some(&b'\n') && answer.len() < ANSWER_MAX {
        answer.push(
            stream.read_u8().await.map_err(|_| io::Error::other("nobody listens in the guest"))?,
        );
    }
    match answer.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(io::Error::other("Firecracker refused the connection")),
    }
}
