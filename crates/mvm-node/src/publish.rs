//! Published ports: the node listens, and carries each connection to an instance of the pool.
//!
//! ```text
//!  client ──> listener ──> share ──> pick: of those that run, the one with fewest ──> a socket in
//!                 │                  connections; if none runs, one is woken          the guest
//!                 └─ full: reset, and counted
//! ```
//!
//! Which listeners there are follows the desired documents, round by round; a port that a request adds
//! is listened on before the request is answered, so that one that cannot be had is refused. The way
//! into a guest is the host-guest channel, so a port is served without a network, and an instance is
//! woken by a connection exactly as it is by an exec. What keeps a port from being served is kept for
//! whoever looks at the pool; the client, whose protocol is not known here, sees a reset.
//!
//! Clients are strangers: how many may be there is shared out by [`Shares`], so that nobody keeps
//! others out, whatever he does.

mod carry;
mod listeners;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_core::name::{InstancePath, PoolPath};
use mvm_core::publish::{Full, Publish, Shares};
use mvm_host::guest::Session;
use mvm_wire::door::PublishedPool;
use tokio::net::TcpListener;

use crate::node::Node;

pub use listeners::Prepared;
pub(crate) use listeners::{Listeners, prepare};

/// Most connections of all pools, however many descriptors there are: each takes memory, too.
const CONNECTIONS_MAX: usize = 8192;
/// The part of the agent's descriptors that published connections may take. What is left is for its own
/// work: callers, instances, images.
const PART_OF_DESCRIPTORS: u64 = 2;

/// What is known of published ports at present.
pub(crate) struct Published(Mutex<State>);

struct State {
    problems: BTreeMap<(PoolPath, Publish), String>,
    loads: BTreeMap<InstancePath, Load>,
    /// Connections that instances have been given so far.
    connections: u64,
    shares: Shares,
    /// Connections that were not let in so far.
    refused: BTreeMap<PoolPath, u64>,
    /// What is listened on.
    listening: BTreeSet<(PoolPath, Publish)>,
    /// Sockets of what has just been admitted, for the next round.
    reserved: BTreeMap<SocketAddr, TcpListener>,
}

impl State {
    /// Counts one more connection of an instance.
    fn give(&mut self, instance: &InstancePath) {
        self.connections += 1;
        let load = self.loads.entry(instance.clone()).or_default();
        *load = Load { open: load.open + 1, last: self.connections };
    }
}

/// What an instance carries.
#[derive(Default)]
struct Load {
    open: u64,
    /// The number of the last connection that it was given.
    last: u64,
}

impl Published {
    /// Nothing yet, for an agent that may have this many descriptors.
    pub(crate) fn new(open_files: u64) -> Self {
        let max = usize::try_from(open_files / PART_OF_DESCRIPTORS).unwrap_or(usize::MAX);
        Self(Mutex::new(State {
            problems: BTreeMap::new(),
            loads: BTreeMap::new(),
            connections: 0,
            shares: Shares::of(max.min(CONNECTIONS_MAX)),
            refused: BTreeMap::new(),
            listening: BTreeSet::new(),
            reserved: BTreeMap::new(),
        }))
    }

    /// What is known at present.
    pub(crate) fn view(&self) -> mvm_wire::door::Published {
        let state = self.state();
        let mut pools: BTreeMap<PoolPath, PublishedPool> = BTreeMap::new();
        for ((pool, publish), problem) in &state.problems {
            let problem = format!("{publish}: {problem}");
            pools.entry(pool.clone()).or_default().problems.push(problem);
        }
        for (pool, refused) in &state.refused {
            pools.entry(pool.clone()).or_default().refused = *refused;
        }
        for (pool, open) in state.shares.pools() {
            pools.entry(pool.clone()).or_default().open = open as u64;
        }
        mvm_wire::door::Published {
            open: state.shares.open() as u64,
            max: state.shares.max() as u64,
            refused: state.refused.values().sum(),
            pools,
        }
    }

    fn set_problem(&self, pool: &PoolPath, publish: Publish, problem: Option<String>) {
        let key = (pool.clone(), publish);
        let mut state = self.state();
        match problem {
            Some(problem) => {
                // Once for each cause: clients may come again and again.
                if state.problems.get(&key) != Some(&problem) {
                    tracing::warn!(%pool, %publish, problem, "a published port is not served");
                }
                state.problems.insert(key, problem);
            }
            None => drop(state.problems.remove(&key)),
        }
    }

    /// Counts a connection that is not let in.
    fn refuse(&self, pool: &PoolPath, publish: Publish, problem: String) {
        *self.state().refused.entry(pool.clone()).or_default() += 1;
        self.set_problem(pool, publish, Some(problem));
    }

    /// Gives one more connection to the instance that has fewest, of those the one that was longest
    /// without a new one.
    fn pick(&self, ready: Vec<(InstancePath, Session)>) -> Option<(Carried<'_>, Session)> {
        let mut state = self.state();
        let load = |path: &InstancePath| {
            state.loads.get(path).map_or((0, 0), |load| (load.open, load.last))
        };
        let (instance, session) = ready.into_iter().min_by_key(|(path, _)| load(path))?;
        // Counted at once, so that the next connection sees it.
        state.give(&instance);
        drop(state);
        Some((Carried { published: self, instance }, session))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place among the connections that there may be, until it is dropped.
struct Place {
    node: Arc<Node>,
    pool: PoolPath,
    client: IpAddr,
}

impl Place {
    fn take(node: &Arc<Node>, pool: &PoolPath, client: IpAddr) -> Result<Self, Full> {
        node.published.state().shares.admit(pool, client)?;
        Ok(Self { node: node.clone(), pool: pool.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.node.published.state().shares.release(&self.pool, self.client);
    }
}

/// A connection that an instance carries, until it is dropped.
struct Carried<'a> {
    published: &'a Published,
    instance: InstancePath,
}

impl<'a> Carried<'a> {
    fn by(published: &'a Published, instance: InstancePath) -> Self {
        published.state().give(&instance);
        Self { published, instance }
    }
}

impl Drop for Carried<'_> {
    fn drop(&mut self) {
        if let Some(load) = self.published.state().loads.get_mut(&self.instance) {
            load.open -= 1;
        }
    }
}
