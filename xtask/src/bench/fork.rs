//! `fork`: new instances that begin with their pool's base, from the request to the end of the first
//! program: one by one, with one that stands by, and 20 at once against as many bare QEMUs that are
//! restored from one file.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mvm_core::admit::Request;
use mvm_core::guest::ExecRequest;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::record::Purpose;
use mvm_wire::Call;
use mvm_wire::view::InstanceView;
use tokio::task::JoinSet;

use super::agent_log::LogMark;
use super::client::{Client, accepted, first_program};
use super::lab::Lab;
use super::microvm::ms_since;
use super::parallel::{COUNT, start_all};
use super::process::private_bytes;
use super::raw::{Peer, RawMachine};
use super::report::Report;
use super::rest::wake;
use super::say;
use super::start::destroy;
use super::statistics::{Summary, median};
use super::wake::PARTS;

/// What one start may take, in milliseconds.
const ONE_MS: f64 = 150.0;
/// The ratio that the starts at once may reach.
const RATIO: f64 = 1.2;
/// How often something that cannot be waited for is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Rounds of starts at once.
const ROUNDS: u32 = 3;

/// Measures this many single starts, and a few rounds of starts at once.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let pool = lab.pool().await?;
    let client = lab.client();
    // One that boots, which the peer is made like.
    let path = client.create(&pool, 1).await?.pop().context("no instance was created")?;
    let view = wake(client, &path).await?;
    let mut peer = Peer::of(lab, &view).await?.machine()?;
    destroy(lab, &path).await?;
    peer.boot().await?;
    peer.sleep().await?;
    accepted(client.call(&Call::WarmUp { pool: pool.clone() }).await?)?;
    // The first one reads the base's memory, and is not counted.
    let (_, path) = one(client, &pool).await?;
    destroy(lab, &path).await?;

    let log = LogMark::now(lab)?;
    let (mut ours, mut private) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        let (ms, path) = one(client, &pool).await?;
        say(&format!("start {run}: {ms:5.0} ms"));
        ours.push(ms);
        let view = client.instances(Selector::Pool(pool.clone())).await?.pop();
        let view = view.context("the instance is gone")?;
        ensure!(view.boots == 0, "{path} was booted: {:?}", view.cold_boot);
        private.push(private_bytes(view.pid.context("it has no process")?)? / f64::from(1 << 20));
        destroy(lab, &path).await?;
    }
    let ours_ms = Summary::of(&ours).context("nothing was measured")?;
    let sample = "a new instance from its pool's base, from the request to the first program's end";
    let mut report = Report::new("fork", sample, ours_ms, None);
    log.report(&mut report, &PARTS)?;

    client.submit(Request::PoolReady { path: pool.clone(), ready: 1 }).await?;
    let (mut standing_by, mut rehearsed) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        for (times, program) in
            [(&mut standing_by, unrehearsed()), (&mut rehearsed, first_program())]
        {
            until_one_stands_by(client, &pool).await?;
            let (ms, path) = one_that_runs(client, &pool, program).await?;
            times.push(ms);
            destroy(lab, &path).await?;
        }
    }
    client.submit(Request::PoolReady { path: pool.clone(), ready: 0 }).await?;
    while !client.instances(Selector::Pool(pool.clone())).await?.is_empty() {
        tokio::time::sleep(POLL).await;
    }
    let standing_by = Summary::of(&standing_by).context("nothing was measured")?;
    report.part("with one that stands by, p50", standing_by.p50, "ms");
    report.part("with one that stands by, p95", standing_by.p95, "ms");
    report.part("the same with the program that it has run before", median(&rehearsed), "ms");

    let (mut many, mut raw) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let started = start_all(lab, &pool, COUNT).await?;
        let booted = started.views.iter().filter(|view| view.boots > 0).count();
        ensure!(booted == 0, "{booted} instances were booted");
        let paths: Vec<InstancePath> = started.views.iter().map(|view| view.path.clone()).collect();
        client.destroy(Selector::Pool(pool.clone()), &paths).await?;
        let raw_ms = raw_round(&peer).await?;
        say(&format!("round {round}: ours {:.0} ms, raw {raw_ms:.0} ms", started.all_ms));
        many.push(started.all_ms);
        raw.push(raw_ms);
    }
    report.part("20 at once: ours", median(&many), "ms");
    report.part("20 at once: raw", median(&raw), "ms");
    report.part("memory of one's own, after the first program", median(&private), "MiB");
    report.target("one, p50", ours_ms.p50, ONE_MS, "ms");
    report.target("one, with one that stands by, p50", standing_by.p50, ONE_MS, "ms");
    report.target("20 at once, ours to raw", median(&many) / median(&raw), RATIO, "");
    Ok(report)
}

/// Waits until an instance stands by, ready to be taken, and the machine has nothing else to do.
async fn until_one_stands_by(client: &Client, pool: &PoolPath) -> anyhow::Result<()> {
    let is_ready =
        |view: &InstanceView| view.purpose == Purpose::Spare && view.state == State::Warm;
    while !client.instances(Selector::Pool(pool.clone())).await?.iter().any(is_ready) {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// A program that no instance has run before.
fn unrehearsed() -> ExecRequest {
    ExecRequest { argv: ["ls", "-l", "/etc"].map(str::to_owned).into(), ..ExecRequest::default() }
}

/// Creates and starts an instance, and has it run the first program.
async fn one(client: &Client, pool: &PoolPath) -> anyhow::Result<(f64, InstancePath)> {
    one_that_runs(client, pool, first_program()).await
}

/// The same with any program.
async fn one_that_runs(
    client: &Client,
    pool: &PoolPath,
    program: ExecRequest,
) -> anyhow::Result<(f64, InstancePath)> {
    let began = Instant::now();
    let request = Request::InstanceCreate {
        pool: pool.clone(),
        count: 1,
        start: true,
        disks: vec![],
        cold: false,
    };
    let created = client.submit(request).await?.instances.pop();
    let path = created.context("no instance was created")?.path;
    // It waits for the instance.
    client.run(&path, program).await?;
    Ok((ms_since(began), path))
}

/// As many bare restores at once; in milliseconds.
async fn raw_round(peer: &RawMachine) -> anyhow::Result<f64> {
    let forks: anyhow::Result<Vec<RawMachine>> = (0..COUNT).map(|_| peer.fork()).collect();
    let began = Instant::now();
    let mut wakes = JoinSet::new();
    for mut fork in forks? {
        wakes.spawn(async move { fork.wake().await.map(|_| fork) });
    }
    let mut woken = Vec::new();
    while let Some(wake) = wakes.join_next().await {
        woken.push(wake??);
    }
    let all_ms = ms_since(began);
    for fork in woken {
        fork.end().await?;
    }
    Ok(all_ms)
}
