//! `parallel`: many starts at once, until the last guest has run its first program, against as many
//! bare QEMUs at once. None may fail and no two may get the same address.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_wire::view::InstanceView;
use tokio::task::JoinSet;

use super::client::check;
use super::lab::Lab;
use super::raw::Peer;
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// How many are started at once.
pub(super) const COUNT: u32 = 20;
/// The ratio that the starts may reach.
const RATIO: f64 = 1.10;

/// Measures this many rounds of each.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let (mut ours, mut first, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        let round = start_all(lab, &pool, COUNT).await?;
        let peer = Peer::of(lab, &round.views[0]).await?;
        let paths: Vec<InstancePath> = round.views.iter().map(|view| view.path.clone()).collect();
        lab.client().destroy(Selector::Pool(pool.clone()), &paths).await?;
        ours.push(round.all_ms);
        first.push(round.first_ms);
        let raw_ms = raw_round(&peer).await?;
        say(&format!("round {run}: ours {:.0} ms, raw {raw_ms:.0} ms", round.all_ms));
        raw.push(raw_ms);
    }
    let (ours_ms, raw_ms) = (Summary::of(&ours), Summary::of(&raw));
    let ours_ms = ours_ms.context("nothing was measured")?;
    let sample = format!("{COUNT} starts at once, until the last guest's first program has ended");
    let mut report = Report::new("parallel", sample, ours_ms, raw_ms);
    report.part("ours: request admitted and first guest ready", median(&first), "ms");
    report.part("ours: per instance", ours_ms.p50 / f64::from(COUNT), "ms");
    report.part("raw: per instance", median(&raw) / f64::from(COUNT), "ms");
    report.target_ratio(RATIO);
    Ok(report)
}

/// A round of starts at once.
pub(super) struct Round {
    /// Until the first guest was ready, in milliseconds.
    first_ms: f64,
    /// Until the last guest had run its first program, in milliseconds.
    pub(super) all_ms: f64,
    /// The instances, which run.
    pub(super) views: Vec<InstanceView>,
}

/// Makes instances and starts all of them with one request.
pub(super) async fn start_all(lab: &Lab, pool: &PoolPath, count: u32) -> anyhow::Result<Round> {
    let client = lab.client();
    let paths = client.create(pool, count).await?;
    let selector = Selector::Pool(pool.clone());
    let began = Instant::now();
    let ms = || began.elapsed().as_secs_f64() * 1000.0;
    client.submit(Request::InstanceStart { selector, all: true }).await?;
    let mut watch = client.watch(paths.clone()).await?;
    let mut first_ms = None;
    let mut ready = BTreeSet::new();
    let mut execs = JoinSet::new();
    let views = loop {
        let views = watch.next().await?;
        for view in &views {
            check(view)?;
            if view.state == State::Running && ready.insert(view.path.clone()) {
                first_ms.get_or_insert_with(ms);
                let (client, path) = (client.clone(), view.path.clone());
                execs.spawn(async move { client.exec(&path).await });
            }
        }
        if ready.len() == paths.len() {
            break views;
        }
    };
    while let Some(exec) = execs.join_next().await {
        exec??;
    }
    let all_ms = ms();
    check_network(lab, &views).await?;
    Ok(Round { first_ms: first_ms.unwrap_or(all_ms), all_ms, views })
}

async fn check_network(lab: &Lab, views: &[InstanceView]) -> anyhow::Result<()> {
    let addresses: BTreeSet<_> = views.iter().filter_map(|view| view.address).collect();
    ensure!(addresses.len() == views.len(), "an address was given twice: {addresses:?}");
    let differences = lab.client().network_differences().await?;
    if !differences.is_empty() {
        bail!("the network is not as expected: {}", differences.join("; "));
    }
    Ok(())
}

/// As many bare QEMUs at once; in milliseconds.
async fn raw_round(peer: &Peer) -> anyhow::Result<f64> {
    let mut prepared = Vec::new();
    for _ in 0..COUNT {
        prepared.push(peer.machine()?);
    }
    let began = Instant::now();
    let mut boots = JoinSet::new();
    for mut machine in prepared {
        boots.spawn(async move { machine.boot().await.map(|_| machine) });
    }
    let mut booted = Vec::new();
    while let Some(boot) = boots.join_next().await {
        booted.push(boot??);
    }
    let all_ms = began.elapsed().as_secs_f64() * 1000.0;
    for machine in booted {
        machine.end().await?;
    }
    Ok(all_ms)
}
