//! Guest kernels from the distribution's packages and from the user's own files.

// A skipped test says why, and numbers are shown; a test ends at its first surprise.
#![allow(clippy::print_stdout, clippy::unwrap_used)]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod image_support;

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use image_support::{can_run, kernel, names, packages, quiet, run, with_own_mounts};
use mvm_host::bootstrap::{BootstrapError, Outcome};
use mvm_host::bootstrap::{Kernel, KernelStore};
use mvm_host::image::progress::Progress;

#[tokio::test]
async fn a_kernel_is_fetched_once_and_mended_when_damaged() {
    if !can_run(&["apt-get"]) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let store = KernelStore::new(state.path()).with_cache(packages());
    assert!(store.default_kernel().unwrap().is_none());
    let (kernel, outcome) = store.ensure_default(&quiet).await.unwrap();
    assert_eq!(outcome, Outcome::Made);
    kernel.verify().unwrap();
    let load = &kernel.manifest().load;
    println!("{} loads {load:?}", kernel.manifest().release);
    for (name, path) in kernel.modules() {
        assert!(fs::read(&path).unwrap().starts_with(b"\x7fELF"), "{name} is not an ELF file");
    }
    check_module_image(&kernel, state.path());

    let (again, outcome) = store.ensure_default(&quiet).await.unwrap();
    assert_eq!((again.id(), outcome), (kernel.id(), Outcome::AlreadyThere));
    assert_eq!(names(&state.path().join("kernels")), ["default", kernel.id().as_str()]);

    fs::OpenOptions::new().write(true).open(kernel.vmlinuz()).unwrap().set_len(1000).unwrap();
    let error = store.default_kernel().unwrap_err().to_string();
    assert!(error.contains("vmlinuz has 1000 bytes instead of"), "{error}");
    let (mended, outcome) = store.ensure_default(&quiet).await.unwrap();
    assert_eq!((mended.id(), outcome), (kernel.id(), Outcome::Made));
    mended.verify().unwrap();
}

/// All modules are in the kernel's filesystem, as files that need no unpacking, with the lists that
/// `modprobe` reads.
fn check_module_image(kernel: &Kernel, scratch: &Path) {
    let (image, _) = kernel.module_image().unwrap();
    let dir = scratch.join("extracted");
    let extract = format!("--extract={}", dir.display());
    let (sound, output) = run("fsck.erofs", &[&extract, image.to_str().unwrap()]);
    assert!(sound, "{output}");
    let needs = fs::read_to_string(dir.join("modules.dep")).unwrap();
    for name in ["bridge", "veth", "nf_tables", "tun", "fuse", "loop", "wireguard"] {
        let line = needs.lines().find(|line| line.contains(&format!("/{name}.ko:"))).unwrap();
        let (path, _) = line.split_once(':').unwrap();
        assert!(fs::read(dir.join(path)).unwrap().starts_with(b"\x7fELF"), "{path}");
    }
    for list in ["modules.dep.bin", "modules.alias.bin", "modules.alias", "modules.nodes"] {
        assert!(dir.join(list).metadata().unwrap().len() > 0, "{list}");
    }
    fs::remove_dir_all(dir).unwrap();
}

/// As an earlier mvm stored it.
fn without_module_image(kernel: &Kernel, kernels: &Path) {
    let (old, id) = (kernels.join(kernel.id().as_str()), "k-00000000000000aa");
    let text = fs::read_to_string(old.join("kernel.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    manifest["id"] = id.into();
    manifest["files"].as_object_mut().unwrap().remove("modules.erofs").unwrap();
    fs::remove_file(old.join("kernel.json")).unwrap();
    fs::write(old.join("kernel.json"), manifest.to_string()).unwrap();
    fs::rename(&old, kernels.join(id)).unwrap();
    fs::write(kernels.join("default"), id).unwrap();
}

#[tokio::test]
async fn a_kernel_that_was_stored_without_its_modules_boots_guests_and_is_fetched_anew() {
    if !can_run(&["apt-get"]) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let store = KernelStore::new(state.path()).with_cache(packages());
    let (kernel, _) = store.ensure_default(&quiet).await.unwrap();
    assert!(!kernel.lacks_modules());
    without_module_image(&kernel, &state.path().join("kernels"));
    let old = store.default_kernel().unwrap().unwrap();
    assert!(old.lacks_modules() && old.module_image().is_none());
    let (whole, outcome) = store.ensure_default(&quiet).await.unwrap();
    assert_eq!((whole.id(), outcome), (kernel.id(), Outcome::Made));
    assert!(whole.module_image().is_some());
    assert!(store.open(old.id()).is_ok(), "images that were built with it are");
}

#[tokio::test]
async fn the_users_own_kernel_is_checked_and_stored() {
    if !can_run(&["apt-get"]) {
        return;
    }
    let fetched = kernel().await;
    let modules = fetched.vmlinuz().with_file_name("modules");
    let state = tempfile::tempdir().unwrap();
    let store = KernelStore::new(state.path());

    let (plain, _) = store.import(&fetched.vmlinuz(), None).await.unwrap();
    assert_eq!(plain.manifest().release, fetched.manifest().release);
    assert!(plain.modules().is_empty());

    let whole = fs::read(fetched.vmlinuz()).unwrap();
    let cut = state.path().join("cut");
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let error = store.import(&cut, None).await.unwrap_err();
    assert!(matches!(error, BootstrapError::BadKernel { .. }), "{error}");
    assert!(error.to_string().contains("truncated"), "{error}");

    // The stored modules alone lack those that are built in, and no list says that they are.
    let built_in: String = ["ext4", "virtio_mmio"].map(|n| format!("kernel/{n}.ko\n")).concat();
    let dir = state.path().join("modules");
    fs::create_dir(&dir).unwrap();
    for name in names(&modules) {
        fs::copy(modules.join(&name), dir.join(&name)).unwrap();
    }
    fs::write(dir.join("modules.builtin"), built_in).unwrap();
    let (with_modules, outcome) = store.import(&fetched.vmlinuz(), Some(&dir)).await.unwrap();
    assert_eq!(outcome, Outcome::Made);
    assert_ne!(with_modules.id(), plain.id());
    assert!(with_modules.manifest().load.contains(&"erofs".to_owned()));
    fs::remove_file(dir.join("erofs.ko")).unwrap();
    let error = store.import(&fetched.vmlinuz(), Some(&dir)).await.unwrap_err();
    assert!(error.to_string().contains("`erofs`"), "{error}");
}

/// A fresh machine, such as a container, has no package lists.
#[test]
fn missing_package_lists_are_refreshed() {
    if !can_run(&["apt-get", "mount"]) {
        return;
    }
    with_own_mounts(|| {
        for dir in ["/var/lib/apt/lists", "/var/cache/apt"] {
            let (mounted, output) = run("mount", &["-t", "tmpfs", "none", dir]);
            assert!(mounted, "{output}");
        }
        let state = tempfile::tempdir().unwrap();
        let store = KernelStore::new(state.path()).with_cache(packages());
        let steps = Mutex::new(Vec::new());
        let record = |progress| steps.lock().unwrap().push(progress);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (kernel, outcome) = runtime.block_on(store.fetch(&record)).unwrap();
        kernel.verify().unwrap();
        assert_eq!(outcome, Outcome::Made);
        let refreshed = Progress::Began("refreshing the package lists".to_owned());
        assert_eq!(steps.into_inner().unwrap().first(), Some(&refreshed));
    });
}
