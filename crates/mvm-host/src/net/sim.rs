//! A simulated machine's network, for the fleet simulator and for tests of what calls the seam.
//!
//! Agents of one [`SimMachine`] share its links and claims, as real ones do. The machine can be
//! tampered with and told to fail.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, LinkName, NetId, NodeNetwork, TenantNetwork, Traffic};
use tokio::sync::Notify;

use crate::held::Held;

use super::{Difference, Network, NetworkError, Occupied, Surroundings};

/// The machine that simulated agents share.
#[derive(Debug, Clone, Default)]
pub struct SimMachine {
    state: Arc<Mutex<State>>,
    visits: Arc<Notify>,
    held: Held<NetId>,
}

#[derive(Debug, Default)]
struct State {
    /// State directories by net id.
    claims: BTreeMap<NetId, PathBuf>,
    links: BTreeMap<String, SimLink>,
    /// Networks that the machine reaches by other links.
    subnets: BTreeSet<Ipv4Net>,
    /// What each agent's firewall lets through, by state directory.
    firewalls: BTreeMap<PathBuf, NodeNetwork>,
    /// How many of the next changes fail.
    failures: u32,
    /// Taps that were taken away from microVMs that ran.
    lost: BTreeSet<String>,
    /// Who is watched, and who was visited, by state directory.
    resting: BTreeMap<PathBuf, (BTreeSet<InstanceNetwork>, VecDeque<InstanceNetwork>)>,
    /// Whose names are served, by state directory.
    names: BTreeMap<PathBuf, BTreeSet<TenantNetwork>>,
}

#[derive(Debug, Clone)]
struct SimLink {
    /// The state directory of its agent; `None` is other software.
    owner: Option<PathBuf>,
    is_up: bool,
}

/// The network of one agent on a simulated machine.
#[derive(Debug)]
pub struct SimNetwork {
    machine: SimMachine,
    state_dir: PathBuf,
    /// Whether this agent has called `ensure`.
    is_ensured: AtomicBool,
}

impl SimMachine {
    /// A machine without links.
    pub fn new() -> Self {
        Self::default()
    }

    /// The agent with this state directory; asking again is like restarting it.
    pub fn agent(&self, state_dir: impl Into<PathBuf>) -> SimNetwork {
        SimNetwork {
            machine: self.clone(),
            state_dir: state_dir.into(),
            is_ensured: AtomicBool::new(false),
        }
    }

    /// Holds up everything that is done to a tenant's network from now on, or lets it go.
    pub fn hold(&self, net_id: NetId, is_held: bool) {
        self.held.hold(net_id, is_held);
    }

    /// Makes the next changes fail, each before it has an effect.
    pub fn fail_next(&self, changes: u32) {
        self.lock().failures = changes;
    }

    /// Puts a link of other software there.
    pub fn add_foreign_link(&self, name: &str) {
        self.lock().links.insert(name.to_owned(), SimLink { owner: None, is_up: true });
    }

    /// Puts a route of other software there.
    pub fn add_foreign_subnet(&self, subnet: Ipv4Net) {
        self.lock().subnets.insert(subnet);
    }

    /// Takes a link away behind its agent's back. A microVM that had a tap has it no longer.
    pub fn remove_link(&self, name: &str) {
        let mut state = self.lock();
        state.links.remove(name);
        state.lost.insert(name.to_owned());
    }

    /// Takes a link down behind its agent's back.
    pub fn take_down(&self, name: &str) {
        if let Some(link) = self.lock().links.get_mut(name) {
            link.is_up = false;
        }
    }

    /// The tenants that have a name server.
    pub fn served_names(&self) -> BTreeSet<TenantNetwork> {
        self.lock().names.values().flatten().copied().collect()
    }

    /// Plays a neighbour that sends an instance a packet; tells whether anybody looks out for it.
    pub fn visit(&self, instance: InstanceNetwork) -> bool {
        let mut state = self.lock();
        let mut agents = state.resting.values_mut();
        let watched = agents.find(|(watched, _)| watched.contains(&instance));
        let is_seen = watched.map(|(_, visits)| visits.push_back(instance)).is_some();
        self.visits.notify_waiters();
        is_seen
    }

    /// The names of all links.
    pub fn links(&self) -> BTreeSet<String> {
        self.lock().links.keys().cloned().collect()
    }

    /// The net ids that agents have claimed, one line each.
    pub fn claims(&self) -> Vec<String> {
        self.lock().claims.keys().map(|id| format!("net id {}", id.0)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts a change, which may be one that fails.
    fn change(&mut self, operation: impl Into<String>) -> Result<(), NetworkError> {
        if self.failures == 0 {
            return Ok(());
        }
        self.failures -= 1;
        Err(NetworkError::system(operation)(io::Error::other("simulated failure")))
    }

    fn claim(&mut self, net_id: NetId, state_dir: &PathBuf) -> Result<(), NetworkError> {
        match self.claims.get(&net_id) {
            Some(owner) if owner == state_dir => Ok(()),
            Some(owner) => {
                let claim = PathBuf::from(net_id.0.to_string());
                Err(NetworkError::Claimed { net_id, owner: owner.clone(), claim })
            }
            None => {
                self.change(format!("claim net id {}", net_id.0))?;
                self.claims.insert(net_id, state_dir.clone());
                Ok(())
            }
        }
    }

    fn check(&self, name: &str, state_dir: &PathBuf) -> Result<(), NetworkError> {
        match self.links.get(name) {
            Some(link) if link.owner.as_ref() != Some(state_dir) => {
                let owner = link.owner.as_ref().map_or_else(
                    || "other software".to_owned(),
                    |owner| format!("the agent of {}", owner.display()),
                );
                Err(NetworkError::Taken { link: name.to_owned(), owner })
            }
            _ => Ok(()),
        }
    }

    fn ensure_link(&mut self, name: String, state_dir: &PathBuf) -> Result<(), NetworkError> {
        self.check(&name, state_dir)?;
        if !self.links.get(&name).is_some_and(|link| link.is_up) {
            self.change(format!("make the link {name}"))?;
            self.links.insert(name, SimLink { owner: Some(state_dir.clone()), is_up: true });
        }
        Ok(())
    }

    /// Deletes an agent's links that are not to be kept.
    fn sweep(&mut self, state_dir: &PathBuf, is_kept: impl Fn(&str) -> bool) -> Vec<NetworkError> {
        let is_left = |(name, link): &(&String, &SimLink)| {
            link.owner.as_ref() == Some(state_dir) && !is_kept(name)
        };
        let left: Vec<String> =
            self.links.iter().filter(is_left).map(|(name, _)| name.clone()).collect();
        let mut errors = Vec::new();
        for name in left {
            match self.change(format!("delete the link {name}")) {
                Ok(()) => drop(self.links.remove(&name)),
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    fn set_firewall(
        &mut self,
        state_dir: &PathBuf,
        change: impl FnOnce(&mut NodeNetwork),
    ) -> Result<(), NetworkError> {
        let before = self.firewalls.get(state_dir).cloned().unwrap_or_default();
        let mut after = before.clone();
        change(&mut after);
        if !has_same_rules(&before, &after) {
            self.change("change the firewall")?;
        }
        let firewall = self.firewalls.entry(state_dir.clone()).or_default();
        *firewall = after;
        if firewall.is_empty() {
            self.firewalls.remove(state_dir);
        }
        Ok(())
    }
}

#[async_trait]
impl Network for SimNetwork {
    async fn claim(&self, net_id: NetId) -> Result<(), NetworkError> {
        self.machine.lock().claim(net_id, &self.state_dir)
    }

    async fn release(&self, net_id: NetId) -> Result<(), NetworkError> {
        let mut state = self.machine.lock();
        if state.claims.get(&net_id) == Some(&self.state_dir) {
            state.change(format!("release net id {}", net_id.0))?;
            state.claims.remove(&net_id);
        }
        Ok(())
    }

    async fn occupied(&self) -> Result<Occupied, NetworkError> {
        let state = self.machine.lock();
        let claims = state.claims.iter();
        let claimed = claims.filter(|(_, owner)| **owner != self.state_dir).map(|(id, _)| *id);
        let links = state.links.iter();
        let named = links
            .filter(|(_, link)| link.owner.as_ref() != Some(&self.state_dir))
            .filter_map(|(name, _)| LinkName::parse(name).map(|name| name.net_id()));
        let net_ids = claimed.chain(named).collect();
        Ok(Occupied { net_ids, subnets: state.subnets.clone() })
    }

    async fn ensure(&self, expected: &NodeNetwork) -> Result<(), NetworkError> {
        let mut state = self.machine.lock();
        let state_dir = &self.state_dir;
        self.is_ensured.store(true, Ordering::Relaxed);
        let (mut errors, mut wanted) = (Vec::new(), expected.clone());
        for tenant in expected.tenants() {
            let claimed = state.claim(tenant.net_id, state_dir);
            if let Err(error) = claimed.and_then(|()| state.check(&tenant.bridge(), state_dir)) {
                errors.push(error);
                wanted.remove_tenant(tenant.net_id);
            }
        }
        for instance in expected.instances() {
            if let Err(error) = state.check(&instance.tap(), state_dir) {
                errors.push(error);
                wanted.remove_instance(instance);
            }
        }
        let kept: BTreeSet<String> = names(expected).collect();
        errors.extend(state.sweep(state_dir, |name| kept.contains(name)));
        let target = wanted.clone();
        errors.extend(state.set_firewall(state_dir, |firewall| *firewall = target).err());
        for name in names(&wanted) {
            errors.extend(state.ensure_link(name, state_dir).err());
        }
        NetworkError::all(errors)
    }

    async fn add_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError> {
        self.machine.held.pass(&tenant.net_id).await;
        if !self.is_ensured.load(Ordering::Relaxed) {
            return Err(NetworkError::NotEnsured);
        }
        let mut state = self.machine.lock();
        let mut wanted = state.firewalls.get(&self.state_dir).cloned().unwrap_or_default();
        wanted.add_tenant(tenant)?;
        state.claim(tenant.net_id, &self.state_dir)?;
        state.check(&tenant.bridge(), &self.state_dir)?;
        state.set_firewall(&self.state_dir, |firewall| *firewall = wanted)?;
        state.ensure_link(tenant.bridge(), &self.state_dir)
    }

    async fn add_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        self.admit_instance(instance).await?;
        let mut state = self.machine.lock();
        state.lost.remove(&instance.tap());
        state.ensure_link(instance.tap(), &self.state_dir)
    }

    async fn admit_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        self.machine.held.pass(&instance.tenant.net_id).await;
        if !self.is_ensured.load(Ordering::Relaxed) {
            return Err(NetworkError::NotEnsured);
        }
        let mut state = self.machine.lock();
        let mut wanted = state.firewalls.get(&self.state_dir).cloned().unwrap_or_default();
        wanted.add_instance(instance)?;
        state.claim(instance.tenant.net_id, &self.state_dir)?;
        state.check(&instance.tenant.bridge(), &self.state_dir)?;
        state.check(&instance.tap(), &self.state_dir)?;
        state.set_firewall(&self.state_dir, |firewall| *firewall = wanted)?;
        state.ensure_link(instance.tenant.bridge(), &self.state_dir)
    }

    async fn take_tap(&self, instance: InstanceNetwork, _pid: u32) -> Result<(), NetworkError> {
        self.machine.held.pass(&instance.tenant.net_id).await;
        let mut state = self.machine.lock();
        state.lost.remove(&instance.tap());
        state.ensure_link(instance.tap(), &self.state_dir)
    }

    async fn remove_tap(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        self.machine.held.pass(&instance.tenant.net_id).await;
        let mut state = self.machine.lock();
        if let Some(firewall) = state.firewalls.get_mut(&self.state_dir) {
            firewall.fall_asleep(&instance);
        }
        let errors = state.sweep(&self.state_dir, |name| name != instance.tap());
        NetworkError::all(errors)
    }

    async fn remove_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        self.machine.held.pass(&instance.tenant.net_id).await;
        let mut state = self.machine.lock();
        let mut errors = state.sweep(&self.state_dir, |name| name != instance.tap());
        let changed =
            state.set_firewall(&self.state_dir, |firewall| firewall.remove_instance(&instance));
        errors.extend(changed.err());
        NetworkError::all(errors)
    }

    async fn remove_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError> {
        self.machine.held.pass(&tenant.net_id).await;
        let mut state = self.machine.lock();
        let is_other =
            |name: &str| LinkName::parse(name).is_none_or(|name| name.net_id() != tenant.net_id);
        let mut errors = state.sweep(&self.state_dir, is_other);
        if errors.is_empty() {
            let changed = state
                .set_firewall(&self.state_dir, |firewall| firewall.remove_tenant(tenant.net_id));
            errors.extend(changed.err());
            if state.claims.get(&tenant.net_id) == Some(&self.state_dir) {
                state.claims.remove(&tenant.net_id);
            }
        }
        NetworkError::all(errors)
    }

    async fn traffic(&self, instance: InstanceNetwork) -> Result<Option<Traffic>, NetworkError> {
        let has_tap = self.machine.lock().links.contains_key(&instance.tap());
        Ok(has_tap.then(Traffic::default))
    }

    async fn mend_firewall(&self) -> Result<bool, NetworkError> {
        // Nobody else changes a simulated one.
        Ok(false)
    }

    async fn mend_links(&self) -> Result<bool, NetworkError> {
        let mut state = self.machine.lock();
        let Some(wanted) = state.firewalls.get(&self.state_dir).cloned() else { return Ok(false) };
        let is_well = |name: &String| state.links.get(name).is_some_and(|link| link.is_up);
        let broken: Vec<String> = names(&wanted).filter(|name| !is_well(name)).collect();
        let mut errors = Vec::new();
        for name in &broken {
            errors.extend(state.ensure_link(name.clone(), &self.state_dir).err());
        }
        NetworkError::all(errors).map(|()| !broken.is_empty())
    }

    async fn cut_off(
        &self,
        running: &[InstanceNetwork],
    ) -> Result<BTreeSet<InstanceNetwork>, NetworkError> {
        let state = self.machine.lock();
        let is_connected = |instance: &&InstanceNetwork| {
            let tap = instance.tap();
            state.links.contains_key(&tap) && !state.lost.contains(&tap)
        };
        Ok(running.iter().filter(|instance| !is_connected(instance)).copied().collect())
    }

    async fn serve_names(&self, tenants: &BTreeSet<TenantNetwork>) -> Result<(), NetworkError> {
        self.machine.lock().names.insert(self.state_dir.clone(), tenants.clone());
        Ok(())
    }

    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        Ok(Surroundings::default())
    }

    async fn watch_resting(&self, resting: &BTreeSet<InstanceNetwork>) -> Result<(), NetworkError> {
        let mut state = self.machine.lock();
        state.resting.entry(self.state_dir.clone()).or_default().0 = resting.clone();
        Ok(())
    }

    async fn visited(&self) -> InstanceNetwork {
        loop {
            let visit = self.machine.visits.notified();
            let next = {
                let mut state = self.machine.lock();
                let agent = state.resting.entry(self.state_dir.clone()).or_default();
                agent.1.pop_front()
            };
            match next {
                Some(instance) => return instance,
                None => visit.await,
            }
        }
    }

    async fn verify(&self, expected: &NodeNetwork) -> Result<Vec<Difference>, NetworkError> {
        let state = self.machine.lock();
        let mut differences = Vec::new();
        for tenant in expected.tenants() {
            if state.claims.get(&tenant.net_id) != Some(&self.state_dir) {
                differences.push(Difference::ClaimMissing { net_id: tenant.net_id.0 });
            }
        }
        let kept: BTreeSet<String> = names(expected).collect();
        for name in &kept {
            let link = name.clone();
            match state.links.get(name) {
                None => differences.push(Difference::LinkMissing { link }),
                Some(found) if found.owner.as_ref() != Some(&self.state_dir) => {
                    let owner = "somebody else".to_owned();
                    differences.push(Difference::LinkForeign { link, owner });
                }
                Some(found) if !found.is_up => differences.push(Difference::LinkDown { link }),
                Some(_) => {}
            }
        }
        for (name, link) in &state.links {
            if link.owner.as_ref() == Some(&self.state_dir) && !kept.contains(name) {
                differences.push(Difference::LinkUnexpected { link: name.clone() });
            }
        }
        let nothing = NodeNetwork::default();
        let firewall = state.firewalls.get(&self.state_dir).unwrap_or(&nothing);
        if !has_same_rules(firewall, expected) {
            let object = "the simulated tables".to_owned();
            differences.push(Difference::FirewallDefinition { object });
        }
        Ok(differences)
    }
}

fn has_same_rules(one: &NodeNetwork, other: &NodeNetwork) -> bool {
    one.tenants().eq(other.tenants()) && one.instances().eq(other.instances())
}

/// The names of all links of a network, bridges first.
fn names(network: &NodeNetwork) -> impl Iterator<Item = String> {
    let bridges = network.tenants().map(TenantNetwork::bridge);
    bridges.chain(network.awake().map(InstanceNetwork::tap))
}
