//! What becomes of images on this machine: revisions, trees that are no container images, archives,
//! and what is collected.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stdout, reason = "a skipped test says why")]

mod image_support;
mod oci_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use image_support::{inputs, kernel, kernel_of_parent, with_own_mounts};
use mvm_core::image::ImageSpec;
use mvm_host::bootstrap::Outcome;
use mvm_host::image::build::ImageStore;
use mvm_host::image::{ImageError, ImageSource, LayerCache, OciSource};
use mvm_host::images::{CollectedKind, Images, InUse, LocalImages};
use oci_support::layout::{Attributes, LayerTar, Layout};
use oci_support::tree::{Snapshot, assert_same, snapshot};
use oci_support::{can_run, quiet, run};
use tar::EntryType;

fn image(dir: &Path, content: &str) -> PathBuf {
    let old = Attributes { mtime: 1_111_111_111, ..Attributes::default() };
    let first = LayerTar::new()
        .entry(EntryType::Regular, "old", "", &old, b"old")
        .hard_link("old-too", "old")
        .pax(&[("SCHILY.xattr.user.note", b"kept")])
        .file("noted", "x")
        .entry(EntryType::Fifo, "pipe", "", &old, b"");
    let second = LayerTar::new().file("app", content);
    let mut layout = Layout::new(dir).layer(first).layer(second);
    layout.config = serde_json::json!({ "Cmd": ["/app"], "User": "7" });
    layout.tag("t")
}

async fn write(source: &OciSource, dest: &Path) -> Snapshot {
    fs::create_dir_all(dest).unwrap();
    source.write_root(dest, &quiet).await.unwrap();
    snapshot(dest)
}

#[tokio::test]
async fn the_same_image_is_the_same_revision_to_the_last_byte() {
    if !can_run(&["apt-get", "mkfs.erofs"]) {
        return;
    }
    let kernel = kernel().await;
    let dir = tempfile::tempdir().unwrap();
    let layout = image(&dir.path().join("layout"), "app");
    let mut roots = Vec::new();
    for state in ["one", "two"] {
        let state = dir.path().join(state);
        let source = OciSource::layout(&layout, None, &LayerCache::new(&state)).await.unwrap();
        let store = ImageStore::new(&state);
        let (revision, outcome) = store.build(&inputs(&source, &kernel), &quiet).await.unwrap();
        assert_eq!(outcome, Outcome::Made);
        let manifest = revision.manifest();
        assert_eq!(
            (manifest.config.cmd.as_slice(), manifest.source.layers.len()),
            (&["/app".to_owned()][..], 2)
        );
        let (_, again) = store.build(&inputs(&source, &kernel), &quiet).await.unwrap();
        assert_eq!(again, Outcome::AlreadyThere);
        roots.push((revision.id().clone(), fs::read(revision.root()).unwrap(), revision.root()));
    }
    assert!(roots[0].0 == roots[1].0 && roots[0].1 == roots[1].1, "byte by byte");

    let root = roots[0].2.clone();
    let expected = {
        let cache = LayerCache::new(dir.path().join("one"));
        let source = OciSource::layout(&layout, None, &cache).await.unwrap();
        write(&source, &dir.path().join("tree")).await
    };
    let mount = dir.path().join("mnt");
    fs::create_dir(&mount).unwrap();
    with_own_mounts(move || {
        run("mount", &["-o", "loop,ro", root.to_str().unwrap(), mount.to_str().unwrap()]);
        let found = snapshot(&mount);
        assert_same(&expected, &found);
        assert_eq!(found[Path::new("old-too")].same_as, Path::new("old"));
        assert_eq!(found[Path::new("old")].mtime, (1_111_111_111, 0), "times are kept");
        run("umount", &[mount.to_str().unwrap()]);
    });
}

#[tokio::test]
async fn archives_hold_the_same_image_as_the_layout() {
    if !can_run(&["skopeo"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = image(&dir.path().join("layout"), "app");
    let cache = LayerCache::new(dir.path().join("state"));
    let expected = OciSource::layout(&layout, Some("t"), &cache).await.unwrap();
    let (oci, docker) = (dir.path().join("oci.tar"), dir.path().join("docker.tar"));
    let from = format!("oci:{}:t", layout.display());
    for to in [
        format!("oci-archive:{}:t", oci.display()),
        format!("docker-archive:{}:some/app:v1", docker.display()),
    ] {
        run("skopeo", &["--insecure-policy", "copy", "-q", &from, &to]);
    }
    run("gzip", &["-k", docker.to_str().unwrap()]);
    let packed = dir.path().join("docker.tar.gz");
    let fingerprint = expected.fingerprint().await.unwrap();
    for source in [
        OciSource::oci_archive(&oci, Some("t"), &cache).await.unwrap(),
        OciSource::docker_archive(&docker, None, &cache).await.unwrap(),
        OciSource::docker_archive(&docker, Some("some/app:v1"), &cache).await.unwrap(),
        OciSource::docker_archive(&packed, None, &cache).await.unwrap(),
    ] {
        assert_eq!(source.fingerprint().await.unwrap(), fingerprint, "{}", source.describe());
        let dest = tempfile::tempdir().unwrap();
        let tree = write(&source, dest.path()).await;
        assert!(tree.contains_key(Path::new("app")));
    }
    let error = OciSource::docker_archive(&docker, Some("other"), &cache).await.unwrap_err();
    assert!(error.to_string().contains("has no image named `other`, but these: "), "{error}");
    let error = OciSource::docker_archive(&dir.path().join("no.tar"), None, &cache).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, ImageError::File(_)) && error.to_string().contains("no.tar"),
        "{error}"
    );
}

#[tokio::test]
async fn a_directory_or_its_archive_is_taken_over_as_it_is() {
    if !can_run(&["tar", "mknod", "setfattr"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for name in ["sbin", "lib/systemd", "tmp", "dev", "etc", "proc", "run", "sys"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::write(root.join("lib/systemd/systemd"), "an init").unwrap();
    fs::hard_link(root.join("lib/systemd/systemd"), root.join("again")).unwrap();
    symlink("../lib/systemd/systemd", root.join("sbin/init")).unwrap();
    let path = |name: &str| root.join(name).to_str().unwrap().to_owned();
    run("mknod", &[&path("null"), "c", "1", "3"]);
    run("setfattr", &["-n", "user.note", "-v", "x", &path("again")]);
    std::os::unix::fs::chown(root.join("again"), Some(12), Some(34)).unwrap();
    let file = fs::File::create(root.join("sparse")).unwrap();
    file.set_len(10_000_000).unwrap();
    let expected = snapshot(&root);

    let cache = LayerCache::new(dir.path().join("state"));
    let source = OciSource::root_dir(&root, &cache, &quiet).await.unwrap();
    assert_eq!(source.config().init.as_deref(), Some("/sbin/init"), "through the link");
    assert_same(&write(&source, &dir.path().join("copy")).await, &expected);
    let again = OciSource::root_dir(&root, &cache, &quiet).await.unwrap();
    let fingerprint = source.fingerprint().await.unwrap();
    assert_eq!(again.fingerprint().await.unwrap(), fingerprint);

    let archive = dir.path().join("root.tar.gz");
    let (file, cwd) = (archive.to_str().unwrap(), root.to_str().unwrap());
    let args = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--format=pax"];
    run("tar", &[&args[..], &["-czf", file, "-C", cwd, "."]].concat());
    let packed =
        OciSource::root_archive(&archive, "archive".to_owned(), &cache, &quiet).await.unwrap();
    assert_eq!(packed.config().init.as_deref(), Some("/sbin/init"));
    assert_same(&write(&packed, &dir.path().join("unpacked")).await, &expected);

    fs::remove_file(root.join("lib/systemd/systemd")).unwrap();
    let changed = OciSource::root_dir(&root, &cache, &quiet).await.unwrap();
    assert_eq!(changed.config().init, None, "a link to nothing is no init");
    assert_ne!(changed.fingerprint().await.unwrap(), fingerprint);
}

#[tokio::test]
async fn what_an_interrupted_build_has_mounted_is_detached_and_never_entered() {
    if !can_run(&["mount"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (state, host) = (dir.path().join("state"), dir.path().join("host"));
    let shm = state.join("layers/scratch/debian-abc/root/dev/shm");
    let half = state.join("images/.tmp-r-0123456789abcdef/tree");
    for dir in [&shm, &host, &half] {
        fs::create_dir_all(dir).unwrap();
    }
    fs::write(host.join("canary"), "x").unwrap();
    run("mount", &["--bind", host.to_str().unwrap(), shm.to_str().unwrap()]);
    let swept = LocalImages::new(&state).sweep().await;
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let is_mounted = mounts.contains("debian-abc");
    if is_mounted {
        run("umount", &["-l", shm.to_str().unwrap()]);
    }
    swept.unwrap();
    assert!(!is_mounted && host.join("canary").exists());
    for dir in ["layers/scratch", "images"] {
        assert_eq!(fs::read_dir(state.join(dir)).unwrap().count(), 0, "{dir}");
    }
}

#[tokio::test]
async fn an_archive_may_be_compressed_in_any_way_that_is_read_and_is_refused_by_name_otherwise() {
    if !can_run(&["tar", "xz", "zstd", "bzip2"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content".repeat(50_000)).unwrap();
    let cache = LayerCache::new(dir.path().join("state"));
    let open = async |option: &str, end: &str| {
        let archive = dir.path().join(format!("root.{end}"));
        let (file, cwd) = (archive.to_str().unwrap(), tree.to_str().unwrap());
        run("tar", &[option, "--mtime=@0", "-cf", file, "-C", cwd, "."]);
        OciSource::root_archive(&archive, "archive".to_owned(), &cache, &quiet).await
    };
    let plain = open("--owner=0", "tar").await.unwrap();
    let fingerprint = plain.fingerprint().await.unwrap();
    for (option, end) in [("-z", "tgz"), ("-J", "tar.xz"), ("--zstd", "tar.zst")] {
        let packed = open(option, end).await.unwrap();
        assert_eq!(packed.fingerprint().await.unwrap(), fingerprint, "{end}");
    }
    let error = open("-j", "tar.bz2").await.unwrap_err();
    let error = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(error.contains("root.tar.bz2") && error.contains("with bzip2, which mvm"), "{error}");
}

#[tokio::test]
async fn a_hole_of_a_file_is_none_of_the_root_filesystem_s_size() {
    if !can_run(&["apt-get", "mkfs.erofs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (tree, state) = (dir.path().join("tree"), dir.path().join("state"));
    fs::create_dir(&tree).unwrap();
    fs::File::create(tree.join("lastlog")).unwrap().set_len(100 << 20).unwrap();
    fs::write(tree.join("small"), "content").unwrap();
    let source = OciSource::root_dir(&tree, &LayerCache::new(&state), &quiet).await.unwrap();
    let kernel = kernel().await;
    let store = ImageStore::new(&state);
    let (revision, _) = store.build(&inputs(&source, &kernel), &quiet).await.unwrap();
    let root = revision.root().metadata().unwrap();
    use std::os::unix::fs::MetadataExt;
    assert!(root.len() < 4 << 20 && root.blocks() * 512 < 4 << 20, "{} bytes", root.len());
}

#[tokio::test]
async fn what_nothing_uses_is_collected_and_the_rest_stays() {
    if !can_run(&["apt-get", "mkfs.erofs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let kernel = kernel().await;
    let store = ImageStore::new(&state);
    let cache = LayerCache::new(&state);
    let mut ids = Vec::new();
    for content in ["kept", "unused"] {
        let layout = image(&dir.path().join(content), content);
        let source = OciSource::layout(&layout, None, &cache).await.unwrap();
        let (revision, _) = store.build(&inputs(&source, &kernel), &quiet).await.unwrap();
        ids.push(revision.id().clone());
    }
    for path in ["layers/downloads/sha256-half", "layers/scratch/tree", "cache/uploads/fresh.tar"] {
        let path = state.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "half").unwrap();
    }
    let forgotten = state.join("cache/uploads/forgotten.tar");
    fs::write(&forgotten, "x").unwrap();
    run("touch", &["-d", "2 hours ago", forgotten.to_str().unwrap()]);
    fs::create_dir(state.join("images/.tmp-r-0123456789abcdef")).unwrap();

    let images = LocalImages::new(&state);
    let in_use = InUse { revisions: [ids[0].clone()].into(), ..InUse::default() };
    let would = images.collect(&in_use, true).await.unwrap();
    assert_eq!(images.list().await.unwrap().len(), 2, "a dry run removes nothing");
    assert_eq!(images.collect(&in_use, false).await.unwrap(), would);
    let kinds: Vec<CollectedKind> = would.iter().map(|item| item.kind).collect();
    use CollectedKind::{Download, Layer, Leftover, Revision, Upload};
    assert_eq!(kinds, [Revision, Layer, Download, Upload, Leftover, Leftover]);
    assert!(would.iter().all(|item| item.bytes > 0), "{would:?}");
    assert_eq!(images.collect(&in_use, false).await.unwrap(), []);
    assert!(state.join("cache/uploads/fresh.tar").exists(), "it may be on its way into a pool");
    let left = images.list().await.unwrap();
    assert_eq!(left[0].revision, ids[0]);
    assert_eq!((left.len(), left[0].layers.len(), left[0].damage.as_ref()), (1, 2, None));
    assert!(images.remove(&ids[1]).await.unwrap_err().to_string().contains("no revision"));
    images.remove(&ids[0]).await.unwrap();
    assert_eq!(images.list().await.unwrap(), []);
}

#[tokio::test]
async fn an_image_without_its_tool_or_file_says_what_is_missing() {
    if !can_run(&["apt-get"]) {
        return;
    }
    kernel().await;
    let images = LocalImages::new(image_support::cache());
    for (spec, part) in
        [("rootfs:/no/such/root", "/no/such/root"), ("oci:/no/such/dir", "/no/such/dir")]
    {
        let spec: ImageSpec = spec.parse().unwrap();
        let error = images.build(&spec, &|_| ()).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_full_disk_in_the_middle_leaves_no_half_image() {
    if !can_run(&["apt-get", "mkfs.erofs"]) {
        return;
    }
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime().block_on(async { drop(kernel().await) });
    let dir = tempfile::tempdir().unwrap();
    let big = "x".repeat(30_000_000);
    let layout = Layout::new(&dir.path().join("layout"))
        .layer(LayerTar::new().file("small", "x"))
        .layer(LayerTar::new().file("big", &big))
        .tag("t");
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    with_own_mounts(move || {
        run("mount", &["-t", "tmpfs", "-o", "size=48m", "none", state.to_str().unwrap()]);
        runtime().block_on(async {
            let kernel = kernel_of_parent();
            let source = OciSource::layout(&layout, None, &LayerCache::new(&state)).await.unwrap();
            let store = ImageStore::new(&state);
            let error = store.build(&inputs(&source, &kernel), &quiet).await.unwrap_err();
            assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
            assert_eq!(oci_support::names(&state.join("images")), [""; 0]);
        });
    });
}

#[tokio::test]
async fn a_debian_system_is_made_of_the_hosts_sources() {
    if !can_run(&["apt-get", "mmdebstrap", "mkfs.erofs"]) {
        return;
    }
    let release = fs::read_to_string("/etc/os-release").unwrap();
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let Some(suite) = codename.filter(|_| release.contains("ID=debian")) else {
        println!("skipped: this machine's package sources are not Debian's");
        return;
    };
    kernel().await;
    let images = LocalImages::new(image_support::cache());
    let missing: ImageSpec = format!("mmdebstrap:{suite},no-such-package-at-all").parse().unwrap();
    let error = images.build(&missing, &|_| ()).await.unwrap_err().to_string();
    assert!(error.contains("no-such-package-at-all"), "{error}");
    let spec = ImageSpec::debian(suite, ["busybox-static"]).unwrap();
    let built = images.build(&spec, &|_| ()).await.unwrap();
    let files = images.files(&built.revision).await.unwrap();
    assert_eq!(files.config.init, None, "nothing that boots a system is in it");
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_owned();
    with_own_mounts(move || {
        let (root, at) = (files.root.to_str().unwrap(), mount.to_str().unwrap());
        run("mount", &["-o", "loop,ro", root, at]);
        let release = fs::read_to_string(mount.join("etc/os-release")).unwrap();
        assert!(release.contains("ID=debian"), "{release}");
        assert!(mount.join("usr/bin/dpkg").exists() && mount.join("bin/busybox").exists());
        run("umount", &[at]);
    });
}
