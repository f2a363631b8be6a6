//! Throw-away network namespaces: a machine of its own for a node, and the world outside.
//!
//! A node whose agent is started in a namespace has its bridges, its firewall and its addresses
//! there, so that a test may add addresses and routes and meddle with the firewall as it likes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Node;
use crate::run::{Output, Running, tool};
use crate::wait::LIMIT;

/// How long a connection on one machine may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A network namespace with a name. It is removed when dropped, with all its links.
pub struct Namespace(String);

impl Namespace {
    /// A new namespace, with loopback up.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(purpose: &str) -> Self {
        let namespace = Self(format!("mvm-e2e-{purpose}-{}", std::process::id()));
        tool("ip", &["netns", "add", &namespace.0]).ok();
        namespace.ip("link set lo up");
        namespace
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Runs `ip` with these arguments inside.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        let words = ["-n", &self.0].into_iter().chain(arguments.split(' '));
        tool("ip", &words.collect::<Vec<_>>()).ok().stdout
    }

    /// Runs a program inside.
    ///
    /// # Panics
    /// It does not end.
    #[track_caller]
    pub fn tool(&self, program: &str, args: &[&str]) -> Output {
        tool("ip", &[&["netns", "exec", &self.0, program], args].concat())
    }

    /// Starts the node's agent inside, with the search path of an ordinary user, as one has it who
    /// became root with `su`.
    ///
    /// # Panics
    /// It does not start.
    pub fn start_agent(&self, node: &Node) {
        let mvm = node.command(&["node", "info"]);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, "env", "PATH=/usr/bin:/bin"]);
        command.arg(mvm.get_program()).args(mvm.get_args());
        for (name, value) in mvm.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Running::start(command, None).wait(LIMIT).ok();
    }

    /// Joins two namespaces with a cable.
    ///
    /// # Panics
    /// It cannot be laid.
    pub fn connect(&self, link: &str, address: &str, other: &Self, link_there: &str, there: &str) {
        self.ip(&format!(
            "link add {link} type veth peer name {link_there} netns {}",
            other.name()
        ));
        for (namespace, link, address) in [(self, link, address), (other, link_there, there)] {
            namespace.ip(&format!("addr add {address} dev {link}"));
            namespace.ip(&format!("link set {link} up"));
        }
    }

    /// Does something on a thread that is inside. Sockets that it makes stay there.
    ///
    /// # Panics
    /// The namespace cannot be entered, or `work` panics.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.0)).expect("the namespace exists");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a namespace");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Serves TCP on all addresses until the process ends: every caller is told its own address as
    /// seen from here. Returns the port.
    ///
    /// # Panics
    /// There is no port.
    pub fn serve_tcp(&self) -> u16 {
        let listener = self.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)));
        let listener = listener.expect("a namespace has free ports");
        let port = listener.local_addr().expect("a bound socket").port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().map(|peer| peer.ip().to_string());
                let mut stream = stream;
                let _ = stream.write_all(format!("{}\n", peer.unwrap_or_default()).as_bytes());
            }
        });
        port
    }

    /// What a server tells a caller from inside, or `None` if it cannot be reached.
    pub fn ask_tcp(&self, address: Ipv4Addr, port: u16) -> Option<String> {
        self.enter(|| {
            let to = SocketAddr::from((address, port));
            let mut stream = TcpStream::connect_timeout(&to, CONNECT_LIMIT).ok()?;
            let mut told = String::new();
            stream.read_to_string(&mut told).ok()?;
            Some(told.trim().to_owned())
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        tool("ip", &["netns", "del", &self.0]);
    }
}
