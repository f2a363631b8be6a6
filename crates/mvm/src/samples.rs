//! Views for this crate's tests.

use std::collections::BTreeSet;

use mvm_core::lifecycle::State;
use mvm_core::record::{BuildState, DesiredState, Purpose};
use mvm_core::spec::{PoolSpec, RestartPolicy};
use mvm_wire::view::{InstanceView, PoolView};

/// A running instance.
pub(crate) fn instance(path: &str) -> InstanceView {
    InstanceView {
        path: path.parse().unwrap(),
        state: State::Running,
        activity: None,
        lacks_space: false,
        purpose: Purpose::Use.into(),
        desired: DesiredState::Running.into(),
        generation: 1,
        waiting: None,
        address: Some([10, 240, 0, 3].into()),
        mac: None,
        tap: None,
        vcpus: 1,
        mem_mib: 256,
        disk_mib: 2048,
        disks: vec![],
        revision: None,
        outdated: vec![],
        exposed_ports: BTreeSet::new(),
        vmm: None,
        pid: None,
        accel: None,
        running_since_unix_ms: None,
        resting_since_unix_ms: None,
        created_unix_ms: 0,
        boots: 1,
        wakes: 0,
        setback: None,
        rested: None,
        pinned: false,
        cold_boot: None,
        restart: RestartPolicy::OnFailure.into(),
        network_problem: None,
        failures: 0,
        last_death: None,
        exit_code: None,
    }
}

/// A pool that was never built.
pub(crate) fn pool(path: &str) -> PoolView {
    PoolView {
        path: path.parse().unwrap(),
        spec: PoolSpec::default().into(),
        desired_running: 1,
        running: 1,
        instances: 1,
        outdated: 0,
        standing_by: 0,
        revision: None,
        history: Vec::new(),
        rolled_back: false,
        build: BuildState::Idle,
        build_generation: 0,
        base: None,
        base_generation: 0,
        base_failure: None,
        exposed_ports: BTreeSet::new(),
        volumes: BTreeSet::new(),
        has_healthcheck: false,
        connections: 0,
        refused_connections: 0,
        publish_problems: Vec::new(),
        created_unix_ms: 0,
        removing: false,
    }
}
