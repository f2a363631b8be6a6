//! `create-many`: requests for one instance each from many clients at once, each durable when it is answered;
//! and the list of many instances.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use futures_util::future::try_join_all;
use mvm_core::admit::Request;
use mvm_core::name::PoolPath;
use mvm_core::record::DesiredState;
use mvm_core::spec::{PoolSpec, Quota};

use super::fleet::{Agent, Fleet, Machine};
use super::report::Report;
use super::say;
use super::statistics::{Summary, median};

/// Requests of one run, and the clients that they come from.
const REQUESTS: usize = 1_000;
const CLIENTS: usize = 50;
/// Instances of the node that is not empty.
const PRESENT: u32 = 10_000;
/// How many requests are answered in a second.
const RATE: f64 = 2_000.0;

/// What the runs on one kind of node gave.
#[derive(Default)]
struct Measured {
    /// Milliseconds of each request.
    request_ms: Vec<f64>,
    /// Requests in a second, of each run.
    rate: Vec<f64>,
    /// Transactions of each run.
    commits: Vec<f64>,
    /// Milliseconds to make a small new file durable, the least that a commit costs here.
    sync_ms: Vec<f64>,
    /// Milliseconds of a list of all instances.
    list_ms: Vec<f64>,
}

/// Measures this many runs on a node that is empty, and on one that is not.
pub(super) async fn run(runs: u32) -> anyhow::Result<Report> {
    let (mut empty, mut full) = (Measured::default(), Measured::default());
    for run in 0..runs {
        for (count, measured) in [(0, &mut empty), (PRESENT, &mut full)] {
            let fleet = Fleet::of(count)?.settled(|_| DesiredState::Stopped);
            measure(&fleet, measured).await?;
            let rate = measured.rate.last().copied().unwrap_or_default();
            say(&format!("run {}: {rate:5.0}/s beside {count} instances", run + 1));
        }
    }
    let ours = Summary::of(&empty.request_ms).context("nothing was measured")?;
    let sample = format!("a request for one instance, {CLIENTS} clients at once");
    let mut report = Report::new("create-many", sample, ours, None);
    let commits = median(&empty.commits);
    report.part(format!("commits for {REQUESTS} requests"), commits, "");
    report.part("requests in a commit", REQUESTS as f64 / commits.max(1.0), "");
    report.part("a new file of 4 KiB made durable, for comparison", median(&empty.sync_ms), "ms");
    report.part(format!("beside {PRESENT} instances: a request"), median(&full.request_ms), "ms");
    report.part(format!("beside {PRESENT} instances: requests"), median(&full.rate), "/s");
    let listed = PRESENT as usize + REQUESTS;
    report.part(format!("the list of {listed} instances"), median(&full.list_ms), "ms");
    report.target_at_least("requests", median(&empty.rate), RATE, "/s");
    Ok(report)
}

async fn measure(fleet: &Fleet, measured: &mut Measured) -> anyhow::Result<()> {
    let machine = Machine::with(fleet).await?;
    let agent = machine.agent().await?;
    let pool = pool(&agent).await?;
    let before = machine.store.version().await?.get();
    let began = Instant::now();
    let clients = (0..CLIENTS).map(|_| client(&agent, &pool));
    let times = try_join_all(clients).await?;
    let took = began.elapsed().as_secs_f64();
    measured.commits.push((machine.store.version().await?.get() - before) as f64);
    measured.request_ms.extend(times.into_iter().flatten());
    measured.rate.push(REQUESTS as f64 / took);
    measured.sync_ms.push(sync_ms(machine.dir())?);
    let began = Instant::now();
    let listed = agent.instances().await?.len();
    measured.list_ms.push(began.elapsed().as_secs_f64() * 1000.0);
    ensure!(listed == fleet.desired.instances.len() + REQUESTS, "{listed} instances are listed");
    agent.node.end().await;
    Ok(())
}

/// Makes a tenant with room for all, and a pool.
async fn pool(agent: &Agent) -> anyhow::Result<PoolPath> {
    let path: PoolPath = "bench/web".parse()?;
    let (name, subnet) = (path.tenant.clone(), Some("10.128.0.0/20".parse()?));
    agent.submit(Request::TenantCreate { name, quota: Quota::default(), subnet }).await?;
    let spec = PoolSpec::default().into();
    agent.submit(Request::PoolCreate { path: path.clone(), spec }).await?;
    Ok(path)
}

/// One client's requests, one after the other: milliseconds of each.
async fn client(agent: &Agent, pool: &PoolPath) -> anyhow::Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..REQUESTS / CLIENTS {
        let request = Request::InstanceCreate {
            pool: pool.clone(),
            count: 1,
            start: false,
            disks: vec![],
            cold: false,
        };
        let began = Instant::now();
        agent.submit(request).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}

fn sync_ms(dir: &Path) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut file = File::create(dir.join("sync"))?;
    file.write_all(&[1; 4096])?;
    file.sync_all()?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}
