//! What a node decides by itself: to wake an instance that somebody needs, and to put one to rest that nobody
//! uses. It is written down before it is acted on, and control takes it over when it hears of it.
//!
//! A decision belongs to one request. A later request voids it, in whichever order the two arrive.

use serde::{Deserialize, Serialize};

use crate::admit::{Capacity, Denial, IsFinished, check_result};
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
/// `desired` has what the node decided before in it; `is_finished` knows what has ended for good.
///
/// # Errors
/// It may not run.
pub fn wake(
    desired: &Desired,
    capacity: Capacity,
    is_finished: IsFinished<'_>,
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
    check_result(desired, &after, capacity, is_finished)?;
    Ok(Some(intent))
}

/// Puts an instance to rest as its pool's policy wants it, unless that is no longer allowed: the
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

#[cfg(test)]
mod tests {
    use imbl::OrdMap;

    use super::*;
    use crate::admit::{NodeFacts, Request, admit, take_over};
    use crate::document::NodeDocument;
    use crate::mirror::Mirror;
    use crate::name::Selector;
    use crate::record;

    const CAPACITY: Capacity = Capacity { vcpus: 100, mem_mib: 100_000, disk_mib: 1_000_000 };

    fn ask(desired: &Desired, request: &Request) -> Desired {
        let facts = NodeFacts { capacity: CAPACITY, ..NodeFacts::default() };
        let mut id = desired.instances.len() as u32;
        let mut entropy = || {
            id += 1;
            id
        };
        admit(desired, &facts, request, &mut entropy, 1).unwrap().desired
    }

    fn document(text: &str) -> Request {
        Request::Apply { document: serde_json::from_str(text).unwrap() }
    }

    /// Two instances that sleep, of which one may run.
    fn asleep() -> (Desired, InstancePath, InstancePath) {
        let up = r#"{"tenant":"t","quota":{"running":2},"pools":{"p":{"running":2}}}"#;
        let mut desired = ask(&Desired::default(), &document(up));
        let sleep = Request::InstanceSleep { selector: Selector::All, all: true, hooks_ms: 0 };
        desired = ask(&desired, &sleep);
        let one = r#"{"tenant":"t","quota":{"running":1}}"#;
        desired = ask(&desired, &document(one));
        let mut paths = desired.instances.keys().cloned();
        let (first, second) = (paths.next().unwrap(), paths.next().unwrap());
        (desired, first, second)
    }

    fn decide(desired: &Desired, path: &InstancePath) -> Result<Option<LocalIntent>, Denial> {
        wake(desired, CAPACITY, &|_| false, path)
    }

    /// A node that was given this, and has decided that.
    fn node(given: &Desired, decided: &[(&InstancePath, &LocalIntent)]) -> Mirror {
        let mut mirror = Mirror::default();
        for (path, intent) in decided {
            let bytes = serde_json::to_vec(intent).unwrap();
            mirror.apply(&record::local_key(path), Some(&bytes));
        }
        mirror.set_document(&NodeDocument { desired: given.clone(), ..NodeDocument::default() });
        mirror
    }

    #[test]
    fn a_wake_is_decided_within_the_quota_and_once() {
        let (given, first, second) = asleep();
        let intent = decide(&given, &first).unwrap().unwrap();
        let mirror = node(&given, &[(&first, &intent)]);
        assert_eq!(mirror.desired.instances[&first].desired, DesiredState::Running);
        assert_eq!(decide(&mirror.desired, &first).unwrap(), None, "it is to run already");
        let denied = decide(&mirror.desired, &second).unwrap_err();
        assert!(matches!(denied, Denial::OverLimit(_)), "{denied:?}");
    }

    #[test]
    fn a_decision_is_void_once_somebody_asks_whoever_was_first() {
        let (given, first, _) = asleep();
        let intent = decide(&given, &first).unwrap().unwrap();
        let selector = Selector::from(&first);
        for asked in [
            Request::InstanceSleep { selector: selector.clone(), all: false, hooks_ms: 0 },
            Request::InstanceStop { selector: selector.clone(), all: false, grace_ms: 0 },
            Request::InstanceDestroy { selector: selector.clone(), all: false, force: true },
        ] {
            let later = ask(&given, &asked);
            let mirror = node(&later, &[(&first, &intent)]);
            assert_eq!(mirror.desired.instances[&first], later.instances[&first], "{asked:?}");
            assert_eq!(mirror.settled_local(), [record::local_key(&first)]);
            // Control does not take over what is void.
            let decided = OrdMap::unit(first.clone(), intent.clone());
            assert_eq!(take_over(&later, &decided), later);
        }
    }

    #[test]
    fn a_decision_that_is_taken_over_is_forgotten_and_a_later_one_is_not() {
        let (given, first, _) = asleep();
        let intent = decide(&given, &first).unwrap().unwrap();
        let decided = OrdMap::unit(first.clone(), intent.clone());
        let taken = take_over(&given, &decided);
        assert_eq!(taken.instances[&first].desired, DesiredState::Running);
        assert_eq!(taken.pools.values().next().unwrap().running, 1);
        assert_eq!(take_over(&taken, &decided), taken, "once is enough");
        let mirror = node(&taken, &[(&first, &intent)]);
        assert_eq!(mirror.settled_local(), [record::local_key(&first)]);
        // The node decides again before it hears that.
        let mut action = mirror.desired.clone();
        let pool = action.pools.get_mut(&first.pool).unwrap();
        pool.spec.sleep_policy.sleep_after_s = Some(1);
        let reason = crate::sleep_policy::RestReason::Idle { idle_s: 1, after_s: 1 };
        let rested = RestAction { instance: first.clone(), rest: Rest::Sleep, reason };
        let later = rest(&action, false, &rested, 5).unwrap();
        assert!(later.number > intent.number);
        let mirror = node(&taken, &[(&first, &later)]);
        assert_eq!(mirror.desired.instances[&first].desired, DesiredState::Sleeping);
        assert_eq!(mirror.settled_local(), [""; 0]);
    }

    #[test]
    fn of_two_things_with_one_name_only_the_one_that_is_gone_is_forgotten() {
        use crate::admit::forget;
        use crate::document::Gone;
        let up = r#"{"tenant":"t","pools":{"p":{"running":0}}}"#;
        let up = ask(&Desired::default(), &document(up));
        let removed = Request::TenantDestroy { name: "t".parse().unwrap(), force: true };
        let going = ask(&up, &removed);
        let (tenant, pool): (crate::name::TenantName, crate::name::PoolPath) =
            ("t".parse().unwrap(), "t/p".parse().unwrap());
        let made = going.tenants[&tenant].created_unix_ms;
        let gone = |tenants, pools| Gone { tenants, pools, ..Gone::default() };
        let both = gone([(tenant.clone(), made)].into(), [(pool.clone(), made)].into());
        assert_eq!(forget(&up, &both), up, "what is to stay stays");
        assert_eq!(forget(&going, &both), Desired::default());
        let tenant_alone = gone([(tenant.clone(), made)].into(), [].into());
        assert_eq!(forget(&going, &tenant_alone), going, "its pool is still there");
        let another = gone([(tenant, made + 1)].into(), [(pool, made + 1)].into());
        assert_eq!(forget(&going, &another), going);
        let mut known = both;
        known.retain_of(&Desired::default());
        assert!(known.is_empty());
    }
}
