//! `create`: what an instance costs before it runs, in time and disk: its record, written by a
//! request for one or for many, and its writable layer, which its first start makes.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use mvm_core::name::Selector;
use mvm_core::spec::PoolSpec;
use mvm_host::image::disk::{LayerTemplates, create_layer};

use super::lab::{Lab, state_bytes};
use super::report::Report;
use super::statistics::{Summary, median};

/// Instances of one run, once with one request and once with one request each.
const COUNT: u32 = 50;
/// What an instance may cost.
const TIME_MS: f64 = 20.0;
const DISK_MIB: f64 = 1.0;
const MIB: f64 = 1024.0 * 1024.0;

#[derive(Default)]
struct Measured {
    /// Milliseconds of a request for one instance.
    single_ms: Vec<f64>,
    /// Milliseconds per instance of a request for many.
    batch_ms: Vec<f64>,
    /// Milliseconds to make a layer.
    layer_ms: Vec<f64>,
    /// MiB that the state grew by, per instance, in the round in which it grew most: afterwards
    /// the store's files have room.
    record_mib: f64,
    /// MiB that a layer takes.
    layer_mib: Vec<f64>,
    /// Milliseconds to make a small new file durable, the least that a layer costs here.
    sync_ms: Vec<f64>,
}

/// Measures this many rounds.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let templates = LayerTemplates::new(lab.state_dir());
    let template = templates.ensure(PoolSpec::default().disk_mib.into()).await?;
    let mut measured = Measured::default();
    for _ in 0..runs {
        let empty = state_bytes(lab.state_dir())?;
        let began = Instant::now();
        let mut paths = lab.client().create(&pool, COUNT).await?;
        measured.batch_ms.push(ms_since(began) / f64::from(COUNT));
        for _ in 0..COUNT {
            let began = Instant::now();
            paths.extend(lab.client().create(&pool, 1).await?);
            measured.single_ms.push(ms_since(began));
        }
        let grown = state_bytes(lab.state_dir())?.saturating_sub(empty);
        let per_instance = grown as f64 / MIB / paths.len() as f64;
        measured.record_mib = measured.record_mib.max(per_instance);
        make_layers(lab.state_dir(), &template, paths.len(), &mut measured)?;
        lab.client().destroy(Selector::Pool(pool.clone()), &paths).await?;
    }
    report(&measured).context("nothing was measured")
}

/// Makes as many layers as there are instances, as their first starts would.
fn make_layers(
    state_dir: &Path,
    template: &Path,
    count: usize,
    measured: &mut Measured,
) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("layers-").tempdir_in(state_dir)?;
    let uid = rustix::process::geteuid().as_raw();
    for index in 0..count {
        let path = dir.path().join(format!("{index}.ext4"));
        let began = Instant::now();
        create_layer(template, &path, uid)?;
        measured.layer_ms.push(ms_since(began));
        measured.layer_mib.push(fs::metadata(&path)?.blocks() as f64 * 512.0 / MIB);
        let began = Instant::now();
        let mut file = File::create(dir.path().join("sync"))?;
        file.write_all(&[1; 4096])?;
        file.sync_all()?;
        measured.sync_ms.push(ms_since(began));
    }
    Ok(())
}

fn ms_since(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

fn report(measured: &Measured) -> Option<Report> {
    // The layers of the batch's instances are measured too, so there are more of them.
    let both = measured.single_ms.iter().zip(&measured.layer_ms);
    let whole: Vec<f64> = both.map(|(single, layer)| single + layer).collect();
    let ours = Summary::of(&whole)?;
    let sample = "one instance, from a request of its own to its record and its writable layer";
    let mut report = Report::new("create", sample, ours, None);
    let (record, layer) = (measured.record_mib, median(&measured.layer_mib));
    report.part("record, one request each", median(&measured.single_ms), "ms");
    report.part(format!("record, {COUNT} in one request"), median(&measured.batch_ms), "ms");
    report.part("writable layer", median(&measured.layer_ms), "ms");
    report.part(
        "a new file of 4 KiB made durable, for comparison",
        median(&measured.sync_ms),
        "ms",
    );
    report.part("disk of the record", record * 1024.0, "KiB");
    report.part("disk of the writable layer", layer * 1024.0, "KiB");
    report.target("time at p50", ours.p50, TIME_MS, "ms");
    report.target("disk", record + layer, DISK_MIB, "MiB");
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_and_layer_count_together() {
        let measured = Measured {
            single_ms: vec![4.0],
            batch_ms: vec![0.5],
            layer_ms: vec![6.0, 100.0],
            record_mib: 0.25,
            layer_mib: vec![0.5, 0.5],
            sync_ms: vec![1.0],
        };
        let report = report(&measured).unwrap();
        assert_eq!(report.ours_ms.p50, 10.0);
        assert_eq!(report.targets[1].value, 0.75);
        assert!(report.missed().is_empty());
    }
}
