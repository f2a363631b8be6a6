//! `adopt`: an agent that starts where another one has left running instances; and what an instance that
//! rests takes of the agent's memory.

use std::time::Instant;

use anyhow::{Context, ensure};
use futures_util::future::try_join_all;
use mvm_core::record::DesiredState;

use super::fleet::{Fleet, Machine, resident_bytes};
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// Instances that run.
const COUNT: u32 = 1_000;
/// Instances that rest.
const RESTING: u32 = 10_000;
/// How long it may take until they are known to run, and what one that rests may take.
const ADOPT_MS: f64 = 2_000.0;
const RESTING_KIB: f64 = 10.0;

/// Measures this many starts.
pub(super) async fn run(runs: u32) -> anyhow::Result<Report> {
    // First: nothing that was freed is used again.
    let resting_kib = resting_kib().await?;
    let machine = Machine::with(&Fleet::of(COUNT)?).await?;
    let agent = machine.agent().await?;
    agent.until_running(COUNT as usize).await?;
    agent.node.end().await;
    let (mut started, mut known, mut answered) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..runs {
        let began = Instant::now();
        let agent = machine.agent().await?;
        started.push(began.elapsed().as_secs_f64() * 1000.0);
        let paths = agent.until_running(COUNT as usize).await?;
        known.push(began.elapsed().as_secs_f64() * 1000.0);
        try_join_all(paths.iter().map(|path| agent.exec(path))).await?;
        let all_ms = began.elapsed().as_secs_f64() * 1000.0;
        agent.node.end().await;
        say(&format!("start {}: {all_ms:.0} ms", run + 1));
        answered.push(all_ms);
    }
    ensure!(machine.running() == COUNT as usize, "not the same microVMs run as before");
    let ours = Summary::of(&answered).context("nothing was measured")?;
    let sample = format!("an agent's start until {COUNT} instances run and have run a program");
    let mut report = Report::new("adopt", sample, ours, None);
    report.part("until it takes calls", median(&started), "ms");
    report.part("until all are reported as running", median(&known), "ms");
    report.target("the start at p50", ours.p50, ADOPT_MS, "ms");
    report.target("memory of an instance that rests", resting_kib, RESTING_KIB, "KiB");
    Ok(report)
}

/// What the process grows by for each instance that sleeps.
async fn resting_kib() -> anyhow::Result<f64> {
    let mut resident = Vec::new();
    for count in [0, RESTING] {
        let fleet = Fleet::of(count)?.settled(|_| DesiredState::Sleeping);
        let machine = Machine::with(&fleet).await?;
        drop(fleet);
        let agent = machine.agent().await?;
        ensure!(agent.instances().await?.len() == count as usize, "not all instances are there");
        agent.node.round().await;
        resident.push(resident_bytes()? as f64 / 1024.0);
        agent.node.end().await;
    }
    Ok((resident[1] - resident[0]) / f64::from(RESTING))
}
