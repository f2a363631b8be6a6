//! Carries out the sleep policies of pools: asks guests what they do, and puts to rest what
//! [`mvm_core::sleep_policy`] decides on.
//!
//! Only instances of pools with a policy are measured; without any, nothing is done at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_core::lifecycle::Phase;
use mvm_core::local;
use mvm_core::name::InstancePath;
use mvm_core::record::{self, Existence, PoolRecord};
use mvm_core::sleep_policy::{Activity, Rest, RestAction, Sample, decide};
use mvm_core::stored::versioned;
use mvm_store::{ChangeError, StoreError, encode};
use tokio::task::JoinSet;

use crate::node::{Node, chain};
use crate::sessions::GUEST_TIMEOUT;
use mvm_core::mirror::Mirror;

/// What instances of pools with a policy do.
#[derive(Default)]
pub(crate) struct Activities(Mutex<BTreeMap<InstancePath, Measured>>);

/// What one instance does, in the run that began then.
#[derive(Clone, Copy)]
struct Measured {
    since_unix_ms: u64,
    activity: Activity,
}

impl Activities {
    /// What an instance does, as of the last measurement.
    pub(crate) fn of(&self, path: &InstancePath) -> Option<Activity> {
        self.lock().get(path).map(|measured| measured.activity)
    }

    /// Forgets everything: no pool has a policy.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn all(&self) -> BTreeMap<InstancePath, Activity> {
        let measured = self.lock();
        measured.iter().map(|(path, measured)| (path.clone(), measured.activity)).collect()
    }

    /// Takes over a measurement, or the moment at which one came to nothing.
    fn note(&self, path: InstancePath, since_unix_ms: u64, sample: Result<Sample, u64>) {
        let mut all = self.lock();
        let before = all.get(&path).filter(|before| before.since_unix_ms == since_unix_ms);
        let activity = match (before, sample) {
            (Some(before), Ok(sample)) => before.activity.observe(sample),
            (None, Ok(sample)) => Activity::first(sample),
            (_, Err(at_unix_ms)) => Activity::unknown(at_unix_ms),
        };
        all.insert(path, Measured { since_unix_ms, activity });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InstancePath, Measured>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_active(pool: &PoolRecord) -> bool {
    pool.existence == Existence::Kept && pool.spec.sleep_policy.is_active()
}

/// How often something is to be measured, if anything is.
pub(crate) fn interval(mirror: &Mirror) -> Option<Duration> {
    let pools = mirror.desired.pools.values().filter(|pool| is_active(pool));
    pools.map(|pool| Duration::from_millis(pool.spec.sleep_policy.sample_ms())).min()
}

/// Asks the guests of pools with a policy what they do, and puts to rest what the policies say.
pub(crate) async fn round(node: &Arc<Node>, mirror: &Mirror) {
    let governed =
        |path: &InstancePath| mirror.desired.pools.get(&path.pool).is_some_and(is_active);
    let mut running = BTreeMap::new();
    let mut warm = BTreeSet::new();
    for path in mirror.desired.instances.keys().filter(|path| governed(path)) {
        match mirror.observed.instances.get(path).map(|status| &status.phase) {
            Some(Phase::Running { since_unix_ms }) => {
                running.insert(path.clone(), *since_unix_ms);
            }
            // It does nothing; since when is known from before.
            Some(Phase::Warm { .. }) => {
                warm.insert(path);
            }
            _ => {}
        }
    }
    let is_kept = |path: &InstancePath| running.contains_key(path) || warm.contains(&path);
    node.activities.lock().retain(|path, _| is_kept(path));
    let mut measurements = JoinSet::new();
    for (path, since_unix_ms) in running {
        let node = node.clone();
        measurements.spawn(async move {
            let sample = measure(&node, &path).await.ok_or(node.clock.now_ms());
            node.activities.note(path, since_unix_ms, sample);
        });
    }
    measurements.join_all().await;
    let mirror = node.state.now();
    let now = node.clock.now_ms();
    let memory = node.host.memory.read();
    let activities = node.activities.all();
    for action in decide(&mirror.desired, &mirror.observed, &activities, memory, now) {
        let path = action.instance.clone();
        let to = match action.rest {
            Rest::Warm => "warm",
            Rest::Sleep => "asleep",
        };
        tracing::info!(instance = %path, to, why = %action.reason, "put to rest by its pool's policy");
        let what = format!("the sleep policy of {path}");
        let problem = rest(node, &action).await.err();
        node.set_problem(&what, problem.map(|error| chain(&error)));
    }
}

/// Decides, durably, that an instance is to rest, unless it may not be touched any more.
async fn rest(node: &Node, action: &RestAction) -> Result<(), ChangeError<StoreError>> {
    let path = &action.instance;
    let now = node.clock.now_ms();
    let decide = async |mirror: Arc<Mirror>| {
        let has_ended = mirror.status(path).has_ended();
        let Some(intent) = local::rest(&mirror.desired, has_ended, action, now) else {
            return Ok((vec![], ()));
        };
        Ok((vec![encode(record::local_key(path), &versioned(&intent))?], ()))
    };
    node.state.change(decide).await?;
    node.poke();
    Ok(())
}

/// What a guest has done so far, if it tells.
async fn measure(node: &Node, path: &InstancePath) -> Option<Sample> {
    let session = node.instance(path)?.session.borrow().clone()?;
    let health = session.health(GUEST_TIMEOUT).await.ok()?;
    Sample::of(&health, node.clock.now_ms())
}
