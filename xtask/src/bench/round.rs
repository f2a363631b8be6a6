//! `round`: one round of the node's loop over many instances with which nothing is to be done, and what the
//! agent computes while nothing happens.

use std::time::Duration;

use anyhow::Context;
use mvm_core::record::DesiredState;
use tokio::time::sleep;

use super::fleet::{Fleet, Machine, cpu_time};
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// Instances: a third runs, a third sleeps, a third is stopped.
const COUNT: u32 = 10_000;
const KINDS: usize = 3;
/// For how long the agent is left alone.
const IDLE: Duration = Duration::from_secs(60);
/// How long a round and how much CPU time in each minute may be.
const ROUND_MS: f64 = 20.0;
const CPU_SECONDS: f64 = 1.0;

/// Measures this many rounds.
pub(super) async fn run(runs: u32) -> anyhow::Result<Report> {
    let fleet = Fleet::of(COUNT)?.settled(|number| match number % KINDS {
        0 => DesiredState::Running,
        1 => DesiredState::Sleeping,
        _ => DesiredState::Stopped,
    });
    let machine = Machine::with(&fleet).await?;
    let agent = machine.agent().await?;
    agent.until_running((COUNT as usize).div_ceil(KINDS)).await?;
    say("all that is to run runs");
    // What follows from the last start is done after a round or two.
    sleep(Duration::from_secs(1)).await;
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let before = cpu_time();
        wall.push(agent.node.round().await.as_secs_f64() * 1000.0);
        cpu.push((cpu_time() - before).as_secs_f64() * 1000.0);
    }
    say(&format!("the agent is left alone for {} s", IDLE.as_secs()));
    let before = cpu_time();
    sleep(IDLE).await;
    let idle = (cpu_time() - before).as_secs_f64() * 60.0 / IDLE.as_secs_f64();
    agent.node.end().await;

    let ours = Summary::of(&wall).context("nothing was measured")?;
    let sample = format!("a round over {COUNT} instances with nothing to do");
    let mut report = Report::new("round", sample, ours, None);
    report.part("CPU time of the process in a round", median(&cpu), "ms");
    report.target("a round at p50", ours.p50, ROUND_MS, "ms");
    report.target("CPU time in a minute in which nothing happens", idle, CPU_SECONDS, "s");
    Ok(report)
}
