//! Published ports: each is one pool's on the whole node. Judged on the whole result of a request, so
//! that no verb can be a way around it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::Denial;
use crate::name::PoolPath;
use crate::publish::Publish;
use crate::record::{Desired, Existence};

/// Refuses a port that another pool listens on. What two pools already share (a record written by
/// hand) is no reason to refuse something else.
pub(super) fn check(before: &Desired, after: &Desired) -> Result<(), Denial> {
    if before.pools == after.pools {
        return Ok(());
    }
    let mut by_port: BTreeMap<u16, Vec<(&PoolPath, &Publish)>> = BTreeMap::new();
    for (pool, publish) in published(after) {
        let others = by_port.entry(SocketAddr::port(&publish.listen())).or_default();
        let colliding = others.iter().find(|(_, other)| other.collides_with(publish));
        if let Some((holder, other)) = colliding {
            let had = |pool: &PoolPath, publish: &Publish| {
                let record = before.pools.get(pool);
                record.is_some_and(|record| record.spec.publish.contains(publish))
            };
            let (asked, holder, publish) = match (had(holder, other), had(pool, publish)) {
                (true, true) => continue,
                (false, true) => (*holder, pool, *other),
                (_, false) => (pool, *holder, publish),
            };
            return Err(Denial::PortTaken {
                publish: *publish,
                pool: asked.clone(),
                holder: (holder.tenant == asked.tenant).then(|| holder.clone()),
            });
        }
        others.push((pool, publish));
    }
    Ok(())
}

fn published(desired: &Desired) -> impl Iterator<Item = (&PoolPath, &Publish)> {
    let kept = desired.pools.values().filter(|pool| pool.existence == Existence::Kept);
    kept.flat_map(|pool| pool.spec.publish.iter().map(|publish| (&pool.path, publish)))
}
