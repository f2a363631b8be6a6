//! The state machine behind the API: what is allowed before a microVM starts and after it.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Write};
use std::os::unix::net::UnixListener;

use mvm_core::firecracker::{
    Action, ActionType, Change, CreateSnapshot, HugePages, LoadSnapshot, MachineConfig,
    SnapshotType, WantedState,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::guest::{Guest, GuestParts};
use crate::http::Asked;
use crate::memory::Memory;
use crate::request::Request;

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";
const MAX_VCPUS: u8 = 32;
/// The longest command line of a kernel that fits, in bytes.
const COMMAND_LINE_MAX: usize = 2047;
const ELF: &[u8] = b"\x7fELF";
const SECTOR: u64 = 512;

/// What is answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    /// Whether the process ends after it.
    pub(crate) is_last: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, body: String) -> Self {
        Self { status, body, is_last: false }
    }

    fn refusal(fault: &str) -> Self {
        Self::new(400, json!({ "fault_message": fault }).to_string())
    }
}

/// Why something was not done.
enum Refusal {
    /// And all is as it was.
    Fault(String),
    /// And Firecracker gives up.
    Fatal(String),
}

impl From<String> for Refusal {
    fn from(fault: String) -> Self {
        Self::Fault(fault)
    }
}

/// What has become of the microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    NotStarted,
    Running,
    Paused,
}

/// What a saved microVM is made of, besides its memory.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Devices {
    mem_mib: usize,
    vcpus: u8,
    /// Path and whether it is only read, in the guest's order.
    drives: Vec<(String, String, bool)>,
    interface: Option<(String, Option<String>)>,
    vsock: Option<String>,
    /// How often a balloon asks its guest, in seconds, if there is one.
    balloon_statistics_s: Option<u16>,
}

/// A Firecracker with at most one microVM.
pub(crate) struct Machine {
    id: String,
    version: String,
    phase: Phase,
    config: MachineConfig,
    kernel: Option<String>,
    devices: Devices,
    listener: Option<UnixListener>,
    metrics: Option<File>,
    is_configured: bool,
    guest: Option<Guest>,
}

impl Machine {
    pub(crate) fn new(id: &str, version: &str) -> Self {
        Self {
            id: id.to_owned(),
            version: version.to_owned(),
            phase: Phase::NotStarted,
            config: MachineConfig {
                vcpu_count: 1,
                mem_size_mib: 128,
                smt: false,
                cpu_template: None,
                track_dirty_pages: false,
                huge_pages: HugePages::None,
            },
            kernel: None,
            devices: Devices::default(),
            listener: None,
            metrics: None,
            is_configured: false,
            guest: None,
        }
    }

    /// Carries out a request.
    pub(crate) fn answer(&mut self, asked: &Asked) -> Answer {
        if !["GET", "PUT", "PATCH"].contains(&asked.method.as_str()) {
            let text = "{ \"error\": \"Invalid HTTP Method: Unsupported HTTP method.\n\
                        All previous unanswered requests will be dropped.\" }";
            return Answer::new(400, text.to_owned());
        }
        let done = Request::of(asked).map_err(Refusal::Fault).and_then(|it| self.carry_out(it));
        match done {
            Ok(Some(body)) => Answer::new(200, body.to_string()),
            Ok(None) => Answer::new(204, String::new()),
            Err(Refusal::Fault(fault)) => Answer::refusal(&fault),
            Err(Refusal::Fatal(fault)) => Answer { is_last: true, ..Answer::refusal(&fault) },
        }
    }

    fn carry_out(&mut self, request: Request) -> Result<Option<serde_json::Value>, Refusal> {
        let is_early = self.phase == Phase::NotStarted;
        match request {
            Request::Describe => Ok(Some(self.describe())),
            Request::Version => Ok(Some(json!({ "firecracker_version": self.version }))),
            Request::BalloonStatistics if !is_early => self.balloon_statistics().map(Some),
            Request::BalloonStatistics => Err(Refusal::Fault(BEFORE_START.into())),
            Request::GetMachine => Ok(Some(self.machine())),
            Request::Change(change) => self.change(change).map(|()| None),
        }
    }

    fn change(&mut self, change: Change) -> Result<(), Refusal> {
        let is_early = self.phase == Phase::NotStarted;
        match change {
            Change::State(_) | Change::Save(_) if is_early => {
                return Err(Refusal::Fault(BEFORE_START.into()));
            }
            Change::State(wanted) => match wanted.state {
                WantedState::Paused => self.pause(),
                WantedState::Resumed => self.resume(),
            },
            Change::Save(save) => self.save(&save)?,
            Change::Action(Action { action_type }) => self.act(action_type)?,
            _ if !is_early => return Err(Refusal::Fault(AFTER_START.into())),
            Change::Load(load) => self.load(&load)?,
            settings => self.configure(settings)?,
        }
        Ok(())
    }

    fn describe(&self) -> serde_json::Value {
        let state = match self.phase {
            Phase::NotStarted => "Not started",
            Phase::Running => "Running",
            Phase::Paused => "Paused",
        };
        json!({
            "id": self.id, "state": state, "vmm_version": self.version, "app_name": "Firecracker",
        })
    }

    /// The guest has no driver that would tell more.
    fn balloon_statistics(&self) -> Result<serde_json::Value, Refusal> {
        let failed = |problem: &str| Refusal::Fault(format!("Internal VMM error: {problem}"));
        match self.devices.balloon_statistics_s {
            None => Err(failed("Failed perform action on device: Device not found")),
            Some(0) => Err(failed("Balloon: Received stats query when stats are disabled.")),
            Some(_) => Ok(json!({
                "target_pages": 0, "actual_pages": 0, "target_mib": 0, "actual_mib": 0,
            })),
        }
    }

    fn machine(&self) -> serde_json::Value {
        json!({
            "vcpu_count": self.config.vcpu_count, "mem_size_mib": self.config.mem_size_mib,
            "smt": self.config.smt, "track_dirty_pages": self.config.track_dirty_pages,
            "huge_pages": "None",
        })
    }

    /// What can be said before the start.
    fn configure(&mut self, change: Change) -> Result<(), String> {
        match change {
            Change::Machine(config) => {
                if !(1..=MAX_VCPUS).contains(&config.vcpu_count) {
                    return Err(
                        "Machine config error: The number of vCPUs must be greater than 0, \
                                less than 32 and must be 1 or an even number if SMT is enabled."
                            .into(),
                    );
                }
                if config.mem_size_mib == 0 {
                    return Err(
                        "Machine config error: The memory size (MiB) is either 0, or not a \
                                multiple of the configured page size."
                            .into(),
                    );
                }
                self.config = config;
            }
            Change::BootSource(source) => {
                let opened = |what: &str| {
                    let what = what.to_owned();
                    move |error: io::Error| format!("Boot source error: The {what} {error}")
                };
                File::open(&source.kernel_image_path)
                    .map_err(opened("kernel file cannot be opened:"))?;
                if let Some(initrd) = &source.initrd_path {
                    let what =
                        "initrd file cannot be opened due to invalid path or invalid permissions.";
                    File::open(initrd).map_err(opened(what))?;
                }
                if source.boot_args.is_some_and(|line| line.len() > COMMAND_LINE_MAX) {
                    return Err("Boot source error: The kernel command line is invalid: Invalid \
                                cmdline capacity provided."
                        .into());
                }
                self.kernel = Some(source.kernel_image_path);
            }
            Change::Drive(drive) => {
                let path = drive.path_on_host.unwrap_or_default();
                let is_read_only = drive.is_read_only.unwrap_or(false);
                open_drive(&path, is_read_only).map_err(|error| {
                    format!(
                        "Drive config error: Unable to create the virtio block device: Virtio \
                         backend error: Error manipulating the backing file: {error} {path}"
                    )
                })?;
                self.devices.drives.push((drive.drive_id, path, is_read_only));
            }
            Change::Network(network) => {
                self.devices.interface = Some((network.iface_id, network.guest_mac));
            }
            Change::Vsock(vsock) => {
                let listener = listen(&vsock.uds_path).map_err(|error| {
                    format!(
                        "Vsock config error: Cannot create backend for vsock device: Error binding \
                         to the host-side Unix socket: {error}"
                    )
                })?;
                self.listener = Some(listener);
                self.devices.vsock = Some(vsock.uds_path);
            }
            Change::Balloon(balloon) if balloon.amount_mib as usize > self.config.mem_size_mib => {
                return Err("Balloon config error: Amount of pages requested is too large.".into());
            }
            Change::Balloon(balloon) => {
                self.devices.balloon_statistics_s = Some(balloon.stats_polling_interval_s);
            }
            Change::Metrics(metrics) => {
                // Metrics are of Firecracker, not of a microVM: one can still be loaded.
                return self
                    .write_metrics_to(&metrics.metrics_path)
                    .map_err(|problem| format!("Metrics error: {problem}"));
            }
            _ => {}
        }
        self.is_configured = true;
        Ok(())
    }

    fn act(&mut self, action: ActionType) -> Result<(), String> {
        match (action, self.phase) {
            (ActionType::InstanceStart, Phase::NotStarted) => self.start(),
            (ActionType::InstanceStart, _) => Err(AFTER_START.into()),
            (_, Phase::NotStarted) => Err(BEFORE_START.into()),
            (ActionType::FlushMetrics, _) => self.flush_metrics(),
            (ActionType::SendCtrlAltDel, _) => Ok(()),
        }
    }

    /// Has what is counted written to a file.
    pub(crate) fn write_metrics_to(&mut self, path: &str) -> Result<(), String> {
        let bad = "Cannot initialize the metrics system due to bad user input:";
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|error| format!("{bad} {error}"))?;
        if self.metrics.is_some() {
            return Err(format!("{bad} Reinitialization of metrics not allowed."));
        }
        self.metrics = Some(file);
        Ok(())
    }

    /// Writes by how much each counter has grown.
    fn flush_metrics(&mut self) -> Result<(), String> {
        let (Some(file), Some(guest)) = (&mut self.metrics, &self.guest) else { return Ok(()) };
        let io = guest.take_writes();
        let line = json!({
            "utc_timestamp_ms": 0,
            "block": {
                "write_count": io.count, "write_bytes": io.bytes, "flush_count": io.flushes,
                "read_agg": { "min_us": 0, "max_us": 0, "sum_us": 0 },
            },
        });
        writeln!(file, "{line}").map_err(|error| error.to_string())
    }

    fn start(&mut self) -> Result<(), String> {
        let failed = |problem: &str| format!("Start microvm error: {problem}");
        let Some(kernel) = &self.kernel else {
            return Err(failed("Cannot start microvm without kernel configuration."));
        };
        if !fs::read(kernel).is_ok_and(|content| content.starts_with(ELF)) {
            return Err(failed(
                "System configuration error: Cannot load kernel due to invalid memory \
                 configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel \
                 image: Kernel Loader: Invalid Elf magic number",
            ));
        }
        self.devices.mem_mib = self.config.mem_size_mib;
        self.devices.vcpus = self.config.vcpu_count;
        let memory = Memory::new(self.devices.mem_mib << 20);
        let memory = memory.map_err(|error| failed(&error.to_string()))?;
        let guest = Guest::new(memory, self.parts());
        if let Some(listener) = self.listener.take() {
            guest.listen(listener);
        }
        guest.boot();
        self.guest = Some(guest);
        self.phase = Phase::Running;
        Ok(())
    }

    fn parts(&self) -> GuestParts {
        let drives = self.devices.drives.iter().zip('a'..);
        let describe = |((_, path, is_read_only), letter): (&(String, String, bool), char)| {
            let sectors = fs::metadata(path).map_or(0, |metadata| metadata.len() / SECTOR);
            format!("vd{letter} {sectors} {}", u8::from(*is_read_only))
        };
        let disks: Vec<String> = drives.map(describe).collect();
        let mac = self.devices.interface.as_ref().and_then(|(_, mac)| mac.clone());
        GuestParts { disks: disks.join(" "), mac: mac.unwrap_or_default() }
    }

    fn pause(&mut self) {
        self.phase = Phase::Paused;
        if let Some(guest) = &self.guest {
            guest.pause();
        }
    }

    fn resume(&mut self) {
        self.phase = Phase::Running;
        if let Some(guest) = &self.guest {
            guest.resume();
        }
    }

    fn save(&self, save: &CreateSnapshot) -> Result<(), String> {
        let failed = |problem: &str| format!("Create snapshot error: {problem}");
        let Some(guest) = self.guest.as_ref().filter(|_| self.phase == Phase::Paused) else {
            return Err(failed(
                "Cannot save the microVM state: Operation not allowed: save/restore unavailable \
                 while running",
            ));
        };
        let text = json!(self.devices).to_string();
        let content = format!("{}\n{text}", digest(&text));
        fs::write(&save.snapshot_path, content).map_err(|error| {
            failed(&format!("Cannot perform open on the snapshot backing file: {error}"))
        })?;
        // What is there is written to, not replaced.
        let memory =
            File::options().write(true).create(true).truncate(false).open(&save.mem_file_path);
        let written = memory.and_then(|mut file| match save.snapshot_type {
            SnapshotType::Full => guest.save(&mut file),
            // Who takes a difference has the memory already.
            SnapshotType::Diff => Ok(()),
        });
        written.map_err(|error| failed(&format!("Cannot write memory file: {error}")))?;
        guest.leave_word_of_a_reset();
        Ok(())
    }

    fn load(&mut self, load: &LoadSnapshot) -> Result<(), Refusal> {
        const FAILED: &str = "Load snapshot error:";
        const STATE: &str = "Load snapshot error: Failed to restore from snapshot: Failed to get \
                             snapshot state from file:";
        const MEMORY: &str = "Load snapshot error: Failed to restore from snapshot: Failed to load \
                              guest memory: Error creating guest memory from file:";
        if self.is_configured {
            return Err(Refusal::Fault(format!(
                "{FAILED} Loading a microVM snapshot not allowed after configuring boot-specific \
                 resources."
            )));
        }
        let fatal = |problem: String| Refusal::Fatal(problem);
        let content = fs::read(&load.snapshot_path)
            .map_err(|error| fatal(format!("{STATE} Failed to open snapshot file: {error}")))?;
        self.devices = understood(&content).map_err(|problem| {
            fatal(format!("{STATE} Failed to load snapshot state from file: {problem}"))
        })?;
        let is_known = |id: &str| {
            self.devices.interface.as_ref().is_some_and(|(known, _)| known.as_str() == id)
        };
        if load.network_overrides.iter().any(|network| !is_known(&network.iface_id)) {
            return Err(fatal(format!("{STATE} Unknown Network Device.")));
        }
        let bytes = self.devices.mem_mib << 20;
        let path = load.mem_backend.as_ref().map_or("", |backend| backend.backend_path.as_str());
        let file = File::open(path)
            .map_err(|error| fatal(format!("{MEMORY} Failed to load guest memory: {error}")))?;
        if !file.metadata().is_ok_and(|metadata| metadata.len() >= bytes as u64) {
            return Err(fatal(format!(
                "{MEMORY} Failed to restore guest memory: Total sum of memory regions exceeds \
                 largest possible file offset"
            )));
        }
        for (_, path, is_read_only) in &self.devices.drives {
            open_drive(path, *is_read_only)
                .map_err(|error| fatal(format!("{FAILED} {error} {path}")))?;
        }
        let memory = Memory::map(&file, bytes);
        let memory = memory.map_err(|error| fatal(format!("{MEMORY} {error}")))?;
        let guest = Guest::new(memory, self.parts());
        guest.leave_word_of_a_reset();
        if let Some(path) = &self.devices.vsock {
            let listener = listen(path).map_err(|error| fatal(format!("{FAILED} {error}")))?;
            guest.listen(listener);
        }
        self.guest = Some(guest);
        self.config.vcpu_count = self.devices.vcpus;
        self.config.mem_size_mib = self.devices.mem_mib;
        self.config.track_dirty_pages = load.track_dirty_pages;
        self.phase = Phase::Paused;
        if load.resume_vm {
            self.resume();
        }
        Ok(())
    }
}

/// Takes a saved state apart, if it is whole.
fn understood(content: &[u8]) -> Result<Devices, String> {
    let text = std::str::from_utf8(content).unwrap_or_default();
    let (sum, text) = text.split_once('\n').unwrap_or_default();
    let devices = serde_json::from_str(text)
        .map_err(|_| "An error occured during bitcode serialization: bitcode error")?;
    match sum == digest(text) {
        true => Ok(devices),
        false => Err("CRC64 validation failed".into()),
    }
}

fn digest(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    format!("{:016x}", hasher.finish())
}

fn open_drive(path: &str, is_read_only: bool) -> io::Result<File> {
    File::options().read(true).write(!is_read_only).open(path)
}

fn listen(path: &str) -> io::Result<UnixListener> {
    // A socket that was given before is given up.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}
