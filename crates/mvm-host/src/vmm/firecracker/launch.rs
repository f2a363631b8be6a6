//! Starting one Firecracker in its jail, with every failure unwound.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use mvm_core::firecracker::{
    Action, ActionType, BackendType, Balloon, BootSource, CacheType, Change, Drive, Entropy,
    HugePages, IoEngine, LoadSnapshot, MachineConfig, MemBackend, Network, NetworkOverride,
    RateLimiter, TokenBucket, Vsock,
};
use mvm_core::rates::Rates;
use mvm_core::vmm::{Accel, VmHandle, VmmKind};
use serde_json::Value;

use super::super::disk_lock::LockedDisk;
use super::super::memory;
use super::super::starting::{Starting, or_last_words};
use super::super::{DiskAccess, Restore, VmSpec, VmmError, console, disk_lock, file_error};
use super::api::Api;
use super::cgroup::Cgroup;
use super::jail::{self, API_SOCKET, INITRD, Jail, KERNEL, SECCOMP_FILTER, VSOCK};
use super::locks::Carrier;
use super::vm::FirecrackerVm;
use super::{FirecrackerConfig, Isolation, Programs, isolation, kernel, metrics};
use crate::net;
use crate::process::{Apart, Process, Spawn, spawn};
use crate::state_dir::{DEVICE_STATE, MEMORY_IMAGE};

/// Firecracker's own upper bound.
const MAX_VCPUS: u32 = 32;
/// The guest's own context id; its host is always 2.
const GUEST_CID: u32 = 3;
const INTERFACE: &str = "eth0";
/// Open files that a Firecracker needs, with room for connections over vsock.
const OPEN_FILES: u32 = 4096;
/// Guests of at most so much memory report free pieces of 4 KiB << order; others of 2 MiB, of which
/// small ones have too few in one piece. Each may split the mapping of a restored guest's memory, and
/// the kernel allows a process some 65,000 mappings.
const FINE_REPORTS_MIB: u32 = 4096;
const FINE_REPORTS_ORDER: u32 = 6;
/// How often a guest's kernel is asked how it uses its memory, in seconds.
const BALLOON_STATISTICS_S: u16 = 60;

/// Starts Firecracker, configures it and starts its guest. If this fails or is given up, no process
/// and no jail is left.
pub(super) async fn launch(
    programs: &Programs,
    config: &FirecrackerConfig,
    spec: &VmSpec,
) -> Result<FirecrackerVm, VmmError> {
    // Looked at first, so that a missing file is told by its own name.
    std::fs::File::open(&spec.initrd).map_err(file_error(&spec.initrd))?;
    let kernel_path = spec.kernel.clone();
    let kernel = tokio::task::spawn_blocking(move || kernel::ensure_uncompressed(&kernel_path));
    let kernel = kernel.await.map_err(|error| VmmError::System {
        operation: "unpack the kernel".into(),
        source: std::io::Error::other(error),
    })??;
    let template = config.cpu_template.as_deref().map(read_template).transpose()?;
    // What is last is dropped first: a failure ends the process before its locks, here and below.
    let locks = open_disks(spec)?;
    let started = start(programs, config, spec).await?;
    started.jail.place_to_read(&kernel, KERNEL)?;
    started.jail.place_to_read(&spec.initrd, INITRD)?;
    started.give_disks(spec, &locks)?;
    started.make_tap(spec)?;
    let api = &started.api;
    let configuring = async {
        for change in configuration(spec, config.free_page_reporting, template) {
            api.make(&change).await?;
        }
        let start = Action { action_type: ActionType::InstanceStart };
        api.make(&Change::Action(start)).await
    };
    or_last_words(started.process()?, spec, configuring).await?;
    finish(config, spec, locks, started)
}

/// Starts Firecracker and loads a saved microVM, which is paused on return. If this fails or is given
/// up, no process and no jail is left.
pub(super) async fn restore(
    programs: &Programs,
    config: &FirecrackerConfig,
    spec: &VmSpec,
    from: &Restore,
) -> Result<FirecrackerVm, VmmError> {
    let memory_bytes = u64::from(spec.mem_mib) << 20;
    if from.memory.bytes() != memory_bytes {
        return Err(VmmError::Control {
            operation: "restore the microVM".into(),
            message: format!("its memory has {} bytes, not {memory_bytes}", from.memory.bytes()),
        });
    }
    let locks = open_disks(spec)?;
    let started = start(programs, config, spec).await?;
    let began = Instant::now();
    let ms = || began.elapsed().as_secs_f64() * 1000.0;
    started.give_disks(spec, &locks)?;
    started.make_tap(spec)?;
    started.jail.place_copy(&from.dir.device_state(), DEVICE_STATE)?;
    started.jail.place_to_read(from.memory.path(), MEMORY_IMAGE)?;
    let process = started.process()?;
    let loading = async {
        started.api.make(&load_request(spec)).await?;
        started.jail.take_out(MEMORY_IMAGE)?;
        let devices_ms = ms();
        // The guest has not run yet: what it sees from its first instruction on is what it knew.
        memory::restore_changes(process.identity().pid, memory_bytes, &from.dir).await?;
        let memory_ms = ms() - devices_ms;
        tracing::debug!(instance = %spec.id, devices_ms, memory_ms, "loaded");
        Ok(())
    };
    or_last_words(process, spec, loading).await?;
    finish(config, spec, locks, started)
}

/// A Firecracker in its jail that serves its API and has no microVM yet. It is ended, and then the jail
/// removed, when this is dropped.
#[derive(Debug)]
struct Started {
    // The first is dropped first.
    starting: Starting,
    jail: Jail,
    cgroup: Option<Cgroup>,
    api: Api,
    carrier: Carrier,
}

impl Started {
    /// Its process.
    fn process(&self) -> Result<&Process, VmmError> {
        self.starting.process()
    }

    /// Makes the tap that it is to open, where it is.
    fn make_tap(&self, spec: &VmSpec) -> Result<(), VmmError> {
        let Some(nic) = &spec.nic else { return Ok(()) };
        let made = net::make_tap(self.process()?.identity().pid, &nic.tap, spec.uid);
        made.map_err(system(&format!("make the tap {}", nic.tap)))
    }

    /// Puts the disks into its jail, and their locks into its hands.
    fn give_disks(&self, spec: &VmSpec, locks: &[LockedDisk]) -> Result<(), VmmError> {
        for (index, disk) in spec.disks.iter().enumerate() {
            self.jail.place_disk(disk, &disk_name(index))?;
        }
        self.carrier.give(locks).map_err(system("hand over the disks' locks"))
    }
}

fn open_disks(spec: &VmSpec) -> Result<Vec<LockedDisk>, VmmError> {
    spec.disks.iter().map(disk_lock::open).collect()
}

fn system(operation: &str) -> impl FnOnce(std::io::Error) -> VmmError {
    let operation = operation.to_owned();
    move |source| VmmError::System { operation, source }
}

/// Starts Firecracker in a new jail and waits until it serves its API. If this fails or is given up,
/// no process and no jail is left.
async fn start(
    programs: &Programs,
    config: &FirecrackerConfig,
    spec: &VmSpec,
) -> Result<Started, VmmError> {
    if spec.vcpus > MAX_VCPUS {
        return Err(VmmError::Spec {
            id: spec.id.clone(),
            message: format!("Firecracker gives a microVM at most {MAX_VCPUS} vCPUs"),
        });
    }
    let began = Instant::now();
    if jail::is_served(spec).await {
        return Err(VmmError::Control {
            operation: "make a jail".into(),
            message: format!("another Firecracker runs in {}", spec.dir.display()),
        });
    }
    let cgroup = Cgroup::make(spec).map_err(system("make a cgroup"))?;
    let jail = Jail::create(spec, &programs.firecracker)?;
    if let Some(filter) = &config.seccomp_filter {
        jail.place_copy(filter, SECCOMP_FILTER)?;
    }
    let console = console::rotate(&spec.dir).map_err(file_error(&spec.dir))?;
    let log_path = spec.dir.vmm_log();
    let open_log = || {
        // For appending, which emptying it does not go with.
        match std::fs::remove_file(&log_path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        OpenOptions::new().append(true).create_new(true).mode(0o600).open(&log_path)
    };
    let log = open_log().map_err(file_error(&log_path))?;
    jail.place_to_write(&log_path, jail::LOG)?;
    jail.place_to_write(&metrics::make_file(jail.dir())?, jail::METRICS)?;
    let made = Carrier::new(&spec.dir).await;
    let (carrier, carried) = made.map_err(system("make a socket for the disks' locks"))?;
    let args = jailer_arguments(programs, config, spec);
    let process = spawn(&Spawn {
        input: Some(carried.as_fd()),
        output: Some(console.as_fd()),
        errors: Some(log.as_fd()),
        apart: Some(Apart { cgroup: cgroup.as_ref().map(Cgroup::dir) }),
        ..Spawn::new(&programs.jailer, &args)
    })
    .map_err(|source| VmmError::Spawn {
        program: programs.jailer.to_string_lossy().into_owned(),
        source,
    })?;
    let starting = Starting::new(process);
    let api = Api::new(jail.root().join(API_SOCKET), config.request_limit);
    let up = api.wait_until_up(config.start_limit);
    or_last_words(starting.process()?, spec, up).await?;
    let process_ms = began.elapsed().as_secs_f64() * 1000.0;
    tracing::debug!(instance = %spec.id, process_ms, "started");
    Ok(Started { starting, jail, cgroup, api, carrier })
}

/// Lets the microVM run on, if nothing walls it off less than it has to be.
fn finish(
    config: &FirecrackerConfig,
    spec: &VmSpec,
    locks: Vec<LockedDisk>,
    started: Started,
) -> Result<FirecrackerVm, VmmError> {
    if config.isolation == Isolation::Production {
        let lacks = isolation::lacks(started.process()?.identity().pid, spec);
        if !lacks.is_empty() {
            return Err(VmmError::NotIsolated { id: spec.id.clone(), lacks: lacks.join(", ") });
        }
    }
    let process = started.starting.succeed()?;
    started.jail.complete();
    started.cgroup.into_iter().for_each(Cgroup::complete);
    locks.into_iter().for_each(LockedDisk::leave_to_vmm);
    let identity = process.identity().clone();
    let handle = VmHandle {
        vmm: VmmKind::Firecracker,
        accel: Accel::Kvm,
        pid: identity.pid,
        start_ticks: identity.start_ticks,
        host_boot_id: identity.host_boot_id,
    };
    Ok(FirecrackerVm::new(handle, process, spec, config.request_limit))
}

/// The jailer's arguments, and behind `--` those of Firecracker.
fn jailer_arguments(
    programs: &Programs,
    config: &FirecrackerConfig,
    spec: &VmSpec,
) -> Vec<OsString> {
    let uid = spec.uid.to_string();
    let mut args: Vec<OsString> = vec!["--id".into(), spec.id.as_str().into()];
    let mut option = |name: &str, value: OsString| args.extend([name.into(), value]);
    option("--exec-file", programs.firecracker.clone().into());
    option("--uid", uid.clone().into());
    option("--gid", uid.into());
    option("--chroot-base-dir", spec.dir.jail().into());
    option("--resource-limit", format!("no-file={OPEN_FILES}").into());
    // Warnings and errors are kept; what is said otherwise is for debugging.
    args.extend(["--", "--api-sock", API_SOCKET, "--log-path", jail::LOG].map(OsString::from));
    args.extend(["--level", "Warning", "--metrics-path", jail::METRICS].map(OsString::from));
    if config.seccomp_filter.is_some() {
        args.extend(["--seccomp-filter", SECCOMP_FILTER].map(OsString::from));
    }
    args
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// The requests that describe a microVM, in order. The guest numbers its disks in this order.
fn configuration(
    spec: &VmSpec,
    free_page_reporting: bool,
    cpu_template: Option<Value>,
) -> Vec<Change> {
    let mut changes = vec![Change::Machine(MachineConfig {
        vcpu_count: u8::try_from(spec.vcpus).unwrap_or(u8::MAX),
        mem_size_mib: spec.mem_mib as usize,
        smt: false,
        cpu_template: None,
        track_dirty_pages: false,
        huge_pages: HugePages::None,
    })];
    changes.extend(cpu_template.map(Change::CpuTemplate));
    changes.push(Change::BootSource(BootSource {
        kernel_image_path: KERNEL.to_owned(),
        initrd_path: Some(INITRD.to_owned()),
        boot_args: Some(kernel_command_line(spec)),
    }));
    changes.extend(spec.disks.iter().enumerate().map(|(index, disk)| {
        Change::Drive(Drive {
            drive_id: disk_name(index),
            path_on_host: Some(disk_name(index)),
            is_read_only: Some(disk.access == DiskAccess::ReadOnly),
            // The guest's flushes reach the disk.
            cache_type: CacheType::Writeback,
            io_engine: Some(IoEngine::Sync),
            rate_limiter: disk_limiter(&spec.rates),
            ..Drive::default()
        })
    }));
    changes.extend(spec.nic.iter().map(|nic| {
        Change::Network(Network {
            iface_id: INTERFACE.to_owned(),
            host_dev_name: nic.tap.clone(),
            guest_mac: Some(nic.mac.to_string()),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        })
    }));
    let vsock = Vsock { vsock_id: None, guest_cid: GUEST_CID, uds_path: VSOCK.to_owned() };
    changes.extend([Change::Vsock(vsock), Change::Entropy(Entropy::default())]);
    if free_page_reporting {
        changes.push(Change::Balloon(Balloon {
            deflate_on_oom: true,
            free_page_reporting: true,
            stats_polling_interval_s: BALLOON_STATISTICS_S,
            ..Balloon::default()
        }));
    }
    changes
}

fn read_template(path: &Path) -> Result<Value, VmmError> {
    let text = std::fs::read_to_string(path).map_err(file_error(path))?;
    serde_json::from_str(&text).map_err(|error| file_error(path)(error.into()))
}

/// A disk's limits as Firecracker has them; `None` if it has none. They are saved with the microVM.
fn disk_limiter(rates: &Rates) -> Option<RateLimiter> {
    // A bucket that nobody used for long is filled once more when it has been emptied: half of what a
    // second allows, so that no more than that comes at once.
    let bucket = |per_second: u64| {
        let size = per_second.div_ceil(2);
        let refill_time = (size * 1000).div_ceil(per_second);
        TokenBucket { size, one_time_burst: None, refill_time }
    };
    let limiter = RateLimiter {
        bandwidth: rates.disk_bytes_s().map(bucket),
        ops: rates.disk_ops_s.map(|operations| bucket(operations.into())),
    };
    (limiter != RateLimiter::default()).then_some(limiter)
}

/// The request that loads what was saved. Paths are the jail's, the same in each.
fn load_request(spec: &VmSpec) -> Change {
    let overrides = spec.nic.iter().map(|nic| NetworkOverride {
        iface_id: INTERFACE.to_owned(),
        host_dev_name: nic.tap.clone(),
    });
    Change::Load(LoadSnapshot {
        snapshot_path: DEVICE_STATE.to_owned(),
        mem_backend: Some(MemBackend {
            backend_type: BackendType::File,
            backend_path: MEMORY_IMAGE.to_owned(),
        }),
        // Keeps small what Firecracker writes, and the driver drops, when it is saved again.
        track_dirty_pages: true,
        network_overrides: overrides.collect(),
        ..LoadSnapshot::default()
    })
}

/// What the guest's kernel needs on this machine, and then what was asked for.
fn kernel_command_line(spec: &VmSpec) -> String {
    // The keyboard controller is there to reset the machine, which ends Firecracker.
    let mut line = String::from(
        "console=ttyS0 reboot=k panic=-1 pci=off random.trust_cpu=on \
         i8042.noaux i8042.nomux i8042.dumbkbd",
    );
    if spec.mem_mib <= FINE_REPORTS_MIB {
        line.push_str(&format!(" page_reporting.page_reporting_order={FINE_REPORTS_ORDER}"));
    }
    if !spec.kernel_args.is_empty() {
        line.push(' ');
        line.push_str(&spec.kernel_args);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: &Change) -> String {
        serde_json::to_string(change).unwrap()
    }

    fn drives(spec: &VmSpec) -> Vec<Drive> {
        let changes = configuration(spec, true, None).into_iter();
        let drive = |change| match change {
            Change::Drive(drive) => Some(drive),
            _ => None,
        };
        changes.filter_map(drive).collect()
    }

    #[test]
    fn no_path_of_the_host_is_given_to_the_guest_s_vmm() {
        let spec = VmSpec::example();
        for change in configuration(&spec, true, None).into_iter().chain([load_request(&spec)]) {
            assert!(!text(&change).contains("/state"), "{change:?}");
        }
    }

    #[test]
    fn free_memory_is_reported_if_it_is_to_be() {
        for expected in [true, false] {
            let changes = configuration(&VmSpec::example(), expected, None);
            let has = changes.iter().any(|change| matches!(change, Change::Balloon(_)));
            assert_eq!(has, expected);
        }
    }

    #[test]
    fn disks_are_in_order_and_only_what_may_be_written_is_writable() {
        let drives = drives(&VmSpec::example());
        assert_eq!(Change::Drive(drives[0].clone()).path(), "/drives/disk0");
        let are_read_only = drives.iter().map(|drive| drive.is_read_only);
        assert!(are_read_only.eq([Some(true), Some(false)]), "{drives:?}");
    }

    #[test]
    fn each_disk_is_held_to_the_rates_that_there_are() {
        let limiter = |rates| {
            let drives = drives(&VmSpec { rates, ..VmSpec::example() });
            let limiter = drives[1].rate_limiter?;
            Some([limiter.bandwidth, limiter.ops].map(|it| it.map(|it| (it.size, it.refill_time))))
        };
        assert_eq!(limiter(Rates::default()), None);
        let rates = Rates { disk_mib_s: Some(2), net_mbit_s: Some(3), disk_ops_s: None };
        let bandwidth = Some((1 << 20, 500));
        assert_eq!(limiter(rates), Some([bandwidth, None]));
        let many = Rates { disk_ops_s: Some(70), ..rates };
        assert_eq!(limiter(many), Some([bandwidth, Some((35, 500))]));
        let one = Rates { disk_ops_s: Some(1), ..rates };
        assert_eq!(limiter(one), Some([bandwidth, Some((1, 1000))]));
    }

    #[test]
    fn a_microvm_without_a_network_has_no_interface() {
        let taps = |spec: &VmSpec| {
            let has = configuration(spec, true, None);
            let has = has.iter().filter(|change| matches!(change, Change::Network(_))).count();
            let Change::Load(load) = load_request(spec) else { panic!("it loads") };
            (has, load.network_overrides.into_iter().map(|it| it.host_dev_name).collect::<Vec<_>>())
        };
        assert_eq!(taps(&VmSpec::example()), (1, vec!["tn1i3".to_owned()]));
        assert_eq!(taps(&VmSpec { nic: None, ..VmSpec::example() }), (0, vec![]));
    }

    #[test]
    fn what_is_left_out_is_not_sent() {
        let changes = configuration(&VmSpec::example(), true, None);
        assert_eq!(text(&changes[0]), r#"{"vcpu_count":2,"mem_size_mib":256}"#);
    }
}
