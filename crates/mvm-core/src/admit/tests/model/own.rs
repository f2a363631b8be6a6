//! What each of control's own requests asks for.

use super::*;

impl Model {
    pub(super) fn carry_out_own(
        &mut self,
        request: &OwnRequest,
        before: &Self,
        most: Capacity,
    ) -> Option<()> {
        use DesiredState::{Destroyed, Warm};
        match request {
            OwnRequest::Spares { pool: path, count } => {
                let spec = self.pool(path)?.spec.clone();
                let base = self.base_for(path, &spec);
                let mut spares =
                    self.of_pool(path, |it| it.purpose == Purpose::Spare && it.is_kept());
                spares.sort_by_key(|path| (self.instances[path].born, path.clone()));
                let mut kept = 0;
                for spare in spares {
                    let instance = &self.instances[&spare];
                    let fits =
                        base.as_ref().is_some_and(|(id, _)| instance.origin.as_ref() == Some(id))
                            && inside(&instance.spec) == inside(&spec)
                            && !instance.has_ended();
                    if fits && kept < u64::from(*count) {
                        kept += 1;
                    } else {
                        self.want(&spare, Destroyed);
                    }
                }
                if base.is_some() {
                    let new = New { purpose: Purpose::Spare, ..New::to_be(Warm) };
                    self.add_instances(path, u64::from(*count) - kept, &[], &new)?;
                }
            }
            OwnRequest::BeginFork { id, source, count } => {
                // What it will need has to be there.
                let mut made = self.clone();
                made.fork(
                    source,
                    &SnapshotId::from_bits(0),
                    &RevisionId::from_digest([0; 8]),
                    *count,
                )?;
                require(made.shares_well() && made.is_within_limits(before, most))?;
                self.forks.insert(id.clone(), (source.clone(), *count));
            }
            OwnRequest::MakeForks { id, snapshot, revision } => {
                if let Some((source, count)) = self.forks.remove(id) {
                    self.fork(&source, snapshot, revision, count)?;
                }
            }
        }
        Some(())
    }

    fn fork(
        &mut self,
        source: &InstancePath,
        snapshot: &SnapshotId,
        revision: &RevisionId,
        count: u32,
    ) -> Option<()> {
        require((1..=1_000).contains(&count))?;
        self.pool(&source.pool)?;
        let original = self.instances.get(source)?.clone();
        require(original.spec.disks.iter().all(|mount| mount.read_only))?;
        self.require_disks(&source.pool.tenant, &original.spec.disks)?;
        for _ in 0..count {
            self.add_instance(
                &source.pool,
                Instance {
                    desired: DesiredState::Running,
                    purpose: Purpose::Use,
                    is_pinned: false,
                    origin: Some(snapshot.clone()),
                    revision: Some(revision.clone()),
                    wishes: 1,
                    born: self.requests,
                    seen: None,
                    ..original.clone()
                },
            )?;
        }
        Some(())
    }
}
