//! What every VMM driver promises: on the simulated one and on Firecracker's stand-in always, and on
//! real QEMU and Firecracker where they can run.

#![allow(clippy::unwrap_used, clippy::print_stderr)]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod elf_support;
mod image_support;
mod stand_in_program;
mod vmm_firecracker;
mod vmm_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mvm_core::net::MacAddr;
use mvm_core::vmm::{ProcessEnd, ShutdownReason, VmHandle};
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::{
    DiskAccess, MemoryImage, MemoryPart, Nic, Packing, Restore, SaveChanges, Vm, VmSpec, Vmm,
    VmmError,
};
use vmm_support::{
    Backend, Guest, Host, PATIENCE, eventually, firecracker::Firecracker, processes_of, qemu::Qemu,
    sim::Sim, stand_in::StandIn, text_of,
};

/// How long before it goes on a guest is reached for.
const EARLY: Duration = Duration::from_millis(200);

/// Runs each promise as a test on each backend: on the simulated one in modelled time.
macro_rules! contract {
    ($($promise:ident),+ $(,)?) => {
        mod simulated {
            $(#[tokio::test(start_paused = true)]
            async fn $promise() {
                super::$promise(super::Host::new(super::Sim::new())).await;
            })+
        }
        mod qemu {
            $(#[tokio::test]
            async fn $promise() {
                if let Some(backend) = super::real_qemu().await {
                    super::$promise(super::Host::new(backend)).await;
                }
            })+
        }
        mod stand_in {
            $(#[tokio::test]
            async fn $promise() {
                if let Some(backend) = super::stand_in() {
                    super::$promise(super::Host::new(backend)).await;
                }
            })+
        }
        mod firecracker {
            $(#[tokio::test]
            async fn $promise() {
                if let Some(backend) = super::real_firecracker() {
                    super::$promise(super::Host::new(backend)).await;
                }
            })+
        }
    };
}

async fn real_qemu() -> Option<Qemu> {
    Qemu::new().await.inspect_err(|why| eprintln!("skipped: {why}")).ok()
}

fn stand_in() -> Option<StandIn> {
    StandIn::new().inspect_err(|why| eprintln!("skipped: {why}")).ok()
}

fn real_firecracker() -> Option<Firecracker> {
    Firecracker::new().inspect_err(|why| eprintln!("skipped: {why}")).ok()
}

contract! {
    a_launched_guest_runs_sees_its_disks_in_order_and_its_console_is_kept,
    the_cause_of_an_end_that_the_guest_chose_is_told,
    an_end_while_no_agent_watched_is_told_to_the_next,
    a_kill_leaves_nothing_and_may_be_repeated,
    a_dropped_microvm_runs_on_and_is_adopted_once_known_by_its_whole_identity,
    a_failed_launch_leaves_nothing,
    two_microvms_share_a_base_and_no_layer,
    what_a_guest_does_with_its_disks_is_counted,
    strays_of_one_instance_are_ended,
    a_saved_microvm_goes_on_where_it_was_time_after_time,
    what_changed_is_saved_into_the_image_that_it_is_about,
    microvms_restored_from_one_image_do_not_see_each_others_memory,
    a_failed_save_or_restore_leaves_nothing,
}

async fn a_launched_guest_runs_sees_its_disks_in_order_and_its_console_is_kept<B: Backend>(
    host: Host<B>,
) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let vm = vmm.launch(&spec).await.unwrap();
    assert_eq!(vm.handle().vmm, vmm.kind());
    assert_eq!(vm.handle().host_boot_id, vmm.host_boot_id());
    let mut guest = Guest::of(&vm).await;
    assert_eq!(guest.ask("disks").await.trim_end(), "vda 6144 1 vdb 10240 0");
    assert!(vm.usage().await.unwrap().rss_kib > 0);
    guest.tell("off").await;
    vm.wait().await;
    let console = spec.dir.console_log();
    assert!(text_of(&console).contains("reboot: Power down"), "{}", text_of(&console));

    let vm = vmm.launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    assert!(!text_of(&console).contains("reboot: Power down"), "the boot before's");
    assert!(text_of(&spec.dir.join("console.log.1")).contains("reboot: Power down"));
    vm.kill().await.unwrap();
}

async fn the_cause_of_an_end_that_the_guest_chose_is_told<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    for (command, reason, last_words) in [
        ("off", ShutdownReason::GuestShutdown, "reboot: Power down"),
        ("reset", ShutdownReason::GuestReset, "reboot: Restarting system"),
        ("panic", ShutdownReason::GuestPanic, "Kernel panic - not syncing"),
    ] {
        let vm = vmm.launch(&spec).await.unwrap();
        Guest::of(&vm).await.tell(command).await;
        let exit = tokio::time::timeout(PATIENCE, vm.wait()).await.unwrap();
        assert_eq!(exit.reason, Some(reason), "{command}");
        assert_eq!(exit.process, ProcessEnd::Exited { code: 0 }, "{command}");
        assert_eq!(vm.wait().await, exit, "{command}");
        let console = text_of(&spec.dir.console_log());
        assert!(console.contains(last_words), "{command}: {console}");
    }
}

async fn an_end_while_no_agent_watched_is_told_to_the_next<B: Backend>(host: Host<B>) {
    let spec = host.spec(1);
    for (command, reason) in
        [("off", ShutdownReason::GuestShutdown), ("reset", ShutdownReason::GuestReset)]
    {
        let handle = {
            let vm = host.backend.vmm().launch(&spec).await.unwrap();
            Guest::of(&vm).await.tell(command).await;
            vm.handle().clone()
        };
        let vmm = host.backend.vmm();
        until_gone(&*vmm, &handle, &host).await;
        let exit = vmm.exit_of(&handle, &spec).await;
        assert_eq!((exit.process, exit.reason), (ProcessEnd::Unobserved, Some(reason)));
    }
}

async fn a_saved_microvm_goes_on_where_it_was_time_after_time<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let mut vm = vmm.launch(&spec).await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("note 0").await, "0");
    let first = saved_into(&host, &vm, "saved-0").await;
    let path = first.memory_image();
    let image = Arc::new(MemoryImage::own(&path, spec.uid).unwrap());
    let content = std::fs::read(&path).unwrap();
    let build = vmm.build().await.unwrap();
    assert_eq!(vm.build().await.unwrap(), build);
    let mut from = Restore { dir: first, memory: image, build: build.clone() };
    for cycle in 1..=3 {
        vm.kill().await.unwrap();
        vm.wait().await;
        vm = vmm.restore(&spec, &from).await.unwrap();
        // Who reaches for the guest before it goes on keeps the connection, too.
        let resume = async {
            tokio::time::sleep(EARLY).await;
            vm.resume().await.unwrap();
        };
        let (mut guest, ()) = tokio::join!(Guest::of(&vm), resume);
        assert_eq!(guest.ask("notes").await, (cycle - 1).to_string());
        assert_eq!(guest.ask(&format!("note {cycle}")).await, cycle.to_string());
        drop(guest);
        from.dir = saved_into(&host, &vm, &format!("saved-{cycle}")).await;
    }
    // What was saved is not touched by the microVM that goes on.
    assert!(std::fs::read(&path).unwrap() == content, "the image changed");
    // A microVM that was saved can go on in the same process, too.
    vm.resume().await.unwrap();
    let mut guest = Guest::of(&vm).await;
    assert_eq!(guest.ask("notes").await, "3");
    // Adopted, it can be paused and saved as before.
    let adopted = host.backend.vmm().adopt(vm.handle(), &spec).await.unwrap().unwrap();
    drop((guest, vm));
    assert_eq!(adopted.build().await.unwrap(), build);
    let from = Restore { dir: saved_into(&host, &adopted, "adopted").await, ..from };
    adopted.kill().await.unwrap();
    adopted.wait().await;
    let vm = vmm.restore(&spec, &from).await.unwrap();
    vm.resume().await.unwrap();
    let mut guest = Guest::of(&vm).await;
    assert_eq!(guest.ask("disks").await.trim_end(), "vda 6144 1 vdb 10240 0");
    guest.tell("off").await;
    assert_eq!(vm.wait().await.reason, Some(ShutdownReason::GuestShutdown));
}

/// Pauses and saves a microVM.
async fn saved_into<B: Backend>(host: &Host<B>, vm: &Arc<dyn Vm>, name: &str) -> SnapshotDir {
    let dir = SnapshotDir::from(&host.root.path().join(name));
    std::fs::create_dir(&dir).unwrap();
    vm.pause().await.unwrap();
    // Both kinds are restored, by turns.
    let packing = if name.ends_with('2') { Packing::Zstd } else { Packing::Plain };
    let saved = vm.save(&dir, SaveChanges::Apart(packing)).await.unwrap();
    if saved.part == MemoryPart::Changes {
        // Far less than the guest's 128 MiB.
        assert!(saved.bytes < 32 << 20, "{saved:?}");
    }
    dir
}

async fn what_changed_is_saved_into_the_image_that_it_is_about<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let mut vm = vmm.launch(&spec).await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("note 0").await, "0");
    let mut dir = saved_into(&host, &vm, "saved-0").await;
    let build = vmm.build().await.unwrap();
    for cycle in 1..=3 {
        vm.kill().await.unwrap();
        vm.wait().await;
        let image = dir.memory_image();
        let memory = Arc::new(MemoryImage::own(&image, spec.uid).unwrap());
        let from = Restore { dir: dir.clone(), memory, build: build.clone() };
        vm = vmm.restore(&spec, &from).await.unwrap();
        vm.resume().await.unwrap();
        let mut guest = Guest::of(&vm).await;
        assert_eq!(guest.ask("notes").await, (cycle - 1).to_string());
        assert_eq!(guest.ask(&format!("note try {cycle}")).await, format!("try {cycle}"));
        // One that cannot be completed is as good as none: the guest goes on and is saved again.
        vm.pause().await.unwrap();
        let tried = SnapshotDir::from(&host.root.path().join(format!("tried-{cycle}")));
        std::fs::create_dir(&tried).unwrap();
        vm.save(&tried, SaveChanges::IntoImage(image.clone())).await.unwrap();
        std::fs::remove_dir_all(&tried).unwrap();
        vm.resume().await.unwrap();
        drop(guest);
        let mut guest = Guest::of(&vm).await;
        assert_eq!(guest.ask("notes").await, format!("try {cycle}"));
        assert_eq!(guest.ask(&format!("note {cycle}")).await, cycle.to_string());
        drop(guest);
        vm.pause().await.unwrap();
        let next = SnapshotDir::from(&host.root.path().join(format!("next-{cycle}")));
        std::fs::create_dir(&next).unwrap();
        let saved = vm.save(&next, SaveChanges::IntoImage(image)).await.unwrap();
        assert_eq!(saved.part, MemoryPart::Whole);
        let bytes: u64 = saved.written.iter().map(|part| part.end - part.start).sum();
        assert_eq!(bytes, saved.bytes, "{saved:?}");
        assert!(saved.bytes < 32 << 20, "{saved:?}");
        std::fs::remove_dir_all(dir).unwrap();
        dir = next;
    }
    vm.kill().await.unwrap();
}

async fn microvms_restored_from_one_image_do_not_see_each_others_memory<B: Backend>(host: Host<B>) {
    let (vmm, specs) = (host.backend.vmm(), [host.spec(1), host.spec(2)]);
    let origin = vmm.launch(&specs[0]).await.unwrap();
    Guest::of(&origin).await.ask("note origin").await;
    let dir = saved_into(&host, &origin, "origin").await;
    origin.kill().await.unwrap();
    origin.wait().await;
    let memory = Arc::new(MemoryImage::share(&dir.memory_image()).unwrap());
    let from = Restore { dir, memory, build: vmm.build().await.unwrap() };
    let mut forks = Vec::new();
    for spec in &specs {
        let vm = vmm.restore(spec, &from).await.unwrap();
        vm.resume().await.unwrap();
        let guest = Guest::of(&vm).await;
        forks.push((vm, guest));
    }
    for (number, (_, guest)) in forks.iter_mut().enumerate() {
        assert_eq!(guest.ask("notes").await, "origin");
        guest.ask(&format!("note fork {number}")).await;
    }
    for (number, (vm, guest)) in forks.iter_mut().enumerate() {
        assert_eq!(guest.ask("notes").await, format!("fork {number}"));
        vm.kill().await.unwrap();
    }
}

async fn a_failed_save_or_restore_leaves_nothing<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let vm = vmm.launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    let dir = SnapshotDir::from(&host.root.path().join("refused"));
    std::fs::create_dir(&dir).unwrap();
    let error = vm.save(&dir, SaveChanges::Apart(Packing::Plain)).await.unwrap_err().to_string();
    assert!(error.contains("only a paused one can be saved"), "{error}");
    Guest::of(&vm).await;
    let dir = saved_into(&host, &vm, "saved").await;
    vm.kill().await.unwrap();
    vm.wait().await;
    assert!(vm.pause().await.is_err());
    let memory = Arc::new(MemoryImage::own(&dir.memory_image(), spec.uid).unwrap());
    let state = std::fs::read(dir.device_state()).unwrap();
    let from = Restore { dir: dir.clone(), memory, build: vmm.build().await.unwrap() };
    for damaged in [&state[..state.len() / 2], &[], b"not the state of any device"] {
        std::fs::write(dir.device_state(), damaged).unwrap();
        let error = vmm.restore(&spec, &from).await.err();
        assert!(matches!(error, Some(VmmError::DiedAtStart { .. })), "{error:?}");
        assert_eq!(processes_of(spec.uid), []);
    }
    std::fs::write(dir.device_state(), &state).unwrap();
    let vm = vmm.restore(&spec, &from).await.unwrap();
    vm.resume().await.unwrap();
    Guest::of(&vm).await;
    vm.kill().await.unwrap();
}

async fn until_gone<B: Backend>(vmm: &dyn Vmm, handle: &VmHandle, host: &Host<B>) {
    let spec = host.spec(1);
    let gone = async {
        // An adopted microVM can be waited for like a launched one.
        while let Some(vm) = vmm.adopt(handle, &spec).await.unwrap() {
            vm.wait().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
}

async fn a_kill_leaves_nothing_and_may_be_repeated<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let vm = vmm.launch(&spec).await.unwrap();
    let mut guest = Guest::of(&vm).await;
    vm.kill().await.unwrap();
    let exit = vm.wait().await;
    assert_eq!((exit.process, exit.reason), (ProcessEnd::Signaled { signal: 9 }, None));
    vm.kill().await.unwrap();
    assert!(vmm.adopt(vm.handle(), &spec).await.unwrap().is_none());
    assert!(vm.connect_guest().await.is_err());
    assert!(vm.usage().await.is_err());
    let end = tokio::time::timeout(PATIENCE, async {
        use tokio::io::AsyncReadExt;
        let mut rest = Vec::new();
        let _reset_or_end = guest.stream().read_to_end(&mut rest).await;
    });
    end.await.expect("the guest's stream ends");
    // Its directory, disks and sockets are free for the next.
    let again = vmm.launch(&spec).await.unwrap();
    Guest::of(&again).await;
    again.kill().await.unwrap();
}

async fn a_dropped_microvm_runs_on_and_is_adopted_once_known_by_its_whole_identity<B: Backend>(
    host: Host<B>,
) {
    let spec = host.spec(1);
    let handle = {
        let vm = host.backend.vmm().launch(&spec).await.unwrap();
        assert_eq!(Guest::of(&vm).await.ask("echo before").await, "before");
        vm.handle().clone()
    };
    let vmm = host.backend.vmm();
    for stranger in [
        VmHandle { start_ticks: handle.start_ticks - 1, ..handle.clone() },
        VmHandle { host_boot_id: "another".into(), ..handle.clone() },
        VmHandle { pid: 0x3fff_fff0, ..handle.clone() },
    ] {
        assert!(vmm.adopt(&stranger, &spec).await.unwrap().is_none(), "{stranger:?}");
    }
    let vm = vmm.adopt(&handle, &spec).await.unwrap().expect("it lives");
    assert_eq!(vm.handle(), &handle);
    let mut guest = Guest::of(&vm).await;
    assert_eq!(guest.ask("echo after").await, "after");
    guest.tell("off").await;
    assert_eq!(vm.wait().await.reason, Some(ShutdownReason::GuestShutdown));
    assert!(vmm.adopt(&handle, &spec).await.unwrap().is_none());
}

async fn a_failed_launch_leaves_nothing<B: Backend>(host: Host<B>) {
    let (vmm, good) = (host.backend.vmm(), host.spec(1));
    let missing = host.root.path().join("missing");
    let mut specs = Vec::new();
    for broken in ["kernel", "initrd", "disk", "uid"] {
        let mut spec = good.clone();
        match broken {
            "kernel" => spec.kernel = missing.clone(),
            "initrd" => spec.initrd = missing.clone(),
            "disk" => spec.disks[1].path = missing.clone(),
            _ => spec.uid = 0,
        }
        specs.push((broken, spec));
    }
    for (broken, spec) in specs {
        let error = vmm.launch(&spec).await.err().expect(broken);
        match broken {
            "uid" => assert!(matches!(error, VmmError::Spec { .. }), "{error}"),
            _ => assert!(error.to_string().contains("missing"), "{broken}: {error}"),
        }
    }
    if let Some(vmm) = host.backend.vmm_without_program() {
        let error = vmm.launch(&good).await.err().unwrap();
        assert!(matches!(error, VmmError::MissingProgram { .. }), "{error}");
    }
    let left = std::fs::read_dir(&good.dir).unwrap().count();
    assert_eq!(left, 0, "files in the instance's directory");
    let vm = vmm.launch(&good).await.unwrap();
    vm.kill().await.unwrap();
}

async fn two_microvms_share_a_base_and_no_layer<B: Backend>(host: Host<B>) {
    let vmm = host.backend.vmm();
    let (one, two) = (host.spec(1), host.spec(2));
    let (first, second) = tokio::join!(vmm.launch(&one), vmm.launch(&two));
    let (first, second) = (first.unwrap(), second.unwrap());
    tokio::join!(Guest::of(&first), Guest::of(&second));
    second.kill().await.unwrap();

    let mut thief = host.spec(2);
    thief.disks[1].path = one.disks[1].path.clone();
    let error = vmm.launch(&thief).await.err().expect("two writers of one disk");
    assert!(
        matches!(&error, VmmError::DiskInUse { path } if *path == one.disks[1].path),
        "{error}"
    );
    thief.disks[1].access = DiskAccess::ReadOnly;
    let error = vmm.launch(&thief).await.err().expect("a reader beside a writer");
    assert!(matches!(error, VmmError::DiskInUse { .. }), "{error}");

    // The lock is the VMM's own: it needs no agent, and goes with the process however that ends.
    first.kill().await.unwrap();
    let reader = vmm.launch(&thief).await.unwrap();
    let error = vmm.launch(&one).await.err().expect("a writer beside a reader");
    assert!(matches!(error, VmmError::DiskInUse { .. }), "{error}");
    reader.kill().await.unwrap();
}

async fn what_a_guest_does_with_its_disks_is_counted<B: Backend>(host: Host<B>) {
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    let vm = vmm.launch(&spec).await.unwrap();
    let handle = vm.handle().clone();
    let mut guest = Guest::of(&vm).await;
    let before = vm.counters().await.unwrap().disk_io;
    let mut rewrite = async || assert_eq!(guest.ask("rewrite").await, "rewritten");
    rewrite().await;
    let once = vm.counters().await.unwrap().disk_io;
    vm.tidy().await.unwrap();
    assert_eq!(once.written_bytes - before.written_bytes, 1 << 20, "{before:?} {once:?}");
    assert!(once.writes > before.writes && once.flushes > before.flushes, "{before:?} {once:?}");
    rewrite().await;
    // Another agent goes on counting.
    drop(vm);
    let vm = host.backend.vmm().adopt(&handle, &spec).await.unwrap().unwrap();
    let twice = vm.counters().await.unwrap().disk_io;
    assert_eq!(twice.written_bytes - before.written_bytes, 2 << 20, "{before:?} {twice:?}");
    assert_eq!(twice.failed, 0);
    vm.kill().await.unwrap();
    assert!(vm.counters().await.is_err());
    // The next run begins at nothing.
    let vm = vmm.launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    assert!(vm.counters().await.unwrap().disk_io.written_bytes < 1 << 20);
    vm.kill().await.unwrap();
}

async fn strays_of_one_instance_are_ended<B: Backend>(host: Host<B>) {
    let vmm = host.backend.vmm();
    let (one, two) = (host.spec(1), host.spec(2));
    let stray = vmm.launch(&one).await.unwrap();
    let other = vmm.launch(&two).await.unwrap();
    vmm.end_strays(&one).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, stray.wait()).await.unwrap();
    assert_eq!(end.reason, None);
    assert!(vmm.adopt(other.handle(), &two).await.unwrap().is_some());
    other.kill().await.unwrap();
}

#[tokio::test]
async fn qemu_runs_confined_as_its_own_user() {
    let Some(backend) = real_qemu().await else { return };
    let host = Host::new(backend);
    let spec = host.spec(1);
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    let pid = vm.handle().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = spec.uid;
    for expected in [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "Groups:\t \n".into(),
        "Seccomp:\t2".into(),
        "NoNewPrivs:\t1".into(),
        "CapEff:\t0000000000000000".into(),
        "CapBnd:\t".into(),
    ] {
        assert!(status.contains(&expected), "{expected:?} is not in {status}");
    }
    // Nothing that QEMU holds lets it change the shared base.
    let base = host.root.path().join("base");
    let mut writable_layers = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap) {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_str().unwrap());
        let info = text_of(info.as_ref());
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let writable = i64::from_str_radix(flags.trim(), 8).unwrap() & 0b11 != 0;
        assert!(!(writable && target == base), "the base is writable");
        writable_layers += usize::from(writable && target == spec.disks[1].path);
    }
    assert!(writable_layers > 0);
    for socket in ["qmp.sock", "agent.sock"] {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let metadata = std::fs::metadata(spec.dir.join(socket)).unwrap();
        assert_eq!((metadata.permissions().mode() & 0o777, metadata.uid()), (0o600, 0), "{socket}");
    }
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_file_that_is_no_kernel_ends_the_launch_with_qemu_s_own_words() {
    let Some(backend) = real_qemu().await else { return };
    let host = Host::new(backend);
    let mut spec = host.spec(1);
    spec.kernel = host.root.path().join("base");
    let error = host.backend.vmm().launch(&spec).await.err().expect("unreadable for its user");
    assert!(matches!(error, VmmError::File { .. }), "{error}");

    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&spec.kernel, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = host.backend.vmm().launch(&spec).await.err().expect("not a kernel");
    assert!(matches!(&error, VmmError::DiedAtStart { log } if log.contains("qemu")), "{error}");
    let mut left: Vec<_> = std::fs::read_dir(&spec.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["console.log", "vmm.log"], "only the logs stay");
}

/// An emulated guest that has to measure its own clock on a busy host hangs without one.
#[tokio::test]
async fn a_guest_boots_on_a_busy_host() {
    let Some(backend) = real_qemu().await else { return };
    let host = Host::new(backend);
    let spec = host.spec(1);
    let _busy = Busy::with_loops(4);
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    vm.kill().await.unwrap();
}

/// Threads that keep the processors busy until this is dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn with_loops(count: usize) -> Self {
        let goes_on = Arc::new(AtomicBool::new(true));
        for _ in 0..count {
            let goes_on = Arc::clone(&goes_on);
            std::thread::spawn(move || {
                while goes_on.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(goes_on)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// In a network namespace of this test's own thread, on which QEMU is also started.
#[tokio::test]
#[allow(unsafe_code)]
async fn a_tap_serves_one_microvm_at_a_time_which_has_its_address() {
    let Some(backend) = real_qemu().await else { return };
    // SAFETY: only the network namespace of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
    let added = std::process::Command::new("ip")
        .args(["tuntap", "add", "dev", "mvmtap0", "mode", "tap"])
        .status();
    assert!(added.unwrap().success());
    let host = Host::new(backend);
    let mac = MacAddr([0x02, 0x6d, 10, 240, 0, 3]);
    let with_nic = |number, tap: &str| VmSpec {
        nic: Some(Nic { tap: tap.to_owned(), mac }),
        ..host.spec(number)
    };
    let vmm = host.backend.vmm();
    let vm = vmm.launch(&with_nic(1, "mvmtap0")).await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("mac").await, mac.to_string());

    for (tap, why) in [("mvmtap0", "busy"), ("mvmtap1", "no such")] {
        let error = vmm.launch(&with_nic(2, tap)).await.err().expect(tap);
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().contains(tap) && source.contains(why), "{error}: {source}");
    }
    vm.kill().await.unwrap();
    vmm.launch(&with_nic(2, "mvmtap0")).await.unwrap().kill().await.unwrap();
}

#[tokio::test]
async fn a_launch_that_is_given_up_leaves_no_process() {
    let Some(backend) = real_qemu().await else { return };
    let host = Host::new(backend);
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    {
        let launch = vmm.launch(&spec);
        let started = eventually("QEMU runs", || !processes_of(spec.uid).is_empty());
        tokio::select! {
            biased;
            () = started => {}
            _ = launch => panic!("it was quicker than the process list"),
        }
    }
    assert_eq!(processes_of(spec.uid), []);
    assert!(!spec.dir.join("qmp.sock").exists());
    vmm.launch(&spec).await.unwrap().kill().await.unwrap();
}
