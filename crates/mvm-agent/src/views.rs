//! What is shown: records and observations put together. What images say is added by `configs`.

use std::collections::BTreeSet;

use mvm_core::admit::{node_usage, tenant_usage};
use mvm_core::lifecycle::{InstanceStatus, Phase, State};
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_core::plan::Waiting;
use mvm_core::record::{
    DesiredState, DiskRecord, Existence, InstanceRecord, PoolRecord, Purpose, TenantRecord,
};
use mvm_wire::view::{
    BadRecordView, BaseView, DiskUserView, DiskView, InstanceView, NodeView, PoolView, TenantView,
};

use crate::node::Node;
use crate::space;
use crate::state::Mirror;

pub(crate) fn node(node: &Node) -> NodeView {
    let mirror = node.state.now();
    let bad = mirror.bad.iter();
    let published = node.published.total();
    NodeView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_unix_ms: node.started_unix_ms,
        state_dir: node.config.state_dir.clone(),
        hostname: mvm_host::platform::hostname(),
        vmm: node.host.vmm.kind(),
        accel: node.config.accel,
        chosen_because: node.config.chosen_because.clone(),
        capacity: node.config.capacity,
        reserved: node_usage(&mirror.desired),
        tenants: mirror.desired.tenants.len() as u64,
        bad_records: bad
            .map(|(key, reason)| BadRecordView { key: key.clone(), reason: reason.clone() })
            .collect(),
        problems: node.problems(),
        connections: published.open,
        connections_max: published.max,
        refused_connections: published.refused,
    }
}

pub(crate) fn tenant(mirror: &Mirror, record: &TenantRecord) -> TenantView {
    TenantView {
        name: record.name.clone(),
        subnet: record.network.subnet.to_string(),
        gateway: record.network.gateway(),
        bridge: record.network.bridge(),
        quota: record.quota.clone(),
        reserved: tenant_usage(&mirror.desired, &record.name),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

pub(crate) fn tenants(mirror: &Mirror, name: Option<&TenantName>) -> Vec<TenantView> {
    let tenants = mirror.desired.tenants.values();
    let matching = tenants.filter(|record| name.is_none_or(|name| record.name == *name));
    matching.map(|record| tenant(mirror, record)).collect()
}

fn pool(node: &Node, mirror: &Mirror, record: &PoolRecord) -> PoolView {
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
        spec: record.spec.clone(),
        desired_running: record.running,
        running: running as u32,
        instances: instances().count() as u32,
        standing_by: standing_by as u32,
        revision: status.revision,
        history: status.history,
        rolled_back: record.rolled_back_to.is_some(),
        build: status.build,
        build_generation: status.build_generation,
        base,
        exposed_ports: BTreeSet::new(),
        volumes: BTreeSet::new(),
        has_healthcheck: false,
        connections: node.published.connections_of(&record.path),
        refused_connections: node.published.refused_of(&record.path),
        publish_problems: node.published.problems_of(&record.path),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

pub(crate) fn pools(
    node: &Node,
    mirror: &Mirror,
    wanted: impl Fn(&PoolPath) -> bool,
) -> Vec<PoolView> {
    let pools = mirror.desired.pools.values().filter(|record| wanted(&record.path));
    pools.map(|record| pool(node, mirror, record)).collect()
}

fn disk(node: &Node, mirror: &Mirror, record: &DiskRecord) -> DiskView {
    let path = &record.path;
    let status = mirror.observed.disks.get(path).cloned().unwrap_or_default();
    let file = node.host.disks.file(path);
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
        host_kib: mvm_host::disks::allocated_kib(&file),
        file,
        instances: instances.collect(),
        pools: pools.map(|pool| pool.path.clone()).collect(),
        created_unix_ms: record.created_unix_ms,
        removing: record.existence == Existence::Removed,
    }
}

pub(crate) fn disks(
    node: &Node,
    mirror: &Mirror,
    wanted: impl Fn(&DiskPath) -> bool,
) -> Vec<DiskView> {
    let disks = mirror.desired.disks.values().filter(|record| wanted(&record.path));
    disks.map(|record| disk(node, mirror, record)).collect()
}

fn instance(
    node: &Node,
    mirror: &Mirror,
    record: &InstanceRecord,
    waiting: Option<&Waiting>,
) -> InstanceView {
    let status = mirror.status(&record.path);
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
        lacks_space: node.lacks_space(&record.path),
        purpose: record.purpose,
        desired: record.desired,
        generation,
        waiting: waiting.cloned(),
        address: network.map(|net| net.address()),
        mac: network.map(|net| net.mac()),
        tap: network.map(|net| net.tap()),
        vcpus: record.spec.vcpus,
        mem_mib: record.spec.mem_mib,
        disk_mib: record.spec.disk_mib,
        disks: record.spec.disks.clone(),
        revision,
        exposed_ports: BTreeSet::new(),
        vmm: vm.as_ref().map(|vm| vm.vmm),
        pid: vm.as_ref().map(|vm| vm.pid),
        accel: vm.as_ref().map(|vm| vm.accel),
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
        rested: record.rested,
        pinned: record.pinned,
        cold_boot,
        restart: record.spec.restart,
        network_problem: None,
        failures,
        last_death,
        exit_code: main_end.map(|end| end.status.shell_code()),
    }
}

pub(crate) fn instances(
    node: &Node,
    mirror: &Mirror,
    wanted: impl Fn(&InstancePath) -> bool,
) -> Vec<InstanceView> {
    let records = mirror.desired.instances.values().filter(|record| wanted(&record.path));
    instances_of(node, mirror, records)
}

pub(crate) fn instances_of<'a>(
    node: &Node,
    mirror: &Mirror,
    records: impl Iterator<Item = &'a InstanceRecord>,
) -> Vec<InstanceView> {
    let waiting = node.waiting();
    let waiting = waiting.borrow();
    let view = |record: &InstanceRecord| InstanceView {
        network_problem: node.cut_off.problem_of(&record.path, &mirror.status(&record.path)),
        ..instance(node, mirror, record, waiting.get(&record.path))
    };
    records.map(view).collect()
}

/// One sentence on why an instance is in its state.
pub(crate) fn summary(node: &Node, view: &InstanceView) -> String {
    let death = view.last_death.as_ref().map(|death| death.cause.to_string());
    match (&view.activity, view.state, view.desired) {
        _ if view.lacks_space => space::words(node),
        (Some(_), State::Running, DesiredState::Running) if view.exit_code.is_some() => {
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
        (None, State::Created, DesiredState::Running) => "it is about to be started".to_owned(),
        (None, State::Created, _) => "it was created and never started".to_owned(),
        (None, State::Stopped | State::Failed, _) => {
            death.unwrap_or_else(|| "it was stopped before it ran".to_owned())
        }
        (None, State::Destroyed, _) => "it is gone".to_owned(),
    }
}
