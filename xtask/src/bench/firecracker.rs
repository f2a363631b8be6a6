//! `--vmm firecracker`: starts, wakes, sleeps and memory of microVMs on Firecracker, against a bare
//! one with the same kernel, disks and memory, driven by hand over its API. Both take turns.
//!
//! It needs a KVM that works and a Firecracker. In the lab its times are an emulated machine's, and
//! only the ratios say something.

mod bare;

use std::time::Instant;

use anyhow::Context;
use mvm_core::name::InstancePath;

use super::agent_log::LogMark;
use super::client::Client;
use super::lab::Lab;
use super::microvm::ms_since;
use super::process::{own_memory_kib, private_bytes, written_bytes};
use super::report::Report;
use super::rest::{fall_asleep, wake};
use super::say;
use super::sleep::dirty;
use super::start::{destroy, one_start};
use super::statistics::{Summary, median};
use bare::Parts;

/// The ratios that a start and a wake may reach.
const START_RATIO: f64 = 1.10;
const WAKE_RATIO: f64 = 1.25;
/// What is written for each byte that the guest has written.
const WRITTEN: f64 = 1.1;
/// The parts of a wake that the agent logs.
const WAKE_PARTS: [(&str, &str); 7] = [
    ("prepare_ms", "ours: wake: plan, manifest"),
    ("load_ms", "ours: wake: jail, loaded, rules, files verified"),
    ("process_ms", "ours: wake: of it the jail, until Firecracker answers"),
    ("devices_ms", "ours: wake: of it disks put in, devices loaded, memory mapped"),
    ("memory_ms", "ours: wake: of it changed memory put in"),
    ("channel_ms", "ours: wake: hello, identity"),
    ("fixes_ms", "ours: wake: clock, random numbers, hooks"),
];
/// Memory of the VMM itself beyond what the bare one has, in MiB.
const MORE_MIB: f64 = 1.0;

/// Measures this many of each.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let client = lab.client();
    // The first of each kind fills caches and is not counted.
    let (_, view) = one_start(lab, &pool).await?;
    let parts = Parts::of(lab, &view).await?;
    destroy(lab, &view.path).await?;
    let guest_bytes = u64::from(view.mem_mib) << 20;
    parts.machine()?.boot().await?.end().await?;

    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            if is_ours {
                let (steps, view) = one_start(lab, &pool).await?;
                let pid = view.pid.context("it has no process")?;
                ours.started(run, "ours", steps.exec.as_secs_f64() * 1000.0);
                ours.own_mib.push(own_memory_kib(pid, guest_bytes)? as f64 / 1024.0);
                destroy(lab, &view.path).await?;
            } else {
                let began = Instant::now();
                let machine = parts.machine()?.boot().await?;
                bare.started(run, "bare", ms_since(began));
                bare.own_mib.push(own_memory_kib(machine.pid()?, guest_bytes)? as f64 / 1024.0);
                machine.end().await?;
            }
        }
    }
    let path = client.create(&pool, 1).await?.pop().context("no instance was created")?;
    wake(client, &path).await?;
    client.exec(&path).await?;
    let mut machine = parts.machine()?.boot().await?;
    fall_asleep(client, &path).await?;
    our_wake(client, &path).await?;
    machine.sleep().await?;
    machine.wake().await?;
    let (agent, log) = (lab.agent_pid()?, LogMark::now(lab)?);
    let mut ratios = Vec::new();
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            if is_ours {
                let view = wake(client, &path).await?;
                client.run(&path, dirty()).await?;
                let vmm = view.pid.context("it has no process")?;
                let (dirty, before) = (private_bytes(vmm)?, written_bytes(agent, Some(vmm))?);
                fall_asleep(client, &path).await?;
                ratios.push((written_bytes(agent, None)? - before) / dirty);
                ours.woken(run, "ours", our_wake(client, &path).await?);
            } else {
                machine.run(dirty()).await?;
                machine.sleep().await?;
                let began = Instant::now();
                machine.wake().await?;
                bare.woken(run, "bare", ms_since(began));
            }
        }
    }
    let mut by_faults = Vec::new();
    for run in 0..runs {
        machine.run(dirty()).await?;
        machine.sleep().await?;
        let began = Instant::now();
        machine.wake_by_faults().await?;
        by_faults.push(ms_since(began));
        say(&format!("wake {}: bare, page faults handled {:.0} ms", run + 1, ms_since(began)));
    }
    machine.end().await?;
    let mut report = report(&ours, &bare, &ratios).context("nothing was measured")?;
    report.part("bare: a wake with page faults handled, p50", median(&by_faults), "ms");
    log.report(&mut report, &WAKE_PARTS)?;
    Ok(report)
}

/// What was measured of one side.
#[derive(Default)]
struct Samples {
    start_ms: Vec<f64>,
    wake_ms: Vec<f64>,
    own_mib: Vec<f64>,
}

impl Samples {
    fn started(&mut self, run: u32, who: &str, ms: f64) {
        say(&format!("start {}: {who} {ms:5.0} ms", run + 1));
        self.start_ms.push(ms);
    }

    fn woken(&mut self, run: u32, who: &str, ms: f64) {
        say(&format!("wake {}: {who} {ms:5.0} ms", run + 1));
        self.wake_ms.push(ms);
    }
}

/// Milliseconds until a program has ended in an instance that slept.
async fn our_wake(client: &Client, path: &InstancePath) -> anyhow::Result<f64> {
    let began = Instant::now();
    wake(client, path).await?;
    client.exec(path).await?;
    Ok(ms_since(began))
}

fn report(ours: &Samples, bare: &Samples, ratios: &[f64]) -> Option<Report> {
    let sample = "one start of an instance, from the request to the end of its first program";
    let start = Summary::of(&ours.start_ms)?;
    let mut report = Report::new("firecracker", sample, start, Summary::of(&bare.start_ms));
    let (our_wake, bare_wake) = (Summary::of(&ours.wake_ms)?, Summary::of(&bare.wake_ms)?);
    for (who, wake) in [("ours", our_wake), ("bare", bare_wake)] {
        report.part(format!("{who}: a wake to the end of the first program, p50"), wake.p50, "ms");
        report.part(format!("{who}: the same, p95"), wake.p95, "ms");
    }
    let (our_mib, bare_mib) = (median(&ours.own_mib), median(&bare.own_mib));
    report.part("ours: memory of the VMM itself", our_mib, "MiB");
    report.part("bare: memory of the VMM itself", bare_mib, "MiB");
    report.target_ratio(START_RATIO);
    report.target("wake, ours to bare", our_wake.p50 / bare_wake.p50, WAKE_RATIO, "");
    report.target("written, for each byte that the guest wrote", median(ratios), WRITTEN, "");
    report.target("memory beyond the bare one's", our_mib - bare_mib, MORE_MIB, "MiB");
    Some(report)
}
