//! `mvm forward`.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts are no Markdown")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use mvm_core::guest::ForwardTarget;
use mvm_core::name::{InstancePath, Selector};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::cli::Context;
use crate::error::{Error, Result, exit};
use crate::forward::{carry, connect};
use crate::output::raw;

/// Connections that are carried at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 256;
/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Carry connections to a port or socket of an instance, without a network.
///
/// Listens on this machine's loopback and carries each connection through the guest channel, so it
/// works for instances without a network and for ports that listen on the guest's loopback only.
/// Ctrl-C ends it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm forward demo/hello 8080            127.0.0.1:8080 to port 8080 of the guest's loopback
  mvm forward i-3f2a 9000:80             127.0.0.1:9000 to port 80
  mvm forward i-3f2a 0:80                a free port, which is printed, to port 80
  mvm forward i-3f2a 5432:/run/postgresql/.s.PGSQL.5432
  mvm forward i-3f2a 9000:10.240.1.7:80  to an address that the guest reaches
  mvm forward i-3f2a --stdio 22          one connection, on standard input and output")]
pub(crate) struct Forward {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL for any running one of the pool.
    selector: Selector,
    /// [[ADDRESS:]PORT:]REMOTE, where REMOTE is a port, ADDRESS:PORT or a socket's absolute path.
    #[arg(value_name = "[LOCAL:]REMOTE")]
    route: Route,
    /// Carry one connection on standard input and output instead of listening.
    #[arg(long)]
    stdio: bool,
}

/// From where to where.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    /// Where to listen; absent if it cannot be told from the target.
    local: Option<SocketAddr>,
    target: ForwardTarget,
}

const SYNTAX: &str =
    "expected [LOCAL:]REMOTE, such as 8080, 9000:80, 9000:10.240.1.7:80 or 9000:/run/app.sock";

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| text.parse::<u16>().map_err(|_| SYNTAX.to_owned());
        let address = |text: &str| match text {
            "localhost" => Ok(LOOPBACK),
            text => text.trim_matches(['[', ']']).parse().map_err(|_| SYNTAX.to_owned()),
        };
        if let Some(at) = text.find('/') {
            let target = ForwardTarget::Unix { path: text[at..].to_owned() };
            let local = match text[..at].strip_suffix(':').map(split) {
                None if at == 0 => None,
                None => return Err(SYNTAX.to_owned()),
                Some(parts) => Some(match parts[..] {
                    [local] => SocketAddr::new(LOOPBACK, port(local)?),
                    [host, local] => SocketAddr::new(address(host)?, port(local)?),
                    _ => return Err(SYNTAX.to_owned()),
                }),
            };
            return Ok(Self { local, target });
        }
        let parts = split(text);
        let is_port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let (local, target) = match parts[..] {
            [remote] => ((LOOPBACK, port(remote)?), (LOOPBACK, port(remote)?)),
            [local, remote] if is_port(local) => {
                ((LOOPBACK, port(local)?), (LOOPBACK, port(remote)?))
            }
            [host, remote] => ((LOOPBACK, port(remote)?), (address(host)?, port(remote)?)),
            [local, host, remote] if is_port(local) => {
                ((LOOPBACK, port(local)?), (address(host)?, port(remote)?))
            }
            [near, local, remote] => ((address(near)?, port(local)?), (LOOPBACK, port(remote)?)),
            [near, local, host, remote] => {
                ((address(near)?, port(local)?), (address(host)?, port(remote)?))
            }
            _ => return Err(SYNTAX.to_owned()),
        };
        if target.1 == 0 {
            return Err("port 0 cannot be connected to".to_owned());
        }
        Ok(Self {
            local: Some(local.into()),
            target: ForwardTarget::Tcp { address: target.0, port: target.1 },
        })
    }
}

/// The parts between colons, of which those in brackets are none.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0;
    text.split(|letter| {
        match letter {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        letter == ':' && depth == 0
    })
    .collect()
}

impl Forward {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let Self { selector, route, stdio } = self;
        if stdio {
            // An agent is started, and whoever is meant looked for, once and in one place.
            let selector = Selector::from(&context.client.locate(selector).await?);
            let connection = connect(&context.client.socket(), selector, route.target).await?;
            carry(connection, tokio::io::stdin(), raw::async_stdout()).await?;
            return Ok(exit::OK);
        }
        let Some(local) = route.local else {
            return Err(Error::Usage {
                message: format!("no local port is named for {}", route.target),
                hint: format!("name one, or 0 for a free one: `0:{}`", route.target),
            });
        };
        let mut interrupt = signal(SignalKind::interrupt()).map_err(signals_failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(signals_failed)?;
        // All connections go to one instance, whichever the selector found first.
        let instance = context.client.locate(selector).await?;
        let listener = TcpListener::bind(local)
            .await
            .map_err(|source| Error::Listen { address: local, source })?;
        let address = listener.local_addr().unwrap_or(local);
        let target = route.target;
        let listening = serde_json::json!({
            "address": address, "instance": instance, "target": target.to_string(),
        });
        context.ui.data(&listening, || address.to_string())?;
        context.ui.remark(&format!("{address} leads to {target} of {instance}; Ctrl-C ends it"));
        tokio::select! {
            () = serve(context, &listener, &instance, &target) => {}
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(exit::OK)
    }
}

fn signals_failed(source: std::io::Error) -> Error {
    Error::Read { what: "signals".to_owned(), source }
}

/// Accepts and carries connections. It does not end: what goes wrong with one of them is told, and
/// the others go on.
async fn serve(
    context: &Context,
    listener: &TcpListener,
    instance: &InstancePath,
    target: &ForwardTarget,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let (socket, selector) = (context.client.socket(), instance.into());
                    connections.spawn(one(socket, selector, target.clone(), stream));
                }
                // Out of descriptors, usually: wait for a connection to end.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            Some(ended) = connections.join_next() => {
                if let Ok(Err(error)) = ended {
                    context.ui.error(&error);
                }
            }
        }
    }
}

async fn one(
    socket: PathBuf,
    selector: Selector,
    target: ForwardTarget,
    stream: TcpStream,
) -> Result<()> {
    // Answers to single keys must not wait for each other.
    let _ = stream.set_nodelay(true);
    let connection = connect(&socket, selector, target).await?;
    let (from, to) = stream.into_split();
    match carry(connection, from, to).await {
        // Whoever connected here has gone.
        Err(Error::Output(_) | Error::Read { .. }) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(local: &str, remote: &str) -> Route {
        let remote: SocketAddr = remote.parse().unwrap();
        let target = ForwardTarget::Tcp { address: remote.ip(), port: remote.port() };
        Route { local: Some(local.parse().unwrap()), target }
    }

    fn unix(local: Option<&str>, path: &str) -> Route {
        let target = ForwardTarget::Unix { path: path.to_owned() };
        Route { local: local.map(|local| local.parse().unwrap()), target }
    }

    #[test]
    fn every_way_to_write_a_route_is_understood() {
        let cases = [
            ("8080", tcp("127.0.0.1:8080", "127.0.0.1:8080")),
            ("9000:80", tcp("127.0.0.1:9000", "127.0.0.1:80")),
            ("0:80", tcp("127.0.0.1:0", "127.0.0.1:80")),
            ("10.0.0.5:80", tcp("127.0.0.1:80", "10.0.0.5:80")),
            ("localhost:80", tcp("127.0.0.1:80", "127.0.0.1:80")),
            ("9000:10.0.0.5:80", tcp("127.0.0.1:9000", "10.0.0.5:80")),
            ("0.0.0.0:9000:80", tcp("0.0.0.0:9000", "127.0.0.1:80")),
            ("0.0.0.0:9000:10.0.0.5:80", tcp("0.0.0.0:9000", "10.0.0.5:80")),
            ("9000:[::1]:80", tcp("127.0.0.1:9000", "[::1]:80")),
            ("/run/a:b", unix(None, "/run/a:b")),
            ("9000:/run/a", unix(Some("127.0.0.1:9000"), "/run/a")),
            ("0.0.0.0:9000:/run/a", unix(Some("0.0.0.0:9000"), "/run/a")),
        ];
        for (text, route) in cases {
            assert_eq!(text.parse(), Ok(route), "{text}");
        }
    }

    #[test]
    fn what_is_no_route_is_refused() {
        for bad in
            ["", "x", "80:", ":80", "70000", "80:0", "1:2:3:4:5", "a:/run/x", "x/y", "a.b:80"]
        {
            assert!(bad.parse::<Route>().is_err(), "{bad}");
        }
    }
}
