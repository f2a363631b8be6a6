//! `sleep`: for how long a guest stands still to be saved, and how much is written for it, against
//! the same guest on a bare QEMU that is migrated into a file. Both guests write the same amount of
//! memory before each sleep, and take turns.

use anyhow::Context;
use mvm_core::guest::ExecRequest;

use super::agent_log::LogMark;
use super::lab::Lab;
use super::microvm::ms_since;
use super::process::{private_bytes, written_bytes};
use super::raw::{Peer, RawSave};
use super::report::Report;
use super::rest::{fall_asleep, wake};
use super::statistics::{Summary, median};

/// The ratio that the guest's standing still may reach.
const RATIO: f64 = 1.5;
/// What is written for each byte that the guest has written.
const WRITTEN: f64 = 1.1;
/// What the guest writes before each sleep, in MiB.
const DIRTY_MIB: u32 = 32;

/// The program that has the guest write to its memory.
pub(super) fn dirty() -> ExecRequest {
    let script = format!("dd if=/dev/urandom of=/run/dirty bs=1M count={DIRTY_MIB} 2>/dev/null");
    ExecRequest { argv: ["sh", "-c", &script].map(str::to_owned).into(), ..ExecRequest::default() }
}

/// Measures this many sleeps of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let client = lab.client();
    let path = client.create(&pool, 1).await?.pop().context("no instance was created")?;
    let mut view = wake(client, &path).await?;
    let mut peer = Peer::of(lab, &view).await?.machine()?;
    peer.boot().await?;
    // The first pair fills caches and is not counted: it saves the whole memory.
    fall_asleep(client, &path).await?;
    view = wake(client, &path).await?;
    peer.sleep().await?;
    peer.wake().await?;

    let (agent, log) = (lab.agent_pid()?, LogMark::now(lab)?);
    let (mut whole, mut ratios) = (Vec::new(), Vec::new());
    let mut raw: Vec<RawSave> = Vec::new();
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            if is_ours {
                client.run(&path, dirty()).await?;
                let vmm = view.pid.context("it has no process")?;
                let (dirty, before) = (private_bytes(vmm)?, written_bytes(agent, Some(vmm))?);
                let began = std::time::Instant::now();
                fall_asleep(client, &path).await?;
                whole.push(ms_since(began));
                ratios.push((written_bytes(agent, None)? - before) / dirty);
                view = wake(client, &path).await?;
            } else {
                peer.run(dirty()).await?;
                raw.push(peer.sleep().await?);
                peer.wake().await?;
            }
        }
    }
    peer.end().await?;
    let paused = log.values("save_ms")?;
    let raw_ms: Vec<f64> = raw.iter().map(|save| save.whole.as_secs_f64() * 1000.0).collect();
    let sample = format!("a guest that has written {DIRTY_MIB} MiB stands still until it is saved");
    let ours_ms = Summary::of(&paused).context("nothing was measured")?;
    let mut report = Report::new("sleep", sample, ours_ms, Summary::of(&raw_ms));
    log.report(&mut report, &[("prepare_ms", "ours: the guest prepares (hooks, sync)")])?;
    report.part("ours: from the request to asleep", median(&whole), "ms");
    let bytes: Vec<f64> = raw.iter().map(|save| save.bytes as f64 / f64::from(1 << 20)).collect();
    report.part("raw: written", median(&bytes), "MiB");
    report.target_ratio(RATIO);
    report.target("written, for each byte that the guest wrote", median(&ratios), WRITTEN, "");
    Ok(report)
}
