//! The call that watches. What it costs follows what has changed, not how much is watched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use mvm_core::mirror::Mirror;
use mvm_core::name::{DiskPath, InstancePath, PoolPath, TenantName};
use mvm_wire::view::InstanceView;
use mvm_wire::{Connection, ConnectionError, Reply};

use crate::{Control, configs, views};

/// What a caller watches.
pub(crate) struct Watched {
    pub(crate) instances: BTreeSet<InstancePath>,
    pub(crate) pools: Vec<PoolPath>,
    /// A tenant's existence.
    pub(crate) tenant: Option<TenantName>,
    pub(crate) disks: Vec<DiskPath>,
    /// Whether the caller understands what has changed, and else has everything each time.
    pub(crate) changes: bool,
}

/// Sends what is watched now and after each change, until the caller hangs up.
pub(crate) async fn watch(
    control: &Control,
    watched: &Watched,
    connection: Connection,
) -> Result<(), ConnectionError> {
    let Connection { mut read, mut write } = connection;
    let mut state = control.state.follow();
    let mut before: Option<Arc<Mirror>> = None;
    let mut shown: BTreeMap<InstancePath, InstanceView> = BTreeMap::new();
    let mut rest = None;
    loop {
        let mirror = state.borrow_and_update().clone();
        let touched = match &before {
            Some(before) => touched(before, &mirror, &watched.instances),
            None => watched.instances.clone(),
        };
        let mut views = views::instances(&mirror, &touched);
        configs::add_ports_to_instances(control, &mut views).await;
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for view in views {
            if shown.get(&view.path) != Some(&view) {
                shown.insert(view.path.clone(), view.clone());
                changed.push(view);
            }
        }
        for path in touched {
            if !mirror.desired.instances.contains_key(&path) && shown.remove(&path).is_some() {
                gone.push(path);
            }
        }
        let now = rest_of(control, &mirror, watched).await;
        let is_first = rest.is_none();
        if is_first || rest.as_ref() != Some(&now) || !changed.is_empty() || !gone.is_empty() {
            rest = Some(now.clone());
            let (pools, tenant_exists, disks) = now;
            let reply = if watched.changes && !is_first {
                Reply::Changed { instances: changed, gone, pools, tenant_exists, disks }
            } else {
                let instances = shown.values().cloned().collect();
                Reply::Snapshot { instances, pools, tenant_exists, disks }
            };
            write.message(&reply).await?;
        }
        before = Some(mirror);
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return Ok(()) },
            // The caller says nothing more: whatever arrives is its hanging up.
            _ = read.next() => return Ok(()),
        }
    }
}

type Rest = (Vec<mvm_wire::view::PoolView>, bool, Vec<mvm_wire::view::DiskView>);

/// What is watched besides instances, of which there are few.
async fn rest_of(control: &Control, mirror: &Mirror, watched: &Watched) -> Rest {
    let mut pools = views::pools(mirror, |path| watched.pools.contains(path));
    let mut disks = views::disks(mirror, |path| watched.disks.contains(path));
    views::complete_pools(control, &mut pools).await;
    views::complete_disks(control, &mut disks).await;
    let is_there = |name: &TenantName| mirror.desired.tenants.contains_key(name);
    (pools, watched.tenant.as_ref().is_some_and(is_there), disks)
}

/// The watched instances whose views may differ between two moments.
fn touched(
    before: &Mirror,
    after: &Mirror,
    watched: &BTreeSet<InstancePath>,
) -> BTreeSet<InstancePath> {
    let is_of_all = !before.desired.tenants.ptr_eq(&after.desired.tenants)
        || !before.desired.pools.ptr_eq(&after.desired.pools)
        || !before.observed.pools.ptr_eq(&after.observed.pools)
        || before.notes.lacking_space != after.notes.lacking_space
        || before.notes.cut_off != after.notes.cut_off;
    if is_of_all {
        return watched.clone();
    }
    let mut touched = BTreeSet::new();
    differing(&before.desired.instances, &after.desired.instances, watched, &mut touched);
    differing(&before.observed.instances, &after.observed.instances, watched, &mut touched);
    differing(&before.notes.waiting, &after.notes.waiting, watched, &mut touched);
    touched
}

fn differing<V: PartialEq>(
    before: &OrdMap<InstancePath, V>,
    after: &OrdMap<InstancePath, V>,
    watched: &BTreeSet<InstancePath>,
    touched: &mut BTreeSet<InstancePath>,
) {
    for change in before.diff(after) {
        let (DiffItem::Add(path, _)
        | DiffItem::Update { new: (path, _), .. }
        | DiffItem::Remove(path, _)) = change;
        if watched.contains(path) {
            touched.insert(path.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::lifecycle::InstanceStatus;
    use mvm_core::plan::Waiting;

    fn path(number: u32) -> InstancePath {
        format!("demo/web/i-{number:08x}").parse().unwrap()
    }

    #[test]
    fn only_what_has_changed_is_looked_at() {
        let watched: BTreeSet<InstancePath> = (0..100).map(path).collect();
        let mut before = Mirror::default();
        for number in 0..1_000 {
            before.observed.instances.insert(path(number), InstanceStatus::default());
        }
        let of = |change: &dyn Fn(&mut Mirror)| {
            let mut after = before.clone();
            change(&mut after);
            touched(&before, &after, &watched)
        };
        assert!(of(&|_| {}).is_empty());
        let started = InstanceStatus { boots: 1, ..InstanceStatus::default() };
        let one = of(&|mirror| {
            mirror.observed.instances.insert(path(7), started.clone());
            mirror.observed.instances.insert(path(700), started.clone());
        });
        assert_eq!(one, BTreeSet::from([path(7)]));
        assert_eq!(of(&|mirror| drop(mirror.observed.instances.remove(&path(8)))).len(), 1);
        assert_eq!(
            of(&|mirror| drop(mirror.notes.waiting.insert(path(9), Waiting::Step))).len(),
            1
        );
        // What many views have something of.
        let all = of(&|mirror| {
            mirror.notes.lacking_space.insert(path(700));
        });
        assert_eq!(all.len(), 100);
        let pool: PoolPath = "demo/web".parse().unwrap();
        let built = mvm_core::record::PoolStatus::default();
        let all = of(&|mirror| drop(mirror.observed.pools.insert(pool.clone(), built.clone())));
        assert_eq!(all.len(), 100);
    }
}
