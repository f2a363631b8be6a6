//! A corpus of odd images: what real tools write, and what no tool writes but registries have. Each comes
//! out as `umoci` unpacks it, or is refused by name.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]
#![allow(clippy::print_stdout, reason = "a failed test says which image it is about")]

mod oci_support;

use std::fs;
use std::path::{Path, PathBuf};

use mvm_host::image::{ImageError, ImageSource, LayerCache, OciSource};
use oci_support::layout::{ARCH, Attributes, GZIP, LayerTar, Layout, PLAIN};
use oci_support::tree::{Snapshot, assert_same, snapshot};
use oci_support::{can_run, quiet, run, umoci_tree};
use serde_json::{Value, json};
use tar::EntryType;

/// Directories that a guest needs and that these images do not have.
const MOUNT_POINTS: [&str; 6] = ["dev", "etc", "proc", "run", "sys", "tmp"];

async fn tree_of(source: Result<OciSource, ImageError>, work: &Path) -> Snapshot {
    let dest = tempfile::Builder::new().prefix("tree-").tempdir_in(work).unwrap();
    source.unwrap().write_root(dest.path(), &quiet).await.unwrap();
    snapshot(dest.path())
}

/// Compares without the directories that only mvm makes.
fn assert_like(mut ours: Snapshot, theirs: &Snapshot) {
    for name in MOUNT_POINTS.map(Path::new) {
        if !theirs.contains_key(name) {
            ours.remove(name);
        }
    }
    assert_same(&ours, theirs);
}

/// Odd layers, each with its name.
fn odd_layers() -> Vec<(&'static str, Vec<LayerTar>)> {
    let plain = Attributes::default();
    let setid = Attributes { mode: 0o6755, owner: (65_534, 2_000_000), ..plain.clone() };
    let large = vec![b'v'; 60_000];
    let deep = "d/".repeat(200);
    vec![
        ("no layer at all", vec![]),
        ("an empty layer", vec![LayerTar::new(), LayerTar::new().file("a", "x")]),
        (
            "names that differ in case only",
            vec![LayerTar::new().file("Name", "1").file("name", "2").dir("DIR/").file("dir", "3")],
        ),
        (
            "names that are no text",
            vec![
                LayerTar::new()
                    .pax(&[("path", b"caf\xe9 \x1b[2J\nline")])
                    .file("x", "latin")
                    .pax(&[("linkpath", b"\xff\xfe")])
                    .symlink("link", "y"),
            ],
        ),
        (
            "a large header",
            vec![
                LayerTar::new()
                    .pax(&[
                        ("comment", large.as_slice()),
                        ("SCHILY.xattr.user.large", &large[..2_000]),
                    ])
                    .file("large", "x")
                    .pax(&[("path", deep.as_bytes())])
                    .dir("shortened/"),
            ],
        ),
        (
            "set ids and sticky bits of unknown owners",
            vec![LayerTar::new().entry(EntryType::Regular, "su", "", &setid, b"x").entry(
                EntryType::Directory,
                "drop/",
                "",
                &Attributes { mode: 0o1777, ..setid },
                b"",
            )],
        ),
        (
            "links over three layers",
            vec![
                LayerTar::new().file("a", "first"),
                LayerTar::new().hard_link("b", "a").file(".wh.a", ""),
                LayerTar::new().hard_link("c", "b").hard_link("d", "./c"),
            ],
        ),
        (
            "whiteouts of what never was, and of itself",
            vec![
                LayerTar::new().file(".wh.nothing", "").dir("dir/").file("dir/.wh.nothing", ""),
                LayerTar::new().dir("dir/").file("dir/.wh..wh..opq", "").file("dir/new", "x"),
                LayerTar::new().file(".wh.dir", "").file("end", "x"),
            ],
        ),
        (
            "an eStargz layer with its index",
            vec![
                LayerTar::new()
                    .file("app", "x")
                    .file(".prefetch.landmark", "\u{f}")
                    .file("stargz.index.json", "{\"version\":1,\"entries\":[]}"),
            ],
        ),
        ("one entry twice", vec![LayerTar::new().file("a", "first").file("a", "second")]),
        (
            "absolute and dotted names",
            vec![
                LayerTar::new()
                    .file("/abs", "x")
                    .file("./dot", "y")
                    .dir("./sub/./")
                    .file("sub//f", "z"),
            ],
        ),
    ]
}

#[tokio::test]
async fn odd_layers_come_out_as_with_umoci() {
    if !can_run(&["umoci"]) {
        return;
    }
    for (name, layers) in odd_layers() {
        let work = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(&work.path().join("layout"));
        for layer in layers {
            layout = layout.layer(layer);
        }
        let dir = layout.tag("t");
        let cache = LayerCache::new(work.path().join("state"));
        let source = OciSource::layout(&dir, None, &cache).await;
        let source = source.map_err(|error| panic!("{name}: {error}"));
        let ours = tree_of(source, work.path()).await;
        let theirs = umoci_tree(&dir, "t", &work.path().join("theirs"));
        println!("{name}");
        assert_like(ours, &theirs);
    }
}

/// An image that every converter understands.
fn ordinary(dir: &Path) -> PathBuf {
    let base = LayerTar::new()
        .dir("usr/")
        .file("usr/file", &"content ".repeat(5_000))
        .hard_link("usr/same", "usr/file")
        .symlink("bin", "usr");
    let top = LayerTar::new().dir("usr/").file("usr/.wh.same", "").file("new", "x");
    let mut layout = Layout::new(dir).layer(base).layer(LayerTar::new()).layer(top);
    layout.config = json!({ "Cmd": ["/new"], "Labels": { "a": "b" } });
    layout.tag("t")
}

#[tokio::test]
async fn whatever_skopeo_makes_of_an_image_is_the_same_image() {
    if !can_run(&["skopeo", "umoci"]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name);
    let dir = ordinary(&path("layout"));
    let theirs = umoci_tree(&dir, "t", &path("theirs"));
    let from = format!("oci:{}:t", dir.display());
    let copy = |options: &[&str], to: &str| {
        let words = ["--insecure-policy", "copy", "-q"];
        run("skopeo", &[&words[..], options, &[&from, to]].concat());
    };
    let cache = LayerCache::new(path("state"));
    let layouts: [(&str, &[&str]); 5] = [
        ("gzip", &["--dest-compress-format", "gzip"]),
        ("zstd", &["--dest-compress-format", "zstd"]),
        ("best", &["--dest-compress-format", "zstd", "--dest-compress-level", "19"]),
        ("plain", &["--dest-decompress"]),
        ("docker", &["--format", "v2s2"]),
    ];
    for (name, options) in layouts {
        // Of an own cache: nothing is unpacked yet.
        let cache = LayerCache::new(path(&format!("state-{name}")));
        let to = path(name);
        if name == "docker" {
            copy(options, &format!("dir:{}", to.display()));
            let target = format!("oci:{}:t", path("docker-oci").display());
            let dir = format!("dir:{}", to.display());
            run("skopeo", &["--insecure-policy", "copy", "-q", &dir, &target]);
        } else {
            copy(options, &format!("oci:{}:t", to.display()));
        }
        let to = if name == "docker" { path("docker-oci") } else { to };
        println!("{name}");
        assert_like(
            tree_of(OciSource::layout(&to, Some("t"), &cache).await, work.path()).await,
            &theirs,
        );
    }
    let (oci, docker) = (path("oci.tar"), path("docker.tar"));
    copy(&[], &format!("oci-archive:{}:t", oci.display()));
    copy(&[], &format!("docker-archive:{}:team/app:v1", docker.display()));
    let opened = OciSource::oci_archive(&oci, None, &cache).await;
    assert_like(tree_of(opened, work.path()).await, &theirs);
    let opened = OciSource::docker_archive(&docker, None, &cache).await;
    assert_like(tree_of(opened, work.path()).await, &theirs);
    let name = |file: &Path| mvm_host::image::name_in_archive(file, work.path());
    assert!(name(&docker).is_some_and(|name| name.ends_with("team/app:v1")));
    assert_eq!((name(&oci), name(&path("layout/index.json"))), (None, None));
    for (program, file) in [("xz", "docker.tar.xz"), ("zstd", "docker.tar.zst")] {
        run(program, &["-kq", docker.to_str().unwrap()]);
        let opened = OciSource::docker_archive(&path(file), None, &cache).await;
        assert_like(tree_of(opened, work.path()).await, &theirs);
    }
}

#[tokio::test]
async fn whatever_buildah_commits_comes_out_as_with_umoci() {
    if !can_run(&["buildah", "umoci", "setcap"]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).display().to_string();
    let (root, state) = (path("root"), path("run"));
    // The plainest ways: they work in containers and namespaces too.
    let store = ["--storage-driver", "vfs", "--root", &root, "--runroot", &state];
    let buildah = |args: &[&str]| run("buildah", &[&store[..], args].concat());
    let container = buildah(&["from", "scratch"]);
    let container = container.lines().last().unwrap().trim();
    let mount = buildah(&["mount", container]);
    let mount = PathBuf::from(mount.lines().last().unwrap().trim());
    fs::create_dir(mount.join("bin")).unwrap();
    fs::copy(mvm_host::process::find_program("true").unwrap(), mount.join("bin/capable")).unwrap();
    run("setcap", &["cap_net_raw+ep", mount.join("bin/capable").to_str().unwrap()]);
    fs::hard_link(mount.join("bin/capable"), mount.join("bin/again")).unwrap();
    run("mkfifo", &[mount.join("pipe").to_str().unwrap()]);
    fs::File::create(mount.join("sparse")).unwrap().set_len(5_000_000).unwrap();
    std::os::unix::fs::chown(mount.join("pipe"), Some(12), Some(34)).unwrap();
    for (name, options) in [
        ("oci", &["--format", "oci"][..]),
        ("docker", &["--format", "docker"]),
        ("squashed", &["--squash", "--timestamp", "1000000000"]),
    ] {
        let layout = work.path().join(name);
        let to = format!("oci:{}:t", layout.display());
        buildah(&[&["commit", "--quiet"], options, &[container, &to]].concat());
        fs::write(mount.join(name), "one more").unwrap();
        let cache = LayerCache::new(work.path().join(format!("state-{name}")));
        let ours = tree_of(OciSource::layout(&layout, None, &cache).await, work.path()).await;
        println!("{name}");
        let theirs = umoci_tree(&layout, "t", &work.path().join(format!("theirs-{name}")));
        assert!(!ours[Path::new("bin/capable")].xattrs.is_empty(), "{name}");
        assert_like(ours, &theirs);
    }
    buildah(&["umount", container]);
}

/// A layout whose manifest is as `change` makes it.
fn changed(dir: &Path, change: impl FnOnce(&mut Value, &Layout)) -> PathBuf {
    let layout = Layout::new(dir).layer(LayerTar::new().file("a", "x"));
    let descriptor = layout.manifest();
    let path = layout.blob_path(descriptor["digest"].as_str().unwrap());
    let mut manifest: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut manifest, &layout);
    let kind = manifest["mediaType"].as_str().unwrap_or_default().to_owned();
    let descriptor = layout.blob(&kind, manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    dir.to_owned()
}

async fn opened(dir: &Path) -> Result<OciSource, String> {
    let cache = LayerCache::new(dir.join("state"));
    OciSource::layout(dir, None, &cache).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn what_is_no_image_or_cannot_be_had_is_refused_by_name() {
    if !can_run(&[]) {
        return;
    }
    let layer_type = |kind: &'static str| {
        move |manifest: &mut Value, _: &Layout| {
            manifest["layers"][0]["mediaType"] = kind.into();
        }
    };
    let config_type = |kind: &'static str| {
        move |manifest: &mut Value, _: &Layout| {
            manifest["config"]["mediaType"] = kind.into();
        }
    };
    type Change = Box<dyn FnOnce(&mut Value, &Layout)>;
    let refused: Vec<(&str, Change)> = vec![
        (
            "artifact of the type application/vnd.cncf.helm.config.v1+json",
            Box::new(config_type("application/vnd.cncf.helm.config.v1+json")),
        ),
        (
            "artifact of the type application/vnd.wasm.config.v0+json",
            Box::new(config_type("application/vnd.wasm.config.v0+json")),
        ),
        (
            "is encrypted",
            Box::new(layer_type("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")),
        ),
        (
            "is foreign",
            Box::new(layer_type("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip")),
        ),
        (
            "of the type application/vnd.in-toto+json: expected",
            Box::new(layer_type("application/vnd.in-toto+json")),
        ),
        (
            "is not a digest that mvm knows",
            Box::new(|manifest: &mut Value, _: &Layout| {
                manifest["layers"][0]["digest"] = format!("sha512:{}", "0".repeat(128)).into();
            }),
        ),
        (
            "version 1: expected",
            Box::new(|manifest: &mut Value, _: &Layout| {
                *manifest = json!({ "schemaVersion": 1, "name": "a", "tag": "t", "fsLayers": [],
                "mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws" });
            }),
        ),
        (
            "has 1 layers, and its configuration names 0",
            Box::new(|manifest: &mut Value, layout: &Layout| {
                let config =
                    json!({ "os": "linux", "architecture": ARCH, "rootfs": { "diff_ids": [] } });
                let kind = "application/vnd.oci.image.config.v1+json";
                manifest["config"] = layout.blob(kind, config.to_string().as_bytes());
            }),
        ),
        (
            "it is for wasip1/wasm",
            Box::new(|manifest: &mut Value, layout: &Layout| {
                let config =
                    json!({ "os": "wasip1", "architecture": "wasm", "rootfs": { "diff_ids": [] } });
                let kind = "application/vnd.oci.image.config.v1+json";
                manifest["config"] = layout.blob(kind, config.to_string().as_bytes());
            }),
        ),
    ];
    for (part, change) in refused {
        let work = tempfile::tempdir().unwrap();
        let error = opened(&changed(work.path(), change)).await.unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    for accepted in [GZIP, PLAIN, "application/vnd.docker.image.rootfs.diff.tar.gzip"] {
        let work = tempfile::tempdir().unwrap();
        opened(&changed(work.path(), layer_type(accepted))).await.unwrap();
    }
}

#[tokio::test]
async fn an_index_may_hold_attestations_and_other_things_beside_the_image() {
    if !can_run(&[]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let layout = Layout::new(work.path()).layer(LayerTar::new().file("a", "x"));
    let mut image = layout.manifest();
    image["platform"] = json!({ "os": "linux", "architecture": ARCH });
    let attestation = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": layout.blob("application/vnd.oci.image.config.v1+json", b"{}"), "layers": [] });
    let mut attestation = layout
        .blob("application/vnd.oci.image.manifest.v1+json", attestation.to_string().as_bytes());
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    let manifests = json!([attestation, image]);
    let kind = "application/vnd.oci.image.index.v1+json";
    let inner = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": manifests });
    let nested = json!([layout.blob(kind, inner.to_string().as_bytes())]);
    for manifests in [manifests, nested] {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(work.path().join("index.json"), index.to_string()).unwrap();
        let source = opened(work.path()).await.unwrap();
        assert_eq!(source.layers().len(), 1);
    }
}
