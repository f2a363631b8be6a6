//! What a simulated guest can do to its microVM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mvm_core::name::InstanceId;
use mvm_core::vmm::{DiskIo, ProcessEnd, ShutdownReason, VmExit};
use tokio::io::DuplexStream;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::guest::sim::{SimFiles, SimMemory};
use crate::vmm::Disk;

/// The guest's side of the agent's port. It is called once for each host connection, on a tokio
/// runtime, must not block, and ends what it starts when its stream ends.
pub type SimGuestService = Arc<dyn Fn(DuplexStream, SimGuestControl) + Send + Sync>;

/// A simulated guest's power switch, console and identity. Clones are the same guest.
#[derive(Debug, Clone)]
pub struct SimGuestControl {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    id: InstanceId,
    boot_id: String,
    started: Instant,
    console: File,
    memory: SimMemory,
    disks: Vec<Disk>,
    disk_io: Mutex<DiskIo>,
    is_paused: watch::Sender<bool>,
    /// Whether the host's disk is full for it.
    finds_no_space: AtomicBool,
    /// Whether it stands still because of that.
    lacks_space: AtomicBool,
    exit: watch::Sender<Option<VmExit>>,
}

impl SimGuestControl {
    pub(super) fn new(
        id: InstanceId,
        boot_id: String,
        memory: BTreeMap<String, String>,
        disks: Vec<Disk>,
        console: File,
    ) -> Self {
        let shared = Shared {
            id,
            boot_id,
            started: Instant::now(),
            console,
            memory: Arc::new(Mutex::new(memory)),
            disks,
            disk_io: Mutex::default(),
            is_paused: watch::Sender::new(false),
            finds_no_space: AtomicBool::new(false),
            lacks_space: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Notes something in the guest's memory, which is saved and restored with it.
    pub fn remember(&self, name: &str, value: &str) {
        let mut memory = self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.insert(name.to_owned(), value.to_owned());
    }

    /// The guest's files: on its microVM's disks, and what it holds back in its memory.
    pub fn files(&self) -> SimFiles {
        // As the agent attaches them: the image, the writable layer, data disks.
        let layer = self.shared.disks.get(1).map(|disk| disk.path.clone());
        let data = self.shared.disks.iter().skip(2).map(|disk| disk.path.clone()).collect();
        SimFiles::new(Arc::clone(&self.shared.memory), layer, data)
    }

    /// Has the guest write so many bytes to a disk, durably.
    pub fn write_to_disk(&self, bytes: u64) {
        let mut io = self.shared.disk_io.lock().unwrap_or_else(PoisonError::into_inner);
        io.writes += 1;
        io.flushes += 1;
        io.written_bytes += bytes;
    }

    pub(super) fn disk_io(&self) -> DiskIo {
        *self.shared.disk_io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest's memory holds under a name.
    pub fn recall(&self, name: &str) -> Option<String> {
        self.memory().get(name).cloned()
    }

    /// Whether both are the same microVM.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    pub(super) fn memory(&self) -> BTreeMap<String, String> {
        self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.shared.is_paused.borrow()
    }

    /// Stops the vCPUs, or lets them run: up to the next write, if that finds no space.
    pub(super) fn set_paused(&self, paused: bool) {
        let lacks_space = !paused && self.shared.finds_no_space.load(Ordering::SeqCst);
        self.shared.lacks_space.store(lacks_space, Ordering::SeqCst);
        self.shared.is_paused.send_replace(paused || lacks_space);
    }

    /// From now on what the guest writes finds no space on the host, or does again.
    pub(super) fn set_full(&self, is_full: bool) {
        self.shared.finds_no_space.store(is_full, Ordering::SeqCst);
        if is_full && !self.is_paused() {
            self.set_paused(false);
        }
    }

    pub(super) fn lacks_space(&self) -> bool {
        self.shared.lacks_space.load(Ordering::SeqCst)
    }

    /// Waits while the vCPUs are paused.
    pub(super) async fn runs(&self) {
        let mut paused = self.shared.is_paused.subscribe();
        // The sender lives in `self`, so the channel cannot close first.
        let _ = paused.wait_for(|paused| !paused).await;
    }

    /// The instance.
    pub fn id(&self) -> &InstanceId {
        &self.shared.id
    }

    /// The guest kernel's boot id.
    pub fn boot_id(&self) -> &str {
        &self.shared.boot_id
    }

    /// Time since the microVM was started.
    pub fn uptime(&self) -> Duration {
        self.shared.started.elapsed()
    }

    /// Writes a line to the serial console, with the kernel's time stamp.
    pub fn print(&self, line: &str) {
        let line = format!("[{:12.6}] {line}\r\n", self.uptime().as_secs_f64());
        if let Err(error) = (&self.shared.console).write_all(line.as_bytes()) {
            tracing::warn!(instance = %self.shared.id, %error, "cannot write a console");
        }
    }

    /// Powers the microVM off.
    pub fn power_off(&self) {
        self.stop("reboot: Power down", ShutdownReason::GuestShutdown);
    }

    /// Resets the microVM, which ends it.
    pub fn reset(&self) {
        self.stop("reboot: Restarting system", ShutdownReason::GuestReset);
    }

    /// Lets the guest's kernel panic.
    pub fn panic(&self, message: &str) {
        self.stop(&format!("Kernel panic - not syncing: {message}"), ShutdownReason::GuestPanic);
    }

    /// Waits until the microVM has ended.
    pub async fn ended(&self) {
        self.wait().await;
    }

    fn stop(&self, last_line: &str, reason: ShutdownReason) {
        if self.exit().is_none() {
            self.print(last_line);
            self.end(VmExit { process: ProcessEnd::Exited { code: 0 }, reason: Some(reason) });
        }
    }

    /// Ends the microVM; only the first cause counts.
    pub(super) fn end(&self, exit: VmExit) {
        self.shared.exit.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(exit);
            first
        });
    }

    pub(super) fn exit(&self) -> Option<VmExit> {
        *self.shared.exit.borrow()
    }

    pub(super) async fn wait(&self) -> VmExit {
        let mut exit = self.shared.exit.subscribe();
        // The sender lives in `self`, so the channel cannot close first.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|ended| *ended);
        ended.unwrap_or(VmExit { process: ProcessEnd::Unobserved, reason: None })
    }
}
