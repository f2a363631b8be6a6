//! Images pulled from registries: a real one, fed by real tools, and one that misbehaves.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod oci_support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use mvm_core::image::Reference;
use mvm_host::image::{ImageError, ImageSource, LayerCache, OciSource, RegistryConfig};
use oci_support::layout::{ARCH, GZIP, LayerTar, Layout, sha256};
use oci_support::registry::{Fault, FaultyRegistry, PASSWORD, RealRegistry, USER, no_config};
use oci_support::tree::{Snapshot, assert_same, snapshot};
use oci_support::{can_run, quiet, run, umoci_tree};
use serde_json::json;

async fn pull(image: &str, state: &Path, config: &RegistryConfig) -> Result<Snapshot, ImageError> {
    let reference: Reference = image.parse().unwrap();
    let cache = LayerCache::new(state);
    let source = OciSource::pull(&reference, config, &cache, &quiet).await?;
    let dest = tempfile::tempdir_in(state.parent().unwrap()).unwrap();
    source.write_root(dest.path(), &quiet).await?;
    Ok(snapshot(dest.path()))
}

/// Some text that does not compress.
fn noise(length: usize) -> String {
    let mut state = 1_u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b' ' + ((state >> 33) % 94) as u8)
    };
    (0..length).map(|_| next()).collect()
}

fn small_image(dir: &Path) -> Layout {
    let first = LayerTar::new().dir("etc/").file("etc/first", &noise(50_000)).file("gone", "x");
    let second = LayerTar::new().file("etc/second", &noise(200_000)).file(".wh.gone", "");
    Layout::new(dir).layer(first).layer(second)
}

fn real_tools() -> bool {
    can_run(&["docker-registry", "skopeo", "umoci"])
}

#[tokio::test]
async fn a_pulled_image_is_the_tree_of_umoci() {
    if !real_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = small_image(&dir.path().join("layout")).tag("t");
    let registry = RealRegistry::start();
    let image = registry.push(&layout, "some/app:v1");
    let config = no_config(dir.path());
    let state = dir.path().join("state");
    let mut ours = pull(&image, &state, &config).await.unwrap();
    let theirs = umoci_tree(&layout, "t", &dir.path().join("theirs"));
    ours.retain(|name, _| theirs.contains_key(name));
    assert_same(&ours, &theirs);
    assert!(ours.contains_key(Path::new("etc/second")));
    let downloads = fs::read_dir(state.join("layers/downloads")).unwrap().count();
    assert_eq!(downloads, 0, "a layer that is unpacked is not kept twice");

    let digest = run(
        "skopeo",
        &["inspect", "--tls-verify=false", "--format", "{{.Digest}}", &format!("docker://{image}")],
    );
    let by_digest = image.replace(":v1", "") + "@" + digest.trim();
    pull(&by_digest, &state, &config).await.unwrap();
    drop(registry);
    let error = pull(&image, &state, &config).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached"), "{error}");
}

#[tokio::test]
async fn the_image_for_this_machine_is_taken_out_of_an_index() {
    if !real_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let make = |architecture: &str, content: &str| {
        let layout = Layout::new(&dir.path().join("layout"));
        let mut layout = layout.layer(LayerTar::new().file("for", content));
        layout.architecture = architecture.to_owned();
        let mut entry = layout.manifest();
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        (layout, entry)
    };
    let (layout, other) = make("s390x", "others");
    let (_, ours) = make(ARCH, "us");
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = |entries: &[&serde_json::Value], tag: &str| {
        let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": entries });
        let index = layout.blob(kind, index.to_string().as_bytes());
        let top = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": kind, "digest": index["digest"], "size": index["size"],
            "annotations": { "org.opencontainers.image.ref.name": "t" },
        }]});
        fs::write(layout.dir.join("index.json"), top.to_string()).unwrap();
        let name = format!("multi:{tag}");
        let registry = RealRegistry::start();
        let to = format!("docker://{}/{name}", registry.host);
        let from = format!("oci:{}:t", layout.dir.display());
        let args = ["--insecure-policy", "copy", "-q", "--all", "--dest-tls-verify=false"];
        run("skopeo", &[&args[..], &[&from, &to]].concat());
        (format!("{}/{name}", registry.host), registry)
    };
    let (state, config) = (dir.path().join("state"), no_config(dir.path()));
    let (image, _registry) = index(&[&other, &ours], "both");
    let tree = pull(&image, &state, &config).await.unwrap();
    assert_eq!(tree[Path::new("for")].content, sha256(b"us")["sha256:".len()..]);
    let (image, _registry) = index(&[&other], "other");
    let error = pull(&image, &state, &config).await.unwrap_err().to_string();
    assert!(
        error.ends_with(&format!("has no image for linux/{ARCH}: it is for linux/s390x")),
        "{error}"
    );
}

#[tokio::test]
async fn an_index_may_lead_to_another_index() {
    if !real_tools() || !can_run(&["curl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout")).layer(LayerTar::new().file("for", "us"));
    let mut ours = layout.manifest();
    ours["platform"] = json!({ "os": "linux", "architecture": ARCH });
    let registry = RealRegistry::start();
    let image = registry.push(&layout.tag("t"), "nested:t");
    // Tools that copy images do not push an index of indexes: it is pushed as it is.
    let kind = "application/vnd.oci.image.index.v1+json";
    let push = |manifest: &serde_json::Value, tag: &str| {
        let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [manifest] });
        let (index, file) = (index.to_string(), dir.path().join(tag));
        fs::write(&file, &index).unwrap();
        let url = format!("http://{}/v2/nested/manifests/{tag}", registry.host);
        let (header, data) = (format!("Content-Type: {kind}"), format!("@{}", file.display()));
        run("curl", &["-sSf", "-X", "PUT", "-H", &header, "--data-binary", &data, &url]);
        json!({ "mediaType": kind, "digest": sha256(index.as_bytes()), "size": index.len() })
    };
    let inner = push(&ours, "inner");
    push(&inner, "outer");
    let (state, config) = (dir.path().join("state"), no_config(dir.path()));
    let outer = image.replace("nested:t", "nested:outer");
    let tree = pull(&outer, &state, &config).await.unwrap();
    assert_eq!(tree[Path::new("for")].content, sha256(b"us")["sha256:".len()..]);
}

#[tokio::test]
async fn credentials_are_needed_where_they_are_and_asked_for_by_name() {
    if !real_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = small_image(&dir.path().join("layout")).tag("t");
    let registry = RealRegistry::with_password();
    let image = registry.push(&layout, "private:v1");
    let (state, config) = (dir.path().join("state"), no_config(dir.path()));
    let login = |password: &str| {
        let auths =
            json!({ "auths": { &registry.host: { "username": USER, "password": password } } });
        fs::write(dir.path().join("config.json"), auths.to_string()).unwrap();
    };
    for wrong in [None, Some("guess")] {
        if let Some(password) = wrong {
            login(password);
        }
        let error = pull(&image, &state, &config).await.unwrap_err().to_string();
        for part in ["refuses", "config.json", "docker login 127.0.0.1"] {
            assert!(error.contains(part), "{error}");
        }
    }
    login(PASSWORD);
    pull(&image, &state, &config).await.unwrap();
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_the_registry_when_it_fails() {
    if !real_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = small_image(&dir.path().join("layout")).tag("t");
    let registry = RealRegistry::start();
    registry.push(&layout, "hub/library/app:v1");
    let config = no_config(dir.path());
    let gone = "127.0.0.1:1";
    let toml = format!(
        "[registry.\"registry.invalid\"]\nmirrors = [\"{gone}\", \"{}/hub\"]\n",
        registry.host
    );
    fs::write(&config.config, toml).unwrap();
    let image = "registry.invalid/library/app:v1";
    pull(image, &dir.path().join("state"), &config).await.unwrap();
    let missing = "registry.invalid/library/app:v2";
    let error = pull(missing, &dir.path().join("state"), &config).await.unwrap_err().to_string();
    assert!(error.contains("registry registry.invalid cannot be reached"), "{error}");
}

#[tokio::test]
async fn what_does_not_exist_is_said_to_be_missing() {
    if !real_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = RealRegistry::start();
    let image = format!("{}/no/such:thing", registry.host);
    let error = pull(&image, &dir.path().join("state"), &no_config(dir.path())).await.unwrap_err();
    assert!(error.to_string().ends_with("has no such image"), "{error}");
}

struct Faulty {
    dir: tempfile::TempDir,
    registry: FaultyRegistry,
    manifest: String,
    /// The larger layer's digest and size.
    layer: (String, usize),
}

impl Faulty {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = small_image(&dir.path().join("layout"));
        let manifest = layout.manifest()["digest"].as_str().unwrap().to_owned();
        let text = fs::read(layout.blob_path(&manifest)).unwrap();
        let text: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let layer = &text["layers"][1];
        let layer = (
            layer["digest"].as_str().unwrap().to_owned(),
            layer["size"].as_u64().unwrap() as usize,
        );
        let registry = FaultyRegistry::start(&layout.dir, &manifest).await;
        Self { dir, registry, manifest, layer }
    }

    async fn pull(&self) -> Result<Snapshot, ImageError> {
        let mut config = no_config(self.dir.path());
        config.stall = Duration::from_secs(1);
        pull(&format!("{}/x:t", self.registry.host), &self.dir.path().join("state"), &config).await
    }

    async fn error(&self, name: &str, fault: Fault) -> String {
        self.registry.fault(name, fault);
        let error = self.pull().await.unwrap_err().to_string();
        self.registry.mend();
        error
    }

    /// Where the requests for the larger layer began.
    fn ranges(&self) -> Vec<usize> {
        let requests = self.registry.requests.lock().unwrap();
        let layer = requests.iter().filter(|request| request.contains(&self.layer.0));
        layer.map(|request| request.rsplit(' ').next().unwrap().parse().unwrap()).collect()
    }
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    if !can_run(&[]) {
        return;
    }
    let faulty = Faulty::start().await;
    let half = faulty.layer.1 / 2;
    faulty.registry.fault(&faulty.layer.0, Fault::CutOnce(half));
    faulty.pull().await.unwrap();
    assert_eq!(faulty.ranges(), [0, half], "in the same pull");
}

#[tokio::test]
async fn a_pull_that_failed_goes_on_in_the_next() {
    if !can_run(&[]) {
        return;
    }
    let faulty = Faulty::start().await;
    let half = faulty.layer.1 / 2;
    let error = faulty.error(&faulty.layer.0, Fault::Stall(half)).await;
    assert!(error.contains("sent nothing for 1 s"), "{error}");
    let before = faulty.ranges().len();
    faulty.pull().await.unwrap();
    assert_eq!(faulty.ranges()[before..], [half]);
}

#[tokio::test]
async fn a_registry_without_ranges_sends_everything_again() {
    if !can_run(&[]) {
        return;
    }
    let faulty = Faulty::start().await;
    faulty.error(&faulty.layer.0, Fault::Stall(faulty.layer.1 / 2)).await;
    faulty.registry.fault(&faulty.layer.0, Fault::NoRanges);
    faulty.pull().await.unwrap();
}

#[tokio::test]
async fn a_damaged_half_is_thrown_away() {
    if !can_run(&[]) {
        return;
    }
    let faulty = Faulty::start().await;
    faulty.error(&faulty.layer.0, Fault::Stall(faulty.layer.1 / 2)).await;
    let name = faulty.layer.0.replace(':', "-");
    let half = faulty.dir.path().join("state/layers/downloads").join(name);
    let mut bytes = fs::read(&half).unwrap();
    bytes[100] ^= 1;
    fs::write(&half, bytes).unwrap();
    faulty.pull().await.unwrap();
    assert_eq!(faulty.ranges().last(), Some(&0), "from the beginning");
}

#[tokio::test]
async fn what_registries_do_wrong_is_told_and_leaves_nothing_bad_behind() {
    if !can_run(&[]) {
        return;
    }
    let faulty = Faulty::start().await;
    let (layer, size) = faulty.layer.clone();
    let other = Layout::new(&faulty.dir.path().join("other"));
    let wrong = other.blob(GZIP, &vec![7; size]);
    let wrong_bytes = fs::read(other.blob_path(wrong["digest"].as_str().unwrap())).unwrap();
    for (name, fault, part) in [
        (layer.as_str(), Fault::Body(wrong_bytes), "lies about sha256:"),
        (&layer, Fault::Body(vec![7; size + 9]), "announces"),
        (&layer, Fault::Body(vec![7; size - 9]), "announces"),
        (&layer, Fault::Cut(0), "the connection ended after 0 of"),
        (&layer, Fault::Status(404), "has no such image"),
        (&layer, Fault::Status(500), "answers with status 500"),
        (&layer, Fault::Status(429), "allows no more requests"),
        ("t", Fault::Status(401), "needs other credentials or does not exist"),
        ("t", Fault::Status(403), "needs other credentials or does not exist"),
        ("t", Fault::Stall(0), "sent nothing for 1 s"),
        ("t", Fault::Body(b"{}".to_vec()), "version 0: expected an OCI or Docker manifest"),
        ("t", Fault::Body(b"<html>".to_vec()), "its manifest does not parse"),
    ] {
        let error = faulty.error(name, fault.clone()).await;
        assert!(error.contains(part), "{fault:?}: {error}");
    }
    assert!(faulty.manifest.starts_with("sha256:"));
    faulty.pull().await.unwrap();
}
