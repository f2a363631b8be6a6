//! `asleep`: what an agent costs that has 500 sleeping instances, and how fast it lists them. They
//! are simulated: of an instance that sleeps there is nothing but its records and its files.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use tokio::time::{sleep, timeout};

use super::lab::Lab;
use super::list;
use super::process::{cpu_ms, memory};
use super::report::Report;
use super::statistics::{Summary, median};

/// How many instances sleep.
const COUNT: u32 = 500;
/// How long the CPU time is watched.
const WINDOW: Duration = Duration::from_secs(30);
/// How long the instances have to fall asleep, and how often they are looked at.
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(500);
/// The agent's CPU in percent of one CPU, its memory in MiB, and a list in milliseconds.
const CPU_PERCENT: f64 = 0.1;
const MEMORY_MIB: f64 = 100.0;
const LIST_MS: f64 = 50.0;

/// Measures this many lists.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let path = lab.pool().await?;
    let scale = Request::PoolScale { path, running: 0, warm: None, sleeping: Some(COUNT) };
    lab.client().submit(scale).await?;
    timeout(LIMIT, all_sleep(lab)).await.context("not all simulated instances sleep")??;
    let agent = lab.agent_pid()?;
    let (began, before) = (Instant::now(), cpu_ms(agent)?);
    sleep(WINDOW).await;
    let percent = (cpu_ms(agent)? - before) / began.elapsed().as_secs_f64() / 10.0;
    let state_dir = lab.state_dir().to_str().context("the repository's path is not UTF-8")?;
    let mut lists = Vec::new();
    for _ in 0..runs {
        let arguments = ["--state-dir", state_dir, "instance", "list"];
        let (ms, lines) = list::command(lab.program(), &arguments).await?;
        ensure!(lines >= COUNT as usize, "only {lines} lines were listed");
        lists.push(ms);
    }
    let sample = format!("`mvm instance list` with {COUNT} sleeping (simulated) instances");
    let ours = Summary::of(&lists).context("nothing was measured")?;
    let mut report = Report::new("asleep", sample, ours, None);
    report.target("the agent's CPU, of one CPU", percent, CPU_PERCENT, "%");
    let resident = memory(agent)?.own_rss_kib as f64 / 1024.0;
    report.target("the agent's resident memory", resident, MEMORY_MIB, "MiB");
    report.target("the list at p50", median(&lists), LIST_MS, "ms");
    Ok(report)
}

async fn all_sleep(lab: &Lab) -> anyhow::Result<()> {
    loop {
        let instances = lab.client().instances(Selector::All).await?;
        let asleep = instances
            .iter()
            .filter(|view| view.state == State::Sleeping && view.activity.is_none());
        if asleep.count() == COUNT as usize {
            return Ok(());
        }
        sleep(POLL).await;
    }
}
