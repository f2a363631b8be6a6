//! `idle`: what the agent and the VMMs cost while nothing happens: the agent's CPU time, and the
//! host's memory beyond that of the guests.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mvm_wire::view::InstanceView;
use tokio::time::sleep;

use super::lab::Lab;
use super::parallel::{COUNT, start_all};
use super::process::{Memory, cpu_ms, memory};
use super::report::Report;
use super::statistics::{Summary, median};

/// How long the CPU time is watched.
const WINDOW: Duration = Duration::from_secs(30);
/// How long the guests have to come to rest.
const SETTLE: Duration = Duration::from_secs(10);
/// What the agent may use, in percent of one CPU.
const CPU_PERCENT: f64 = 1.0;

/// Measures this many windows.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let round = start_all(lab, &pool, COUNT).await?;
    sleep(SETTLE).await;
    let agent = lab.agent_pid()?;
    let vmms = processes(&round.views)?;
    let (mut agent_ms, mut agent_percent, mut vmm_percent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let began = Instant::now();
        let (agent_before, vmms_before) = (cpu_ms(agent)?, total_cpu_ms(&vmms)?);
        sleep(WINDOW).await;
        let window_ms = began.elapsed().as_secs_f64() * 1000.0;
        let used = cpu_ms(agent)? - agent_before;
        agent_ms.push(used);
        agent_percent.push(used / window_ms * 100.0);
        let used = (total_cpu_ms(&vmms)? - vmms_before) / f64::from(COUNT);
        vmm_percent.push(used / window_ms * 100.0);
    }
    let of_vmms = vmms.iter().map(|pid| memory(*pid)).collect::<anyhow::Result<Vec<Memory>>>()?;
    let in_mib = |field: fn(&Memory) -> u64| {
        median(&of_vmms.iter().map(|memory| field(memory) as f64 / 1024.0).collect::<Vec<_>>())
    };
    // A process that has started microVMs has used some: else the wrong one was measured.
    let since_start = cpu_ms(agent)?;
    ensure!(since_start > 0.0, "process {agent} has used no CPU time at all");
    let ours = Summary::of(&agent_ms).context("nothing was measured")?;
    let sample = format!("the agent's CPU time in {} s with {COUNT} instances", WINDOW.as_secs());
    let mut report = Report::new("idle", sample, ours, None);
    report.part("agent: CPU time since its start", since_start, "ms");
    report.part("agent: resident memory", memory(agent)?.own_rss_kib as f64 / 1024.0, "MiB");
    report.part("per VMM: guest memory, resident", in_mib(|m| m.guest_rss_kib), "MiB");
    report.part("per VMM: its own memory, shared in part (PSS)", in_mib(|m| m.own_pss_kib), "MiB");
    report.part("per VMM: its own memory, shared in full (RSS)", in_mib(|m| m.own_rss_kib), "MiB");
    report.part("per VMM: CPU, of one CPU", median(&vmm_percent), "%");
    report.target("agent: CPU, of one CPU", median(&agent_percent), CPU_PERCENT, "%");
    Ok(report)
}

fn processes(views: &[InstanceView]) -> anyhow::Result<Vec<u32>> {
    let pid = |view: &InstanceView| view.pid.with_context(|| format!("{} is gone", view.path));
    views.iter().map(pid).collect()
}

fn total_cpu_ms(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| cpu_ms(*pid)).sum()
}
