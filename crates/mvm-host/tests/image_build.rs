//! Revisions: the same inputs give the same bytes, and no interruption leaves a half of one.

// A skipped test says why, and numbers are shown; a test ends at its first surprise.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod image_support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use image_support::{
    cache, can_run, inputs, kernel, kernel_of_parent, names, packages, quiet, run, with_own_mounts,
};
use mvm_host::bootstrap::Outcome;
use mvm_host::image::build::ImageStore;
use mvm_host::image::digest::Digest;
use mvm_host::image::progress::OnProgress;
use mvm_host::image::source::{ImageSource, Ownership};
use mvm_host::image::{BuiltinSource, ImageError};

/// A source that writes one file; with a `marker` it then says so and never ends.
struct OneFile {
    size: usize,
    marker: Option<PathBuf>,
}

impl OneFile {
    fn small() -> Self {
        Self { size: 5000, marker: None }
    }
}

#[async_trait]
impl ImageSource for OneFile {
    fn describe(&self) -> String {
        "one file".to_owned()
    }
    fn ownership(&self) -> Ownership {
        Ownership::AllRoot
    }
    async fn fingerprint(&self) -> Result<Digest, ImageError> {
        Ok(Digest::of(&self.size.to_be_bytes()))
    }
    async fn write_root(&self, dest: &Path, _: OnProgress<'_>) -> Result<(), ImageError> {
        fs::write(dest.join("file"), vec![7; self.size]).unwrap();
        if let Some(marker) = &self.marker {
            fs::write(marker, "").unwrap();
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

fn tools() -> bool {
    can_run(&["apt-get", "mkfs.erofs"])
}

#[tokio::test]
async fn the_builtin_image_is_the_same_bytes_on_each_machine() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let source = BuiltinSource::resolve(&packages(), &quiet).await.unwrap();
    let inputs = inputs(&source, &kernel);
    let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = ImageStore::new(one.path());
    let (first, outcome) = store.build(&inputs, &quiet).await.unwrap();
    assert_eq!(outcome, Outcome::Made);
    let (second, _) = ImageStore::new(two.path()).build(&inputs, &quiet).await.unwrap();
    assert_eq!(first.manifest(), second.manifest());
    let expected = ["initrd", "manifest.json", "modules.erofs", "root.erofs", "vmlinuz"];
    assert_eq!(names(first.dir()), expected);
    let modules = [&first, &second].map(|revision| revision.modules().unwrap().metadata().unwrap());
    let (of_kernel, _) = kernel.module_image().unwrap();
    let of_kernel = of_kernel.metadata().unwrap().ino();
    assert_eq!(modules.map(|meta| meta.ino()), [of_kernel; 2], "they share the kernel's file");
    for name in names(first.dir()) {
        let [a, b] =
            [&first, &second].map(|revision| fs::read(revision.dir().join(&name)).unwrap());
        println!("{name}: {} bytes", a.len());
        assert!(a == b, "{name} differs");
    }
    first.verify().unwrap();

    let inode = first.root().metadata().unwrap().ino();
    let (again, outcome) = store.build(&inputs, &quiet).await.unwrap();
    assert_eq!((again.id(), outcome), (first.id(), Outcome::AlreadyThere));
    assert_eq!(again.root().metadata().unwrap().ino(), inode, "nothing was written");
    assert_eq!(store.list().unwrap(), [first.id().clone()]);
    let (sound, output) = run("fsck.erofs", &[first.root().to_str().unwrap()]);
    assert!(sound, "{output}");
}

#[tokio::test]
async fn the_builtin_root_has_users_applets_and_a_shared_tmp() {
    if !tools() {
        return;
    }
    let source = BuiltinSource::resolve(&packages(), &quiet).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    source.write_root(dir.path(), &quiet).await.unwrap();
    let meta = |name: &str| dir.path().join(name).metadata().unwrap();
    assert_eq!(meta("tmp").mode() & 0o7777, 0o1777);
    assert_eq!((meta("home/mvm").uid(), meta("home/mvm").gid()), (1000, 1000));
    assert_eq!(meta("root").mode() & 0o7777, 0o700);
    assert_eq!(fs::read_link(dir.path().join("bin/sh")).unwrap(), Path::new("/bin/busybox"));
    for applet in ["usr/bin/awk", "bin/ls", "sbin/ip"] {
        assert!(dir.path().join(applet).symlink_metadata().unwrap().is_symlink(), "{applet}");
    }
    // A static program runs with nothing else around it.
    let root = dir.path().to_str().unwrap();
    let (ok, output) = run("chroot", &[root, "/bin/sh", "-c", "id -u mvm; ls /etc/passwd"]);
    assert!(ok && output == "1000\n/etc/passwd\n", "{output}");
}

#[tokio::test]
async fn each_input_changes_the_id() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let state = tempfile::tempdir().unwrap();
    let store = ImageStore::new(state.path());
    let (small, large) = (OneFile::small(), OneFile { size: 6000, marker: None });
    let (base, _) = store.build(&inputs(&small, &kernel), &quiet).await.unwrap();
    let (source, _) = store.build(&inputs(&large, &kernel), &quiet).await.unwrap();
    let mut other = inputs(&small, &kernel);
    other.agent = b"another agent";
    let (agent, _) = store.build(&other, &quiet).await.unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    assert!(base.id() != source.id() && base.id() != agent.id() && source.id() != agent.id());
}

#[tokio::test]
async fn damage_is_found_named_and_mended_by_the_next_build() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let state = tempfile::tempdir().unwrap();
    let store = ImageStore::new(state.path());
    let source = OneFile::small();
    let inputs = inputs(&source, &kernel);
    for name in ["vmlinuz", "initrd", "root.erofs", "manifest.json"] {
        let (revision, outcome) = store.build(&inputs, &quiet).await.unwrap();
        assert_eq!(outcome, Outcome::Made, "before {name}");
        let path = revision.dir().join(name);
        let cut = path.metadata().unwrap().len() - 1;
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let error = store.open(revision.id()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("`mvm pool build`"), "{error}");
        fs::remove_file(&path).unwrap();
        let error = store.open(revision.id()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    let (revision, _) = store.build(&inputs, &quiet).await.unwrap();
    let mut content = fs::read(revision.root()).unwrap();
    content[4096] ^= 1;
    fs::write(revision.root(), content).unwrap();
    let same_size = store.open(revision.id()).unwrap();
    let error = same_size.verify().unwrap_err().to_string();
    assert!(error.contains("root.erofs does not have the content"), "{error}");
}

#[tokio::test]
async fn builders_of_one_revision_wait_for_one_another() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let state = tempfile::tempdir().unwrap();
    let store = ImageStore::new(state.path());
    let source = OneFile::small();
    let inputs = inputs(&source, &kernel);
    let builds = tokio::join!(
        store.build(&inputs, &quiet),
        store.build(&inputs, &quiet),
        store.build(&inputs, &quiet)
    );
    let outcomes = [builds.0.unwrap().1, builds.1.unwrap().1, builds.2.unwrap().1];
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Made).count(), 1);
    assert_eq!(names(&state.path().join("images")).len(), 1, "no lock and no temporary stays");
}

/// The builder that [`a_killed_build_leaves_nothing_for_long`] kills; it does nothing by itself.
#[tokio::test]
async fn builder_to_be_killed() {
    let Some(state) = std::env::var_os("MVM_TEST_BUILD_AND_HANG").map(PathBuf::from) else {
        return;
    };
    let source = OneFile { marker: Some(state.join("marker")), ..OneFile::small() };
    let kernel = kernel_of_parent();
    let _ = ImageStore::new(&state).build(&inputs(&source, &kernel), &quiet).await;
}

#[tokio::test]
#[allow(clippy::disallowed_methods)] // a process that can be killed
async fn a_killed_build_leaves_nothing_for_long() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    for cleaner in ["the next build", "gc_temp"] {
        let state = tempfile::tempdir().unwrap();
        let store = ImageStore::new(state.path());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "builder_to_be_killed"])
            .env("MVM_TEST_BUILD_AND_HANG", state.path())
            .env("MVM_TEST_CACHE", cache())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !state.path().join("marker").exists() {
            assert!(Instant::now() < deadline, "the builder did not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(store.gc_temp().unwrap(), 0, "a running build is left alone");
        child.kill().unwrap();
        child.wait().unwrap();
        let images = state.path().join("images");
        assert!(names(&images).iter().any(|name| name.starts_with(".tmp-")));
        assert!(store.list().unwrap().is_empty());
        if cleaner == "gc_temp" {
            assert_eq!(store.gc_temp().unwrap(), 1);
            assert!(names(&images).is_empty());
        } else {
            let source = OneFile::small();
            let (revision, _) = store.build(&inputs(&source, &kernel), &quiet).await.unwrap();
            assert_eq!(names(&images), [revision.id().as_str()]);
        }
    }
}

#[tokio::test]
async fn a_cancelled_build_leaves_nothing() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let state = tempfile::tempdir().unwrap();
    let marker = state.path().join("marker");
    let source = OneFile { marker: Some(marker.clone()), ..OneFile::small() };
    let store = ImageStore::new(state.path());
    let inputs = inputs(&source, &kernel);
    let started = async {
        while !marker.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        _ = store.build(&inputs, &quiet) => panic!("the source never ends"),
        () = started => {}
    }
    assert!(names(&state.path().join("images")).is_empty());
}

#[tokio::test]
async fn a_full_disk_is_said_clearly_and_leaves_nothing() {
    if !tools() {
        return;
    }
    let kernel = kernel().await;
    let boot_files = kernel.vmlinuz().metadata().unwrap().len()
        + kernel.modules().iter().map(|(_, path)| path.metadata().unwrap().len()).sum::<u64>();
    // The first fails while the tool writes, the second while mvm does.
    for room in [boot_files + (3 << 20), 1 << 20] {
        let kernel = kernel.clone();
        with_own_mounts(move || {
            let state = tempfile::tempdir().unwrap();
            let options = format!("size={room}");
            let args = ["-t", "tmpfs", "-o", &options, "none", state.path().to_str().unwrap()];
            let (mounted, output) = run("mount", &args);
            assert!(mounted, "{output}");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let store = ImageStore::new(state.path());
            let source = OneFile { size: 2 << 20, marker: None };
            let result = runtime.unwrap().block_on(store.build(&inputs(&source, &kernel), &quiet));
            let error = result.unwrap_err();
            assert!(matches!(error, ImageError::NoSpace { .. }), "{error}: {error:?}");
            assert!(names(&state.path().join("images")).is_empty());
            assert!(run("umount", &[state.path().to_str().unwrap()]).0);
        });
    }
}
