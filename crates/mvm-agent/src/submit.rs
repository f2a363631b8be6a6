//! Requests: admitted by the pure core, written in one transaction, answered with what to wait for.

use mvm_core::admit::{self, Denial, Edit, NodeFacts, Request};
use mvm_core::lifecycle::Phase;
use mvm_core::name::{Selector, TenantName};
use mvm_core::record::{self, Desired};
use mvm_host::listen::ListenError;
use mvm_host::net::{NetworkError, Occupied};
use mvm_store::{CommitError, Op, StoreError, encode};
use mvm_wire::{Accepted, ApiError, DiskTarget, ErrorCode, InstanceTarget, PoolTarget};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::node::{Node, chain};
use crate::publish::{self, Reservation, Unavailable};
use crate::spares;
use crate::state::{ChangeError, Mirror, Room};
use crate::suggest::{Kind, did_you_mean, did_you_mean_selector};

/// Attempts at a net id, in case another agent of this machine takes the same at the same moment.
const CLAIM_ATTEMPTS: u32 = 8;

/// Why a request was not admitted.
enum Refusal {
    Denied(Denial),
    BadRecord { key: String, reason: String },
    Port(Unavailable),
    Claim(NetworkError),
    Encode(StoreError),
}

/// Admits a request and makes it durable.
pub(crate) async fn submit(node: &Arc<Node>, request: Request) -> Result<Accepted, ApiError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let occupied = node.host.network.occupied().await.map_err(|error| internal(&error))?;
        let change = |mirror| admit(node, mirror, &request, occupied);
        let result = node.state.change_with(room_of(&request), change).await;
        match result {
            Ok((revision, (edit, ports))) => {
                ports.keep();
                node.poke();
                return Ok(accepted(revision.get(), edit));
            }
            Err(ChangeError::Refused(Refusal::Claim(_))) if attempts < CLAIM_ATTEMPTS => {}
            Err(ChangeError::Refused(refusal)) => return Err(refused(&node.state.now(), refusal)),
            Err(ChangeError::Store(CommitError::Store(StoreError::TransactionTooLong {
                count,
                ..
            }))) => {
                return Err(too_much(&format!("{count} objects")));
            }
            Err(ChangeError::Store(CommitError::Store(StoreError::TransactionTooLarge {
                bytes,
            }))) => {
                return Err(too_much(&format!("{} MiB of records", bytes >> 20)));
            }
            Err(ChangeError::Store(error)) => return Err(internal(&error)),
        }
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
fn room_of(request: &Request) -> Room {
    match request {
        Request::InstanceStop { .. }
        | Request::InstanceDestroy { .. }
        | Request::PoolDestroy { .. }
        | Request::TenantDestroy { .. }
        | Request::DiskRemove { .. }
        | Request::Remove { .. } => Room::Reserved,
        _ => Room::Ordinary,
    }
}

async fn admit(
    node: &Arc<Node>,
    mirror: Arc<Mirror>,
    request: &Request,
    occupied: Occupied,
) -> Result<(Vec<Op>, (Edit, Reservation)), Refusal> {
    if let Some((key, reason)) = bad_record(&mirror, request) {
        return Err(Refusal::BadRecord { key: key.to_owned(), reason: reason.to_owned() });
    }
    let facts = NodeFacts {
        capacity: node.config.capacity,
        foreign_net_ids: occupied.net_ids,
        foreign_subnets: occupied.subnets.into_iter().collect(),
        ended: ended(&mirror),
        up: up(&mirror),
        ready: spares::ready(&mirror),
        images: mirror.observed.pools.clone(),
    };
    let now = node.clock.now_ms();
    let mut entropy = || getrandom::u32().unwrap_or(now as u32);
    let edit = admit::admit(&mirror.desired, &facts, request, &mut entropy, now)
        .map_err(Refusal::Denied)?;
    let ops = difference(&mirror.desired, &edit.desired).map_err(Refusal::Encode)?;
    let ports =
        publish::reserve(node, &mirror.desired, &edit.desired).await.map_err(Refusal::Port)?;
    for (name, tenant) in &edit.desired.tenants {
        let net_id = tenant.network.net_id;
        let before = mirror.desired.tenants.get(name).map(|before| before.network.net_id);
        if before != Some(net_id) {
            node.host.network.claim(net_id).await.map_err(Refusal::Claim)?;
        }
    }
    Ok((ops, (edit, ports)))
}

/// A record of the request's tenant that does not parse: what it holds is not known, so nothing of
/// that tenant can be admitted.
fn bad_record<'a>(mirror: &'a Mirror, request: &Request) -> Option<(&'a str, &'a str)> {
    if mirror.bad.is_empty() {
        return None;
    }
    match tenant_of(mirror, request) {
        Some(tenant) => mirror.bad_record_of(&tenant),
        None => mirror.bad.iter().next().map(|(key, reason)| (key.as_str(), reason.as_str())),
    }
}

fn tenant_of(mirror: &Mirror, request: &Request) -> Option<TenantName> {
    match request {
        // A new tenant takes a network, and what the others hold must be known for that.
        Request::TenantCreate { .. } => None,
        Request::TenantUpdate { name, .. }
        | Request::TenantMove { name, .. }
        | Request::TenantDestroy { name, .. } => Some(name.clone()),
        Request::PoolCreate { path, .. }
        | Request::PoolBuild { path }
        | Request::PoolTemplate { path }
        | Request::PoolUpdate { path, .. }
        | Request::PoolRollback { path }
        | Request::PoolScale { path, .. }
        | Request::PoolPolicy { path, .. }
        | Request::PoolReady { path, .. }
        | Request::PoolSpares { path, .. }
        | Request::PoolDestroy { path, .. } => Some(path.tenant.clone()),
        Request::InstanceCreate { pool, .. } => Some(pool.tenant.clone()),
        Request::InstanceRest(action) => Some(action.instance.pool.tenant.clone()),
        Request::InstanceFork { source, .. } => Some(source.pool.tenant.clone()),
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
                let mut paths = mirror.desired.instances.keys();
                paths.find(|path| selector.matches(path)).map(|path| path.pool.tenant.clone())
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

/// Instances that have, or are getting or losing, a microVM; one that nothing is known of may.
fn up(mirror: &Mirror) -> std::collections::BTreeSet<mvm_core::name::InstancePath> {
    let is_up = |path: &&mvm_core::name::InstancePath| {
        mirror.is_untouchable(path)
            || !matches!(
                mirror.status(path).phase,
                Phase::Created
                    | Phase::Sleeping { .. }
                    | Phase::Stopped
                    | Phase::Failed
                    | Phase::Destroyed
            )
    };
    mirror.desired.instances.keys().filter(is_up).cloned().collect()
}

/// Instances that were to run and ended by themselves.
fn ended(mirror: &Mirror) -> std::collections::BTreeSet<mvm_core::name::InstancePath> {
    let wanted = mirror.desired.instances.values();
    wanted
        .filter(|record| record.desired.is_alive())
        .filter(|record| {
            mirror
                .observed
                .instances
                .get(&record.path)
                .is_some_and(|status| status.has_ended() && status.generation == record.generation)
        })
        .map(|record| record.path.clone())
        .collect()
}

/// The records that differ.
pub(crate) fn difference(before: &Desired, after: &Desired) -> Result<Vec<Op>, StoreError> {
    fn puts<K: Ord, V: Serialize + PartialEq>(
        before: &BTreeMap<K, V>,
        after: &BTreeMap<K, V>,
        key: fn(&K) -> String,
        ops: &mut Vec<Op>,
    ) -> Result<(), StoreError> {
        for (name, record) in after {
            if before.get(name) != Some(record) {
                ops.push(encode(key(name), record)?);
            }
        }
        Ok(())
    }
    let mut ops = Vec::new();
    puts(&before.tenants, &after.tenants, record::tenant_key, &mut ops)?;
    puts(&before.pools, &after.pools, record::pool_key, &mut ops)?;
    puts(&before.instances, &after.instances, record::instance_key, &mut ops)?;
    puts(&before.disks, &after.disks, record::disk_key, &mut ops)?;
    Ok(ops)
}

fn accepted(revision: u64, edit: Edit) -> Accepted {
    let instances = edit.instances.iter().filter_map(|path| edit.desired.instances.get(path));
    let disks = edit.disks.iter().filter_map(|path| edit.desired.disks.get(path));
    let pools = edit.pools.iter().filter_map(|path| edit.desired.pools.get(path));
    Accepted {
        revision,
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
        Refusal::BadRecord { key, reason } => bad_record_error(&key, &reason),
        Refusal::Port(unavailable) => port_error(&unavailable),
        Refusal::Claim(error) => internal(&error),
        Refusal::Encode(error) => internal(&error),
    }
}

/// A port that this machine does not give.
fn port_error(unavailable: &Unavailable) -> ApiError {
    let Unavailable { pool, publish, error } = unavailable;
    let address = publish.listen();
    let hint = match error {
        ListenError::Taken { .. } => {
            let (port, guest_port) = (address.port(), publish.guest_port());
            let other = port.checked_add(1).unwrap_or(port - 1);
            Some(format!("end that program, or publish another port, such as {other}:{guest_port}"))
        }
        ListenError::NotHere { .. } => Some(
            "`ip address` lists this machine's addresses; 0.0.0.0 means all of them".to_owned(),
        ),
        ListenError::NotAllowed => Some("publish a port above 1023".to_owned()),
        ListenError::Other(_) => None,
    };
    let message = format!("pool {pool} cannot have port {address}: {error}");
    ApiError { code: ErrorCode::Conflict, message, hint }
}

/// A failure inside the agent or on its machine.
pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::new(ErrorCode::Internal, chain(error))
}

/// A record that does not parse, as people see it.
pub(crate) fn bad_record_error(key: &str, reason: &str) -> ApiError {
    let message = format!(
        "the stored record `{key}` does not parse ({reason}); what it describes is left alone until it is mended"
    );
    ApiError::new(ErrorCode::BadRecord, message).hint(format!(
        "look at it with `mvm node record show {key}`, write a corrected one with `mvm node record set {key} FILE`"
    ))
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
