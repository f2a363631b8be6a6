//! What is shown: records and reports put together. What only the node knows is added in the end.

use std::collections::BTreeSet;
use std::path::PathBuf;

use mvm_core::admit::{node_usage, tenant_usage};
use mvm_core::lifecycle::{InstanceStatus, Phase, State};
use mvm_core::mirror::Mirror;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_core::outdated::SpecPart;
use mvm_core::record::{
    DesiredState, DiskRecord, Existence, InstanceRecord, PoolRecord, Purpose, TenantRecord,
};
use mvm_wire::ApiError;
use mvm_wire::door::{Answer, Published, Question, Traces};
use mvm_wire::view::{
    BadRecordView, BaseView, DiskUserView, DiskView, InstanceView, NodeView, PoolView, TenantView,
};

use crate::{Control, bases, configs};

/// The agent and its machine.
pub(crate) async fn node(control: &Control) -> Result<NodeView, ApiError> {
    let mirror = control.state.now();
    let machine = match control.link.ask(Question::Machine).await? {
        Answer::Machine(machine) => *machine,
        other => return Err(other.unexpected()),
    };
    let published = published(control).await?;
    let bad = mirror.bad.iter();
    let mut problems = machine.problems;
    problems.extend(control.problems());
    Ok(NodeView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_unix_ms: control.started_unix_ms,
        state_dir: machine.state_dir,
        hostname: machine.hostname,
        vmm: machine.vmm.into(),
        accel: machine.accel.into(),
        chosen_because: machine.chosen_because,
        capacity: machine.capacity,
        reserved: node_usage(&mirror.desired, &|path| mirror.is_finished(path)),
        tenants: mirror.desired.tenants.len() as u64,
        bad_records: bad
            .map(|(key, reason)| BadRecordView { key: key.clone(), reason: reason.clone() })
            .collect(),
        problems,
        connections: published.open,
        connections_max: published.max,
        refused_connections: published.refused,
    })
}

async fn published(control: &Control) -> Result<Published, ApiError> {
    match control.link.ask(Question::Published).await? {
        Answer::Published(published) => Ok(published),
        other => Err(other.unexpected()),
    }
}

/// Adds to pools what only their node and their images know. What cannot be had is left out.
pub(crate) async fn complete_pools(control: &Control, views: &mut [PoolView]) {
    configs::add_to_pools(control, views).await;
    if views.is_empty() {
        return;
    }
    let mut pools = published(control).await.map(|it| it.pools).unwrap_or_default();
    for view in views {
        let of_pool = pools.remove(&view.path).unwrap_or_default();
        view.connections = of_pool.open;
        view.refused_connections = of_pool.refused;
        view.publish_problems = of_pool.problems;
    }
}

/// Adds to disks where they are. What cannot be had is left out.
pub(crate) async fn complete_disks(control: &Control, views: &mut [DiskView]) {
    if views.is_empty() {
        return;
    }
    let disks = views.iter().map(|view| view.path.clone()).collect();
    let Ok(Answer::DiskFiles(mut files)) = control.link.ask(Question::DiskFiles { disks }).await
    else {
        return;
    };
    for view in views {
        if let Some(found) = files.remove(&view.path) {
            view.file = found.file;
            view.host_kib = found.host_kib;
        }
    }
}

pub(crate) fn tenant(mirror: &Mirror, record: &TenantRecord) -> TenantView {
    TenantView {
        name: record.name.clone(),
        subnet: record.network.subnet.to_string(),
        gateway: record.network.gateway(),
        bridge: record.network.bridge(),
        quota: record.quota.clone(),
        reserved: tenant_usage(&mirror.desired, &|path| mirror.is_finished(path), &record.name),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

pub(crate) fn tenants(mirror: &Mirror, name: Option<&TenantName>) -> Vec<TenantView> {
    let tenants = mirror.desired.tenants.values();
    let matching = tenants.filter(|record| name.is_none_or(|name| record.name == *name));
    matching.map(|record| tenant(mirror, record)).collect()
}

fn pool(mirror: &Mirror, record: &PoolRecord) -> PoolView {
    let status = mirror.observed.pools.get(&record.path).cloned().unwrap_or_default();
    let instances = || mirror.desired.instances_in(&record.path);
    let running = instances()
        .filter(|i| i.purpose.is_use() && mirror.status(&i.path).state() == State::Running)
        .count();
    let standing_by = instances()
        .filter(|i| i.purpose == Purpose::Spare)
        .filter(|i| mirror.status(&i.path).state() == State::Warm)
        .count();
    let base = status.base.as_ref().map(|base| BaseView {
        id: base.id.clone(),
        in_use: status.base_for(&record.spec).is_some(),
        made_unix_ms: base.made_unix_ms,
        given_up: base.given_up.clone(),
    });
    PoolView {
        path: record.path.clone(),
        spec: record.spec.clone().into(),
        desired_running: record.running,
        running: running as u32,
        instances: instances().count() as u32,
        outdated: instances().filter(|i| !outdated(mirror, i).is_empty()).count() as u32,
        standing_by: standing_by as u32,
        revision: status.revision,
        history: status.history,
        rolled_back: record.rolled_back_to.is_some(),
        build: status.build,
        build_generation: status.build_generation,
        base,
        base_generation: bases::carried_out(mirror, &record.path),
        base_failure: bases::failure(mirror, &record.path),
        exposed_ports: BTreeSet::new(),
        volumes: BTreeSet::new(),
        has_healthcheck: false,
        connections: 0,
        refused_connections: 0,
        publish_problems: Vec::new(),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

fn outdated(mirror: &Mirror, record: &InstanceRecord) -> Vec<SpecPart> {
    let path = &record.path.pool;
    let Some(pool) = mirror.desired.pools.get(path) else { return Vec::new() };
    let builds = mirror.observed.pools.get(path).and_then(|status| status.revision.as_ref());
    let boots = mirror.observed.instances.get(&record.path);
    let boots = boots.and_then(|status| status.revision.as_ref());
    mvm_core::outdated::outdated(record, boots, pool, builds)
}

pub(crate) fn pools(mirror: &Mirror, wanted: impl Fn(&PoolPath) -> bool) -> Vec<PoolView> {
    let pools = mirror.desired.pools.values().filter(|record| wanted(&record.path));
    pools.map(|record| pool(mirror, record)).collect()
}

fn disk(mirror: &Mirror, record: &DiskRecord) -> DiskView {
    let path = &record.path;
    let status = mirror.observed.disks.get(path).cloned().unwrap_or_default();
    let instances = mirror.desired.instances_of(&path.tenant).filter_map(|instance| {
        let mount = instance.spec.disks.iter().find(|mount| mount.name == path.disk)?;
        Some(DiskUserView {
            instance: instance.path.clone(),
            path: mount.path.clone(),
            read_only: mount.read_only,
            state: mirror.status(&instance.path).state(),
        })
    });
    let pools = mirror.desired.pools_of(&path.tenant).filter(|pool| {
        pool.existence == Existence::Kept
            && pool.spec.disks.iter().any(|mount| mount.name == path.disk)
    });
    DiskView {
        path: path.clone(),
        size_mib: record.size_mib,
        ready: status.size_mib.is_some_and(|size_mib| size_mib >= record.size_mib),
        error: status.failure.map(|failure| failure.error),
        host_kib: 0,
        file: PathBuf::new(),
        instances: instances.collect(),
        pools: pools.map(|pool| pool.path.clone()).collect(),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

pub(crate) fn disks(mirror: &Mirror, wanted: impl Fn(&DiskPath) -> bool) -> Vec<DiskView> {
    let disks = mirror.desired.disks.values().filter(|record| wanted(&record.path));
    disks.map(|record| disk(mirror, record)).collect()
}

fn instance(mirror: &Mirror, record: &InstanceRecord) -> InstanceView {
    let status = mirror.status(&record.path).clone();
    let network = mirror.desired.network_of(record);
    let (state, activity) = (status.state(), status.activity().map(str::to_owned));
    let InstanceStatus {
        phase,
        generation,
        revision,
        vm,
        boots,
        failures,
        // What waits for it tells.
        short_runs: _,
        last_death,
        main_end,
        snapshot: _,
        memory: _,
        sleeps: _,
        wakes,
        setback,
        cold_boot,
    } = status;
    InstanceView {
        path: record.path.clone(),
        state,
        activity,
        lacks_space: mirror.notes.lacking_space.contains(&record.path),
        purpose: record.purpose.into(),
        desired: record.desired.into(),
        generation,
        waiting: mirror.notes.waiting.get(&record.path).cloned(),
        address: network.map(|net| net.address()),
        mac: network.map(|net| net.mac()),
        tap: network.map(|net| net.tap()),
        vcpus: record.spec.vcpus,
        mem_mib: record.spec.mem_mib,
        disk_mib: record.spec.disk_mib,
        disks: record.spec.disks.clone(),
        revision,
        outdated: outdated(mirror, record),
        exposed_ports: BTreeSet::new(),
        vmm: vm.as_ref().map(|vm| vm.vmm.into()),
        pid: vm.as_ref().map(|vm| vm.pid),
        accel: vm.as_ref().map(|vm| vm.accel.into()),
        running_since_unix_ms: match phase {
            Phase::Running { since_unix_ms } => Some(since_unix_ms),
            _ => None,
        },
        resting_since_unix_ms: match phase {
            Phase::Warm { since_unix_ms } | Phase::Sleeping { since_unix_ms } => {
                Some(since_unix_ms)
            }
            _ => None,
        },
        created_unix_ms: record.created_unix_ms,
        boots,
        wakes,
        setback,
        rested: record.rested.map(Into::into),
        pinned: record.pinned,
        cold_boot,
        restart: record.spec.restart.into(),
        network_problem: mirror.notes.cut_off.get(&record.path).cloned(),
        failures,
        last_death,
        exit_code: main_end.map(|end| end.status.shell_code()),
    }
}

pub(crate) fn instances<'a>(
    mirror: &Mirror,
    wanted: impl IntoIterator<Item = &'a InstancePath>,
) -> Vec<InstanceView> {
    let records = wanted.into_iter().filter_map(|path| mirror.desired.instances.get(path));
    instances_of(mirror, records)
}

pub(crate) fn instances_of<'a>(
    mirror: &Mirror,
    records: impl Iterator<Item = &'a InstanceRecord>,
) -> Vec<InstanceView> {
    records.map(|record| instance(mirror, record)).collect()
}

/// One sentence on why an instance is in its state.
pub(crate) fn summary(view: &InstanceView, traces: &Traces) -> String {
    let death = view.last_death.as_ref().map(|death| death.cause.to_string());
    if let Some(words) = traces.lacks_space.clone().filter(|_| view.lacks_space) {
        return words;
    }
    match (&view.activity, view.state, view.desired.known()) {
        (Some(_), State::Running, Some(DesiredState::Running)) if view.exit_code.is_some() => {
            let code = view.exit_code.unwrap_or_default();
            format!("its main process ended with {code}, and so it is stopping")
        }
        (Some(activity), _, _) => format!("it is {activity}, as requested"),
        (None, State::Running, _) if view.network_problem.is_some() => {
            format!("it runs, but {}", view.network_problem.clone().unwrap_or_default())
        }
        (None, State::Running, _) => match death {
            Some(death) => format!("it runs, as requested; its last run ended: {death}"),
            None => "it runs, as requested".to_owned(),
        },
        (None, State::Warm, _) => "its vCPUs are stopped, and its memory is kept".to_owned(),
        (None, State::Sleeping, _) => {
            "it sleeps, and goes on with `mvm wake` or when it is needed".to_owned()
        }
        (None, State::Created, Some(DesiredState::Running)) => {
            "it is about to be started".to_owned()
        }
        (None, State::Created, _) => "it was created and never started".to_owned(),
        (None, State::Stopped | State::Failed, _) => {
            death.unwrap_or_else(|| "it was stopped before it ran".to_owned())
        }
        (None, State::Destroyed, _) => "it is gone".to_owned(),
        (None, State::Unknown, _) => "its state is not known".to_owned(),
    }
}
