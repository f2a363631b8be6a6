//! Neighbours of instances that rest: whoever sends one a packet is seen, and so it can be woken.
//!
//! Without a guest there is nobody to answer ARP, and a neighbour's connection would fail within
//! seconds. So, for as long as an instance rests,
//!
//! ```text
//!  an entry of the bridge's table    frames for its MAC go to the bridge itself, not to a tap
//!  a packet socket on the bridge     reads those frames, and questions for its address
//!    ARP question    is answered in its name: a question alone wakes nobody
//!    IPv4 packet     is told to the agent; the packet is lost, and its sender repeats it
//! ```
//!
//! What gets that far has passed the bridge's rules, which drop whatever is not of its sender.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};

use mvm_core::net::{InstanceNetwork, MacAddr, NetId, TenantNetwork};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;

use super::NetworkError;
use super::links::{Link, Links};

/// Ethernet types, and the only ARP that there is here: of IPv4 over Ethernet (RFC 826).
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];
/// Lengths of an Ethernet header, of it with an ARP message and of it with an IPv4 header.
const ETHERNET: usize = 14;
const WITH_ARP: usize = ETHERNET + 28;
const WITH_IPV4: usize = ETHERNET + 20;
/// As much of a frame as is read.
const SNAPSHOT: u32 = 64;
/// How often one instance's visitors are told at most.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// Visitors that wait to be told; of those beyond, the next packet tells.
const QUEUE: usize = 256;

/// The tenants in which somebody rests.
#[derive(Debug)]
pub(super) struct Resting {
    watches: Mutex<BTreeMap<NetId, Watch>>,
    tell: mpsc::Sender<InstanceNetwork>,
    told: Mutex<mpsc::Receiver<InstanceNetwork>>,
}

/// One tenant's.
#[derive(Debug)]
struct Watch {
    bridge: Link,
    known: Known,
    task: AbortHandle,
}

/// Who rests, by address.
type Known = Arc<StdMutex<BTreeMap<Ipv4Addr, InstanceNetwork>>>;

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Resting {
    pub(super) fn new() -> Self {
        let (tell, told) = mpsc::channel(QUEUE);
        Self { watches: Mutex::default(), tell, told: Mutex::new(told) }
    }

    /// The next instance that rests and is sent a packet.
    pub(super) async fn visited(&self) -> InstanceNetwork {
        match self.told.lock().await.recv().await {
            Some(instance) => instance,
            // This value has the sending half as well.
            None => std::future::pending().await,
        }
    }

    /// Watches for these instances and no others; whoever no longer rests gets its frames itself.
    pub(super) async fn ensure(
        &self,
        links: &Links,
        resting: &BTreeSet<InstanceNetwork>,
    ) -> Result<(), NetworkError> {
        let mut watches = self.watches.lock().await;
        let mut wanted: BTreeMap<NetId, BTreeMap<Ipv4Addr, InstanceNetwork>> = BTreeMap::new();
        for instance in resting {
            let of_tenant = wanted.entry(instance.tenant.net_id).or_default();
            of_tenant.insert(instance.address(), *instance);
        }
        let mut errors = Vec::new();
        let all: BTreeSet<NetId> = watches.keys().chain(wanted.keys()).copied().collect();
        for net_id in all {
            let rest = wanted.remove(&net_id).unwrap_or_default();
            let changed = self.ensure_tenant(links, &mut watches, net_id, rest).await;
            errors.extend(changed.err());
        }
        NetworkError::all(errors)
    }

    async fn ensure_tenant(
        &self,
        links: &Links,
        watches: &mut BTreeMap<NetId, Watch>,
        net_id: NetId,
        rest: BTreeMap<Ipv4Addr, InstanceNetwork>,
    ) -> Result<(), NetworkError> {
        let name = rest.values().next().map(|instance| instance.tenant.bridge());
        let bridge = match &name {
            Some(name) => links.get(name).await?,
            None => None,
        };
        let before = match watches.get(&net_id) {
            Some(watch) => lock(&watch.known).clone(),
            None => BTreeMap::new(),
        };
        // A bridge that was made anew has none of its entries.
        let is_same =
            |watch: &Watch| bridge.as_ref().is_none_or(|it| it.index == watch.bridge.index);
        let old = watches.get(&net_id).filter(|watch| is_same(watch));
        if let Some(watch) = old {
            for instance in before.values().filter(|it| !rest.contains_key(&it.address())) {
                links.leave_to_port(&watch.bridge, instance.mac()).await?;
                lock(&watch.known).remove(&instance.address());
            }
        }
        let (Some(bridge), false) = (bridge, rest.is_empty()) else {
            watches.remove(&net_id);
            return Ok(());
        };
        if old.is_none() {
            let failed = NetworkError::system(format!("watch {}", bridge.name));
            let watch = Watch::start(&bridge, self.tell.clone()).map_err(failed)?;
            watches.insert(net_id, watch);
        }
        let Some(watch) = watches.get(&net_id) else { return Ok(()) };
        for (address, instance) in rest {
            if lock(&watch.known).contains_key(&address) {
                continue;
            }
            links.take_from_port(&bridge, instance.mac()).await?;
            lock(&watch.known).insert(address, instance);
        }
        Ok(())
    }
}

impl Watch {
    fn start(bridge: &Link, tell: mpsc::Sender<InstanceNetwork>) -> io::Result<Self> {
        let socket = open(bridge.index)?;
        // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        let known = Known::default();
        let task = tokio::spawn(watch(socket, known.clone(), tell)).abort_handle();
        Ok(Self { bridge: bridge.clone(), known, task })
    }
}

fn lock(known: &Known) -> std::sync::MutexGuard<'_, BTreeMap<Ipv4Addr, InstanceNetwork>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(socket: AsyncFd<OwnedFd>, known: Known, tell: mpsc::Sender<InstanceNetwork>) {
    let mut told: BTreeMap<InstanceNetwork, Instant> = BTreeMap::new();
    let mut frame = [0; SNAPSHOT as usize];
    loop {
        let Ok(mut ready) = socket.readable().await else { return };
        let read = ready.try_io(|socket| Ok(rustix::io::read(socket, &mut frame)?));
        let length = match read {
            Ok(Ok(length)) => length,
            // The bridge went down or away: whoever looks after it makes another one.
            Ok(Err(_)) => {
                tokio::time::sleep(TOLD_EVERY).await;
                continue;
            }
            Err(_would_block) => continue,
        };
        let seen = judge(&frame[..length], &lock(&known));
        match seen {
            Seen::Question(answer) => {
                // A neighbour asks again.
                let _ = rustix::io::write(socket.get_ref(), &answer);
            }
            Seen::Packet(instance) => {
                let now = Instant::now();
                told.retain(|_, at| now.duration_since(*at) < TOLD_EVERY);
                if !told.contains_key(&instance) && tell.try_send(instance).is_ok() {
                    told.insert(instance, now);
                }
            }
            Seen::Nothing => {}
        }
    }
}

/// What a frame is to those who rest.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// A question for the address of one, with the answer.
    Question([u8; WITH_ARP]),
    /// A packet to one.
    Packet(InstanceNetwork),
    Nothing,
}

fn judge(frame: &[u8], known: &BTreeMap<Ipv4Addr, InstanceNetwork>) -> Seen {
    let bytes = |at: usize| frame.get(at..at + 4).and_then(|it| <[u8; 4]>::try_from(it).ok());
    let find = |at: usize| known.get(&Ipv4Addr::from(bytes(at)?));
    match frame.get(12..ETHERNET).map(|kind| u16::from_be_bytes([kind[0], kind[1]])) {
        Some(ARP) if frame.len() >= WITH_ARP => {
            let message = &frame[ETHERNET..WITH_ARP];
            let is_question = message[..6] == ARP_HEAD && message[6..8] == ARP_REQUEST;
            let Some(instance) = find(ETHERNET + 24).filter(|_| is_question) else {
                return Seen::Nothing;
            };
            // The host asks, too; what it sends is not for the guests of its bridge to hear.
            match message[8..14] == gateway_mac(instance.tenant) {
                true => Seen::Nothing,
                false => Seen::Question(answer(message, instance.mac())),
            }
        }
        Some(IPV4) if frame.len() >= WITH_IPV4 => match find(ETHERNET + 16) {
            Some(instance) if frame[..6] == instance.mac().0 => Seen::Packet(*instance),
            _ => Seen::Nothing,
        },
        _ => Seen::Nothing,
    }
}

fn gateway_mac(tenant: TenantNetwork) -> [u8; 6] {
    tenant.gateway_mac().0
}

/// The answer to an ARP question: its target's address is at this MAC.
fn answer(question: &[u8], mac: MacAddr) -> [u8; WITH_ARP] {
    let mut answer = [0; WITH_ARP];
    let asker = &question[8..14];
    answer[..6].copy_from_slice(asker);
    answer[6..12].copy_from_slice(&mac.0);
    answer[12..14].copy_from_slice(&ARP.to_be_bytes());
    let body = &mut answer[ETHERNET..];
    body[..6].copy_from_slice(&ARP_HEAD);
    body[6..8].copy_from_slice(&ARP_REPLY);
    body[8..14].copy_from_slice(&mac.0);
    body[14..18].copy_from_slice(&question[24..28]);
    body[18..28].copy_from_slice(&question[8..18]);
    answer
}

/// A packet socket on a link, for ARP and for IPv4 that is neither the host's own nor for all.
fn open(link: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // No protocol yet: nothing is received before there is a filter and a link.
    // SAFETY: the call takes numbers and gives a descriptor that nobody else has.
    let socket = unsafe {
        let socket = check(libc::socket(libc::AF_PACKET, kind, 0))?;
        OwnedFd::from_raw_fd(socket)
    };
    let mut program = filter();
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let size = |bytes: usize| bytes as libc::socklen_t;
    // SAFETY: the kernel copies the program, which outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size(size_of::<libc::sock_fprog>()),
        )
    })?;
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = link.cast_signed();
    // SAFETY: the address outlives the call.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size(size_of::<libc::sockaddr_ll>()),
        )
    })?;
    Ok(socket)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The filter as the kernel's virtual machine has it (`linux/filter.h`): what passes costs a copy, and all
/// that guests send beyond the bridge comes by here.
fn filter() -> [libc::sock_filter; 7] {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_PKTTYPE`.
    const PACKET_TYPE: u32 = (-0x1000_i32 + 4).cast_unsigned();
    const OTHER_HOST: u32 = 3;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    [
        step(LOAD_HALF, 0, 0, 12),
        step(JUMP_IF_EQUAL, 3, 0, ARP.into()),
        step(JUMP_IF_EQUAL, 0, 3, IPV4.into()),
        step(LOAD_WORD, 0, 0, PACKET_TYPE),
        step(JUMP_IF_EQUAL, 0, 1, OTHER_HOST),
        step(RETURN, 0, 0, SNAPSHOT),
        step(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::net::Slot;

    fn instance(slot: u16) -> InstanceNetwork {
        let net_id = NetId(1);
        let subnet = TenantNetwork::default_subnet(net_id);
        InstanceNetwork::new(TenantNetwork { net_id, subnet }, Slot(slot))
    }

    fn question(from: InstanceNetwork, to: Ipv4Addr) -> Vec<u8> {
        let (mac, address) = (from.mac().0, from.address().octets());
        let head = [&[0xff; 6][..], &mac, &ARP.to_be_bytes(), &ARP_HEAD, &ARP_REQUEST];
        [&head.concat()[..], &mac, &address, &[0; 6], &to.octets()].concat()
    }

    fn packet(from: InstanceNetwork, to: InstanceNetwork) -> Vec<u8> {
        let mut packet = [&to.mac().0[..], &from.mac().0, &IPV4.to_be_bytes(), &[0; 20]].concat();
        packet[26..30].copy_from_slice(&from.address().octets());
        packet[30..34].copy_from_slice(&to.address().octets());
        packet
    }

    #[test]
    fn a_question_is_answered_in_the_name_of_who_rests_and_a_packet_is_told() {
        let (asker, sleeper) = (instance(3), instance(4));
        let known = BTreeMap::from([(sleeper.address(), sleeper)]);
        let Seen::Question(answer) = judge(&question(asker, sleeper.address()), &known) else {
            panic!("it is not answered");
        };
        let expected = [
            &asker.mac().0[..],
            &sleeper.mac().0,
            &ARP.to_be_bytes(),
            &ARP_HEAD,
            &ARP_REPLY,
            &sleeper.mac().0,
            &sleeper.address().octets(),
            &asker.mac().0,
            &asker.address().octets(),
        ];
        assert_eq!(answer.to_vec(), expected.concat());
        assert_eq!(judge(&packet(asker, sleeper), &known), Seen::Packet(sleeper));
    }

    #[test]
    fn what_is_not_for_who_rests_is_nothing() {
        let (asker, sleeper) = (instance(3), instance(4));
        let known = BTreeMap::from([(sleeper.address(), sleeper)]);
        assert_eq!(judge(&question(asker, instance(5).address()), &known), Seen::Nothing);
        assert_eq!(judge(&packet(asker, instance(5)), &known), Seen::Nothing);
        let mut elsewhere = packet(asker, sleeper);
        elsewhere[..6].copy_from_slice(&asker.tenant.gateway_mac().0);
        assert_eq!(judge(&elsewhere, &known), Seen::Nothing);
        let mut of_host = question(asker, sleeper.address());
        of_host[22..28].copy_from_slice(&asker.tenant.gateway_mac().0);
        assert_eq!(judge(&of_host, &known), Seen::Nothing);
        for frame in [question(asker, sleeper.address()), packet(asker, sleeper)] {
            for length in 0..frame.len() {
                assert_eq!(judge(&frame[..length], &known), Seen::Nothing);
            }
        }
    }
}
