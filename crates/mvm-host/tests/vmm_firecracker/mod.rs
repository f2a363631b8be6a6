//! What Firecracker's driver promises besides the contract.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_core::net::MacAddr;
use mvm_host::vmm::firecracker::{FirecrackerConfig, FirecrackerVmm, Isolation};
use mvm_host::vmm::{Nic, TapPlace, VmSpec, Vmm, VmmError};

use super::elf_support::kernel;
use super::real_firecracker;
use super::vmm_support::{Backend, Guest, Host, PATIENCE, eventually, processes_of, text_of};

fn cgroup_of(spec: &VmSpec) -> std::path::PathBuf {
    Path::new("/sys/fs/cgroup/mvm").join(spec.uid.to_string())
}

#[tokio::test]
async fn it_runs_jailed_as_its_own_user() {
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let spec = host.spec(1);
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    let pid = vm.handle().pid;
    let status = text_of(format!("/proc/{pid}/status").as_ref());
    let uid = spec.uid;
    for expected in [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "Groups:\t \n".into(),
        "NoNewPrivs:\t1".into(),
        "CapEff:\t0000000000000000".into(),
        // The first of its own PID namespace.
        format!("NSpid:\t{pid}\t1\n"),
    ] {
        assert!(status.contains(&expected), "{expected:?} is not in {status}");
    }
    // Its root is the jail, in which the disks are the instance's own files.
    let root = format!("/proc/{pid}/root");
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    for (name, disk) in [("disk0", &spec.disks[0]), ("disk1", &spec.disks[1])] {
        assert_eq!(inode(&Path::new(&root).join(name)), inode(&disk.path), "{name}");
    }
    assert!(!Path::new(&root).join("proc").exists() && !Path::new(&root).join("etc").exists());
    let base = std::fs::metadata(&spec.disks[0].path).unwrap();
    assert_eq!((base.uid(), base.mode() & 0o022), (0, 0), "the shared base can be written");
    let limit = text_of(&cgroup_of(&spec).join(spec.id.as_str()).join("memory.max"));
    assert_eq!(limit.trim(), ((128 * 2 + 128) << 20).to_string());
    vm.kill().await.unwrap();
    assert!(!cgroup_of(&spec).exists(), "a cgroup is left");
}

/// One that was not built as its releases are may lack a filter of its own, and nothing else.
#[tokio::test]
async fn production_finds_every_wall_where_the_machine_has_them() {
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let spec = host.spec(1);
    let seccomp_filter = std::env::var_os("MVM_TEST_SECCOMP_FILTER").map(PathBuf::from);
    let has_filter = seccomp_filter.is_some();
    let config = FirecrackerConfig::from_environment();
    let isolation = Isolation::Production;
    let vmm = FirecrackerVmm::new(FirecrackerConfig { isolation, seccomp_filter, ..config });
    match vmm.launch(&spec).await {
        Ok(vm) => {
            Guest::of(&vm).await;
            vm.kill().await.unwrap();
        }
        Err(VmmError::NotIsolated { lacks, .. }) => {
            assert_eq!(lacks, "a seccomp filter");
            assert!(!has_filter, "the filter that was given is not in force");
            assert_eq!(processes_of(spec.uid), []);
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_file_that_is_no_kernel_is_refused_before_anything_is_made() {
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let mut spec = host.spec(1);
    spec.kernel = host.root.path().join("base");
    let error = host.backend.vmm().launch(&spec).await.err().expect("not a kernel");
    assert!(matches!(&error, VmmError::File { path, .. } if *path == spec.kernel), "{error}");
    assert_eq!(std::fs::read_dir(&spec.dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_kernel_that_does_not_boot_ends_its_microvm_and_says_nothing() {
    /// An instruction that is none, where nothing handles it.
    const FAULTS: [u8; 2] = [0x0f, 0x0b];
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let mut spec = host.spec(1);
    spec.kernel = host.root.path().join("faults");
    std::fs::write(&spec.kernel, kernel(&FAULTS)).unwrap();
    match host.backend.vmm().launch(&spec).await {
        Ok(vm) => {
            let exit = tokio::time::timeout(PATIENCE, vm.wait()).await.unwrap();
            assert_eq!(exit.reason, None, "nobody has said why");
        }
        // It was quicker than the driver.
        Err(error) => assert!(matches!(error, VmmError::DiedAtStart { .. }), "{error}"),
    }
    assert_eq!(processes_of(spec.uid), []);
}

#[tokio::test]
async fn a_tap_is_made_where_nothing_else_is_for_the_microvms_user() {
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let spec = |number| VmSpec {
        nic: Some(Nic { tap: "mvmtap0".into(), mac: MacAddr([0x02, 0x6d, 10, 240, 0, 3]) }),
        ..host.spec(number)
    };
    let vmm = host.backend.vmm();
    assert_eq!(vmm.tap_place(None), TapPlace::Own);
    // Of one name: neither is where the other, or the machine's links, are.
    let vms = [vmm.launch(&spec(1)).await.unwrap(), vmm.launch(&spec(2)).await.unwrap()];
    for (vm, number) in vms.iter().zip(1..) {
        assert_eq!(Guest::of(vm).await.ask("mac").await, "02:6d:0a:f0:00:03");
        let namespace = format!("--net=/proc/{}/ns/net", vm.handle().pid);
        let links = Command::new("nsenter").args([&namespace, "ip", "-o", "-d", "link"]).output();
        let links = String::from_utf8(links.unwrap().stdout).unwrap();
        let names: Vec<&str> = links.lines().filter_map(|it| it.split(": ").nth(1)).collect();
        assert_eq!(names, ["lo", "mvmtap0"], "{links}");
        assert!(links.contains(&format!(" user {} ", spec(number).uid)), "{links}");
    }
    let here = Command::new("ip").args(["-o", "link"]).output().unwrap();
    assert!(!String::from_utf8(here.stdout).unwrap().contains("mvmtap0"));
    for vm in vms {
        vm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_launch_that_is_given_up_leaves_no_process_and_no_jail() {
    let Some(backend) = real_firecracker() else { return };
    let host = Host::new(backend);
    let (vmm, spec) = (host.backend.vmm(), host.spec(1));
    {
        let launch = vmm.launch(&spec);
        let started = eventually("the jailer runs", || spec.dir.join("vmm.log").exists());
        tokio::select! {
            biased;
            () = started => {}
            _ = launch => panic!("it was quicker than a look at the directory"),
        }
    }
    assert_eq!(processes_of(spec.uid), []);
    assert!(!spec.dir.join("jail").exists());
    vmm.launch(&spec).await.unwrap().kill().await.unwrap();
}
