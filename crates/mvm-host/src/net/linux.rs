//! The network of a Linux machine: netlink, `/dev/net/tun`, `/proc/sys/net` and `nft`.
//!
//! Order makes every half-done change safe: links go before the rules that guard them, and come
//! after. A kill between any two steps leaves something that [`ensure`](Network::ensure) mends.

mod firewall;
mod making;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use mvm_core::net::{InstanceNetwork, LinkName, NetId, NodeNetwork, TenantNetwork, Traffic};
use mvm_core::nft::render_full;
use tokio::sync::Mutex;

use firewall::{Firewall, is_as_left};

use super::claims::Claims;
use super::links::{Link, LinkKind, Links};
use super::names::{Names, RESOLV_CONF};
use super::ownership::Ownership;
use super::resting::Resting;
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
        firewall.change(self.owner.table(), wanted).await?;
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

    async fn links_by_name(&self) -> Result<BTreeMap<String, Link>, NetworkError> {
        let links = self.links.all().await?;
        Ok(links.into_iter().map(|link| (link.name.clone(), link)).collect())
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
        if let Err(error) = firewall.ensure(self.owner.table(), wanted.clone()).await {
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
            errors.extend(firewall.change(self.owner.table(), wanted).await.err());
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
            errors.extend(firewall.change(self.owner.table(), wanted).await.err());
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
        firewall.ensure(self.owner.table(), wanted).await
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
