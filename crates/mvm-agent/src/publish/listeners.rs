//! The sockets that are listened on: as the desired documents say, from before a request that adds a
//! port is answered.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::name::PoolPath;
use mvm_core::publish::Publish;
use mvm_core::record::{Desired, Existence};
use mvm_host::listen::{ListenError, listen};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::carry::serve;
use crate::node::Node;

/// How long a port that cannot be had is left alone: to find out who has it takes a look at every process
/// of the machine, and rounds may follow each other closely.
const AGAIN: Duration = Duration::from_secs(5);

type Key = (PoolPath, Publish);

/// What is to be listened on.
fn published(desired: &Desired) -> BTreeSet<Key> {
    let kept = desired.pools.values().filter(|pool| pool.existence == Existence::Kept);
    kept.flat_map(|pool| pool.spec.publish.iter().map(|publish| (pool.path.clone(), *publish)))
        .collect()
}

/// A port that a request wants and that cannot be had.
pub(crate) struct Unavailable {
    pub(crate) pool: PoolPath,
    pub(crate) publish: Publish,
    pub(crate) error: ListenError,
}

/// Sockets of a request that is being admitted; closed when it is dropped, unless it is kept.
pub(crate) struct Reservation {
    node: Arc<Node>,
    addresses: Vec<SocketAddr>,
}

impl Reservation {
    /// The request is admitted: the next round takes the sockets.
    pub(crate) fn keep(mut self) {
        self.addresses.clear();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.node.published.state();
        for address in &self.addresses {
            state.reserved.remove(address);
        }
    }
}

/// Listens on what a request adds. A port that another pool of this node gives up by it is had in the
/// next round.
pub(crate) async fn reserve(
    node: &Arc<Node>,
    before: &Desired,
    after: &Desired,
) -> Result<Reservation, Unavailable> {
    let had = published(before);
    let mut reservation = Reservation { node: node.clone(), addresses: Vec::new() };
    for (pool, publish) in published(after) {
        if had.contains(&(pool.clone(), publish)) {
            continue;
        }
        let is_ours = {
            let state = node.published.state();
            state.reserved.contains_key(&publish.listen())
                || state.listening.iter().any(|(_, other)| other.collides_with(&publish))
        };
        if is_ours {
            continue;
        }
        match listen(publish.listen()).await {
            Ok(listener) => {
                node.published.state().reserved.insert(publish.listen(), listener);
                reservation.addresses.push(publish.listen());
            }
            Err(error) => return Err(Unavailable { pool, publish, error }),
        }
    }
    Ok(reservation)
}

/// The ports that are listened on, each with the task that serves it.
#[derive(Default)]
pub(crate) struct Listeners {
    open: BTreeMap<Key, JoinHandle<()>>,
    /// Those that could not be had, and when that was found.
    failed: BTreeMap<Key, Instant>,
}

impl Listeners {
    /// Listens on what is desired, and on nothing else.
    pub(crate) async fn ensure(&mut self, node: &Arc<Node>, desired: &Desired) {
        let wanted = published(desired);
        let is_over =
            |key: &Key, task: &JoinHandle<()>| !wanted.contains(key) || task.is_finished();
        let over: Vec<_> = self.open.extract_if(.., |key, task| is_over(key, task)).collect();
        for (key, task) in over {
            task.abort();
            // Another pool may want the port right now.
            drop(task.await);
            node.published.state().listening.remove(&key);
        }
        {
            let mut state = node.published.state();
            state.problems.retain(|key, _| wanted.contains(key));
            state.loads.retain(|path, load| load.open > 0 || desired.instances.contains_key(path));
            state.refused.retain(|pool, _| desired.pools.contains_key(pool));
            let is_wanted = |address: &SocketAddr| {
                wanted.iter().any(|(_, publish)| publish.listen() == *address)
            };
            state.reserved.retain(|address, _| is_wanted(address));
        }
        self.failed.retain(|key, at| wanted.contains(key) && at.elapsed() < AGAIN);
        for (pool, publish) in wanted {
            let key = (pool.clone(), publish);
            if self.open.contains_key(&key) {
                continue;
            }
            let reserved = node.published.state().reserved.remove(&publish.listen());
            let listening = match reserved {
                Some(listener) => Ok(listener),
                None if self.failed.contains_key(&key) => continue,
                None => listen(publish.listen()).await,
            };
            match listening {
                Ok(listener) => {
                    node.published.set_problem(&pool, publish, None);
                    node.published.state().listening.insert(key.clone());
                    let serve = serve(node.clone(), pool, publish, listener);
                    self.open.insert(key, tokio::spawn(serve));
                }
                Err(error) => {
                    node.published.set_problem(&pool, publish, Some(error.to_string()));
                    self.failed.insert(key, Instant::now());
                }
            }
        }
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.open.values().for_each(JoinHandle::abort);
    }
}
