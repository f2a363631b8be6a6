//! Requests: admitted by the pure core, written in one transaction, answered with what to wait for.

use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use mvm_core::admit::{self, Denial, Edit, NodeFacts, OwnRequest, Request};
use mvm_core::mirror::Mirror;
use mvm_core::name::{RequestId, Selector, TenantName};
use mvm_core::record::{self, Desired, RequestRecord};
use mvm_core::stored::{Stored, versioned};
use mvm_store::{ChangeError, CommitError, Op, Room, StoreError, encode};
use mvm_wire::door::{Answer, Occupied, Question, Veto};
use mvm_wire::{Accepted, ApiError, DiskTarget, ErrorCode, InstanceTarget, PoolTarget};
use serde::{Deserialize, Serialize};

use crate::suggest::{Kind, did_you_mean, did_you_mean_selector};
use crate::{Control, Prepared};

/// Attempts at a net id, in case another agent of this machine takes the same at the same moment.
const CLAIM_ATTEMPTS: u32 = 8;

/// Why a request was not admitted.
enum Refusal {
    Denied(Denial),
    BadRecord { key: String, reason: String },
    Vetoed(Veto),
    Encode(StoreError),
}

/// Who asks for what.
#[derive(Clone, Copy)]
enum Asked<'a> {
    /// A person or a program.
    Outside(&'a Request),
    /// Control itself.
    Own(&'a OwnRequest),
}

/// What a request was answered, as it is kept.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Answered {
    Accepted(Accepted),
    Refused(ApiError),
}

impl From<Answered> for Result<Accepted, ApiError> {
    fn from(answered: Answered) -> Self {
        match answered {
            Answered::Accepted(accepted) => Ok(accepted),
            Answered::Refused(error) => Err(error),
        }
    }
}

/// What a request was answered lately; nothing if that is not known, or was written by a newer agent.
pub(crate) fn answered(mirror: &Mirror, id: &RequestId) -> Option<Answered> {
    let known = mirror.requests.get(id)?;
    serde_json::from_value(known.answer.clone()).ok()
}

/// Admits a request and makes it durable.
pub(crate) async fn submit(control: &Control, request: Request) -> Result<Accepted, ApiError> {
    carry_out(control, Asked::Outside(&request), None).await
}

/// The same of a request of control's own; with an id, on the way of the request of that id, unless that was
/// answered.
pub(crate) async fn submit_own(
    control: &Control,
    request: &OwnRequest,
    id: Option<&RequestId>,
) -> Result<Accepted, ApiError> {
    carry_out(control, Asked::Own(request), id).await
}

/// The same once: a request whose id was used lately is answered with what it was answered then.
pub(crate) async fn submit_once(
    control: &Control,
    request: Request,
    id: &RequestId,
) -> Result<Accepted, ApiError> {
    carry_out(control, Asked::Outside(&request), Some(id)).await
}

async fn carry_out(
    control: &Control,
    request: Asked<'_>,
    id: Option<&RequestId>,
) -> Result<Accepted, ApiError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let occupied = occupied(control, request).await?;
        let change = |mirror| admit(control, mirror, request, id, &occupied);
        match control.change(room_of(request), change).await {
            Ok((version, admitted)) => {
                let accepted = match admitted {
                    Admitted::Before(answer) => answer?,
                    Admitted::Now(accepted, prepared) => {
                        prepared.keep();
                        accepted
                    }
                };
                return Ok(Accepted { revision: version, ..accepted });
            }
            Err(ChangeError::Refused(Refusal::Vetoed(Veto::Taken(_))))
                if attempts < CLAIM_ATTEMPTS => {}
            Err(ChangeError::Refused(refusal)) => {
                return Err(refused(&control.state.now(), refusal));
            }
            Err(ChangeError::Store(CommitError::Store(StoreError::TransactionTooLong {
                count,
                ..
            }))) => {
                return Err(too_much(&format!("{count} objects")));
            }
            Err(ChangeError::Store(CommitError::Store(StoreError::TransactionTooLarge {
                bytes,
                ..
            }))) => {
                return Err(too_much(&format!("{} MiB of records", bytes >> 20)));
            }
            Err(ChangeError::Store(error)) => return Err(ApiError::internal(&error)),
        }
    }
}

/// What others have of the machine's networks, if the request may take one.
async fn occupied(control: &Control, request: Asked<'_>) -> Result<Occupied, ApiError> {
    match request {
        Asked::Outside(
            Request::TenantCreate { .. } | Request::TenantMove { .. } | Request::Apply { .. },
        ) => {}
        _ => return Ok(Occupied::default()),
    }
    match control.link.ask(Question::Occupied).await? {
        Answer::Occupied(occupied) => Ok(occupied),
        other => Err(other.unexpected()),
    }
}

/// A request that changes more than can be recorded as one.
fn too_much(what: &str) -> ApiError {
    let message = format!("the request changes {what} at once, which is too much for one request");
    ApiError::new(ErrorCode::OverLimit, message)
        .hint("ask for it in parts: fewer instances at a time, or several documents")
}

/// What a request may use of a filesystem that is full: what ends something frees space, or keeps
/// others from it.
fn room_of(request: Asked<'_>) -> Room {
    match request {
        Asked::Outside(
            Request::InstanceStop { .. }
            | Request::InstanceDestroy { .. }
            | Request::PoolDestroy { .. }
            | Request::TenantDestroy { .. }
            | Request::DiskRemove { .. }
            | Request::Remove { .. },
        ) => Room::Reserved,
        _ => Room::Ordinary,
    }
}

/// A request that may be answered.
enum Admitted {
    /// It was carried out before.
    Before(Result<Accepted, ApiError>),
    /// It is being carried out.
    Now(Accepted, Box<dyn Prepared>),
}

async fn admit(
    control: &Control,
    mirror: Arc<Mirror>,
    request: Asked<'_>,
    id: Option<&RequestId>,
    occupied: &Occupied,
) -> Result<(Vec<Op>, Admitted), Refusal> {
    if let Some(answered) = id.and_then(|id| answered(&mirror, id)) {
        return Ok((vec![], Admitted::Before(answered.into())));
    }
    if let Some((key, reason)) = bad_record(&mirror, request) {
        return Err(Refusal::BadRecord { key: key.to_owned(), reason: reason.to_owned() });
    }
    let facts = NodeFacts {
        capacity: control.machine.capacity,
        foreign_net_ids: occupied.net_ids.clone(),
        foreign_subnets: occupied.subnets.clone(),
        observed: mirror.observed.clone(),
        unknown: mirror.untouchable(),
    };
    let now = (control.ambient.now_ms)();
    let mut entropy = || (control.ambient.entropy)();
    let edit = match request {
        Asked::Outside(request) => {
            admit::admit(&mirror.desired, &facts, request, &mut entropy, now)
        }
        Asked::Own(request) => {
            admit::admit_own(&mirror.desired, &facts, request, &mut entropy, now)
        }
    };
    let edit = edit.map_err(Refusal::Denied)?;
    let mut ops = difference(&mirror.desired, &edit.desired).map_err(Refusal::Encode)?;
    let prepared = control.link.prepare(&mirror.desired, &edit.desired).await;
    let accepted = accepted(edit);
    // One that changes nothing may be asked again and again, and one that is begun is answered later.
    let is_answer = !matches!(request, Asked::Own(OwnRequest::BeginFork { .. }));
    if let Some(id) = id.filter(|_| !ops.is_empty() && is_answer) {
        let answered = Answered::Accepted(accepted.clone());
        ops.extend(remembered(&mirror, id, &answered, now).map_err(Refusal::Encode)?);
    }
    Ok((ops, Admitted::Now(accepted, prepared.map_err(Refusal::Vetoed)?)))
}

/// Remembers the answer to a request, and forgets old ones.
pub(crate) fn remembered(
    mirror: &Mirror,
    id: &RequestId,
    answered: &Answered,
    now: u64,
) -> Result<Vec<Op>, StoreError> {
    let answer = serde_json::to_value(answered).unwrap_or_default();
    let record = RequestRecord { answer, at_unix_ms: now };
    let old = mirror.old_requests(now).into_iter().filter(|old| old != id);
    let mut ops: Vec<Op> = old.map(|old| Op::Delete { key: record::request_key(&old) }).collect();
    ops.push(encode(record::request_key(id), &versioned(&record))?);
    Ok(ops)
}

/// A record of the request's tenant that does not parse: what it holds is not known, so nothing of
/// that tenant can be admitted.
fn bad_record<'a>(mirror: &'a Mirror, request: Asked<'_>) -> Option<(&'a str, &'a str)> {
    if mirror.bad.is_empty() {
        return None;
    }
    match tenant_of(mirror, request) {
        Some(tenant) => mirror.bad_record_of(&tenant),
        None => mirror.bad.iter().next().map(|(key, reason)| (key.as_str(), reason.as_str())),
    }
}

fn tenant_of(mirror: &Mirror, request: Asked<'_>) -> Option<TenantName> {
    let request = match request {
        Asked::Outside(request) => request,
        Asked::Own(request) => return request.pool(&mirror.desired).map(|it| it.tenant.clone()),
    };
    match request {
        // A new tenant takes a network, and what the others hold must be known for that.
        Request::TenantCreate { .. } => None,
        Request::TenantUpdate { name, .. }
        | Request::TenantMove { name, .. }
        | Request::TenantDestroy { name, .. } => Some(name.clone()),
        Request::PoolCreate { path, .. }
        | Request::PoolBuild { path }
        | Request::PoolWarmUp { path }
        | Request::PoolUpdate { path, .. }
        | Request::PoolRollback { path }
        | Request::PoolScale { path, .. }
        | Request::PoolPolicy { path, .. }
        | Request::PoolReady { path, .. }
        | Request::PoolDestroy { path, .. } => Some(path.tenant.clone()),
        Request::InstanceCreate { pool, .. } => Some(pool.tenant.clone()),
        Request::InstanceStart { selector, .. }
        | Request::InstanceStop { selector, .. }
        | Request::InstanceWarm { selector, .. }
        | Request::InstanceSleep { selector, .. }
        | Request::InstancePin { selector, .. }
        | Request::InstanceRestart { selector, .. }
        | Request::InstanceDestroy { selector, .. } => match selector {
            Selector::All => None,
            Selector::Tenant(tenant) => Some(tenant.clone()),
            Selector::Pool(pool) | Selector::Id { pool: Some(pool), .. } => {
                Some(pool.tenant.clone())
            }
            Selector::Id { pool: None, .. } => {
                let first = mirror.desired.instances_meant(selector).next();
                first.map(|record| record.path.pool.tenant.clone())
            }
        },
        Request::DiskCreate { path, .. }
        | Request::DiskResize { path, .. }
        | Request::DiskRemove { path } => Some(path.tenant.clone()),
        Request::Apply { document } | Request::Remove { document } => {
            mirror.desired.tenants.contains_key(&document.tenant).then(|| document.tenant.clone())
        }
    }
}

/// The records that differ.
pub(crate) fn difference(before: &Desired, after: &Desired) -> Result<Vec<Op>, StoreError> {
    fn changes<K: Ord, V: Stored + PartialEq>(
        before: &OrdMap<K, V>,
        after: &OrdMap<K, V>,
        key: fn(&K) -> String,
        ops: &mut Vec<Op>,
    ) -> Result<(), StoreError> {
        for change in before.diff(after) {
            ops.push(match change {
                DiffItem::Add(name, record) | DiffItem::Update { new: (name, record), .. } => {
                    encode(key(name), &versioned(record))?
                }
                DiffItem::Remove(name, _) => Op::Delete { key: key(name) },
            });
        }
        Ok(())
    }
    let mut ops = Vec::new();
    changes(&before.tenants, &after.tenants, record::tenant_key, &mut ops)?;
    changes(&before.pools, &after.pools, record::pool_key, &mut ops)?;
    changes(&before.instances, &after.instances, record::instance_key, &mut ops)?;
    changes(&before.disks, &after.disks, record::disk_key, &mut ops)?;
    for change in before.forks.diff(&after.forks) {
        let (id, fork, is_there) = match change {
            DiffItem::Add(id, fork) | DiffItem::Update { new: (id, fork), .. } => (id, fork, true),
            DiffItem::Remove(id, fork) => (id, fork, false),
        };
        let key = record::fork_key(&fork.source.pool.tenant, id);
        ops.push(if is_there { encode(key, &versioned(fork))? } else { Op::Delete { key } });
    }
    Ok(ops)
}

/// The answer, but for the version.
fn accepted(edit: Edit) -> Accepted {
    let instances = edit.instances.iter().filter_map(|path| edit.desired.instances.get(path));
    let disks = edit.disks.iter().filter_map(|path| edit.desired.disks.get(path));
    let pools = edit.pools.iter().filter_map(|path| edit.desired.pools.get(path));
    Accepted {
        revision: 0,
        instances: instances
            .map(|record| InstanceTarget {
                path: record.path.clone(),
                generation: record.generation,
            })
            .collect(),
        pools: pools
            .map(|record| PoolTarget {
                path: record.path.clone(),
                build_generation: record.build_generation,
                base_generation: record.base_generation,
            })
            .collect(),
        disks: disks
            .map(|record| DiskTarget { path: record.path.clone(), size_mib: record.size_mib })
            .collect(),
        notes: edit.notes,
    }
}

fn refused(mirror: &Mirror, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Denied(denial) => denied(mirror, &denial),
        Refusal::BadRecord { key, reason } => ApiError::bad_record(&key, &reason),
        Refusal::Vetoed(Veto::Refused(error)) => error,
        Refusal::Vetoed(Veto::Taken(error)) => ApiError::new(ErrorCode::Internal, error),
        Refusal::Encode(error) => ApiError::internal(&error),
    }
}

/// The name that was meant by one that does not exist, as a hint.
fn meant(mirror: &Mirror, denial: &Denial) -> Option<String> {
    match denial {
        Denial::NoSuchTenant { name } => did_you_mean(mirror, Kind::Tenant, name.as_str()),
        Denial::NoSuchPool { path } => did_you_mean(mirror, Kind::Pool, &path.to_string()),
        Denial::NoSuchDisk { path } => did_you_mean(mirror, Kind::Disk, &path.to_string()),
        Denial::NoSuchName { name } => {
            did_you_mean_selector(mirror, &Selector::Tenant(name.clone()))
        }
        Denial::NoSuchInstance { selector } => {
            did_you_mean_selector(mirror, &selector.parse().ok()?)
        }
        _ => None,
    }
}

/// A denial, as people see it.
pub(crate) fn denied(mirror: &Mirror, denial: &Denial) -> ApiError {
    let code = match denial {
        Denial::NoSuchTenant { .. }
        | Denial::NoSuchPool { .. }
        | Denial::NoSuchDisk { .. }
        | Denial::NoSuchName { .. }
        | Denial::NoInstances { .. }
        | Denial::NoSuchInstance { .. } => ErrorCode::NotFound,
        Denial::Exists { .. }
        | Denial::BeingRemoved { .. }
        | Denial::StillRunning { .. }
        | Denial::StillHasPools { .. }
        | Denial::StillHasDisks { .. }
        | Denial::DiskAttached { .. }
        | Denial::DiskHeld { .. }
        | Denial::DiskConflict(_)
        | Denial::ForkWrites { .. }
        | Denial::SubnetOverlaps { .. }
        | Denial::NoEarlierRevision { .. }
        | Denial::NoBase { .. }
        | Denial::PortTaken { .. }
        | Denial::NotAlive { .. }
        | Denial::SubnetInUse { .. }
        | Denial::SubnetFixed { .. } => ErrorCode::Conflict,
        Denial::OverLimit(_) | Denial::NoNetwork => ErrorCode::OverLimit,
        Denial::Ambiguous { .. }
        | Denial::Spec { .. }
        | Denial::Mounts { .. }
        | Denial::DiskShrinks { .. }
        | Denial::Subnet(_)
        | Denial::SubnetTooSmall { .. }
        | Denial::Number { .. }
        | Denial::NoSuchLimit { .. } => ErrorCode::Invalid,
    };
    let hint = meant(mirror, denial).or_else(|| denial.hint());
    ApiError { code, message: denial.to_string(), hint }
}
