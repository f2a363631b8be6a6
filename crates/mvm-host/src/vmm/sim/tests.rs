use std::path::PathBuf;

use tokio::io::AsyncReadExt;
use tokio::time::Instant;

use super::*;

struct Host {
    dir: tempfile::TempDir,
    world: SimWorld,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in ["kernel", "initrd", "disk"] {
            File::create(dir.path().join(file)).unwrap();
        }
        Self { dir, world: SimWorld::new(SimTimes::default()) }
    }

    fn spec(&self, bits: u32) -> VmSpec {
        let id = InstanceId::from_bits(bits);
        let path = |name: &str| -> PathBuf { self.dir.path().join(name) };
        std::fs::create_dir_all(path(id.as_str())).unwrap();
        VmSpec {
            dir: path(id.as_str()).into(),
            id,
            vcpus: 1,
            mem_mib: 64,
            kernel: path("kernel"),
            initrd: path("initrd"),
            kernel_args: String::new(),
            disks: Vec::new(),
            nic: None,
            uid: 70_000,
            vmm: None,
            rates: mvm_core::rates::Rates::default(),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn faults_hit_the_next_launch_only_and_take_modelled_time() {
    let host = Host::new();
    let (vmm, spec) = (SimVmm::new(host.world.clone()), host.spec(1));
    for fault in [
        SimFault::LaunchFails("out of luck".into()),
        SimFault::PanicsAfter(Duration::from_secs(3_600)),
        SimFault::VmmDiesAfter(Duration::from_secs(60)),
    ] {
        host.world.inject(&spec.id, fault);
    }
    let Err(error) = vmm.launch(&spec).await else { panic!("launched") };
    assert!(error.to_string().contains("out of luck"), "{error}");
    assert!(host.world.running().is_empty());

    let start = Instant::now();
    let exit = vmm.launch(&spec).await.unwrap().wait().await;
    assert_eq!(exit.reason, Some(ShutdownReason::GuestPanic));
    assert!(start.elapsed() >= Duration::from_secs(3_600));
    let tail = crate::console::tail(&spec.dir.join("console.log"), 1).unwrap();
    assert!(tail[0].contains("Kernel panic - not syncing"), "{tail:?}");

    let exit = vmm.launch(&spec).await.unwrap().wait().await;
    assert_eq!(exit, VmExit { process: ProcessEnd::Signaled { signal: 11 }, reason: None });

    let healthy = vmm.launch(&spec).await.unwrap();
    let day = Duration::from_secs(86_400);
    assert!(tokio::time::timeout(day, healthy.wait()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_says_hello_is_silent_and_its_port_can_be_left() {
    let host = Host::new();
    let service: SimGuestService = Arc::new(|_stream, _control| panic!("it says hello"));
    let vmm = SimVmm::new(host.world.clone().with_guests(service));
    let spec = host.spec(1);
    host.world.inject(&spec.id, SimFault::NeverSaysHello);
    let vm = vmm.launch(&spec).await.unwrap();
    for _attempt in 0..2 {
        let mut stream = vm.connect_guest().await.unwrap();
        let read = tokio::time::timeout(Duration::from_secs(600), stream.read_u8()).await;
        assert!(read.is_err(), "it said something");
    }
    let mut stream = vm.connect_guest().await.unwrap();
    vm.kill().await.unwrap();
    assert!(stream.read_u8().await.is_err());
    assert!(vm.connect_guest().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_reboot_of_the_host_ends_everything_and_its_pids_are_used_again() {
    let host = Host::new();
    let (vmm, spec) = (SimVmm::new(host.world.clone()), host.spec(1));
    let before = vmm.launch(&spec).await.unwrap();
    host.world.reboot_host();
    assert_eq!(before.wait().await.process, ProcessEnd::Unobserved);
    assert!(host.world.running().is_empty());
    let after = vmm.launch(&spec).await.unwrap();
    assert_eq!(before.handle().pid, after.handle().pid);
    assert!(vmm.adopt(before.handle(), &spec).await.unwrap().is_none());
    assert!(vmm.adopt(after.handle(), &spec).await.unwrap().is_some());
}
