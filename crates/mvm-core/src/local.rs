//! What a node decides by itself: to wake an instance that somebody needs, and to put one to rest that nobody
//! uses. It is written down before it is acted on, and control takes it over when it hears of it.
//!
//! A decision is about one wish: when somebody asks for something else, it is void, whoever was first.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::admit::{Capacity, Denial, check_result};
use crate::name::InstancePath;
use crate::record::{DEFAULT_HOOKS_MS, Desired, DesiredState, InstanceRecord, Purpose};
use crate::sleep_policy::{Rest, RestAction, Rested};

/// A node's own decision about one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalIntent {
    /// Which of the node's decisions about the instance it is.
    pub number: u64,
    /// The request that it goes beyond: [`InstanceRecord::intent`].
    pub intent: u64,
    /// What the instance is to do.
    pub desired: DesiredState,
    /// As in [`InstanceRecord::sleep_request`].
    pub sleep_request: u64,
    /// As in [`InstanceRecord::hooks_ms`].
    pub hooks_ms: u64,
    /// What its pool's sleep policy did to it, if that is what it is.
    pub rested: Option<Rested>,
}

impl LocalIntent {
    /// Whether it goes beyond what control knows.
    pub fn holds(&self, record: &InstanceRecord) -> bool {
        self.intent == record.intent && self.number > record.local_number
    }

    /// What the instance is to be, with the decision if that holds.
    #[must_use]
    pub fn over(&self, record: &InstanceRecord) -> InstanceRecord {
        let mut record = record.clone();
        if !self.holds(&record) || record.desired == DesiredState::Destroyed {
            return record;
        }
        record.desired = self.desired;
        record.sleep_request = self.sleep_request;
        record.hooks_ms = self.hooks_ms;
        record.rested = self.rested;
        record.local_number = self.number;
        // What somebody needs stands by no longer.
        if record.purpose == Purpose::Spare && self.desired == DesiredState::Running {
            record.purpose = Purpose::Use;
        }
        record
    }

    fn beyond(record: &InstanceRecord, desired: DesiredState) -> Self {
        Self {
            number: record.local_number + 1,
            intent: record.intent,
            desired,
            sleep_request: record.sleep_request,
            hooks_ms: record.hooks_ms,
            rested: None,
        }
    }
}

/// Wakes an instance that rests, if the quota of its tenant, the node and what has its disks allow it;
/// nothing if it is to run anyway, or not to be alive.
///
/// `desired` has what the node decided before in it; `finished` are instances that have ended for good.
///
/// # Errors
/// It may not run.
pub fn wake(
    desired: &Desired,
    capacity: Capacity,
    finished: &BTreeSet<InstancePath>,
    path: &InstancePath,
) -> Result<Option<LocalIntent>, Denial> {
    let resting = desired
        .instances
        .get(path)
        .filter(|record| matches!(record.desired, DesiredState::Warm | DesiredState::Sleeping));
    let Some(record) = resting else { return Ok(None) };
    let intent = LocalIntent::beyond(record, DesiredState::Running);
    let mut after = desired.clone();
    after.instances.insert(path.clone(), intent.over(record));
    check_result(desired, &after, capacity, finished)?;
    Ok(Some(intent))
}

/// Puts an instance to rest as its pool's policy wants it, unless it may not be touched any more: the
/// node may have heard of something else meanwhile.
pub fn rest(
    desired: &Desired,
    has_ended: bool,
    action: &RestAction,
    now: u64,
) -> Option<LocalIntent> {
    let RestAction { instance: path, rest, reason } = action;
    let to = match rest {
        Rest::Warm => DesiredState::Warm,
        Rest::Sleep => DesiredState::Sleeping,
    };
    let pool = desired.pools.get(&path.pool)?;
    let record = desired.instances.get(path)?;
    let may_rest = pool.spec.sleep_policy.is_active()
        && record.desired.is_up()
        && record.desired != to
        && !record.pinned
        && !has_ended;
    may_rest.then(|| {
        let intent = LocalIntent {
            rested: Some(Rested { rest: *rest, reason: *reason, at_unix_ms: now }),
            ..LocalIntent::beyond(record, to)
        };
        match rest {
            Rest::Warm => intent,
            Rest::Sleep => LocalIntent {
                sleep_request: record.sleep_request + 1,
                hooks_ms: DEFAULT_HOOKS_MS,
                ..intent
            },
        }
    })
}
