//! One simulated VMM process and its guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::name::InstanceId;
use mvm_core::snapshot::VmmBuild;
use mvm_core::vmm::{Accel, ProcessEnd, VmExit, VmHandle, VmmKind};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;

use super::super::{
    Disk, GuestStream, MemoryPart, SaveChanges, Saved, Vm, VmCounters, VmSpec, VmUsage, VmmError,
};
use super::{SimFault, SimGuestControl, SimGuestService};
use crate::state_dir::SnapshotDir;

/// Bytes that each direction of the agent's port holds.
const PORT_BYTES: usize = 64 * 1024;
const SIGKILL: i32 = 9;
const SIGSEGV: i32 = 11;

/// How a machine begins.
pub(super) enum Begin {
    /// Its guest boots, which takes this long.
    Boot(Duration),
    /// It goes on, paused, where it was saved.
    GoOn(Past),
}

/// What is saved of a machine: the content of its [`SnapshotDir::device_state`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Past {
    boot_id: String,
    memory: BTreeMap<String, String>,
}

impl Past {
    /// Reads it back.
    pub(super) fn load(path: &Path) -> Result<Self, VmmError> {
        let text = std::fs::read(path).map_err(file_error(path))?;
        serde_json::from_slice(&text)
            .map_err(|error| VmmError::DiedAtStart { log: format!("{}: {error}", path.display()) })
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { path, source }
}

/// A simulated VMM process.
pub(super) struct Machine {
    handle: VmHandle,
    mem_mib: u32,
    disks: Vec<Disk>,
    control: SimGuestControl,
    booted: watch::Receiver<bool>,
    service: Option<SimGuestService>,
    /// The port takes one host connection at a time.
    port: Arc<Semaphore>,
    tasks: Mutex<JoinSet<()>>,
}

impl Machine {
    /// Starts the machine on the current runtime.
    pub(super) fn start(
        handle: VmHandle,
        spec: &VmSpec,
        begin: Begin,
        console: File,
        fault: Option<SimFault>,
        service: Option<SimGuestService>,
    ) -> Arc<Self> {
        let (boot, past) = match begin {
            Begin::Boot(time) => {
                let boot_id = format!("{}-{}", handle.host_boot_id, handle.pid);
                (Some(time), Past { boot_id, memory: BTreeMap::new() })
            }
            Begin::GoOn(past) => (None, past),
        };
        let control = SimGuestControl::new(
            spec.id.clone(),
            past.boot_id,
            past.memory,
            spec.disks.clone(),
            console,
        );
        control.set_paused(boot.is_none());
        let (booting, booted) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let command_line = spec.kernel_args.clone();
        let service = service.filter(|_| fault != Some(SimFault::NeverSaysHello));
        tasks.spawn(live(control.clone(), command_line, boot, fault, booting));
        Arc::new(Self {
            handle,
            mem_mib: spec.mem_mib,
            disks: spec.disks.clone(),
            control,
            booted,
            service,
            port: Arc::new(Semaphore::new(1)),
            tasks: Mutex::new(tasks),
        })
    }

    pub(super) fn handle(&self) -> &VmHandle {
        &self.handle
    }

    /// Ends the process with SIGKILL.
    pub(super) fn end_by_signal(&self) {
        let process = ProcessEnd::Signaled { signal: SIGKILL };
        self.control.end(VmExit { process, reason: None });
    }

    pub(super) fn id(&self) -> &InstanceId {
        self.control.id()
    }

    pub(super) fn disks(&self) -> &[Disk] {
        &self.disks
    }

    pub(super) fn exit(&self) -> Option<VmExit> {
        self.control.exit()
    }

    /// From now on what its guest writes finds no space, or does again.
    pub(super) fn set_full(&self, is_full: bool) {
        self.control.set_full(is_full);
    }

    /// Ends the machine as a power cut of its host does.
    pub(super) fn vanish(&self) {
        self.control.end(VmExit { process: ProcessEnd::Unobserved, reason: None });
    }

    /// Attaches a host connection to the port: bytes wait until the guest serves it.
    async fn connect(&self) -> Option<HostEnd> {
        let permit = tokio::select! {
            biased;
            () = self.control.ended() => return None,
            permit = Arc::clone(&self.port).acquire_owned() => permit.ok()?,
        };
        let (host, outer) = tokio::io::duplex(PORT_BYTES);
        let (host_lives, host_gone) = oneshot::channel::<()>();
        let (control, service) = (self.control.clone(), self.service.clone());
        let booted = self.booted.clone();
        let relay = async move {
            tokio::select! {
                () = serve(outer, host_gone, booted, service, control.clone()) => {}
                () = control.ended() => {}
            }
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(relay);
        Some(HostEnd { stream: host, _only: permit, _lives: host_lives })
    }
}

/// Connects one host connection with the guest's service, once there is one.
async fn serve(
    outer: DuplexStream,
    host_gone: oneshot::Receiver<()>,
    mut booted: watch::Receiver<bool>,
    service: Option<SimGuestService>,
    control: SimGuestControl,
) {
    let ready = async {
        match service {
            Some(service) if booted.wait_for(|booted| *booted).await.is_ok() => service,
            _ => std::future::pending().await,
        }
    };
    let service = tokio::select! {
        service = ready => service,
        _ = host_gone => return,
    };
    let (inner, guest) = tokio::io::duplex(PORT_BYTES);
    service(guest, control.clone());
    let (host_reads, host_writes) = tokio::io::split(outer);
    let (guest_reads, guest_writes) = tokio::io::split(inner);
    // Either end may hang up at any time: that ends the connection, nothing else.
    tokio::select! {
        _ = carry(host_reads, guest_writes, &control) => {}
        _ = carry(guest_reads, host_writes, &control) => {}
    }
}

/// Carries bytes while the vCPUs run.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    control: &SimGuestControl,
) -> io::Result<()> {
    let mut piece = vec![0; PORT_BYTES];
    loop {
        let len = from.read(&mut piece).await?;
        control.runs().await;
        if len == 0 {
            return to.shutdown().await;
        }
        to.write_all(&piece[..len]).await?;
    }
}

/// The host's end of the port, which is free for the next when this is dropped.
struct HostEnd {
    stream: DuplexStream,
    _only: OwnedSemaphorePermit,
    _lives: oneshot::Sender<()>,
}

impl AsyncRead for HostEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for HostEnd {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The guest's life until it ends by itself.
async fn live(
    control: SimGuestControl,
    command_line: String,
    boot: Option<Duration>,
    fault: Option<SimFault>,
    booted: watch::Sender<bool>,
) {
    let boot = async {
        if let Some(time) = boot {
            control.print("Linux version 6.1.0-simulated");
            control.print(&format!("Command line: console=ttyS0 {command_line}"));
            tokio::time::sleep(time).await;
            control.print("Run /init as init process");
        }
        booted.send_replace(true);
        control.ended().await;
    };
    let fail = async {
        match fault {
            Some(SimFault::PanicsAfter(after)) => {
                tokio::time::sleep(after).await;
                control.panic("Attempted to kill init! exitcode=0x0000000b");
            }
            Some(SimFault::VmmDiesAfter(after)) => {
                tokio::time::sleep(after).await;
                let process = ProcessEnd::Signaled { signal: SIGSEGV };
                control.end(VmExit { process, reason: None });
            }
            Some(SimFault::NeverSaysHello | SimFault::LaunchFails(_)) | None => {
                std::future::pending().await
            }
        }
    };
    tokio::select! {
        () = boot => {}
        () = fail => {}
    }
}

/// A hold on a machine; dropping it leaves the machine running.
pub(super) struct SimVm {
    machine: Arc<Machine>,
}

impl SimVm {
    pub(super) fn new(machine: Arc<Machine>) -> Self {
        Self { machine }
    }

    fn alive(&self, operation: &str) -> Result<&SimGuestControl, VmmError> {
        match self.machine.exit() {
            None => Ok(&self.machine.control),
            Some(_) => Err(self.gone(operation)),
        }
    }

    fn gone(&self, operation: &str) -> VmmError {
        VmmError::Control {
            operation: operation.to_owned(),
            message: format!("simulated process {} has ended", self.machine.handle.pid),
        }
    }
}

/// The one simulator that there is.
pub(super) fn build() -> VmmBuild {
    let (version, cpu) = ("1".to_owned(), String::new());
    VmmBuild { vmm: VmmKind::Sim, version, accel: Accel::Tcg, cpu }
}

#[async_trait]
impl Vm for SimVm {
    fn handle(&self) -> &VmHandle {
        &self.machine.handle
    }

    async fn build(&self) -> Result<VmmBuild, VmmError> {
        Ok(build())
    }

    async fn wait(&self) -> VmExit {
        self.machine.control.wait().await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.machine.end_by_signal();
        Ok(())
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.alive("pause")?.set_paused(true);
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.alive("resume")?.set_paused(false);
        Ok(())
    }

    async fn lacks_space(&self) -> Result<bool, VmmError> {
        Ok(self.alive("ask")?.lacks_space())
    }

    async fn save(&self, dest: &SnapshotDir, _changes: SaveChanges) -> Result<Saved, VmmError> {
        let control = self.alive("save")?;
        if !control.is_paused() || control.lacks_space() {
            return Err(VmmError::Control {
                operation: "save the microVM".into(),
                message: "it is `running`, and only a paused one can be saved".into(),
            });
        }
        let past = Past { boot_id: control.boot_id().to_owned(), memory: control.memory() };
        let path = dest.device_state();
        let text =
            serde_json::to_vec(&past).map_err(io::Error::other).map_err(file_error(&path))?;
        std::fs::write(&path, text).map_err(file_error(&path))?;
        let path = dest.memory_image();
        let image = File::create_new(&path).map_err(file_error(&path))?;
        image.set_len(u64::from(self.machine.mem_mib) << 20).map_err(file_error(&path))?;
        Ok(Saved { part: MemoryPart::Whole, bytes: 0, written: Vec::new() })
    }

    async fn connect_guest(&self) -> Result<Box<dyn GuestStream>, VmmError> {
        match self.machine.connect().await {
            Some(stream) => Ok(Box::new(stream)),
            None => Err(self.gone("connect to the guest agent's port")),
        }
    }

    async fn usage(&self) -> Result<VmUsage, VmmError> {
        if self.machine.exit().is_some() {
            return Err(self.gone("measure"));
        }
        // A guest that has booted and idles: a hundredth of a CPU and a third of its memory.
        let uptime_ms = u64::try_from(self.machine.control.uptime().as_millis());
        Ok(VmUsage {
            cpu_ms: uptime_ms.unwrap_or(u64::MAX) / 100,
            rss_kib: u64::from(self.machine.mem_mib) * 1024 / 3,
            ..VmUsage::default()
        })
    }

    async fn counters(&self) -> Result<VmCounters, VmmError> {
        let disk_io = self.alive("count")?.disk_io();
        Ok(VmCounters { disk_io, ..VmCounters::default() })
    }

    async fn tidy(&self) -> Result<(), VmmError> {
        self.alive("tidy").map(drop)
    }
}
