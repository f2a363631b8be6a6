//! Images that are damaged, or made to do harm: each is refused with the reason, and leaves
//! nothing behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod oci_support;

use std::fs;
use std::path::Path;

use mvm_host::image::{ImageError, ImageSource, LayerCache, OciSource};
use oci_support::layout::{GZIP, LayerTar, Layout, PLAIN, gzip, sha256};
use oci_support::{can_run, quiet};
use serde_json::json;

async fn merge(layout: &Path, work: &Path) -> Result<(), ImageError> {
    let source = OciSource::layout(layout, None, &LayerCache::new(work.join("state"))).await?;
    let dest = tempfile::tempdir_in(work).unwrap();
    source.write_root(dest.path(), &quiet).await
}

/// The error of an image with one layer of these bytes.
async fn refused(kind: &str, bytes: &[u8], diff_id: &str) -> String {
    let work = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&work.path().join("layout"));
    let descriptor = layout.blob(kind, bytes);
    layout.add(descriptor, diff_id.to_owned());
    let error = merge(&layout.tag("t"), work.path()).await.unwrap_err().to_string();
    let layers = work.path().join("state/layers");
    let left: Vec<_> = fs::read_dir(&layers)
        .map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect())
        .unwrap_or_default();
    assert!(left.is_empty() || error.contains("layer 1 of"), "{error} leaves {left:?}");
    error
}

async fn refused_tar(tar: LayerTar) -> String {
    let tar = tar.finish();
    refused(PLAIN, &tar, &sha256(&tar)).await
}

#[tokio::test]
async fn damaged_layers_are_refused() {
    if !can_run(&[]) {
        return;
    }
    let tar = LayerTar::new().file("a", &"content".repeat(5_000)).finish();
    let packed = gzip(&tar);
    let id = sha256(&tar);
    let other = sha256(b"other");
    let mut flipped = packed.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xff;
    for (kind, bytes, diff_id, part) in [
        (GZIP, packed.clone(), &other, "it unpacks to sha256:"),
        (GZIP, packed[..packed.len() / 2].to_vec(), &id, "is not usable: it cannot be read"),
        (PLAIN, tar[..600].to_vec(), &id, "ends too early"),
        (GZIP, flipped, &id, "is not usable"),
        (PLAIN, b"not a tar archive, but text".repeat(100), &id, "wrong checksum"),
    ] {
        let error = refused(kind, &bytes, diff_id).await;
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[tokio::test]
async fn a_blob_with_another_digest_is_refused() {
    if !can_run(&[]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&work.path().join("layout"));
    let tar = LayerTar::new().file("a", "one").finish();
    let changed = LayerTar::new().file("a", "two").finish();
    let descriptor = layout.blob(PLAIN, &tar);
    layout.add(descriptor, sha256(&changed));
    let dir = layout.tag("t");
    fs::write(layout.blob_path(&sha256(&tar)), &changed).unwrap();
    let error = merge(&dir, work.path()).await.unwrap_err().to_string();
    assert!(error.contains("its digest is sha256:"), "{error}");
    fs::write(layout.blob_path(&sha256(&tar)), b"shorter").unwrap();
    let error = merge(&dir, work.path()).await.unwrap_err().to_string();
    assert!(error.contains("has 7 bytes instead of"), "{error}");
    fs::remove_file(layout.blob_path(&sha256(&tar))).unwrap();
    let error = merge(&dir, work.path()).await.unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}

#[tokio::test]
async fn layers_that_climb_out_are_refused_and_touch_nothing() {
    if !can_run(&[]) {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("owned");
    let up = format!("{}{}", "../".repeat(8), target.display());
    let error = refused_tar(LayerTar::new().file(&up, "x")).await;
    assert!(error.contains("climbs out of the image's root"), "{error}");
    let error = refused_tar(LayerTar::new().hard_link("shadow", "../../../etc/shadow")).await;
    assert!(error.contains("climbs out"), "{error}");
    let error = refused_tar(LayerTar::new().hard_link("shadow", "/etc/shadow")).await;
    assert!(error.contains("which is not there"), "the image's own, not the host's: {error}");
    let loops = LayerTar::new().symlink("a", "b").symlink("b", "a").file("a/c", "x");
    assert!(refused_tar(loops).await.contains("endless chain of symbolic links"));

    // A link to a directory of the host, planted by one layer and written through by the next.
    let work = tempfile::tempdir().unwrap();
    let host = outside.path().to_str().unwrap();
    let layout = Layout::new(&work.path().join("layout"))
        .layer(LayerTar::new().symlink("out", host).symlink("up", "../../../../../../tmp"))
        .layer(LayerTar::new().file("out/owned", "x").file("up/owned-by-mvm-test", "x"));
    merge(&layout.tag("t"), work.path()).await.unwrap();
    assert!(!target.exists(), "it is written inside the image");
    assert!(!Path::new("/tmp/owned-by-mvm-test").exists());
}

/// Bytes as small as gzip makes them.
fn gzip_best(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_layer_that_is_made_to_fill_the_disk_is_refused() {
    if !can_run(&[]) {
        return;
    }
    // A gibibyte and more of one letter, which the tar header says, in a megabyte.
    let size: u64 = 1_200 << 20;
    let mut header = tar::Header::new_gnu();
    header.set_path("bomb").unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let letters = gzip_best(&[b'x'; 1 << 20]);
    let bomb = [gzip(header.as_bytes()), letters.repeat(1_200)].concat();
    assert!((bomb.len() as u64) < size / 200, "{} bytes", bomb.len());
    let error = refused(GZIP, &bomb, &sha256(b"whatever")).await;
    assert!(error.contains("expands to more than any sound layer of its size"), "{error}");
}

#[tokio::test]
async fn images_that_cannot_be_used_say_what_they_are() {
    if !can_run(&[]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let dir = |name: &str| work.path().join(name);
    let error = merge(&dir("nowhere"), work.path()).await.unwrap_err().to_string();
    assert!(error.starts_with("cannot read directory") && error.contains("nowhere"), "{error}");
    fs::create_dir(dir("empty")).unwrap();
    let error = merge(&dir("empty"), work.path()).await.unwrap_err().to_string();
    assert!(error.contains("has no `oci-layout`: expected"), "{error}");

    let mut other = Layout::new(&dir("other")).layer(LayerTar::new().file("a", "x"));
    other.architecture = "riscv64".to_owned();
    let error = merge(&other.tag("t"), work.path()).await.unwrap_err().to_string();
    assert!(error.contains("it is for linux/riscv64"), "{error}");

    let mut foreign = Layout::new(&dir("foreign"));
    let kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut descriptor = foreign.blob(kind, b"x");
    descriptor["urls"] = json!(["https://example.com/layer"]);
    foreign.add(descriptor, sha256(b"x"));
    let error = merge(&foreign.tag("t"), work.path()).await.unwrap_err().to_string();
    assert!(error.contains("is foreign") && error.contains("https://example.com/layer"), "{error}");

    let several = Layout::new(&dir("several")).layer(LayerTar::new().file("a", "x"));
    let manifest = several.manifest();
    let named = |name: &str| {
        let mut entry = manifest.clone();
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        entry
    };
    let index = json!({ "schemaVersion": 2, "manifests": [named("v1"), named("v2")] });
    fs::write(several.dir.join("index.json"), index.to_string()).unwrap();
    let error = merge(&several.dir, work.path()).await.unwrap_err().to_string();
    assert!(error.ends_with("append a colon and one of these names: v1, v2"), "{error}");
    let cache = LayerCache::new(dir("state"));
    let error = OciSource::layout(&several.dir, Some("v3"), &cache).await.unwrap_err().to_string();
    assert!(error.contains("has no image named `v3`, but these: v1, v2"), "{error}");
    OciSource::layout(&several.dir, Some("v2"), &cache).await.unwrap();
}
