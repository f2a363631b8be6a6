//! `image`: a revision from a local image of 300 MiB in 20 layers, against `umoci` and `mkfs.erofs`
//! by hand; and again with one layer changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use mvm_core::image::ImageSpec;
use mvm_core::name::PoolPath;
use mvm_host::image::digest::Digest;
use serde_json::{Value, json};
use tokio::process::Command;

use super::lab::Lab;
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

const LAYERS: usize = 20;
/// Files of one layer, of [`FILE_KIB`] each: 15 MiB.
const FILES: usize = 120;
const FILE_KIB: usize = 128;
/// What a build may take of the time by hand.
const BUILD_RATIO: f64 = 1.2;
/// What a build with one changed layer may take of the time by hand.
const REBUILD_RATIO: f64 = 0.4;

#[derive(Default)]
struct Measured {
    build_ms: Vec<f64>,
    rebuild_ms: Vec<f64>,
    hand_ms: Vec<f64>,
    unpack_ms: Vec<f64>,
    mkfs_ms: Vec<f64>,
}

/// Measures this many rounds.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let mut measured = Measured::default();
    for round in 0..runs {
        say(&format!("round {}: making an image", round + 1));
        let dir = tempfile::Builder::new().prefix("image-").tempdir_in(lab.state_dir())?;
        let salt = u64::from(round) + u64::from(std::process::id()) * 1_000;
        let mut image = Image::make(dir.path(), salt).await?;
        // Neither side waits for what the other has left to write.
        rustix::fs::sync();
        by_hand(dir.path(), &image.layout, &mut measured).await?;
        rustix::fs::sync();
        measured.build_ms.push(build(lab, &pool, &image.layout).await?);
        image.change_a_layer(salt + 500).await?;
        rustix::fs::sync();
        measured.rebuild_ms.push(build(lab, &pool, &image.layout).await?);
    }
    report(&measured).context("nothing was measured")
}

async fn build(lab: &Lab, pool: &PoolPath, layout: &Path) -> anyhow::Result<f64> {
    let path = layout.display().to_string();
    let began = Instant::now();
    lab.client().update(pool, ImageSpec::OciLayout { path, tag: None }).await?;
    Ok(ms_since(began))
}

/// What one would type without mvm.
async fn by_hand(dir: &Path, layout: &Path, measured: &mut Measured) -> anyhow::Result<()> {
    let (tree, root) = (dir.join("tree"), dir.join("root.erofs"));
    let began = Instant::now();
    let image = format!("{}:t", layout.display());
    tool(Command::new("umoci").args(["raw", "unpack", "--image", &image]).arg(&tree)).await?;
    let unpacked = ms_since(began);
    tool(Command::new("mkfs.erofs").arg("--quiet").arg(&root).arg(&tree)).await?;
    // A revision is on the disk when it is there.
    fs::File::open(&root)?.sync_all()?;
    let whole = ms_since(began);
    measured.unpack_ms.push(unpacked);
    measured.mkfs_ms.push(whole - unpacked);
    measured.hand_ms.push(whole);
    fs::remove_dir_all(&tree)?;
    Ok(fs::remove_file(&root)?)
}

/// An OCI layout with one image.
struct Image {
    layout: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
}

impl Image {
    async fn make(dir: &Path, salt: u64) -> anyhow::Result<Self> {
        let layout = dir.join("layout");
        fs::create_dir_all(layout.join("blobs/sha256"))?;
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut image = Self { layout, layers: Vec::new(), diff_ids: Vec::new() };
        for number in 0..LAYERS {
            let (layer, diff_id) = image.layer(number, salt).await?;
            image.layers.push(layer);
            image.diff_ids.push(diff_id);
        }
        image.write_documents()?;
        Ok(image)
    }

    async fn change_a_layer(&mut self, salt: u64) -> anyhow::Result<()> {
        let middle = LAYERS / 2;
        (self.layers[middle], self.diff_ids[middle]) = self.layer(middle, salt).await?;
        self.write_documents()
    }

    /// Each layer has files of its own, and hides or replaces some of the layer below.
    async fn layer(&self, number: usize, salt: u64) -> anyhow::Result<(Value, String)> {
        let tree = self.layout.with_file_name("layer");
        let dir = tree.join(format!("srv/layer{number}"));
        fs::create_dir_all(&dir)?;
        for file in 0..FILES {
            let seed = salt + (number * FILES + file) as u64 * 7_919;
            fs::write(dir.join(format!("file{file}")), content(seed))?;
        }
        if let Some(below) = number.checked_sub(1) {
            let dir = tree.join(format!("srv/layer{below}"));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(".wh.file0"), "")?;
            fs::write(dir.join("file1"), content(salt + number as u64))?;
        }
        let tar = self.layout.with_file_name("layer.tar");
        let (from, to) = (tree.as_path(), tar.as_path());
        tool(Command::new("tar").arg("-C").arg(from).arg("-cf").arg(to).arg("srv")).await?;
        fs::remove_dir_all(&tree)?;
        let (diff_id, _) = Digest::of_file(&tar)?;
        tool(Command::new("gzip").args(["-f", "-n", "-6"]).arg(&tar)).await?;
        let packed = self.layout.with_file_name("layer.tar.gz");
        let (digest, size) = Digest::of_file(&packed)?;
        fs::rename(packed, self.blob(&digest))?;
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let layer =
            json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": size });
        Ok((layer, format!("sha256:{diff_id}")))
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.layout.join("blobs/sha256").join(digest.to_string())
    }

    fn store(&self, kind: &str, document: &Value) -> anyhow::Result<Value> {
        let text = document.to_string();
        let digest = Digest::of(text.as_bytes());
        fs::write(self.blob(&digest), &text)?;
        Ok(json!({
            "mediaType": kind, "digest": format!("sha256:{digest}"), "size": text.len(),
        }))
    }

    fn write_documents(&self) -> anyhow::Result<()> {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = self.store(
            "application/vnd.oci.image.config.v1+json",
            &json!({
                "os": "linux", "architecture": architecture, "config": {},
                "rootfs": { "type": "layers", "diff_ids": self.diff_ids },
            }),
        )?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let mut manifest = self.store(
            kind,
            &json!({
                "schemaVersion": 2, "mediaType": kind, "config": config, "layers": self.layers,
            }),
        )?;
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "t" });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        Ok(fs::write(self.layout.join("index.json"), index.to_string())?)
    }
}

/// Half noise, half repetition, as programs and their data are when compressed.
fn content(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(FILE_KIB * 1024);
    while bytes.len() < FILE_KIB * 1024 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"the same");
    }
    bytes
}

async fn tool(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().await.with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn ms_since(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

fn report(measured: &Measured) -> Option<Report> {
    let (ours, hand) = (Summary::of(&measured.build_ms)?, Summary::of(&measured.hand_ms)?);
    let sample =
        "one build from a local image of 300 MiB in 20 layers, against umoci and mkfs.erofs";
    let mut report = Report::new("image", sample, ours, Some(hand));
    let rebuild = median(&measured.rebuild_ms);
    report.part("build with one changed layer", rebuild, "ms");
    report.part("umoci raw unpack", median(&measured.unpack_ms), "ms");
    report.part("mkfs.erofs, made durable", median(&measured.mkfs_ms), "ms");
    report.target_ratio(BUILD_RATIO);
    report.target("rebuild, of the time by hand", rebuild / hand.p50, REBUILD_RATIO, "");
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_builds_are_bounded_by_the_time_by_hand() {
        let measured = Measured {
            build_ms: vec![110.0],
            rebuild_ms: vec![50.0],
            hand_ms: vec![100.0],
            unpack_ms: vec![70.0],
            mkfs_ms: vec![30.0],
        };
        let report = report(&measured).unwrap();
        assert_eq!(report.missed(), ["rebuild, of the time by hand"]);
    }
}
