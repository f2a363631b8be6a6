//! The network of a Linux machine: netlink, `/dev/net/tun`, `/proc/sys/net` and `nft`.
//!
//! Order makes every half-done change safe: links go before the rules that guard them, and come
//! after. A kill between any two steps leaves something that [`ensure`](Network::ensure) mends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, LinkName, NetId, NodeNetwork, TenantNetwork, Traffic};
use mvm_core::nft::{render_delta, render_full};
use tokio::sync::Mutex;

use super::claims::Claims;
use super::links::{Link, LinkKind, Links};
use super::names::{Names, RESOLV_CONF};
use super::ownership::Ownership;
use super::resting::Resting;
use super::tap::NewTap;
use super::verify::Machine;
use super::{
    Difference, Network, NetworkError, Occupied, Owner, Registry, Surroundings, nft, sysctl,
};
use crate::platform::firewall::input_drops;

/// Sizes of packets that guests are told, in bytes: what IPv6 needs at least, and what Ethernet, and so a tap,
/// takes at most.
const MIN_MTU: u32 = 1280;
const MAX_MTU: u32 = 1500;

/// The network of the machine, in the network namespace of the thread that made this value.
#[derive(Debug)]
pub struct LinuxNetwork {
    owner: Owner,
    ownership: Ownership,
    registry: Registry,
    links: Links,
    names: Names,
    /// Whether other software's firewall keeps guests from asking at their gateways.
    is_input_dropped: AtomicBool,
    resting: Resting,
    /// Held over each change, so that changes happen one after the other.
    firewall: Mutex<Firewall>,
}

/// What we know of our tables in the kernel.
#[derive(Debug)]
enum Firewall {
    /// Nothing yet: a change could take away what an earlier agent has let through.
    Unknown,
    /// They are what this network renders to, for certain as of this transaction of the kernel's; of
    /// none if somebody else has changed something since they were looked at.
    Applied(NodeNetwork, Option<u32>),
    /// They should be what this network renders to, but a change failed.
    Broken(NodeNetwork),
}

impl LinuxNetwork {
    /// The network of this owner; `claims_dir` is [`CLAIMS_DIR`](super::CLAIMS_DIR) on a machine
    /// that agents share. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// There is no routing netlink socket.
    pub fn new(owner: Owner, claims_dir: PathBuf) -> Result<Self, NetworkError> {
        let registry = Registry::at(&claims_dir);
        let claims = Claims::new(claims_dir, owner.state_dir());
        let ownership = Ownership::new(&owner, claims);
        let links = Links::open()?;
        let firewall = Mutex::new(Firewall::Unknown);
        let names = Names::new(RESOLV_CONF.into());
        let resting = Resting::new();
        let is_input_dropped = AtomicBool::new(false);
        Ok(Self { owner, ownership, registry, links, names, is_input_dropped, resting, firewall })
    }

    /// The same with another file in place of the machine's `/etc/resolv.conf`.
    #[must_use]
    pub fn with_resolv_conf(self, path: PathBuf) -> Self {
        Self { names: Names::new(path), ..self }
    }

    /// A tenant's bridge, made after its guard unless it is there and up.
    async fn guarded_bridge(
        &self,
        firewall: &mut Firewall,
        wanted: NodeNetwork,
        tenant: &TenantNetwork,
    ) -> Result<Link, NetworkError> {
        let found = self.links.get(&tenant.bridge()).await?;
        if let Some(link) = &found {
            self.ownership.check(link)?;
        }
        self.change_firewall(firewall, wanted).await?;
        match found {
            // Mending is for `ensure`: here the way is short.
            Some(bridge) if bridge.is_up => Ok(bridge),
            found => {
                sysctl::ip_forward().ensure()?;
                let addresses = self.links.addresses().await?;
                let has: Vec<Ipv4Net> = addresses
                    .into_iter()
                    .filter(|(index, _)| found.as_ref().is_some_and(|link| link.index == *index))
                    .map(|(_, address)| address)
                    .collect();
                self.ensure_bridge(tenant, found.as_ref(), &has).await
            }
        }
    }

    /// What of `expected` may be made, and why the rest may not.
    fn admissible(
        &self,
        expected: &NodeNetwork,
        links: &BTreeMap<String, Link>,
    ) -> (NodeNetwork, Vec<NetworkError>) {
        let mut errors = Vec::new();
        let mut admissible = expected.clone();
        for tenant in expected.tenants() {
            let claimed = self.ownership.claim(tenant.net_id);
            let bridge = links.get(&tenant.bridge()).map(|bridge| self.ownership.check(bridge));
            // A claim that was lost does not take the network from instances that run.
            let is_admissible = match &bridge {
                Some(checked) => checked.is_ok(),
                None => claimed.is_ok(),
            };
            if !is_admissible {
                admissible.remove_tenant(tenant.net_id);
            }
            errors.extend([Some(claimed), bridge].into_iter().flatten().filter_map(Result::err));
        }
        for instance in expected.instances() {
            let tap = links.get(&instance.tap());
            if let Err(error) = tap.map_or(Ok(()), |tap| self.ownership.check(tap)) {
                errors.push(error);
                admissible.remove_instance(instance);
            }
        }
        (admissible, errors)
    }

    /// Makes bridges and taps as they are to be, and returns what could not be done.
    async fn ensure_links(
        &self,
        wanted: &NodeNetwork,
        links: &BTreeMap<String, Link>,
    ) -> Result<Vec<NetworkError>, NetworkError> {
        let mut errors: Vec<_> = sysctl::ip_forward().ensure().err().into_iter().collect();
        let mut addresses: BTreeMap<u32, Vec<Ipv4Net>> = BTreeMap::new();
        for (index, address) in self.links.addresses().await? {
            addresses.entry(index).or_default().push(address);
        }
        for tenant in wanted.tenants() {
            let found = links.get(&tenant.bridge());
            let has = found.and_then(|link| addresses.get(&link.index));
            let has = has.map_or(&[][..], Vec::as_slice);
            let bridge = match self.ensure_bridge(tenant, found, has).await {
                Ok(bridge) => bridge,
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            };
            for instance in wanted.awake().filter(|instance| instance.tenant == *tenant) {
                let found = links.get(&instance.tap());
                errors.extend(self.ensure_tap(instance, found, &bridge).await.err());
            }
        }
        Ok(errors)
    }

    /// Looks at what other software's firewall does to guests.
    async fn look_at_others(&self) {
        let is_dropped = !input_drops().await.is_empty();
        self.is_input_dropped.store(is_dropped, Ordering::Relaxed);
    }

    async fn machine(&self) -> Result<Machine, NetworkError> {
        Ok(Machine {
            links: self.links_by_name().await?,
            addresses: self.links.addresses().await?,
            routes: self.links.routes().await?,
        })
    }

    /// Deletes our links that are not to be kept, taps before bridges.
    async fn sweep(
        &self,
        links: &BTreeMap<String, Link>,
        is_kept: impl Fn(&Link) -> bool,
    ) -> Vec<NetworkError> {
        let mut errors = Vec::new();
        let (bridges, others): (Vec<_>, Vec<_>) = links
            .values()
            .filter(|link| !is_kept(link))
            .partition(|link| matches!(link.kind, LinkKind::Bridge { .. }));
        for link in others.into_iter().chain(bridges) {
            let deleted = match self.ownership.is_ours(link) {
                Ok(true) => self.links.delete(link).await,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            errors.extend(deleted.err());
        }
        errors
    }

    async fn links_by_name(&self) -> Result<BTreeMap<String, Link>, NetworkError> {
        let links = self.links.all().await?;
        Ok(links.into_iter().map(|link| (link.name.clone(), link)).collect())
    }

    /// Makes a tenant's bridge, or mends it; `addresses` are those that it has.
    async fn ensure_bridge(
        &self,
        tenant: &TenantNetwork,
        found: Option<&Link>,
        addresses: &[Ipv4Net],
    ) -> Result<Link, NetworkError> {
        let (name, mac) = (tenant.bridge(), tenant.gateway_mac());
        let bridge = match found {
            Some(link) => {
                self.ownership.check(link)?;
                let settings =
                    LinkKind::Bridge { forwards_link_local: true, runs_spanning_tree: false };
                if link.mac != Some(mac) || link.kind != settings {
                    self.links.reset_bridge(link, mac).await?;
                }
                link.clone()
            }
            None => {
                self.links.add_bridge(&name, mac).await?;
                self.links.found(&name).await?
            }
        };
        if bridge.alias.as_deref() != Some(self.ownership.alias()) {
            self.links.set_alias(&bridge, self.ownership.alias()).await?;
        }
        for setting in sysctl::of_bridge(&name) {
            setting.ensure()?;
        }
        let gateway = tenant.gateway_net();
        for &address in addresses.iter().filter(|address| **address != gateway) {
            self.links.delete_address(&bridge, address).await?;
        }
        if !addresses.contains(&gateway) {
            self.links.add_address(&bridge, gateway).await?;
        }
        if !bridge.is_up {
            self.links.bring_up(&bridge).await?;
        }
        Ok(bridge)
    }

    /// Lets an instance's packets through, and returns its tap, if it has one, and its tenant's bridge.
    async fn admit(
        &self,
        firewall: &mut Firewall,
        instance: InstanceNetwork,
    ) -> Result<(Option<Link>, Link), NetworkError> {
        let applied = firewall.network().ok_or(NetworkError::NotEnsured)?;
        let mut wanted = applied.clone();
        wanted.add_instance(instance)?;
        if let Firewall::Applied(applied, left_at) = firewall
            && !is_as_left(*left_at).await?
        {
            // It may have lost what it had from before its sleep: it gets that once more.
            applied.remove_instance(&instance);
        }
        self.ownership.claim(instance.tenant.net_id)?;
        let tap = self.links.get(&instance.tap()).await?;
        if let Some(link) = &tap {
            self.ownership.check(link)?;
        }
        let bridge = self.guarded_bridge(firewall, wanted, &instance.tenant).await?;
        Ok((tap, bridge))
    }

    /// Makes an instance's tap on its bridge, or mends it.
    async fn ensure_tap(
        &self,
        instance: &InstanceNetwork,
        found: Option<&Link>,
        bridge: &Link,
    ) -> Result<(), NetworkError> {
        let (name, owner_uid) = (instance.tap(), instance.owner_uid());
        let tap = match found {
            Some(link) => {
                self.ownership.check(link)?;
                if link.kind == (LinkKind::Tap { owner_uid: Some(owner_uid) }) {
                    link.clone()
                } else {
                    self.links.delete(link).await?;
                    self.create_tap(&name, owner_uid).await?
                }
            }
            None => self.create_tap(&name, owner_uid).await?,
        };
        for setting in sysctl::of_tap(&name) {
            setting.ensure()?;
        }
        if tap.controller != Some(bridge.index) {
            self.links.attach(&tap, bridge).await?;
        }
        // Whatever was said while it rested.
        self.links.leave_to_port(bridge, instance.mac()).await?;
        // Never before it is attached: on its own it would lead into the host.
        if !tap.is_up {
            self.links.bring_up(&tap).await?;
        }
        Ok(())
    }

    /// Deletes an instance's tap, if there is one and it is ours.
    async fn delete_tap(&self, instance: &InstanceNetwork) -> Result<(), NetworkError> {
        match self.links.get(&instance.tap()).await? {
            Some(tap) if self.ownership.is_ours(&tap)? => self.links.delete(&tap).await,
            _ => Ok(()),
        }
    }

    async fn create_tap(&self, name: &str, owner_uid: u32) -> Result<Link, NetworkError> {
        let failed = |error| NetworkError::system(format!("create the tap {name}"))(error);
        let new = NewTap::create(name, owner_uid).map_err(failed)?;
        let tap = self.links.found(name).await?;
        // Marked before it can outlive us: there is never a tap that nobody owns.
        self.links.set_alias(&tap, self.ownership.alias()).await?;
        new.persist().map_err(failed)?;
        Ok(tap)
    }

    /// Turns the firewall that we know of into that of `wanted`.
    async fn change_firewall(
        &self,
        firewall: &mut Firewall,
        wanted: NodeNetwork,
    ) -> Result<(), NetworkError> {
        let table = self.owner.table();
        let full = render_full(table, &wanted);
        let (batch, builds_on) = match firewall {
            Firewall::Applied(applied, left_at) => {
                (render_delta(table, applied, &wanted), Some(*left_at))
            }
            Firewall::Unknown | Firewall::Broken(_) => (full.clone(), None),
        };
        if batch.is_empty() {
            if let Firewall::Applied(applied, _) = firewall {
                // Who sleeps is in no rule.
                *applied = wanted;
            }
            return Ok(());
        }
        // Stays so if the batch fails, or nobody waits for its end.
        *firewall = Firewall::Broken(wanted.clone());
        let left_at = match nft::apply(batch).await {
            // A change is of what is known only if nothing came before it.
            Ok(number) => number.filter(|number| {
                builds_on.is_none_or(|left_at| left_at == Some(number.wrapping_sub(1)))
            }),
            Err(error) => {
                tracing::warn!(%table, %error, "the firewall is not as it was left: replacing it");
                nft::apply(full).await?
            }
        };
        *firewall = Firewall::Applied(wanted, left_at);
        Ok(())
    }

    /// Reads the kernel's tables and replaces them if they are not those of `wanted`; tells whether they
    /// were not.
    async fn ensure_firewall(
        &self,
        firewall: &mut Firewall,
        wanted: NodeNetwork,
    ) -> Result<bool, NetworkError> {
        let table = self.owner.table();
        let expected = nft::expected(table.clone(), &wanted).await?;
        // Before the tables are read: what is changed meanwhile is looked at again.
        let mut left_at = nft::generation().await?;
        let differs = nft::current(table.clone()).await? != expected;
        if differs {
            *firewall = Firewall::Broken(wanted.clone());
            left_at = nft::apply(render_full(table, &wanted)).await?;
        }
        *firewall = Firewall::Applied(wanted, left_at);
        Ok(differs)
    }
}

/// Whether nobody has changed any firewall since this transaction.
async fn is_as_left(left_at: Option<u32>) -> Result<bool, NetworkError> {
    Ok(left_at.is_some() && nft::generation().await? == left_at)
}

impl Firewall {
    /// The network that the tables are, or should be, of.
    fn network(&self) -> Option<&NodeNetwork> {
        match self {
            Self::Unknown => None,
            Self::Applied(network, _) | Self::Broken(network) => Some(network),
        }
    }
}

#[async_trait]
impl Network for LinuxNetwork {
    async fn claim(&self, net_id: NetId) -> Result<(), NetworkError> {
        self.ownership.claim(net_id)
    }

    async fn release(&self, net_id: NetId) -> Result<(), NetworkError> {
        self.ownership.claims().release(net_id)
    }

    async fn occupied(&self) -> Result<Occupied, NetworkError> {
        let claims = self.ownership.claims().all()?;
        let is_other =
            |(_, holder): &(&NetId, &PathBuf)| holder.as_path() != self.owner.state_dir();
        let mut net_ids: BTreeSet<NetId> =
            claims.iter().filter(is_other).map(|(net_id, _)| *net_id).collect();
        let mut ours = BTreeSet::new();
        for link in self.links.all().await? {
            if self.ownership.is_ours(&link)? {
                ours.insert(link.index);
            } else if let Some(name) = LinkName::parse(&link.name) {
                net_ids.insert(name.net_id());
            }
        }
        let routes = self.links.routes().await?;
        let is_other = |link: Option<u32>| link.is_none_or(|link| !ours.contains(&link));
        let subnets = routes
            .into_iter()
            .filter(|route| is_other(route.link))
            .map(|route| route.destination.trunc())
            .collect();
        Ok(Occupied { net_ids, subnets })
    }

    async fn ensure(&self, expected: &NodeNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        // Before there is anything with the mark.
        let registered = self.registry.register(self.owner.mark(), self.owner.state_dir());
        registered.map_err(NetworkError::system("register the state directory with its mark"))?;
        let links = self.links_by_name().await?;
        let (wanted, mut errors) = self.admissible(expected, &links);

        let kept: BTreeSet<String> = expected
            .tenants()
            .map(TenantNetwork::bridge)
            .chain(expected.awake().map(InstanceNetwork::tap))
            .collect();
        let left = self.sweep(&links, |link| kept.contains(&link.name)).await;
        if !left.is_empty() {
            // What is left over is still in the firewall that is there.
            errors.extend(left);
            return NetworkError::all(errors);
        }
        if let Err(error) = self.ensure_firewall(&mut firewall, wanted.clone()).await {
            // No link comes up without its guard.
            errors.push(error);
            return NetworkError::all(errors);
        }
        if let Some(former) = self.owner.former_table() {
            // The new tables guard what these did.
            let removal = render_full(former, &NodeNetwork::default());
            errors.extend(nft::apply(removal).await.err());
        }
        self.look_at_others().await;
        if wanted.is_empty() {
            return NetworkError::all(errors);
        }
        errors.extend(self.ensure_links(&wanted, &links).await?);
        NetworkError::all(errors)
    }

    async fn add_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        let applied = firewall.network().ok_or(NetworkError::NotEnsured)?;
        let mut wanted = applied.clone();
        wanted.add_tenant(tenant)?;
        self.ownership.claim(tenant.net_id)?;
        self.guarded_bridge(&mut firewall, wanted, &tenant).await.map(drop)
    }

    async fn add_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        let (tap, bridge) = self.admit(&mut firewall, instance).await?;
        self.ensure_tap(&instance, tap.as_ref(), &bridge).await
    }

    async fn admit_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        self.admit(&mut firewall, instance).await.map(drop)
    }

    async fn take_tap(&self, instance: InstanceNetwork, pid: u32) -> Result<(), NetworkError> {
        let _firewall = self.firewall.lock().await;
        let (name, owner_uid) = (instance.tap(), instance.owner_uid());
        let bridge = self.links.found(&instance.tenant.bridge()).await?;
        self.ownership.check(&bridge)?;
        let there = Links::of_process(pid)?;
        let made = match there.is_beside(&self.links)? {
            true => None,
            false => there.get(&name).await?,
        };
        let Some(tap) = made else {
            let taken = self.links.found(&name).await?;
            return self.ensure_tap(&instance, Some(&taken), &bridge).await;
        };
        if tap.kind != (LinkKind::Tap { owner_uid: Some(owner_uid) }) {
            return Err(NetworkError::system(format!("take {name} from process {pid}"))(
                std::io::Error::other("it is no tap of the instance's user"),
            ));
        }
        // Of a run before, or made anew while the VMM started.
        if let Some(old) = self.links.get(&name).await? {
            self.ownership.check(&old)?;
            self.links.delete(&old).await?;
        }
        there.hand_over(&tap, &self.links, self.ownership.alias(), &bridge).await?;
        let tap = self.links.found(&name).await?;
        self.ensure_tap(&instance, Some(&tap), &bridge).await
    }

    async fn remove_tap(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        if let Firewall::Applied(network, _) | Firewall::Broken(network) = &mut *firewall {
            network.fall_asleep(&instance);
        }
        self.delete_tap(&instance).await
    }

    async fn remove_instance(&self, instance: InstanceNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        let mut errors: Vec<_> = self.delete_tap(&instance).await.err().into_iter().collect();
        // Without its element a tap that could not be deleted is cut off.
        if let Some(applied) = firewall.network() {
            let mut wanted = applied.clone();
            wanted.remove_instance(&instance);
            errors.extend(self.change_firewall(&mut firewall, wanted).await.err());
        }
        NetworkError::all(errors)
    }

    async fn remove_tenant(&self, tenant: TenantNetwork) -> Result<(), NetworkError> {
        let mut firewall = self.firewall.lock().await;
        let links = self.links_by_name().await?;
        let is_other = |link: &Link| {
            LinkName::parse(&link.name).is_none_or(|name| name.net_id() != tenant.net_id)
        };
        let errors = self.sweep(&links, is_other).await;
        if !errors.is_empty() {
            // What is left over needs its guard and its claim.
            return NetworkError::all(errors);
        }
        let mut errors = Vec::new();
        if let Some(applied) = firewall.network() {
            let mut wanted = applied.clone();
            wanted.remove_tenant(tenant.net_id);
            errors.extend(self.change_firewall(&mut firewall, wanted).await.err());
        }
        errors.extend(self.ownership.claims().release(tenant.net_id).err());
        NetworkError::all(errors)
    }

    async fn traffic(&self, instance: InstanceNetwork) -> Result<Option<Traffic>, NetworkError> {
        // What comes in from a tap is what its guest sends.
        Ok(self.links.get(&instance.tap()).await?.map(|tap| {
            let (sent_bytes, received_bytes) = tap.carried;
            Traffic { sent_bytes, received_bytes }
        }))
    }

    async fn mend_firewall(&self) -> Result<bool, NetworkError> {
        let mut firewall = self.firewall.lock().await;
        let wanted = match &*firewall {
            Firewall::Unknown => return Ok(false),
            Firewall::Applied(_, left_at) if is_as_left(*left_at).await? => return Ok(false),
            Firewall::Applied(network, _) | Firewall::Broken(network) => network.clone(),
        };
        self.look_at_others().await;
        self.ensure_firewall(&mut firewall, wanted).await
    }

    async fn mend_links(&self) -> Result<bool, NetworkError> {
        let firewall = self.firewall.lock().await;
        // Links are made only behind rules that are known to be there.
        let Firewall::Applied(wanted, _) = &*firewall else { return Ok(false) };
        let machine = self.machine().await?;
        let differences = machine.differences(wanted, &self.ownership)?;
        if !differences.iter().any(Difference::is_of_links) {
            return Ok(false);
        }
        let (wanted, mut errors) = self.admissible(wanted, &machine.links);
        errors.extend(self.ensure_links(&wanted, &machine.links).await?);
        NetworkError::all(errors).map(|()| true)
    }

    async fn cut_off(
        &self,
        running: &[InstanceNetwork],
    ) -> Result<BTreeSet<InstanceNetwork>, NetworkError> {
        // Not in the middle of a change.
        let _firewall = self.firewall.lock().await;
        let links = self.links_by_name().await?;
        let is_connected = |instance: &&InstanceNetwork| {
            // A link that is down tells nothing of its other end.
            links.get(&instance.tap()).is_some_and(|tap| tap.has_carrier || !tap.is_up)
        };
        Ok(running.iter().filter(|instance| !is_connected(instance)).copied().collect())
    }

    async fn serve_names(&self, tenants: &BTreeSet<TenantNetwork>) -> Result<(), NetworkError> {
        self.names.ensure(tenants).await
    }

    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        let conf = self.names.conf();
        let addresses = self.links.addresses().await?;
        let own: Vec<_> = addresses.iter().map(|(_, net)| net.addr()).collect();
        let mtu = self.links.uplink_mtu().await?;
        Ok(Surroundings {
            nameservers: conf.direct(&own).collect(),
            is_gateway_last: self.is_input_dropped.load(Ordering::Relaxed),
            search: conf.search.clone(),
            resolver_options: conf.options.clone(),
            mtu: mtu.map(|mtu| mtu.clamp(MIN_MTU, MAX_MTU) as u16),
        })
    }

    async fn watch_resting(&self, resting: &BTreeSet<InstanceNetwork>) -> Result<(), NetworkError> {
        self.resting.ensure(&self.links, resting).await
    }

    async fn visited(&self) -> InstanceNetwork {
        self.resting.visited().await
    }

    async fn verify(&self, expected: &NodeNetwork) -> Result<Vec<Difference>, NetworkError> {
        // Not in the middle of a change.
        let _firewall = self.firewall.lock().await;
        let machine = self.machine().await?;
        let mut differences = machine.differences(expected, &self.ownership)?;
        let table = self.owner.table();
        let wanted = nft::expected(table.clone(), expected).await?;
        differences.extend(nft::current(table.clone()).await?.differences(&wanted));
        Ok(differences)
    }
}
