//! Firecracker's versions side by side: installed from a path or a mirror, kept for what they saved,
//! and used again for that. The program that stands in for Firecracker is each of them.

#![allow(clippy::unwrap_used, clippy::print_stderr)]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod image_support;
mod stand_in_program;
mod vmm_support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use mvm_core::vmm::VmmKind;
use mvm_host::bootstrap::Outcome;
use mvm_host::bootstrap::firecracker::{InstallError, Wanted, install};
use mvm_host::image::digest::Digest;
use mvm_host::state_dir::SnapshotDir;
use mvm_host::vmm::firecracker::{FirecrackerConfig, FirecrackerVersion, FirecrackerVmm};
use mvm_host::vmm::sim::{SimTimes, SimVmm, SimWorld};
use mvm_host::vmm::{MemoryImage, NodeVmm, Packing, Restore, SaveChanges, Vm, VmSpec, Vmm};
use serde_json::json;
use vmm_support::stand_in::{BEHAVIOUR, StandIn};
use vmm_support::{Backend, Guest, Host};

const VERSION: FirecrackerVersion = FirecrackerVersion(1, 15, 1);

/// Makes a kept program say that it is a version: it says 1.15.1 unless told.
fn call(kept: &Path, version: &str) {
    let path = kept.join(version).join(BEHAVIOUR);
    std::fs::write(path, json!({ "version": version }).to_string()).unwrap();
}

async fn version_of(vm: &dyn Vm) -> String {
    vm.build().await.unwrap().version
}

#[tokio::test]
async fn what_a_version_saved_is_restored_by_it_after_an_upgrade() {
    let Ok(backend) = StandIn::new() else { return };
    let host = Host::new(backend);
    let (spec, kept) = (host.spec(1), host.root.path().join("firecracker"));
    let old = host.backend.vmm_that_keeps(&kept);
    let vm = old.launch(&spec).await.unwrap();
    Guest::of(&vm).await.ask("note old").await;
    // It is replaced where it was installed, while the microVM runs.
    host.backend.behave(&json!({ "version": "1.16.2" }));
    let from = saved(&*vm, &spec, &host.root.path().join("saved")).await;
    let saved_on = &from.build;
    assert_eq!((saved_on.vmm, saved_on.version.as_str()), (VmmKind::Firecracker, "1.15.1"));

    let new = host.backend.vmm_that_keeps(&kept);
    assert_eq!(new.build().await.unwrap().version, "1.16.2");
    call(&kept, "1.16.2");
    assert_eq!(new.build_for(saved_on).await.unwrap(), *saved_on);
    let vm = new.restore(&spec, &from).await.unwrap();
    assert_eq!(version_of(&*vm).await, "1.15.1");
    vm.resume().await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("notes").await, "old");
    vm.kill().await.unwrap();
    vm.wait().await;
    let vm = new.launch(&spec).await.unwrap();
    assert_eq!(version_of(&*vm).await, "1.16.2");
    vm.kill().await.unwrap();

    // Without it, the verdict is about what there is.
    std::fs::remove_dir_all(kept.join("1.15.1")).unwrap();
    assert_eq!(new.build_for(saved_on).await.unwrap().version, "1.16.2");
}

#[tokio::test]
async fn what_firecracker_saved_it_restores_also_for_an_agent_that_uses_another_vmm() {
    let Ok(backend) = StandIn::new() else { return };
    let host = Host::new(backend);
    let spec = host.spec(1);
    let vm = host.backend.vmm().launch(&spec).await.unwrap();
    Guest::of(&vm).await.ask("note kept").await;
    let from = saved(&*vm, &spec, &host.root.path().join("saved")).await;
    let simulated = Arc::new(SimVmm::new(SimWorld::new(SimTimes::default())));
    let node = NodeVmm::new(simulated.clone()).and(host.backend.vmm(), None);
    assert_eq!(node.build_for(&from.build).await.unwrap(), from.build);
    let vm = node.restore(&spec, &from).await.unwrap();
    assert_eq!(vm.handle().vmm, VmmKind::Firecracker);
    vm.resume().await.unwrap();
    assert_eq!(Guest::of(&vm).await.ask("notes").await, "kept");
    vm.kill().await.unwrap();
    // In production nothing but the chosen one starts microVMs.
    let strict = NodeVmm::new(simulated.clone()).and(host.backend.vmm(), None);
    let strict = strict.with_none_but_the_chosen();
    assert_eq!(strict.build_for(&from.build).await.unwrap().vmm, VmmKind::Sim);
    // Where it is no more, the verdict is about what there is.
    let gone = host.backend.vmm_without_program().unwrap();
    let node = NodeVmm::new(simulated).and(gone, None);
    assert_eq!(node.build_for(&from.build).await.unwrap().vmm, VmmKind::Sim);
}

/// Saves a microVM, and ends it.
async fn saved(vm: &dyn Vm, spec: &VmSpec, dir: &Path) -> Restore {
    let dir = &SnapshotDir::from(dir);
    std::fs::create_dir(dir).unwrap();
    vm.pause().await.unwrap();
    vm.save(dir, SaveChanges::Apart(Packing::Plain)).await.unwrap();
    let build = vm.build().await.unwrap();
    vm.kill().await.unwrap();
    vm.wait().await;
    let memory = Arc::new(MemoryImage::own(&dir.memory_image(), spec.uid).unwrap());
    Restore { dir: dir.clone(), memory, build }
}

/// A mirror on this machine's loopback: paths with what is answered, everything else is not found.
fn mirror(files: BTreeMap<String, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/releases", listener.local_addr().unwrap());
    // Ends with the test's process.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> =
                lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
            let (status, body) = match files.get(path.trim_start_matches("/releases/")) {
                Some(content) => ("200 OK", content.as_slice()),
                None => ("404 Not Found", &b""[..]),
            };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}", body.len());
            // A client that has seen enough hangs up.
            let _ = stream.write_all(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes());
            let _ = stream.write_all(body);
        }
    });
    url
}

/// An archive as the project publishes it, with these programs of a version.
fn archive(version: &str, programs: &[&str]) -> Vec<u8> {
    let content = std::fs::read(stand_in_program::path().unwrap()).unwrap();
    let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    let mut archive = tar::Builder::new(encoder);
    for name in programs {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        let path = format!("release-v{version}-x86_64/{name}-v{version}-x86_64");
        archive.append_data(&mut header, path, content.as_slice()).unwrap();
    }
    archive.into_inner().unwrap().finish().unwrap()
}

/// Where a version and its checksum are on a mirror.
fn published(version: &str, archive: Vec<u8>, checksum: &str) -> BTreeMap<String, Vec<u8>> {
    let name = format!("firecracker-v{version}-x86_64.tgz");
    let line = format!("{checksum}  {name}\n");
    BTreeMap::from([
        (format!("v{version}/{name}"), archive),
        (format!("v{version}/{name}.sha256.txt"), line.into_bytes()),
    ])
}

fn sum(content: &[u8]) -> String {
    Digest::of(content).to_string()
}

#[tokio::test]
async fn a_release_is_downloaded_verified_and_used() {
    let (state, whole) =
        (tempfile::tempdir().unwrap(), archive("1.15.1", &["firecracker", "jailer"]));
    let url = mirror(published("1.15.1", whole.clone(), &sum(&whole)));
    for outcome in [Outcome::Made, Outcome::AlreadyThere] {
        let installed =
            install(&state.path().into(), &Wanted::Release(VERSION), &url, &|_| {}).await;
        assert_eq!(installed.unwrap(), (VERSION, outcome));
    }
    let config = FirecrackerConfig::of(&state.path().into());
    assert_eq!(config.program, state.path().join("firecracker/1.15.1/firecracker"));
    assert_eq!(FirecrackerVmm::new(config).version().await.unwrap(), VERSION);
    let names = image_support::names(&state.path().join("firecracker"));
    assert_eq!(names, ["1.15.1"], "something is left");
}

#[tokio::test]
async fn what_is_not_the_published_release_is_not_installed() {
    let whole = archive("1.15.1", &["firecracker", "jailer"]);
    let half = archive("1.15.1", &["firecracker"]);
    let digest = sum(&whole);
    let cut = whole[..whole.len() / 2].to_vec();
    let other = archive("1.16.2", &["firecracker", "jailer"]);
    let release = |text: &str| text.parse::<Wanted>().unwrap();
    for (wanted, files, told) in [
        ("1.15.1", BTreeMap::new(), "404"),
        ("1.15.1", published("1.15.1", whole.clone(), "none"), "its published checksum is none"),
        ("1.15.1", published("1.15.1", cut.clone(), &digest), "expected SHA-256"),
        ("1.15.1", published("1.15.1", cut.clone(), &sum(&cut)), "is not the release"),
        ("1.15.1", published("1.15.1", half.clone(), &sum(&half)), "there is no `jailer-v1.15.1"),
        ("v1.16.2", published("1.16.2", other.clone(), &sum(&other)), "says that it is 1.15.1"),
        ("1.16.0", BTreeMap::new(), "loses the guest's channel"),
    ] {
        let state = tempfile::tempdir().unwrap();
        let url = mirror(files);
        let error =
            install(&state.path().into(), &release(wanted), &url, &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains(told), "{wanted}: {error}");
        let left = std::fs::read_dir(state.path().join("firecracker"));
        assert_eq!(left.map_or(0, Iterator::count), 0, "{told}: something is left");
    }
    let state = tempfile::tempdir().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{nobody}");
    let error = install(&state.path().into(), &release("1.15.1"), &url, &|_| {}).await.unwrap_err();
    assert!(
        matches!(&error, InstallError::Download { problem, .. } if problem.contains("refused"))
    );
}

#[tokio::test]
async fn the_programs_of_a_path_are_installed_unless_others_of_their_version_are() {
    let (state, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let program = dir.path().join("firecracker");
    let wanted: Wanted = program.to_str().unwrap().parse().unwrap();
    assert_eq!(wanted, Wanted::Program(program.clone()));
    let installed = async || install(&state.path().into(), &wanted, "", &|_| {}).await;
    let error = installed().await.unwrap_err();
    assert!(matches!(error, InstallError::NoProgram { .. }), "{error}");
    for name in ["firecracker", "jailer"] {
        std::fs::copy(stand_in_program::path().unwrap(), dir.path().join(name)).unwrap();
    }
    assert_eq!(installed().await.unwrap(), (VERSION, Outcome::Made));
    assert_eq!(installed().await.unwrap(), (VERSION, Outcome::AlreadyThere));
    let jailer = std::fs::File::options().append(true).open(dir.path().join("jailer"));
    jailer.unwrap().write_all(b"rebuilt").unwrap();
    let error = installed().await.unwrap_err();
    assert!(matches!(&error, InstallError::Others { .. }), "{error}");
}
