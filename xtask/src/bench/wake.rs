//! `wake`: from the request to wake a sleeping instance to the end of a program in it, against the
//! same guest on a bare QEMU that is restored from the file that it was migrated into. Both take turns.

use std::time::{Duration, Instant};

use anyhow::Context;
use mvm_core::name::InstancePath;

use super::agent_log::LogMark;
use super::client::Client;
use super::lab::Lab;
use super::microvm::ms_since;
use super::raw::{Peer, RawWake};
use super::report::Report;
use super::rest::{fall_asleep, wake};
use super::say;
use super::statistics::{Summary, median};

/// The ratio that a wake may reach.
const RATIO: f64 = 1.25;

/// The parts of a wake that the agent logs.
pub(super) const PARTS: [(&str, &str); 6] = [
    ("prepare_ms", "ours: plan, manifest, tap and rules"),
    ("process_ms", "ours: QEMU started, answers"),
    ("memory_ms", "ours: changed memory put in"),
    ("load_ms", "ours: QEMU started and loaded, files verified"),
    ("channel_ms", "ours: hello, identity"),
    ("fixes_ms", "ours: clock, random numbers, hooks"),
];

/// Measures this many wakes of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let client = lab.client();
    let path = client.create(&pool, 1).await?.pop().context("no instance was created")?;
    let view = wake(client, &path).await?;
    client.exec(&path).await?;
    let mut peer = Peer::of(lab, &view).await?.machine()?;
    peer.boot().await?;
    // The first pair fills caches and is not counted: it saves the whole memory.
    fall_asleep(client, &path).await?;
    our_wake(client, &path).await?;
    peer.sleep().await?;
    peer.wake().await?;

    let log = LogMark::now(lab)?;
    let (mut ours, mut ready) = (Vec::new(), Vec::new());
    let mut raw: Vec<RawWake> = Vec::new();
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            if is_ours {
                fall_asleep(client, &path).await?;
                let (ready_ms, exec_ms) = our_wake(client, &path).await?;
                say(&format!("pair {}: ours {exec_ms:5.0} ms", run + 1));
                ready.push(ready_ms);
                ours.push(exec_ms);
            } else {
                peer.sleep().await?;
                let wake = peer.wake().await?;
                say(&format!("pair {}: raw  {:5.0} ms", run + 1, ms(wake.exec)));
                raw.push(wake);
            }
        }
    }
    peer.end().await?;
    let raw_ms: Vec<f64> = raw.iter().map(|wake| ms(wake.exec)).collect();
    let sample = "a wake, from the request to the end of the first program";
    let ours_ms = Summary::of(&ours).context("nothing was measured")?;
    let mut report = Report::new("wake", sample, ours_ms, Summary::of(&raw_ms));
    log.report(&mut report, &PARTS)?;
    report.part("ours: until it is running", median(&ready), "ms");
    report.part("ours: first program", median(&differences(&ours, &ready)), "ms");
    let of_raw = |part: fn(&RawWake) -> Duration| {
        median(&raw.iter().map(|wake| ms(part(wake))).collect::<Vec<_>>())
    };
    report.part("raw: QEMU started, answers", of_raw(|wake| wake.process), "ms");
    report.part("raw: memory and devices loaded", of_raw(|wake| wake.loaded - wake.process), "ms");
    report.part("raw: hello", of_raw(|wake| wake.hello - wake.loaded), "ms");
    report.part("raw: first program", of_raw(|wake| wake.exec - wake.hello), "ms");
    report.target_ratio(RATIO);
    Ok(report)
}

/// Milliseconds until it was running, and until a program had ended.
async fn our_wake(client: &Client, path: &InstancePath) -> anyhow::Result<(f64, f64)> {
    let began = Instant::now();
    wake(client, path).await?;
    let ready_ms = ms_since(began);
    client.exec(path).await?;
    Ok((ready_ms, ms_since(began)))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn differences(whole: &[f64], part: &[f64]) -> Vec<f64> {
    whole.iter().zip(part).map(|(whole, part)| whole - part).collect()
}
