//! A simulated guest: the guest's side of the protocol without a guest.
//!
//! The simulated VMM serves it on an in-process stream, so that everything above the VMM seam runs
//! unchanged. It knows a handful of programs, files of one line each, and no users or processes.

mod files;
mod main_process;
mod programs;
mod serve;

pub use files::{SimFiles, SimMemory};
pub use serve::serve;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_core::guest::{
    ClockReading, Configuration, Feature, ForwardTarget, Health, Hello, WakeReason,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::clock::unix_ns;

/// Largest log that is kept, in bytes.
const LONGEST_LOG: usize = 64 * 1024;

/// One boot of a simulated guest. Clones are the same guest.
#[derive(Debug, Clone)]
pub struct SimGuest {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    boot_id: String,
    started: Instant,
    state: Mutex<State>,
    log: watch::Sender<Log>,
    is_shut_down: watch::Sender<bool>,
}

/// The kernel's log, of which the oldest bytes are forgotten.
#[derive(Debug, Default)]
struct Log {
    text: Vec<u8>,
    forgotten: usize,
}

impl Log {
    /// A piece from an offset on: where it really starts, its bytes, and the log's end.
    fn piece(&self, offset: usize, longest: usize) -> (usize, Vec<u8>, usize) {
        let start = offset.max(self.forgotten);
        let rest = self.text.get(start - self.forgotten..).unwrap_or_default();
        let piece = rest[..rest.len().min(longest)].to_vec();
        (start, piece, self.forgotten + self.text.len())
    }
}

#[derive(Debug, Default)]
struct State {
    configuration: Option<Configuration>,
    sessions: u64,
    last_pid: u32,
    mem_total_kib: u64,
    main: Option<main_process::SimMain>,
    wakes: Vec<WakeReason>,
    /// What was connected to, in order.
    targets: Vec<ForwardTarget>,
    /// What it cannot do, as one of an earlier version.
    missing: Vec<Feature>,
    load: Load,
    clock: Clock,
    files: SimFiles,
    /// How long it takes to shut down.
    lingers: Duration,
}

/// What its programs have done, as its health tells.
#[derive(Debug, Default)]
struct Load {
    cpu_ms: u64,
    net_bytes: u64,
    is_busy: bool,
    /// Whether it does not tell how it is any more.
    is_silent: bool,
    /// How long it prepares for a sleep.
    hooks: Duration,
}

/// Its wall clock.
#[derive(Debug, Clone, Copy, Default)]
struct Clock {
    /// How far it is ahead of the host's, in nanoseconds.
    ahead_ns: i64,
    is_disciplined: bool,
}

/// The kernel release that a simulated guest claims.
const KERNEL: &str = "6.0.0-simulated";

/// What a simulated guest can do.
const FEATURES: [Feature; 9] = [
    Feature::Builtins,
    Feature::Disks,
    Feature::Main,
    Feature::Sleep,
    Feature::Clock,
    Feature::Forward,
    Feature::Published,
    Feature::LongMessages,
    Feature::Settings,
];

impl SimGuest {
    /// A guest that has just booted.
    pub fn new(boot_id: impl Into<String>, mem_total_kib: u64) -> Self {
        let guest = Self {
            shared: Arc::new(Shared {
                boot_id: boot_id.into(),
                started: Instant::now(),
                state: Mutex::new(State { mem_total_kib, ..State::default() }),
                log: watch::Sender::default(),
                is_shut_down: watch::Sender::default(),
            }),
        };
        guest.log("simulated kernel started");
        guest
    }

    /// The same guest, with an agent of before there was this.
    #[must_use]
    pub fn older_than(self, feature: Feature) -> Self {
        self.state().missing.push(feature);
        self
    }

    /// The sockets that the host connected to, in order.
    pub fn targets(&self) -> Vec<ForwardTarget> {
        self.state().targets.clone()
    }

    /// The identity that the host gave, if it has.
    pub fn configuration(&self) -> Option<Configuration> {
        self.state().configuration.clone()
    }

    /// Each wake that it was told of, in order.
    pub fn wakes(&self) -> Vec<WakeReason> {
        self.state().wakes.clone()
    }

    /// What its wall clock shows.
    fn read_clock(&self) -> ClockReading {
        let Clock { ahead_ns, is_disciplined } = self.state().clock;
        ClockReading { unix_ns: unix_ns().saturating_add_signed(ahead_ns), is_disciplined }
    }

    /// Lets its wall clock show this.
    fn set_clock(&self, to_unix_ns: u64) {
        let ahead = i128::from(to_unix_ns) - i128::from(unix_ns());
        self.state().clock.ahead_ns = i64::try_from(ahead).unwrap_or(0);
    }

    /// Adds a line to the kernel's log; the oldest are forgotten.
    pub fn log(&self, line: &str) {
        let micros = self.shared.started.elapsed().as_micros();
        let line = format!("[{:5}.{:06}] {line}\n", micros / 1_000_000, micros % 1_000_000);
        self.shared.log.send_modify(|log| {
            log.text.extend_from_slice(line.as_bytes());
            let excess = log.text.len().saturating_sub(LONGEST_LOG);
            log.text.drain(..excess);
            log.forgotten += excess;
        });
    }

    /// From now on its files are these: it goes on in another microVM.
    pub fn use_files(&self, files: SimFiles) {
        self.state().files = files;
    }

    /// Puts on its disks what it holds back.
    fn sync(&self) {
        let state = self.state();
        let disks = state.configuration.as_ref().map(|known| known.disks.as_slice());
        if let Err(error) = state.files.sync(disks.unwrap_or_default()) {
            tracing::warn!(boot = self.shared.boot_id, %error, "a simulated guest cannot write");
        }
    }

    /// Waits until a host asked for a shutdown, and was answered.
    pub async fn shut_down(&self) {
        // The sender lives as long as this guest.
        let _ = self.shared.is_shut_down.subscribe().wait_for(|&is| is).await;
    }

    fn hello(&self) -> Hello {
        let mut state = self.state();
        state.sessions += 1;
        Hello {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            boot_id: self.shared.boot_id.clone(),
            kernel: KERNEL.into(),
            session: state.sessions,
            configured: state.configuration.is_some(),
            features: FEATURES
                .into_iter()
                .filter(|feature| !state.missing.contains(feature))
                .map(|feature| feature.name().to_owned())
                .collect(),
        }
    }

    fn health(&self, execs: usize, connections: usize) -> Health {
        let state = self.state();
        Health {
            ready: state.configuration.is_some(),
            uptime_ms: u64::try_from(self.shared.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            mem_total_kib: state.mem_total_kib,
            mem_available_kib: state.mem_total_kib / 2,
            disk_total_kib: 1024 * 1024,
            disk_free_kib: 1000 * 1024,
            execs: u32::try_from(execs).unwrap_or(u32::MAX),
            connections: u32::try_from(connections).unwrap_or(u32::MAX),
            cpu_ms: Some(state.load.cpu_ms),
            net_bytes: Some(state.load.net_bytes),
            busy: state.load.is_busy,
            ..Health::default()
        }
    }

    fn next_pid(&self) -> u32 {
        let mut state = self.state();
        state.last_pid = state.last_pid.wrapping_add(1).max(2);
        state.last_pid
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
