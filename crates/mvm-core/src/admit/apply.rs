//! The declarative document: `up` makes the node agree with it, `down` removes what it describes.

use super::pools::ask_for_build;
use super::{DEFAULT_GRACE_MS, Denial, Draft};
use crate::name::{DiskPath, PoolPath};
use crate::record::Existence;
use crate::spec::{Document, PoolSpec};

impl Draft<'_> {
    /// Pools of the tenant that the document does not name stay as they are, and are mentioned.
    pub(super) fn apply(&mut self, document: &Document) -> Result<(), Denial> {
        let name = &document.tenant;
        match self.edit.desired.tenants.get_mut(name) {
            None => self.tenant_create(
                name,
                document.quota.clone().unwrap_or_default(),
                document.subnet,
            )?,
            Some(tenant) if tenant.existence == Existence::Removed => {
                return Err(Denial::BeingRemoved { object: format!("tenant {name}") });
            }
            Some(tenant) => {
                let has = tenant.network.subnet;
                if let Some(wants) = document.subnet.filter(|wants| *wants != has) {
                    return Err(Denial::SubnetFixed { name: name.clone(), has, wants });
                }
                if let Some(quota) = &document.quota {
                    tenant.quota = quota.clone();
                }
            }
        }
        for (disk, wanted) in &document.disks {
            let path = DiskPath { tenant: name.clone(), disk: disk.clone() };
            if self.edit.desired.disks.contains_key(&path) {
                self.disk_resize(&path, wanted.size_mib)?;
            } else {
                self.disk_create(&path, wanted.size_mib)?;
            }
        }
        for (pool, wanted) in &document.pools {
            let path = PoolPath { tenant: name.clone(), pool: pool.clone() };
            if let Some(before) = self.edit.desired.pools.get(&path) {
                let mut spec = wanted.spec.clone();
                if !wanted.names_image {
                    spec.image = before.spec.image.clone();
                }
                let was_running = before.running;
                self.require_pool(&path)?;
                self.require_spec(&path, &spec)?;
                self.update_spec(&path, &spec);
                self.edit.pools.push(path.clone());
                if was_running > wanted.running {
                    let wanted = wanted.running;
                    self.note(format!(
                        "pool {path}: {wanted} of it run, as the document says, and no longer {was_running}"
                    ));
                }
            } else {
                self.pool_create(&path, &wanted.spec)?;
            }
            self.pool_scale(&path, wanted.running, None, None)?;
            self.note_missing_base(&path);
        }
        let unnamed: Vec<PoolPath> = self
            .edit
            .desired
            .pools_of(name)
            .filter(|pool| !document.pools.contains_key(&pool.path.pool))
            .map(|pool| pool.path.clone())
            .collect();
        for pool in unnamed {
            self.note(format!("pool {pool} is not in the document and stays as it is"));
        }
        Ok(())
    }

    /// Says what keeps instances of a pool from standing by.
    fn note_missing_base(&mut self, path: &PoolPath) {
        let Some(pool) = self.edit.desired.pools.get(path) else { return };
        let status = self.node.image(path);
        let has_base = status.is_some_and(|status| status.base_for(&pool.spec).is_some());
        let ready = pool.spec.ready;
        if ready > 0 && !has_base {
            self.note(format!(
                "pool {path}: the {ready} that are to stand by are made once it has a base, which `mvm pool warm-up {path}` makes"
            ));
        }
    }

    fn update_spec(&mut self, path: &PoolPath, wanted: &PoolSpec) {
        let Some(pool) = self.edit.desired.pools.get_mut(path) else { return };
        if pool.spec == *wanted {
            return;
        }
        if pool.spec.image != wanted.image {
            ask_for_build(pool);
        }
        // What is published, when its instances rest and how many stand by is the pool's and not its instances'.
        let PoolSpec { publish, sleep_policy, ready, .. } = wanted.clone();
        let before = PoolSpec { publish, sleep_policy, ready, ..pool.spec.clone() };
        pool.spec = wanted.clone();
        if before == *wanted {
            return;
        }
        let older = self.edit.desired.instances_in(path).count();
        if older > 0 {
            self.note(format!(
                "pool {path} has changed: its {older} existing instances stay as they are, new ones follow the document (`mvm pool info {path}` says how to renew them)"
            ));
        }
    }

    /// Removes the document's pools, and the tenant if nothing else is in it. What is gone already
    /// is no error, so that a second `down` succeeds.
    pub(super) fn remove(&mut self, document: &Document) -> Result<(), Denial> {
        let name = &document.tenant;
        if !self.edit.desired.tenants.contains_key(name) {
            self.note(format!("tenant {name} does not exist: nothing to do"));
            return Ok(());
        }
        for pool in document.pools.keys() {
            let path = PoolPath { tenant: name.clone(), pool: pool.clone() };
            if self.edit.desired.pools.contains_key(&path) {
                self.remove_pool(&path, DEFAULT_GRACE_MS);
            }
        }
        let others: Vec<PoolPath> = self
            .edit
            .desired
            .pools_of(name)
            .filter(|pool| pool.existence == Existence::Kept)
            .map(|pool| pool.path.clone())
            .collect();
        let disks: Vec<DiskPath> = self
            .edit
            .desired
            .disks_of(name)
            .filter(|disk| disk.existence == Existence::Kept)
            .map(|disk| disk.path.clone())
            .collect();
        if !disks.is_empty() {
            let disks = super::denial::list(&disks);
            self.note(format!(
                "data disks are kept, and tenant {name} with them: {disks} (`mvm disk rm` removes them)"
            ));
        } else if others.is_empty() {
            return self.tenant_destroy(name, false);
        }
        if others.is_empty() {
            return Ok(());
        }
        let others = super::denial::list(&others);
        self.note(format!("tenant {name} stays, as the document does not name {others}"));
        Ok(())
    }
}
