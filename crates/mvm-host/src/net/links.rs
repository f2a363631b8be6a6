//! The machine's links, addresses and routes, over netlink.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use mvm_core::net::MacAddr;
use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoTun, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::{NetworkError, namespace};

/// Attribute of a tap's link information with its owner (`IFLA_TUN_OWNER` of `linux/if_link.h`).
const TUN_OWNER: u16 = 1;
/// Bridges treat frames to all reserved link-local addresses that Linux lets them (all but the
/// first three, for spanning tree, pause frames and LACP) as ordinary ones, so that they pass the
/// firewall instead of going to the host unseen.
const GROUP_FWD_MASK: u16 = 0xfff8;

/// A connection to the kernel's routing netlink, in the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Links {
    handle: rtnetlink::Handle,
    connection: JoinHandle<()>,
    namespace: File,
    /// The kernel refuses a second list on a socket that has not taken all of the first.
    listing: Mutex<()>,
}

/// What a link is, as far as we care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LinkKind {
    Bridge { forwards_link_local: bool, runs_spanning_tree: bool },
    Tap { owner_uid: Option<u32> },
    Other,
}

/// One link.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: LinkKind,
    pub(super) alias: Option<String>,
    /// The index of the bridge (or other link) that it is a port of.
    pub(super) controller: Option<u32>,
    pub(super) is_up: bool,
    /// Whether there is something at the other end: of a tap, a process that has it open.
    pub(super) has_carrier: bool,
    /// The largest packet that it takes, in bytes.
    pub(super) mtu: Option<u32>,
    pub(super) mac: Option<MacAddr>,
    /// Bytes that came in from it, and that went out to it.
    pub(super) carried: (u64, u64),
}

/// One IPv4 route with a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Ipv4Net,
    /// The index of the link that it leaves by, if it is one.
    pub(super) link: Option<u32>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Links {
    /// Opens the connection; must be called within a tokio runtime.
    pub(super) fn open() -> Result<Self, NetworkError> {
        Self::connect().map_err(NetworkError::system("open a routing netlink socket"))
    }

    /// Opens one in the network namespace of a process.
    pub(super) fn of_process(pid: u32) -> Result<Self, NetworkError> {
        let runtime = Handle::current();
        let connected = namespace::within(pid, || {
            let _entered = runtime.enter();
            Self::connect()
        });
        let operation = format!("open a routing netlink socket in the namespace of process {pid}");
        connected.map_err(NetworkError::system(operation))
    }

    /// Whether both are in one network namespace.
    pub(super) fn is_beside(&self, other: &Self) -> Result<bool, NetworkError> {
        let inode = |links: &Self| links.namespace.metadata().map(|it| (it.dev(), it.ino()));
        let same = inode(self).and_then(|own| Ok(own == inode(other)?));
        same.map_err(NetworkError::system("compare network namespaces"))
    }

    fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let namespace = namespace::of("thread-self")?;
        let connection = tokio::spawn(connection);
        Ok(Self { handle, connection, namespace, listing: Mutex::new(()) })
    }

    pub(super) async fn all(&self) -> Result<Vec<Link>, NetworkError> {
        let _listing = self.listing.lock().await;
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(failed("list links"))?;
        Ok(links.into_iter().filter_map(link_of).collect())
    }

    pub(super) async fn get(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let request = self.handle.link().get().match_name(name.to_owned());
        match request.execute().try_next().await {
            Ok(message) => Ok(message.and_then(link_of)),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(failed(format!("look up the link {name}"))(error)),
        }
    }

    /// A link that has to be there.
    pub(super) async fn found(&self, name: &str) -> Result<Link, NetworkError> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let link = self.get(name).await?;
        link.ok_or_else(|| NetworkError::system(format!("find the link {name}"))(gone()))
    }

    /// Creates a bridge, down and without alias, but with its MAC.
    pub(super) async fn add_bridge(&self, name: &str, mac: MacAddr) -> Result<(), NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .address(mac.0.to_vec())
            .set_info_data(InfoData::Bridge(vec![
                InfoBridge::StpState(BridgeStpState::Disabled),
                InfoBridge::ForwardDelay(0),
                InfoBridge::GroupFwdMask(GROUP_FWD_MASK),
            ]))
            .build();
        let request = self.handle.link().add(message);
        request.execute().await.map_err(failed(format!("create the bridge {name}")))
    }

    /// Gives a bridge back what [`add_bridge`](Self::add_bridge) gave it.
    pub(super) async fn reset_bridge(&self, link: &Link, mac: MacAddr) -> Result<(), NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(&link.name)
            .index(link.index)
            .address(mac.0.to_vec())
            .set_info_data(InfoData::Bridge(vec![
                InfoBridge::StpState(BridgeStpState::Disabled),
                InfoBridge::GroupFwdMask(GROUP_FWD_MASK),
            ]))
            .build();
        // The kind's own attributes are only changed by a "new link" request for an existing one.
        let request = self.handle.link().add(message).set_flags(REQUEST_AND_ACK);
        request.execute().await.map_err(failed(format!("change the bridge {}", link.name)))
    }

    pub(super) async fn set_alias(&self, link: &Link, alias: &str) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).alias(alias).build();
        self.set(message, format!("mark the link {}", link.name)).await
    }

    pub(super) async fn attach(&self, tap: &Link, bridge: &Link) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(tap.index).controller(bridge.index).build();
        self.set(message, format!("put {} on {}", tap.name, bridge.name)).await
    }

    /// Moves a tap that is down into the network namespace of `to`, marks it and puts it on a bridge there, in
    /// one step: it is never there without that.
    pub(super) async fn hand_over(
        &self,
        tap: &Link,
        to: &Links,
        alias: &str,
        bridge: &Link,
    ) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(tap.index)
            .setns_by_fd(to.namespace.as_raw_fd())
            .alias(alias)
            .controller(bridge.index)
            .build();
        self.set(message, format!("move {} to {}", tap.name, bridge.name)).await
    }

    pub(super) async fn bring_up(&self, link: &Link) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).up().build();
        self.set(message, format!("bring up the link {}", link.name)).await
    }

    /// Has a bridge take frames for this MAC itself, whatever port they went to before.
    pub(super) async fn take_from_port(
        &self,
        bridge: &Link,
        mac: MacAddr,
    ) -> Result<(), NetworkError> {
        let request = self.handle.neighbours().add_bridge(bridge.index, &mac.0);
        let request = request.state(NeighbourState::Permanent).flags(NeighbourFlags::Own).replace();
        let operation = format!("have {} take frames for {mac}", bridge.name);
        request.execute().await.map_err(failed(operation))
    }

    /// Has a bridge find out again where frames for this MAC go.
    pub(super) async fn leave_to_port(
        &self,
        bridge: &Link,
        mac: MacAddr,
    ) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = bridge.index;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        match self.handle.neighbours().del(message).execute().await {
            // There was no such entry, or there is no such bridge any more.
            Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            result => {
                result.map_err(failed(format!("have {} give up frames for {mac}", bridge.name)))
            }
        }
    }

    /// Deletes a link; it may be gone by now.
    pub(super) async fn delete(&self, link: &Link) -> Result<(), NetworkError> {
        match self.handle.link().del(link.index).execute().await {
            Err(error) if errno(&error) != Some(libc::ENODEV) => {
                Err(failed(format!("delete the link {}", link.name))(error))
            }
            _ => Ok(()),
        }
    }

    /// The IPv4 addresses of all links, with the link's index.
    pub(super) async fn addresses(&self) -> Result<Vec<(u32, Ipv4Net)>, NetworkError> {
        let _listing = self.listing.lock().await;
        let addresses: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("list addresses"))?;
        Ok(addresses.iter().filter_map(address_of).collect())
    }

    pub(super) async fn add_address(&self, link: &Link, net: Ipv4Net) -> Result<(), NetworkError> {
        let request =
            self.handle.address().add(link.index, IpAddr::V4(net.addr()), net.prefix_len());
        request.execute().await.map_err(failed(format!("give {net} to {}", link.name)))
    }

    pub(super) async fn delete_address(
        &self,
        link: &Link,
        net: Ipv4Net,
    ) -> Result<(), NetworkError> {
        let listing = self.listing.lock().await;
        let request = self.handle.address().get().set_link_index_filter(link.index).execute();
        let addresses: Vec<AddressMessage> =
            request.try_collect().await.map_err(failed("list addresses"))?;
        drop(listing);
        for message in addresses {
            if address_of(&message) == Some((link.index, net)) {
                let request = self.handle.address().del(message);
                request
                    .execute()
                    .await
                    .map_err(failed(format!("take {net} from {}", link.name)))?;
            }
        }
        Ok(())
    }

    /// The machine's IPv4 routes other than default routes.
    pub(super) async fn routes(&self) -> Result<Vec<Route>, NetworkError> {
        Ok(self.all_routes().await?.iter().filter_map(route_of).collect())
    }

    /// The largest packet that the machine's default route takes, in bytes, if there is such a route.
    pub(super) async fn uplink_mtu(&self) -> Result<Option<u32>, NetworkError> {
        let routes = self.all_routes().await?;
        let uplink = routes.iter().filter_map(default_route_of).min();
        let links = self.all().await?;
        let mtu_of = |index| links.iter().find(|link| link.index == index)?.mtu;
        Ok(uplink.and_then(|(_, index)| mtu_of(index)))
    }

    async fn all_routes(&self) -> Result<Vec<RouteMessage>, NetworkError> {
        let _listing = self.listing.lock().await;
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet;
        let routes = self.handle.route().get(request).execute();
        routes.try_collect().await.map_err(failed("list routes"))
    }

    async fn set(&self, message: LinkMessage, operation: String) -> Result<(), NetworkError> {
        self.handle.link().set(message).execute().await.map_err(failed(operation))
    }
}

/// Flags of a netlink request that changes something that exists.
const REQUEST_AND_ACK: u16 =
    rtnetlink::packet_core::NLM_F_REQUEST | rtnetlink::packet_core::NLM_F_ACK;

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

fn failed(operation: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            _ => io::Error::other(error),
        };
        NetworkError::system(operation)(source)
    }
}

fn link_of(message: LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Other,
        alias: None,
        controller: None,
        is_up: message.header.flags.contains(LinkFlags::Up),
        has_carrier: message.header.flags.contains(LinkFlags::LowerUp),
        mtu: None,
        mac: None,
        carried: (0, 0),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Controller(index) if index != 0 => link.controller = Some(index),
            LinkAttribute::Address(mac) => link.mac = <[u8; 6]>::try_from(mac).ok().map(MacAddr),
            LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
            LinkAttribute::LinkInfo(infos) => link.kind = kind_of(&infos),
            LinkAttribute::Stats64(stats) => link.carried = (stats.rx_bytes, stats.tx_bytes),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn kind_of(infos: &[LinkInfo]) -> LinkKind {
    let mut kind = LinkKind::Other;
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => {
                kind = LinkKind::Bridge { forwards_link_local: false, runs_spanning_tree: false };
            }
            LinkInfo::Kind(InfoKind::Tun) => kind = LinkKind::Tap { owner_uid: None },
            LinkInfo::Data(InfoData::Bridge(data)) => {
                kind = LinkKind::Bridge {
                    forwards_link_local: data.contains(&InfoBridge::GroupFwdMask(GROUP_FWD_MASK)),
                    runs_spanning_tree: !data
                        .contains(&InfoBridge::StpState(BridgeStpState::Disabled)),
                };
            }
            LinkInfo::Data(InfoData::Tun(data)) => {
                kind = LinkKind::Tap { owner_uid: data.iter().find_map(tap_owner) };
            }
            _ => {}
        }
    }
    kind
}

fn tap_owner(attribute: &InfoTun) -> Option<u32> {
    if attribute.kind() != TUN_OWNER || attribute.value_len() != 4 {
        return None;
    }
    let mut value = [0; 4];
    attribute.emit_value(&mut value);
    Some(u32::from_ne_bytes(value))
}

fn address_of(message: &AddressMessage) -> Option<(u32, Ipv4Net)> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
        _ => None,
    })?;
    let net = Ipv4Net::new(address, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    let link = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    let destination = Ipv4Net::new(destination, message.header.destination_prefix_length).ok()?;
    Some(Route { destination, link })
}

/// The metric of a default route of the main table, and the index of its link.
fn default_route_of(message: &RouteMessage) -> Option<(u32, u32)> {
    let header = &message.header;
    let is_default = header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast;
    let (mut metric, mut link) = (0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    link.filter(|_| is_default).map(|link| (metric, link))
}
