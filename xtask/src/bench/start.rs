//! `start`: from the request to start an instance to the end of its first program, against the
//! same microVM on a bare QEMU. Both take turns, so that noise hits both.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath};
use mvm_wire::view::InstanceView;

use super::client::{check, only};
use super::lab::Lab;
use super::process::cpu_ms;
use super::raw::{Milestones, Peer};
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// The ratio that a start may reach.
const RATIO: f64 = 1.10;

/// When a start had got where, since its request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    accepted: Duration,
    /// Layer, tap and rules are there, and QEMU is about to be started.
    prepared: Duration,
    /// QEMU has answered, and its process is on record.
    launched: Duration,
    /// The guest has said hello and has its identity.
    ready: Duration,
    pub(super) exec: Duration,
    /// Not a moment, but the CPU time that QEMU had used by then.
    cpu: Duration,
}

/// Measures this many starts of each.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    // The first pair fills the page cache and is not counted.
    let (_, view) = one_start(lab, &pool).await?;
    let peer = Peer::of(lab, &view).await?;
    destroy(lab, &view.path).await?;
    raw_start(&peer).await?;

    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            if is_ours {
                let (steps, view) = one_start(lab, &pool).await?;
                destroy(lab, &view.path).await?;
                progress(run, "ours", steps.exec, steps.cpu);
                ours.push(steps);
            } else {
                let milestones = raw_start(&peer).await?;
                progress(run, "raw", milestones.exec, milestones.cpu);
                raw.push(milestones);
            }
        }
    }
    report(&ours, &raw).context("nothing was measured")
}

fn progress(run: u32, who: &str, whole: Duration, cpu: Duration) {
    let (whole, cpu) = (whole.as_millis(), cpu.as_millis());
    say(&format!("pair {}: {who:4} {whole:5} ms, of which QEMU computed {cpu:5} ms", run + 1));
}

pub(super) async fn destroy(lab: &Lab, path: &InstancePath) -> anyhow::Result<()> {
    lab.client().destroy(only(path), std::slice::from_ref(path)).await
}

/// The first start of a new instance, which makes its writable layer too.
pub(super) async fn one_start(lab: &Lab, pool: &PoolPath) -> anyhow::Result<(Steps, InstanceView)> {
    let client = lab.client();
    let path = client.create(pool, 1).await?.pop().context("no instance was created")?;
    let (began, began_wall) = (Instant::now(), SystemTime::now());
    client.submit(Request::InstanceStart { selector: only(&path), all: false }).await?;
    let accepted = began.elapsed();
    let mut watch = client.watch(vec![path.clone()]).await?;
    let mut launched = None;
    let view = loop {
        let view = watch.next().await?.pop().context("the instance is gone")?;
        check(&view)?;
        if view.pid.is_some() {
            launched.get_or_insert_with(|| began.elapsed());
        }
        if view.state == State::Running {
            break view;
        }
    };
    let ready = began.elapsed();
    client.exec(&path).await?;
    let exec = began.elapsed();
    let pid = view.pid.context("the instance has no process")?;
    let cpu = Duration::from_secs_f64(cpu_ms(pid)? / 1000.0);
    let dir = lab.instance_dir(&path);
    let prepared = born(&dir.console_log(), began_wall)?;
    let launched = launched.unwrap_or(ready);
    Ok((Steps { accepted, prepared, launched, ready, exec, cpu }, view))
}

/// When a file was made.
fn born(path: &Path, since: SystemTime) -> anyhow::Result<Duration> {
    let created = fs::metadata(path).and_then(|metadata| metadata.created());
    let created =
        created.with_context(|| format!("cannot tell when {} was made", path.display()))?;
    // The filesystem's clock is a few milliseconds coarse.
    Ok(created.duration_since(since).unwrap_or_default())
}

async fn raw_start(peer: &Peer) -> anyhow::Result<Milestones> {
    let mut machine = peer.machine()?;
    let milestones = machine.boot().await?;
    machine.end().await?;
    Ok(milestones)
}

fn report(ours: &[Steps], raw: &[Milestones]) -> Option<Report> {
    let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
    let totals: Vec<f64> = ours.iter().map(|steps| ms(steps.exec)).collect();
    let raw_totals: Vec<f64> = raw.iter().map(|milestones| ms(milestones.exec)).collect();
    let sample = "one start of an instance, from the request to the end of its first program";
    let (ours_ms, raw_ms) = (Summary::of(&totals)?, Summary::of(&raw_totals)?);
    let mut report = Report::new("start", sample, ours_ms, Some(raw_ms));
    type Step<T> = (&'static str, fn(&T) -> (Duration, Duration));
    let our_parts: [Step<Steps>; 5] = [
        ("ours: request admitted and stored", |s| (Duration::ZERO, s.accepted)),
        ("ours: planned, layer, tap and rules made", |s| (s.accepted, s.prepared)),
        ("ours: QEMU started, answers on QMP, on record", |s| (s.prepared, s.launched)),
        ("ours: kernel and guest agent to hello, configured", |s| (s.launched, s.ready)),
        ("ours: first program", |s| (s.ready, s.exec)),
    ];
    for (name, part) in our_parts {
        report.part(name, median_between(ours, part), "ms");
    }
    let raw_parts: [Step<Milestones>; 4] = [
        ("raw: QEMU started, its sockets are there", |m| (Duration::ZERO, m.process)),
        ("raw: kernel and guest agent to hello", |m| (m.process, m.hello)),
        ("raw: configured", |m| (m.hello, m.configured)),
        ("raw: first program", |m| (m.configured, m.exec)),
    ];
    for (name, part) in raw_parts {
        report.part(name, median_between(raw, part), "ms");
    }
    // What a busy machine does not change.
    let our_cpu = median_between(ours, |steps| (Duration::ZERO, steps.cpu));
    let raw_cpu = median_between(raw, |milestones| (Duration::ZERO, milestones.cpu));
    report.part("ours: CPU time of QEMU", our_cpu, "ms");
    report.part("raw: CPU time of QEMU", raw_cpu, "ms");
    report.target_ratio(RATIO);
    Some(report)
}

fn median_between<T>(samples: &[T], part: fn(&T) -> (Duration, Duration)) -> f64 {
    let between = |sample: &T| {
        let (from, to) = part(sample);
        to.saturating_sub(from).as_secs_f64() * 1000.0
    };
    median(&samples.iter().map(between).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_start_add_up_to_it() {
        let at = Duration::from_millis;
        let steps = Steps {
            accepted: at(5),
            prepared: at(30),
            launched: at(90),
            ready: at(1900),
            exec: at(1950),
            cpu: at(1000),
        };
        let raw = Milestones {
            process: at(50),
            hello: at(1700),
            configured: at(1750),
            exec: at(1800),
            cpu: at(900),
        };
        let report = report(&[steps], &[raw]).unwrap();
        let sum = |prefix| {
            let parts = report.parts.iter();
            let parts =
                parts.filter(|part| part.name.starts_with(prefix) && !part.name.contains("CPU"));
            parts.map(|part| part.value).sum::<f64>()
        };
        assert_eq!(sum("ours").round(), 1950.0);
        assert_eq!(sum("raw").round(), 1800.0);
        assert!(report.missed().is_empty());
    }
}
