//! Waits until what was asked for is there: follows the agent's watch and judges each snapshot.
//!
//! The judgement is [`progress::progress`], a pure function of levels. Waiting changes nothing: who
//! stops waiting leaves the request to go on.

pub(crate) mod progress;

use std::future::Future;
use std::time::{SystemTime, UNIX_EPOCH};

use mvm_core::name::{PoolPath, TenantName};
use mvm_wire::{Accepted, Call, Connection, ConnectionError, Reply};
use tokio::time::{Instant, MissedTickBehavior};

use crate::client::{Client, is_lost, unexpected};
use crate::error::{Error, Result};
use crate::units::Seconds;
pub(crate) use progress::{Failure, Goal, Progress, Request, Snapshot, progress};

/// What is done within this time needs no words about what was waited for.
const WORDLESS: std::time::Duration = std::time::Duration::from_millis(500);
/// How long an agent that went away has to be replaced.
const AGENT_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
/// How many may go away within that time of each other.
const MOST_LOSSES: u32 = 5;
/// Pause after one went away.
const AFTER_A_LOSS: std::time::Duration = std::time::Duration::from_millis(50);
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
    Call::Watch { instances, pools, tenant, disks, changes: true }
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
    let mut losses = Losses::none();
    let mut latest: Option<Snapshot> = None;
    let mut waiting = vec!["the agent's first report".to_owned()];
    let (mut refreshes, mut problems) = (0, Vec::new());
    loop {
        tokio::select! {
            reply = connection.read.message::<Reply>() => match reply {
                Err(error) if is_lost(&error) && losses.is_another(MOST_LOSSES) => {
                    tell("the agent went away: waiting for the next one");
                    connection = tokio::select! {
                        next = next_agent(client, &call, error) => next?,
                        () = tokio::time::sleep_until(deadline) => {
                            return Err(Error::WaitTimeout { after: timeout, waiting });
                        }
                        () = &mut interrupt => return Err(Error::StoppedWaiting),
                    };
                    continue;
                }
                Err(error) if is_lost(&error) => return Err(Error::WaitLost(error)),
                Err(error) => return Err(error.into()),
                Ok(reply) => match reply {
                Reply::Snapshot { instances, pools, tenant_exists, disks } => {
                    let snapshot = Snapshot::new(instances, pools, tenant_exists);
                    latest = Some(snapshot.with_disks(disks));
                }
                Reply::Changed { instances, gone, pools, tenant_exists, disks } => {
                    let snapshot = Snapshot::new(instances, pools, tenant_exists);
                    latest.get_or_insert_default().change(snapshot.with_disks(disks), &gone);
                }
                Reply::Error(error) => return Err(error.into()),
                Reply::Done => return Err(Error::WaitLost(ConnectionError::HungUp)),
                other => return Err(unexpected(&other)),
                },
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

/// The watch of the next agent: what was accepted is durable, whatever becomes of the one that accepted it.
async fn next_agent(client: &Client, call: &Call, lost: ConnectionError) -> Result<Connection> {
    // One that keeps going away is not asked at once again.
    tokio::time::sleep(AFTER_A_LOSS).await;
    match tokio::time::timeout(AGENT_LIMIT, client.start_again(call)).await {
        Ok(connection) => connection,
        Err(_) => Err(Error::WaitLost(lost)),
    }
}

/// How often agents went away, shortly one after the other.
struct Losses {
    count: u32,
    last: Instant,
}

impl Losses {
    fn none() -> Self {
        Self { count: 0, last: Instant::now() }
    }

    /// Counts another one: whether there were at most so many.
    fn is_another(&mut self, most: u32) -> bool {
        if self.last.elapsed() > AGENT_LIMIT {
            self.count = 0;
        }
        self.count += 1;
        self.last = Instant::now();
        self.count <= most
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
