//! The call that watches.

use std::collections::BTreeSet;

use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_wire::{Connection, ConnectionError, Reply};

use crate::{Control, configs, views};

/// What a caller watches.
pub(crate) struct Watched {
    pub(crate) instances: BTreeSet<InstancePath>,
    pub(crate) pools: Vec<PoolPath>,
    /// A tenant's existence.
    pub(crate) tenant: Option<TenantName>,
    pub(crate) disks: Vec<DiskPath>,
}

/// Sends what is watched now and after each change, until the caller hangs up.
pub(crate) async fn watch(
    control: &Control,
    watched: &Watched,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let mut state = control.state.follow();
    let mut last = None;
    loop {
        let mirror = state.borrow_and_update().clone();
        let mut instances = views::instances(&mirror, &watched.instances);
        let mut pools = views::pools(&mirror, |path| watched.pools.contains(path));
        let mut disks = views::disks(&mirror, |path| watched.disks.contains(path));
        configs::add_ports_to_instances(control, &mut instances).await;
        views::complete_pools(control, &mut pools).await;
        views::complete_disks(control, &mut disks).await;
        let is_there = |name: &TenantName| mirror.desired.tenants.contains_key(name);
        let tenant_exists = watched.tenant.as_ref().is_some_and(is_there);
        let snapshot = Reply::Snapshot { instances, pools, tenant_exists, disks };
        if last.as_ref() != Some(&snapshot) {
            write.message(&snapshot).await?;
            last = Some(snapshot);
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return Ok(()) },
            // The caller says nothing more: whatever arrives is its hanging up.
            _ = read.next() => return Ok(()),
        }
    }
}
