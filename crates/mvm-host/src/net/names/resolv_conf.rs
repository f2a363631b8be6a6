//! What resolv.conf(5) of the machine says, as of now.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Where name servers answer.
const PORT: u16 = 53;
/// Servers, domains and options that are taken over; the C library takes fewer servers.
const MAX_SERVERS: usize = 4;
const MAX_WORDS: usize = 32;
const MAX_WORD: usize = 255;
/// More than any such file is long, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// How the machine finds names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Its name servers, in order.
    pub servers: Vec<SocketAddr>,
    /// Domains in which it looks for short names.
    pub search: Vec<String>,
    /// Options of its resolver.
    pub options: Vec<String>,
}

impl ResolvConf {
    /// Reads the file's text; `index_of` gives the number of a link.
    pub fn parse(text: &str, index_of: impl Fn(&str) -> Option<u32>) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| server(word, &index_of));
                    if let Some(server) = server
                        && !conf.servers.contains(&server)
                    {
                        conf.servers.push(server);
                    }
                }
                // The last of them counts.
                Some("search" | "domain") => conf.search = taken_over(words),
                Some("options") => conf.options.extend(taken_over(words)),
                _ => {}
            }
        }
        conf.servers.truncate(MAX_SERVERS);
        conf.options.truncate(MAX_WORDS);
        conf
    }

    /// The servers that a guest could ask by itself, through the machine: those that are not the machine's
    /// own, and whose addresses mean the same everywhere.
    pub fn direct<'a>(&'a self, own: &'a [Ipv4Addr]) -> impl Iterator<Item = IpAddr> + 'a {
        self.servers.iter().filter_map(|server| match server.ip() {
            IpAddr::V4(address) => {
                let is_local = address.is_loopback()
                    || address.is_link_local()
                    || address.is_unspecified()
                    || own.contains(&address);
                (!is_local).then_some(IpAddr::V4(address))
            }
            // Guests have no IPv6.
            IpAddr::V6(_) => None,
        })
    }
}

fn taken_over<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let is_sound = |word: &&str| {
        word.len() <= MAX_WORD
            && !word.starts_with(['#', ';'])
            && word.chars().all(|c| c.is_ascii_graphic())
    };
    words.take_while(is_sound).take(MAX_WORDS).map(str::to_owned).collect()
}

fn server(word: &str, index_of: &impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Ok(address) = word.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, PORT));
    }
    // An address of a link, such as `fe80::1%eth0`.
    let (address, link) = word.split_once('%')?;
    let scope = link.parse().ok().or_else(|| index_of(link))?;
    Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, scope).into())
}

/// The machine's file, read again whenever it has changed.
#[derive(Debug)]
pub(super) struct Followed {
    path: PathBuf,
    known: Mutex<Option<(Stamp, Arc<ResolvConf>)>>,
}

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

impl Followed {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::default() }
    }

    /// What the file says now; nothing if there is none.
    pub(super) fn now(&self) -> Arc<ResolvConf> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = stamp(&self.path);
        if let (Some(now), Some((then, conf))) = (stamp, &*known)
            && now == *then
        {
            return conf.clone();
        }
        let conf = Arc::new(read(&self.path).unwrap_or_default());
        *known = stamp.map(|stamp| (stamp, conf.clone()));
        conf
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = path.metadata().ok()?;
    Some(Stamp {
        file: (metadata.dev(), metadata.ino()),
        size: metadata.size(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Reads the machine's file, or another one of the kind.
pub(crate) fn read(path: &Path) -> io::Result<ResolvConf> {
    let mut text = String::new();
    let file = fs::File::open(path)?;
    io::Read::read_to_string(&mut io::Read::take(file, MAX_FILE), &mut text)?;
    let index_of = |link: &str| {
        fs::read_to_string(format!("/sys/class/net/{link}/ifindex")).ok()?.trim().parse().ok()
    };
    Ok(ResolvConf::parse(&text, index_of))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ResolvConf {
        ResolvConf::parse(text, |link| (link == "eth0").then_some(2))
    }

    #[test]
    fn servers_are_taken_in_order_and_once_wherever_they_are() {
        let text = "# nameserver 9.9.9.9\nnameserver 127.0.0.53\nnameserver\t10.255.255.53 # x\n\
                    nameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver fe80::1%none\n\
                    nameserver 2001:db8::1\nnameserver\nnameserver no-address\n";
        let servers = parse(text).servers;
        let texts: Vec<String> = servers.iter().map(ToString::to_string).collect();
        let expected = ["127.0.0.53:53", "10.255.255.53:53", "[fe80::1%2]:53", "[2001:db8::1]:53"];
        assert_eq!(texts, expected);
    }

    #[test]
    fn the_last_search_list_counts_and_options_add_up() {
        let text = "domain old.example\nsearch a.example b.example # not this\n\
                    options ndots:2 rotate\noptions timeout:1\n";
        let conf = parse(text);
        assert_eq!(conf.search, ["a.example", "b.example"]);
        assert_eq!(conf.options, ["ndots:2", "rotate", "timeout:1"]);
        assert_eq!(parse("search \u{1b}[31m x\n").search, [""; 0]);
    }

    #[test]
    fn a_guest_asks_by_itself_only_what_is_elsewhere() {
        let text = "nameserver 127.0.0.1\nnameserver 169.254.1.1\nnameserver 192.0.2.7\n\
                    nameserver 10.241.0.5\n";
        let own = [Ipv4Addr::new(192, 0, 2, 7)];
        let conf = parse(text);
        let direct: Vec<String> = conf.direct(&own).map(|address| address.to_string()).collect();
        assert_eq!(direct, ["10.241.0.5"]);
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let followed = Followed::new(path.clone());
        assert_eq!(*followed.now(), ResolvConf::default());
        for server in ["192.0.2.1", "192.0.2.22"] {
            let fresh = dir.path().join("fresh");
            fs::write(&fresh, format!("nameserver {server}\n")).unwrap();
            fs::rename(&fresh, &path).unwrap();
            assert_eq!(followed.now().servers[0].ip().to_string(), server);
            assert!(Arc::ptr_eq(&followed.now(), &followed.now()));
        }
    }
}
