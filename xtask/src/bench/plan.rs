//! `plan`: what to do with instances none of which has ever run, decided by the core alone.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, ensure};
use mvm_core::plan::{PlanLimits, plan};

use super::fleet::Fleet;
use super::report::Report;
use super::statistics::{Summary, median};

/// Instances that are planned for, and in which steps it is shown that the time grows with their number.
const COUNT: u32 = 10_000;
const STEP: usize = 1_000;
/// How long it may take.
const PLAN_MS: f64 = 300.0;
/// How much longer it may take for each instance of many than of few: memory is slower than a cache.
const GROWTH: f64 = 2.0;

/// Measures this many plans of each size.
pub(super) fn run(runs: u32) -> anyhow::Result<Report> {
    let mut all = Vec::new();
    for count in (STEP..=COUNT as usize).step_by(STEP) {
        all.push((count, plans(count, runs)?));
    }
    let (_, few) = all.first().context("nothing was measured")?;
    let (_, many) = all.last().context("nothing was measured")?;
    let ours = Summary::of(many).context("nothing was measured")?;
    let growth = ours.p50 / f64::from(COUNT) / (median(few) / STEP as f64);
    let sample = format!("the plan that starts {COUNT} instances");
    let mut report = Report::new("plan", sample, ours, None);
    for (count, times) in &all {
        report.part(format!("{count} instances"), median(times), "ms");
    }
    report.target("the plan at p50", ours.p50, PLAN_MS, "ms");
    let name = format!("time for each of {COUNT} instances, to that for each of {STEP}");
    report.target(name, growth, GROWTH, "");
    Ok(report)
}

/// Milliseconds of each plan.
fn plans(count: usize, runs: u32) -> anyhow::Result<Vec<f64>> {
    let Fleet { desired, observed } = Fleet::of(u32::try_from(count)?)?;
    let limits = PlanLimits { starting: count };
    let mut times = Vec::new();
    for _ in 0..runs {
        let began = Instant::now();
        let plan = black_box(plan(black_box(&desired), &observed, limits, 0));
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        ensure!(plan.actions.len() == count, "{} actions are planned", plan.actions.len());
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_of_every_size_starts_all_instances() {
        for count in [1, 50, 51, 401] {
            assert_eq!(plans(count, 1).unwrap().len(), 1, "{count}");
        }
    }
}
