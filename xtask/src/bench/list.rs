//! `list`: the command that lists a thousand instances, against the same program doing nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use super::lab::Lab;
use super::report::Report;
use super::statistics::{Summary, median};

/// How many instances are listed.
const COUNT: u32 = 1000;
/// The ratio to `mvm --version` that the list may reach.
const RATIO: f64 = 3.0;
/// How long the simulated instances have to run, and how often they are looked at.
const START_LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(500);

/// Measures this many lists of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let request =
        Request::InstanceCreate { pool, count: COUNT, start: true, disks: vec![], cold: false };
    lab.client().submit(request).await?;
    timeout(START_LIMIT, all_run(lab)).await.context("not all simulated instances run")??;
    let state_dir = lab.state_dir().to_str().context("the repository's path is not UTF-8")?;
    let table = ["--state-dir", state_dir, "ps", "-a"];
    let json = ["--state-dir", state_dir, "ps", "-a", "-o", "json"];
    let version = ["--version"];
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    let (mut as_json, mut call) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let (ms, lines) = command(lab.program(), &table).await?;
        ensure!(lines >= COUNT as usize, "only {lines} lines were listed");
        ours.push(ms);
        raw.push(command(lab.program(), &version).await?.0);
        as_json.push(command(lab.program(), &json).await?.0);
        let began = Instant::now();
        let listed = lab.client().instances(Selector::All).await?;
        call.push(began.elapsed().as_secs_f64() * 1000.0);
        ensure!(listed.len() == COUNT as usize, "the agent listed {}", listed.len());
    }
    let ours = Summary::of(&ours).context("nothing was measured")?;
    let sample = format!("`mvm ps -a` of {COUNT} instances, against `mvm --version`");
    let mut report = Report::new("list", sample, ours, Summary::of(&raw));
    report.part("as JSON (`-o json`)", median(&as_json), "ms");
    report.part("the agent's answer, read by this (unoptimised) program", median(&call), "ms");
    report.target_ratio(RATIO);
    Ok(report)
}

/// Waits until all instances run. A watch would send all of them at each of their changes.
async fn all_run(lab: &Lab) -> anyhow::Result<()> {
    loop {
        let instances = lab.client().instances(Selector::All).await?;
        if instances.iter().filter(|view| view.state == State::Running).count() == COUNT as usize {
            return Ok(());
        }
        sleep(POLL).await;
    }
}

/// Runs a command; its time in milliseconds and how many lines it wrote.
pub(super) async fn command(program: &Path, args: &[&str]) -> anyhow::Result<(f64, usize)> {
    let began = Instant::now();
    let output = Command::new(program).args(args).kill_on_drop(true).output().await?;
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{args:?} ended with {}: {error}", output.status);
    Ok((ms, output.stdout.iter().filter(|byte| **byte == b'\n').count()))
}
