//! The sockets that are listened on: as the document says, from before a request that adds a port is
//! answered.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use imbl::ordmap::DiffItem;
use mvm_core::name::PoolPath;
use mvm_core::publish::Publish;
use mvm_core::record::{Desired, Existence};
use mvm_host::listen::{ListenError, listen};
use mvm_wire::door::Veto;
use mvm_wire::{ApiError, ErrorCode};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::carry::serve;
use crate::node::{Node, chain};

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

/// What a document that is being written needs of the machine; given back when it is dropped, unless it is kept.
pub struct Prepared {
    node: Arc<Node>,
    /// Sockets that listen.
    addresses: Vec<SocketAddr>,
}

impl Prepared {
    /// The document is written: the node's next round takes over what it needs.
    pub fn keep(mut self) {
        self.addresses.clear();
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let mut state = self.node.published.state();
        for address in &self.addresses {
            state.reserved.remove(address);
        }
    }
}

/// Listens on the ports that a document adds, and claims the net ids of its new tenants. A port that another
/// pool of this node gives up by it is had in the next round.
pub(crate) async fn prepare(
    node: &Arc<Node>,
    before: &Desired,
    after: &Desired,
) -> Result<Prepared, Veto> {
    let mut prepared = Prepared { node: node.clone(), addresses: Vec::new() };
    let (had, wanted) = match before.pools == after.pools {
        true => (BTreeSet::new(), BTreeSet::new()),
        false => (published(before), published(after)),
    };
    for (pool, publish) in wanted.difference(&had) {
        let is_ours = {
            let state = node.published.state();
            state.reserved.contains_key(&publish.listen())
                || state.listening.iter().any(|(_, other)| other.collides_with(publish))
        };
        if is_ours {
            continue;
        }
        match listen(publish.listen()).await {
            Ok(listener) => {
                node.published.state().reserved.insert(publish.listen(), listener);
                prepared.addresses.push(publish.listen());
            }
            Err(error) => return Err(Veto::Refused(unavailable(pool, publish, &error))),
        }
    }
    for change in before.tenants.diff(&after.tenants) {
        let (had, net_id) = match change {
            DiffItem::Add(_, new) => (None, new.network.net_id),
            DiffItem::Update { old, new } => (Some(old.1.network.net_id), new.1.network.net_id),
            DiffItem::Remove(..) => continue,
        };
        if had != Some(net_id) {
            let claimed = node.host.network.claim(net_id).await;
            claimed.map_err(|error| Veto::Taken(chain(&error)))?;
        }
    }
    Ok(prepared)
}

/// A port that this machine does not give.
fn unavailable(pool: &PoolPath, publish: &Publish, error: &ListenError) -> ApiError {
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

/// The ports that are listened on, each with the task that serves it.
#[derive(Default)]
pub(crate) struct Listeners {
    open: BTreeMap<Key, JoinHandle<()>>,
    /// Those that could not be had, and when that was found.
    failed: BTreeMap<Key, Instant>,
}

impl Listeners {
    /// Whether what is desired is listened on, and nothing else, as far as is known without a look.
    pub(crate) fn is_as_desired(&self, desired: &Desired) -> bool {
        let wanted = published(desired);
        let is_served =
            |(key, task): (&Key, &JoinHandle<()>)| wanted.contains(key) && !task.is_finished();
        wanted.len() == self.open.len() && self.open.iter().all(is_served)
    }

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
