//! What the tests of the planner share: one tenant with one pool, and instances in it.

mod closed_loop;
mod disks;
mod levels;
mod node;
mod properties;
mod removal;

use super::*;
use crate::death::{Cause, Death};
use crate::lifecycle::{Outcome, StartFrom};
use crate::name::InstanceId;
use crate::net::{NetId, Slot, TenantNetwork};
use crate::record::{DEFAULT_HOOKS_MS, Purpose, TenantRecord};
use crate::spec::{PoolSpec, Quota};
use imbl::OrdMap;

const NOW: u64 = 1_000_000;
const GRACE_MS: u64 = 7_000;
const LIMITS: PlanLimits = PlanLimits { starting: 8 };

fn pool() -> PoolPath {
    "demo/web".parse().unwrap()
}

fn path(number: u32) -> InstancePath {
    pool().instance(InstanceId::from_bits(number))
}

fn revision() -> RevisionId {
    RevisionId::from_digest([1; 8])
}

/// An instance, as asked for, of the second generation.
fn record(number: u32, desired: DesiredState) -> InstanceRecord {
    InstanceRecord {
        path: path(number),
        spec: PoolSpec::default(),
        own_disks: vec![],
        slot: Slot(u16::try_from(number).unwrap() + 3),
        desired,
        generation: 2,
        grace_ms: GRACE_MS,
        sleep_request: 0,
        hooks_ms: DEFAULT_HOOKS_MS,
        origin: None,
        revision: None,
        intent: 0,
        local_number: 0,
        purpose: Purpose::Use,
        pinned: false,
        rested: None,
        created_unix_ms: 0,
    }
}

fn desired(instances: impl IntoIterator<Item = InstanceRecord>) -> Desired {
    let (tenant, path) = (pool().tenant, pool());
    let net_id = NetId(1);
    let tenant = TenantRecord {
        name: tenant,
        quota: Quota::default(),
        network: TenantNetwork { net_id, subnet: TenantNetwork::default_subnet(net_id) },
        created_unix_ms: 0,
        existence: Existence::Kept,
    };
    let pool = PoolRecord {
        path,
        spec: PoolSpec::default(),
        running: 0,
        build_generation: 0,
        base_generation: 0,
        rolled_back_to: None,
        created_unix_ms: 0,
        existence: Existence::Kept,
    };
    Desired {
        tenants: OrdMap::unit(tenant.name.clone(), tenant),
        pools: OrdMap::unit(pool.path.clone(), pool),
        instances: instances.into_iter().map(|record| (record.path.clone(), record)).collect(),
        ..Desired::default()
    }
}

fn built() -> PoolStatus {
    PoolStatus { revision: Some(revision()), ..PoolStatus::default() }
}

/// A status of the current generation.
fn status(phase: Phase) -> InstanceStatus {
    InstanceStatus { phase, generation: 2, revision: Some(revision()), ..Default::default() }
}

/// A status of an instance that ended at [`NOW`].
fn ended(phase: Phase, failures: u32) -> InstanceStatus {
    let death = Death { cause: Cause::VmmCrash, at_unix_ms: NOW, exit: None, console_tail: vec![] };
    InstanceStatus { failures, last_death: Some(death), ..status(phase) }
}

fn observed(
    image: PoolStatus,
    instances: impl IntoIterator<Item = (u32, InstanceStatus)>,
) -> Observed {
    let instances = instances.into_iter().map(|(number, status)| (path(number), status));
    Observed {
        pools: OrdMap::unit(pool(), image),
        instances: instances.collect(),
        ..Observed::default()
    }
}

/// Plans for one instance of a pool whose image is built.
fn plan_one(record: InstanceRecord, status: InstanceStatus, now: u64) -> Plan {
    plan(&desired([record]), &observed(built(), [(1, status)]), LIMITS, now)
}

fn start_action() -> Action {
    Action::Start { instance: path(1), generation: 2, revision: revision() }
}

fn stop_action(generation: u64) -> Action {
    Action::Stop { instance: path(1), grace_ms: GRACE_MS, generation }
}

const STARTING: Phase = Phase::Starting { deadline_unix_ms: NOW + 1, begin: StartFrom::Boot };
const RUNNING: Phase = Phase::Running { since_unix_ms: NOW };

const fn stopping(outcome: Outcome) -> Phase {
    Phase::Stopping { kill_unix_ms: NOW, outcome, is_forced: false }
}

const fn releasing(outcome: Outcome) -> Phase {
    Phase::Releasing { retry_unix_ms: None, outcome }
}
