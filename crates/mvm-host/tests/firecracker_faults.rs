//! What Firecracker's driver makes of refusals, sudden ends and silence, with the program that stands
//! in for Firecracker: each says what went wrong and leaves nothing, or the microVM as it was.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod image_support;
mod stand_in_program;
mod vmm_support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use mvm_core::vmm::ProcessEnd;
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::firecracker::Isolation;
use mvm_host::vmm::{MemoryImage, Packing, Restore, SaveChanges, Vm, VmSpec, Vmm, VmmError};
use serde_json::{Value, json};
use vmm_support::stand_in::StandIn;
use vmm_support::{Backend, Guest, Host, processes_of};

/// How long the driver waits for a stand-in that is silent.
const SHORT: Duration = Duration::from_millis(300);
/// The requests of a launch, in their order.
const LAUNCH: [&str; 8] = [
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/disk0",
    "PUT /drives/disk1",
    "PUT /vsock",
    "PUT /entropy",
    "PUT /balloon",
    "PUT /actions",
];

fn host() -> Option<Host<StandIn>> {
    StandIn::new().inspect_err(|why| eprintln!("skipped: {why}")).map(Host::new).ok()
}

/// A fault at one request, or at the start.
fn fault(at: &str, what: &Value) -> Value {
    json!({ "faults": [{ "at": at, "what": what }] })
}

fn refused(words: &str) -> Value {
    let body = json!({ "fault_message": words }).to_string();
    json!({ "refuse": { "status": 400, "body": body } })
}

/// What a request may meet, and what is told of it.
fn faults() -> Vec<(Value, &'static str)> {
    vec![
        (refused("not today"), "Firecracker refused with status 400: not today"),
        (
            json!({ "refuse": { "status": 500, "body": "no JSON" } }),
            "Firecracker refused with status 500: no JSON",
        ),
        (json!({ "die": { "words": "a last word" } }), "a last word"),
        (json!({ "say": "SSH-2.0-OpenSSH\r\n" }), "cannot talk to Firecracker"),
        (json!({ "say": "" }), "cannot talk to Firecracker"),
        (json!({ "say": "HTTP/1.1 200 \r\nContent-Length: 99\r\n\r\n{" }), "cannot talk to"),
    ]
}

/// Nothing of an instance is left but its logs.
#[track_caller]
fn assert_nothing_left(spec: &VmSpec) {
    assert_eq!(processes_of(spec.uid), []);
    let mut left: Vec<_> = std::fs::read_dir(&spec.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("console.log"))
        .collect();
    left.retain(|name| name != "vmm.log");
    assert_eq!(left, Vec::<String>::new());
}

#[tokio::test]
async fn a_launch_that_meets_a_fault_at_any_request_says_which_and_leaves_nothing() {
    // At once: what fails is waited for, because it may yet say why.
    join_all(LAUNCH.map(launches_that_meet_faults)).await;
}

async fn launches_that_meet_faults(request: &str) {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    for (what, told) in faults() {
        host.backend.behave(&fault(request, &what));
        let error = host.backend.vmm().launch(&spec).await.err().expect(request).to_string();
        assert!(error.contains(told), "{request} {what}: {error}");
        let is_end = what.get("die").is_some();
        assert!(is_end || error.starts_with(request), "{request} {what}: {error}");
        assert_nothing_left(&spec);
    }
    host.backend.behave(&json!({}));
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn what_an_earlier_agent_left_running_is_ended_before_its_jail_is_removed() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    drop(host.backend.vmm().launch(&spec).await.unwrap());
    host.backend.vmm().clear(&spec).await.unwrap();
    assert_nothing_left(&spec);
}

#[tokio::test]
async fn a_firecracker_that_is_silent_or_late_is_given_up_or_waited_for() {
    let Ok(backend) = StandIn::new() else { return };
    let host = Host::new(backend.within(SHORT));
    let spec = host.spec(1);
    for (at, told) in [("start", "cannot talk to Firecracker"), ("PUT /vsock", "did not answer")] {
        host.backend.behave(&fault(at, &json!("hang")));
        let error = host.backend.vmm().launch(&spec).await.err().expect(at).to_string();
        assert!(error.contains(told), "{at}: {error}");
        assert_nothing_left(&spec);
    }
    host.backend.behave(&fault("PUT /vsock", &json!({ "delay": 100 })));
    host.backend.vmm().launch(&spec).await.unwrap().kill().await.unwrap();
}

#[tokio::test]
async fn one_that_ends_before_it_serves_is_told_in_its_own_words() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    host.backend
        .behave(&fault("start", &json!({ "die": { "words": "Failed to chown /dev/kvm" } })));
    let error = host.backend.vmm().launch(&spec).await.err().unwrap();
    assert!(
        matches!(&error, VmmError::DiedAtStart { log } if log == "Failed to chown /dev/kvm"),
        "{error}"
    );
    assert_nothing_left(&spec);
}

/// In the words of a real one without access to it.
#[tokio::test]
async fn a_kvm_that_is_refused_is_told() {
    let Some(host) = host() else { return };
    let words = "Start microvm error: Kvm error: Error creating KVM object: Permission denied (os \
                 error 13)";
    host.backend.behave(&fault("PUT /actions", &refused(words)));
    let error = host.backend.vmm().launch(&host.spec(1)).await.err().unwrap().to_string();
    assert!(error.starts_with("PUT /actions: ") && error.ends_with(words), "{error}");
}

#[tokio::test]
async fn a_version_with_known_faults_is_refused_before_anything_is_made() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    for (version, is_fit) in [
        ("1.10.1", false),
        ("1.15.0", false),
        ("1.16.0", false),
        ("1.16.1", false),
        ("1.16.2", true),
    ] {
        host.backend.behave(&json!({ "version": version }));
        let launched = host.backend.vmm().launch(&spec).await;
        match launched {
            Ok(vm) => {
                assert!(is_fit, "{version}");
                assert_eq!(host.backend.vmm().build().await.unwrap().version, version);
                vm.kill().await.unwrap();
            }
            Err(VmmError::Unfit { found, .. }) => {
                assert!(!is_fit && found == version, "{version}");
                assert_eq!(std::fs::read_dir(&spec.dir).unwrap().count(), 0);
            }
            Err(error) => panic!("{version}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_firecracker_without_a_jailer_is_not_started() {
    let Some(host) = host() else { return };
    std::fs::remove_file(host.backend.program().with_file_name("jailer")).unwrap();
    let error = host.backend.vmm().launch(&host.spec(1)).await.err().unwrap();
    assert!(
        matches!(&error, VmmError::MissingProgram { program } if program == "jailer"),
        "{error}"
    );
}

/// The stand-in makes no cgroup on any machine, and has no seccomp filter unless it is given one.
#[tokio::test]
async fn production_ends_what_is_not_walled_off_and_says_what_it_lacks() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let filter = host.root.path().join("filter.bpf");
    std::fs::write(&filter, "compiled").unwrap();
    for (given, lacks) in [
        (None, "a seccomp filter, a cgroup of its own (version 2)"),
        (Some(filter.clone()), "a cgroup of its own (version 2)"),
    ] {
        let vmm = host.backend.vmm_that_isolates(Isolation::Production, given);
        let error = vmm.launch(&spec).await.err().unwrap();
        assert!(
            matches!(&error, VmmError::NotIsolated { lacks: told, .. } if told == lacks),
            "{error}"
        );
        assert_nothing_left(&spec);
    }
}

#[tokio::test]
async fn a_seccomp_filter_of_the_operator_s_is_in_force_or_the_launch_fails() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let filter = host.root.path().join("filter.bpf");
    let vmm = host.backend.vmm_that_isolates(Isolation::Available, Some(filter.clone()));
    let error = vmm.launch(&spec).await.err().unwrap();
    assert!(matches!(&error, VmmError::File { path, .. } if *path == filter), "{error}");
    std::fs::write(&filter, "").unwrap();
    let error = vmm.launch(&spec).await.err().unwrap().to_string();
    assert!(error.contains("Filter deserialization failed"), "{error}");
    assert_nothing_left(&spec);
    std::fs::write(&filter, "compiled").unwrap();
    let vm = vmm.launch(&spec).await.unwrap();
    let status = vmm_support::text_of(format!("/proc/{}/status", vm.handle().pid).as_ref());
    assert!(status.contains("Seccomp:\t2\n"), "{status}");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_template_of_the_processor_is_taken_or_the_launch_fails() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let template = host.root.path().join("template.json");
    let vmm = host.backend.vmm_with_template(&template);
    let failure = async || vmm.launch(&spec).await.err().unwrap();
    let error = failure().await;
    assert!(matches!(&error, VmmError::File { path, .. } if *path == template), "{error}");
    std::fs::write(&template, "{").unwrap();
    let error = failure().await;
    assert!(matches!(&error, VmmError::File { path, .. } if *path == template), "{error}");
    std::fs::write(&template, r#"{"cpu": "fast"}"#).unwrap();
    let error = failure().await.to_string();
    assert!(error.contains("PUT /cpu-config") && error.contains("unknown field `cpu`"), "{error}");
    assert_nothing_left(&spec);
    std::fs::write(&template, r#"{"cpuid_modifiers": []}"#).unwrap();
    vmm.launch(&spec).await.unwrap().kill().await.unwrap();
}

#[tokio::test]
async fn a_jail_that_a_crash_left_is_replaced() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let left = spec.dir.join("jail/another-program").join(spec.id.as_str()).join("root/save");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("memory"), "of an earlier run").unwrap();
    // Nobody listens on it any more.
    drop(std::os::unix::net::UnixListener::bind(host.root.path().join("api.sock")).unwrap());
    std::fs::rename(host.root.path().join("api.sock"), left.with_file_name("api.sock")).unwrap();
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    Guest::of(&vm).await;
    assert!(!left.exists());
    vm.kill().await.unwrap();
}

/// Launches, pauses and saves a microVM, and ends it.
async fn saved(host: &Host<StandIn>, spec: &VmSpec, dir: &Path) -> Restore {
    let dir = &SnapshotDir::from(dir);
    std::fs::create_dir(dir).unwrap();
    let vm = host.backend.vmm().launch(spec).await.unwrap();
    Guest::of(&vm).await.ask("note kept").await;
    vm.pause().await.unwrap();
    vm.save(dir, SaveChanges::Apart(Packing::Plain)).await.unwrap();
    vm.kill().await.unwrap();
    vm.wait().await;
    let memory = MemoryImage::own(&dir.memory_image(), spec.uid).unwrap();
    let build = host.backend.vmm().build().await.unwrap();
    Restore { dir: dir.clone(), memory: Arc::new(memory), build }
}

#[tokio::test]
async fn a_restore_that_meets_a_fault_leaves_what_was_saved_and_nothing_else() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let from = saved(&host, &spec, &host.root.path().join("saved")).await;
    let content =
        || [from.dir.device_state(), from.dir.memory_image()].map(|it| std::fs::read(it).unwrap());
    let before = content();
    for (what, told) in faults() {
        host.backend.behave(&fault("PUT /snapshot/load", &what));
        let error = host.backend.vmm().restore(&spec, &from).await.err().unwrap().to_string();
        assert!(error.contains(told), "{what}: {error}");
        assert_nothing_left(&spec);
    }
    assert!(content() == before, "what was saved changed");
    host.backend.behave(&json!({}));
    let vm = host.backend.vmm().restore(&spec, &from).await.unwrap();
    vm.resume().await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("notes").await, "kept");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_pause_resume_or_save_that_is_refused_leaves_the_microvm_as_it_was() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let dir = SnapshotDir::from(&host.root.path().join("dest"));
    std::fs::create_dir(&dir).unwrap();
    for (request, is_paused) in [("PATCH /vm", false), ("PUT /snapshot/create", true)] {
        for (what, told) in faults().into_iter().filter(|(what, _)| what.get("die").is_none()) {
            host.backend.behave(&fault(request, &what));
            let vm = host.backend.vmm().launch(&spec).await.unwrap();
            let error = match is_paused {
                false => vm.pause().await.unwrap_err(),
                true => {
                    vm.pause().await.unwrap();
                    vm.save(&dir, SaveChanges::Apart(Packing::Plain)).await.unwrap_err()
                }
            };
            assert!(error.to_string().contains(told), "{request} {what}: {error}");
            assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{request} {what}");
            if is_paused {
                vm.resume().await.unwrap();
            }
            Guest::of(&vm).await;
            vm.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_firecracker_that_dies_in_the_middle_of_a_call_is_known_to_have_ended() {
    let Some(host) = host() else { return };
    let spec = host.spec(1);
    let dir = SnapshotDir::from(&host.root.path().join("dest"));
    std::fs::create_dir(&dir).unwrap();
    let die = json!({ "die": { "words": "" } });
    for request in ["PATCH /vm", "PUT /snapshot/create"] {
        host.backend.behave(&fault(request, &die));
        let vm: Arc<dyn Vm> = host.backend.vmm().launch(&spec).await.unwrap();
        let paused = vm.pause().await;
        let done = match request {
            "PATCH /vm" => paused,
            _ => vm.save(&dir, SaveChanges::Apart(Packing::Plain)).await.map(drop),
        };
        assert!(done.unwrap_err().to_string().starts_with(request), "{request}");
        let end = vm.wait().await;
        assert_eq!((end.process, end.reason), (ProcessEnd::Exited { code: 1 }, None), "{request}");
        assert!(vm.connect_guest().await.is_err());
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{request}");
    }
}
