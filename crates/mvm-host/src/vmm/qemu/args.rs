//! QEMU's argument list, as a pure function of what was asked for and which descriptors it inherits.
//!
//! Whatever has structure is given as JSON, which needs no escaping of commas.

use std::ffi::OsString;
use std::os::fd::RawFd;

use mvm_core::guest::PORT_NAME;
use mvm_core::rates::Rates;
use mvm_core::vmm::Accel;
use serde_json::{Value, json};

use super::super::{DiskAccess, VmSpec};
use super::journal;

/// The processor that software emulation shows to a guest. Five-level paging costs emulated page
/// walks and gives nothing. Fast string instructions are slow ones here: a guest that is told of
/// them copies byte by byte.
pub(super) const EMULATED_CPU: &str = "max,la57=off,erms=off,fsrm=off";
/// Upper bound of QEMU's cache of translated code in MiB. QEMU would take up to a gibibyte, which
/// no admission accounts for.
const TRANSLATION_CACHE_MIB: u32 = 128;
/// The set that holds the console's descriptor; disks come after it.
const CONSOLE_SET: usize = 0;
const FIRST_DISK_SET: usize = 1;

/// The numbers of the inherited descriptors.
#[derive(Debug, Clone)]
pub(super) struct Descriptors {
    pub(super) memory: RawFd,
    /// The devices' state, if the microVM is restored: its memory is then an image.
    pub(super) device_state: Option<RawFd>,
    pub(super) kernel: RawFd,
    pub(super) initrd: RawFd,
    pub(super) console: RawFd,
    pub(super) qmp: RawFd,
    pub(super) agent: RawFd,
    pub(super) journal_dir: RawFd,
    pub(super) tap: Option<RawFd>,
    pub(super) disks: Vec<DiskDescriptor>,
}

/// One disk's descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskDescriptor {
    pub(super) fd: RawFd,
    pub(super) access: DiskAccess,
}

/// QEMU's arguments, without the program's name.
pub(super) fn arguments(
    spec: &VmSpec,
    accel: Accel,
    tsc_khz: Option<u64>,
    fds: &Descriptors,
) -> Vec<OsString> {
    let mut args = Arguments::default();
    args.option("-name", spec.id.as_str());
    // No legacy timers and interrupt controllers: the guest is told the frequency of its counter.
    // The clock chip stays, so that the guest knows the time from its first line on, and so do
    // option ROMs: without them the firmware of newer QEMUs loads no kernel.
    // A saved state of devices is complete without their description, which is for people.
    args.option(
        "-machine",
        "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=ram,\
         suppress-vmdesc=on",
    );
    match accel {
        Accel::Kvm => args.option("-accel", "kvm").option("-cpu", "host"),
        Accel::Tcg => args
            .option("-accel", format!("tcg,tb-size={TRANSLATION_CACHE_MIB}"))
            .option("-cpu", EMULATED_CPU),
    };
    args.option("-smp", spec.vcpus.to_string())
        .option("-m", format!("{}M", spec.mem_mib))
        .json(
            "-object",
            &json!({
                "qom-type": "memory-backend-file", "id": "ram", "share": fds.device_state.is_none(),
                "mem-path": descriptor_path(fds.memory), "size": u64::from(spec.mem_mib) << 20,
            }),
        )
        .flags(&["-nodefaults", "-no-user-config", "-no-reboot"])
        .option("-display", "none")
        .option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        )
        .option("-kernel", descriptor_path(fds.kernel))
        .option("-initrd", descriptor_path(fds.initrd))
        .option("-append", kernel_command_line(&spec.kernel_args, tsc_khz));
    args.option("-add-fd", format!("fd={},set={CONSOLE_SET}", fds.console))
        .option("-chardev", format!("file,id=console,path=/dev/fdset/{CONSOLE_SET},append=on"))
        .option("-serial", "chardev:console")
        .option("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fds.qmp))
        .option("-mon", "chardev=qmp,mode=control")
        .option(
            "-chardev",
            format!("pipe,id=events,path=/proc/self/fd/{}/{}", fds.journal_dir, journal::STEM),
        )
        .option("-mon", "chardev=events,mode=control")
        .option("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fds.agent))
        .json("-device", &json!({ "driver": "virtio-serial-device" }))
        .json(
            "-device",
            &json!({ "driver": "virtserialport", "chardev": "agent", "name": PORT_NAME }),
        )
        .json("-object", &json!({ "qom-type": "rng-builtin", "id": "rng" }))
        .json("-device", &json!({ "driver": "virtio-rng-device", "rng": "rng" }))
        // Through this port the guest's kernel reports a panic.
        .json("-device", &json!({ "driver": "pvpanic" }));
    if fds.device_state.is_some() {
        // The guest waits for its devices' state, which is written without a head that names the
        // machine; it stays paused then.
        args.flags(&["-S"])
            .option("-incoming", "defer")
            .option("-global", "migration.send-configuration=off");
    }
    // The guest numbers its disks in the order of these devices.
    for (index, disk) in fds.disks.iter().enumerate() {
        let set = FIRST_DISK_SET + index;
        let mut device = block_device(index, set, disk.access);
        if let Some(limits) = disk_limits(&spec.rates) {
            let group = format!("limits{index}");
            let object = json!({ "qom-type": "throttle-group", "id": group, "limits": limits });
            args.json("-object", &object);
            device = throttled(index, device, &group);
        }
        args.option("-add-fd", format!("fd={},set={set}", disk.fd))
            .json("-blockdev", &device)
            .json(
                "-device",
                &json!({
                    "driver": "virtio-blk-device", "drive": disk_name(index),
                    // While the host's disk is full, the guest stands still: told of an error, it
                    // would lose what it writes. The write is tried again as it goes on.
                    "werror": "enospc", "rerror": "report",
                }),
            );
    }
    if let (Some(fd), Some(nic)) = (fds.tap, &spec.nic) {
        args.option("-netdev", format!("tap,id=net0,fd={fd}")).json(
            "-device",
            &json!({ "driver": "virtio-net-device", "netdev": "net0", "mac": nic.mac.to_string() }),
        );
    }
    args.0
}

fn descriptor_path(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// The host's page cache is used, because the base is shared by many microVMs, and the guest's
/// flushes reach the disk. QEMU's image locks stay on: two writers of one disk are refused.
fn block_device(index: usize, set: usize, access: DiskAccess) -> Value {
    let read_only = access == DiskAccess::ReadOnly;
    let cache = json!({ "direct": false, "no-flush": false });
    let mut device = json!({
        "driver": "raw", "node-name": disk_name(index), "read-only": read_only, "cache": cache,
        "file": {
            "driver": "file", "filename": format!("/dev/fdset/{set}"), "read-only": read_only,
            "aio": "threads", "locking": "on", "cache": cache,
        },
    });
    if !read_only {
        // What the guest frees or fills with zeroes becomes a hole in the sparse file.
        device["discard"] = json!("unmap");
        device["detect-zeroes"] = json!("unmap");
        device["file"]["discard"] = json!("unmap");
    }
    device
}

/// A disk's limits as QEMU has them; `None` if it has none.
fn disk_limits(rates: &Rates) -> Option<Value> {
    let mut limits = serde_json::Map::new();
    if let Some(bytes) = rates.disk_bytes_s() {
        limits.insert("bps-total".to_owned(), bytes.into());
    }
    if let Some(operations) = rates.disk_ops_s {
        limits.insert("iops-total".to_owned(), operations.into());
    }
    (!limits.is_empty()).then_some(limits.into())
}

/// The disk behind what holds it to the limits of a group, under the disk's own name.
fn throttled(index: usize, mut device: Value, group: &str) -> Value {
    let name = device["node-name"].take();
    device["node-name"] = format!("{}-unlimited", disk_name(index)).into();
    json!({
        "driver": "throttle", "node-name": name, "throttle-group": group,
        "read-only": device["read-only"], "file": device,
    })
}

/// What the guest's kernel needs on this machine, and then what was asked for.
fn kernel_command_line(extra: &str, tsc_khz: Option<u64>) -> String {
    // A panic ends in a reset, which ends QEMU; the quickest reset is a triple fault.
    let mut line = String::from("console=ttyS0 reboot=t panic=-1 edd=off random.trust_cpu=on");
    if let Some(khz) = tsc_khz {
        // The kernel would compare the counter with timer ticks, which a busy host delivers late,
        // and then keep time by those: its clock would fall behind for good.
        line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable no_timer_check"));
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }

    fn json(&mut self, name: &str, value: &Value) -> &mut Self {
        self.option(name, value.to_string())
    }

    fn flags(&mut self, names: &[&str]) -> &mut Self {
        self.0.extend(names.iter().map(OsString::from));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_limits_is_behind_them_and_keeps_its_name() {
        let device = block_device(1, 7, DiskAccess::ReadWrite);
        let limited = throttled(1, device.clone(), "limits1");
        assert_eq!(limited["node-name"], device["node-name"]);
        assert_eq!(limited["file"]["file"], device["file"]);
        assert_ne!(limited["file"]["node-name"], device["node-name"]);
        assert_eq!(disk_limits(&Rates::default()), None);
        let rates = Rates { net_mbit_s: Some(1), disk_mib_s: Some(2), disk_ops_s: Some(3) };
        let limits = disk_limits(&rates);
        assert_eq!(limits, Some(json!({ "bps-total": 2 << 20, "iops-total": 3 })));
    }

    fn fds() -> Descriptors {
        let disk = |fd, access| DiskDescriptor { fd, access };
        Descriptors {
            memory: 10,
            device_state: None,
            kernel: 11,
            initrd: 12,
            console: 13,
            qmp: 14,
            agent: 15,
            journal_dir: 16,
            tap: Some(17),
            disks: vec![disk(18, DiskAccess::ReadOnly), disk(19, DiskAccess::ReadWrite)],
        }
    }

    fn values(args: &[OsString], name: &str) -> Vec<String> {
        let pairs = args.windows(2).filter(|pair| pair[0] == name);
        pairs.map(|pair| pair[1].to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn no_path_of_the_host_is_given_away() {
        for arg in arguments(&VmSpec::example(), Accel::Tcg, Some(1), &fds()) {
            assert!(!arg.to_str().unwrap().contains("/state"), "{arg:?}");
        }
    }

    #[test]
    fn the_sandbox_denies_everything_and_nothing_is_added_by_default() {
        let args = arguments(&VmSpec::example(), Accel::Tcg, None, &fds());
        let sandbox = &values(&args, "-sandbox")[0];
        for class in ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"] {
            assert!(sandbox.contains(&format!("{class}=deny")), "{sandbox}");
        }
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(args.iter().any(|arg| arg == flag), "{flag}");
        }
    }

    #[test]
    fn only_a_writable_disk_may_be_written_or_punched() {
        let args = arguments(&VmSpec::example(), Accel::Tcg, None, &fds());
        assert_eq!(values(&args, "-add-fd"), ["fd=13,set=0", "fd=18,set=1", "fd=19,set=2"]);
        let devices: Vec<Value> = values(&args, "-blockdev")
            .iter()
            .map(|text| serde_json::from_str(text).unwrap())
            .collect();
        assert_eq!(devices[0]["read-only"], true);
        assert_eq!(devices[0]["file"]["read-only"], true);
        assert_eq!(devices[0].get("discard"), None);
        assert_eq!(devices[1]["read-only"], false);
        assert_eq!(devices[1]["file"]["filename"], "/dev/fdset/2");
        assert_eq!(devices[1]["file"]["discard"], "unmap");
        assert_eq!(devices[1]["cache"]["no-flush"], false);
        assert_eq!(devices[1]["file"]["locking"], "on");
    }

    #[test]
    fn a_guest_stands_still_while_the_host_s_disk_is_full() {
        let args = arguments(&VmSpec::example(), Accel::Tcg, None, &fds());
        let devices = values(&args, "-device").into_iter();
        let devices = devices.filter_map(|text| serde_json::from_str::<Value>(&text).ok());
        let disks: Vec<Value> =
            devices.filter(|device| device["driver"] == "virtio-blk-device").collect();
        assert_eq!(disks.len(), 2);
        assert!(disks.iter().all(|disk| disk["werror"] == "enospc"), "{disks:?}");
    }

    #[test]
    fn software_emulation_is_told_the_counter_s_frequency_and_kvm_is_not() {
        let tcg = arguments(&VmSpec::example(), Accel::Tcg, Some(2_596_146), &fds());
        let line = &values(&tcg, "-append")[0];
        assert!(line.contains(" tsc_early_khz=2596146 tsc=reliable "), "{line}");
        assert!(line.ends_with(" quiet mvm.x=1"), "{line}");
        assert_eq!(values(&tcg, "-accel"), ["tcg,tb-size=128"]);
        let kvm = arguments(&VmSpec::example(), Accel::Kvm, None, &fds());
        assert!(!values(&kvm, "-append")[0].contains("tsc"));
        assert_eq!(
            (values(&kvm, "-accel"), values(&kvm, "-cpu")),
            (vec!["kvm".into()], vec!["host".into()])
        );
    }

    #[test]
    fn a_restored_microvm_waits_for_its_devices_and_keeps_its_image_as_it_is() {
        let backend = |fds: &Descriptors| {
            let args = arguments(&VmSpec::example(), Accel::Tcg, None, fds);
            let objects = values(&args, "-object").into_iter();
            let mut objects = objects.map(|text| serde_json::from_str::<Value>(&text).unwrap());
            let memory = objects.find(|object| object["id"] == "ram").unwrap();
            (args, memory["share"].clone())
        };
        let (args, share) = backend(&fds());
        assert!(values(&args, "-incoming").is_empty() && share == true);
        let (args, share) = backend(&Descriptors { device_state: Some(30), ..fds() });
        assert_eq!(values(&args, "-incoming"), ["defer"]);
        assert_eq!(share, false);
        assert!(args.iter().any(|arg| arg == "-S"));
    }

    #[test]
    fn a_microvm_without_a_network_has_no_interface() {
        let with = arguments(&VmSpec::example(), Accel::Tcg, None, &fds());
        assert_eq!(values(&with, "-netdev"), ["tap,id=net0,fd=17"]);
        assert!(values(&with, "-device").iter().any(|d| d.contains("02:00:00:00:00:07")));
        let spec = VmSpec { nic: None, ..VmSpec::example() };
        let without = arguments(&spec, Accel::Tcg, None, &Descriptors { tap: None, ..fds() });
        assert!(values(&without, "-netdev").is_empty());
        assert!(!values(&without, "-device").iter().any(|d| d.contains("virtio-net")));
    }
}
