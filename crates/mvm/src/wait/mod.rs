//! Waits until what was asked for is there: follows the agent's watch and judges each snapshot.
//!
//! The judgement is [`progress::progress`], a pure function of levels. Waiting changes nothing: who
//! stops waiting leaves the request to go on.

pub(crate) mod progress;

use std::future::Future;
use std::time::{SystemTime, UNIX_EPOCH};

use mvm_core::name::{PoolPath, TenantName};
use mvm_wire::{Accepted, Call, ConnectionError, Reply};
use tokio::time::{Instant, MissedTickBehavior};

use crate::client::{Client, unexpected};
use crate::error::{Error, Result};
use crate::units::Seconds;
pub(crate) use progress::{Failure, Goal, Progress, Request, Snapshot, progress};

/// What is done within this time needs no words about what was waited for.
const WORDLESS: std::time::Duration = std::time::Duration::from_millis(500);
/// How often the line about what is waited for is brought up to date without news.
const REFRESH: std::time::Duration = std::time::Duration::from_secs(1);
/// How many of these pass until the node is asked for problems of its own, such as a full disk.
const REFRESHES_PER_LOOK: u32 = 3;

/// The host's clock in milliseconds since the Unix epoch: the agent's, as it runs on this machine.
pub(crate) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The objects to watch for a request: its targets, and the pools that its instances need.
pub(crate) fn watch_call(accepted: &Accepted, tenant: Option<TenantName>) -> Call {
    let mut pools: Vec<PoolPath> = accepted.pools.iter().map(|pool| pool.path.clone()).collect();
    pools.extend(accepted.instances.iter().map(|instance| instance.path.pool.clone()));
    pools.sort_unstable();
    pools.dedup();
    let instances = accepted.instances.iter().map(|instance| instance.path.clone()).collect();
    let disks = accepted.disks.iter().map(|disk| disk.path.clone()).collect();
    Call::Watch { instances, pools, tenant, disks }
}

/// Waits until the goal is reached and returns what is there then. `tell` is called with a line
/// about what is waited for.
///
/// # Errors
/// Something failed, `timeout` passed, `interrupt` ended first, or the agent went away.
pub(crate) async fn wait(
    client: &Client,
    request: &Request<'_>,
    timeout: Seconds,
    interrupt: impl Future<Output = ()>,
    mut tell: impl FnMut(&str),
) -> Result<Snapshot> {
    let began = Instant::now();
    let deadline = began + timeout.as_duration();
    let call = watch_call(request.accepted, request.goal.tenant().cloned());
    let mut connection = client.start(&call).await?;
    let mut refresh = tokio::time::interval(REFRESH);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(interrupt);
    let mut latest: Option<Snapshot> = None;
    let mut waiting = vec!["the agent's first report".to_owned()];
    let (mut refreshes, mut problems) = (0, Vec::new());
    loop {
        tokio::select! {
            reply = connection.read.message::<Reply>() => match reply.map_err(agent_lost)? {
                Reply::Snapshot { instances, pools, tenant_exists, disks } => {
                    let snapshot = Snapshot::new(instances, pools, tenant_exists);
                    latest = Some(snapshot.with_disks(disks));
                }
                Reply::Error(error) => return Err(error.into()),
                Reply::Done => return Err(agent_lost(ConnectionError::HungUp)),
                other => return Err(unexpected(&other)),
            },
            _ = refresh.tick() => {
                refreshes += 1;
                if refreshes % REFRESHES_PER_LOOK == 0 {
                    problems = tell_problems(client, problems, &mut tell).await;
                }
            }
            () = tokio::time::sleep_until(deadline) => {
                waiting.extend(problems);
                return Err(Error::WaitTimeout { after: timeout, waiting });
            }
            () = &mut interrupt => return Err(Error::StoppedWaiting),
        }
        let Some(snapshot) = &latest else { continue };
        match progress(request, snapshot, now_unix_ms()) {
            Progress::Done => return Ok(latest.unwrap_or_default()),
            Progress::Failed(failure) => return Err(Error::Failed(failure)),
            Progress::Waiting { line, items } => {
                if began.elapsed() >= WORDLESS {
                    tell(&line);
                }
                waiting = items;
            }
        }
    }
}

/// What was accepted is durable, whatever becomes of the agent.
fn agent_lost(error: ConnectionError) -> Error {
    match error {
        ConnectionError::HungUp | ConnectionError::Io(_) => Error::WaitLost(error),
        other => other.into(),
    }
}

/// Tells the node's problems that were not told before, and returns all there are.
async fn tell_problems(
    client: &Client,
    told: Vec<String>,
    tell: &mut impl FnMut(&str),
) -> Vec<String> {
    // Who cannot be asked now is asked again.
    let Ok(node) = client.node().await else { return told };
    let lines = node.problems.iter().map(|problem| format!("the node has a problem: {problem}"));
    let lines: Vec<String> = lines.collect();
    for line in lines.iter().filter(|line| !told.contains(line)) {
        tell(line);
    }
    lines
}
