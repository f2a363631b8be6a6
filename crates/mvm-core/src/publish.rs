//! Published ports as asked for: where the node listens, and the port of a pool's guests that its
//! connections go to.

mod shares;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

pub use shares::{Full, POOL_MAX, Shares};

/// Most published ports of one pool.
pub const PUBLISH_MAX: usize = 64;

/// Why a port cannot be published as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The text is not `[ADDRESS:]PORT:GUEST-PORT[/tcp]`.
    #[error(
        "`{text}` is not valid: expected [ADDRESS:]PORT:GUEST-PORT with ports from 1 to 65535, such as 8080:80"
    )]
    Grammar {
        /// As given.
        text: String,
    },
    /// Only TCP is carried.
    #[error("`{text}` cannot be published: only TCP is carried, not {protocol}")]
    Protocol {
        /// As given.
        text: String,
        /// As given.
        protocol: String,
    },
    /// The address is none.
    #[error(
        "`{text}` cannot be published: `{address}` is not an address of this machine's, such as 127.0.0.1, 0.0.0.0 or [::]"
    )]
    Address {
        /// As given.
        text: String,
        /// As given.
        address: String,
    },
    /// There are more than a pool can have.
    #[error("{count} published ports are too many: a pool has at most {PUBLISH_MAX}")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// Two of one pool listen in one place.
    #[error("{first} and {second} listen on the same port")]
    Twice {
        /// One of them.
        first: Publish,
        /// The other.
        second: Publish,
    },
}

/// A port that the node listens on for a pool. Typed as `[ADDRESS:]PORT:GUEST-PORT[/tcp]`; without an
/// address only this machine itself can connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Publish {
    address: IpAddr,
    port: NonZeroU16,
    guest_port: NonZeroU16,
}

impl Publish {
    /// Where the node listens.
    pub fn listen(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.get())
    }

    /// The guests' port, on whatever address a program listens.
    pub fn guest_port(&self) -> u16 {
        self.guest_port.get()
    }

    /// Whether both cannot listen at once on one machine.
    pub fn collides_with(&self, other: &Self) -> bool {
        let covers = |a: &IpAddr, b: &IpAddr| match (a, b) {
            (IpAddr::V6(any), IpAddr::V4(_)) => any.is_unspecified(),
            _ => a == b || (a.is_unspecified() && a.is_ipv4() == b.is_ipv4()),
        };
        self.port == other.port
            && (covers(&self.address, &other.address) || covers(&other.address, &self.address))
    }
}

impl FromStr for Publish {
    type Err = PublishError;
    fn from_str(text: &str) -> Result<Self, PublishError> {
        let grammar = || PublishError::Grammar { text: text.to_owned() };
        let ports = match text.split_once('/') {
            None => text,
            Some((ports, "tcp")) => ports,
            Some((_, protocol)) => {
                let protocol = protocol.to_owned();
                return Err(PublishError::Protocol { text: text.to_owned(), protocol });
            }
        };
        let (listen, guest_port) = ports.rsplit_once(':').ok_or_else(grammar)?;
        let (address, port) = match listen.rsplit_once(':') {
            None => (Ipv4Addr::LOCALHOST.into(), listen),
            Some((address, port)) => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let parsed = match bare {
                    Some(bare) => bare.parse().map(IpAddr::V6),
                    None => address.parse().map(IpAddr::V4),
                };
                let wrong = |_| PublishError::Address {
                    text: text.to_owned(),
                    address: address.to_owned(),
                };
                (parsed.map_err(wrong)?, port)
            }
        };
        let number = |text: &str| text.parse::<NonZeroU16>().map_err(|_| grammar());
        Ok(Self { address, port: number(port)?, guest_port: number(guest_port)? })
    }
}

crate::serde_as_text!(Publish);

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}:{}", self.listen(), self.guest_port))
    }
}

/// Checks that the published ports of one pool can be there beside each other.
///
/// # Errors
/// Names the first two that cannot, or the count if there are too many.
pub fn check_published(published: &[Publish]) -> Result<(), PublishError> {
    if published.len() > PUBLISH_MAX {
        return Err(PublishError::TooMany { count: published.len() });
    }
    for (index, second) in published.iter().enumerate() {
        if let Some(first) = published[..index].iter().find(|first| first.collides_with(second)) {
            return Err(PublishError::Twice { first: *first, second: *second });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(text: &str) -> Publish {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_without_an_address_is_for_this_machine_alone() {
        let short = publish("8080:80");
        assert_eq!((short.listen().to_string(), short.guest_port()), ("127.0.0.1:8080".into(), 80));
        assert_eq!(short, publish("127.0.0.1:8080:80/tcp"));
    }

    #[test]
    fn what_is_shown_can_be_typed() {
        for text in ["127.0.0.1:8080:80", "0.0.0.0:1:65535", "[::]:443:8443", "[::1]:5:6"] {
            assert_eq!(publish(text).to_string(), text);
            let json = serde_json::to_string(&publish(text)).unwrap();
            assert_eq!(serde_json::from_str::<Publish>(&json).unwrap(), publish(text));
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        for text in ["", "80", ":80", "80:", "0:80", "80:0", "80:65536", "a:b", "1:2:3:4x", "-1:80"]
        {
            assert!(text.parse::<Publish>().is_err(), "{text}");
        }
        for (text, reason) in [
            ("8080", "expected [ADDRESS:]PORT:GUEST-PORT"),
            ("53:53/udp", "only TCP is carried, not udp"),
            ("localhost:80:80", "`localhost` is not an address"),
            ("::1:80:80", "`::1` is not an address"),
        ] {
            let error = text.parse::<Publish>().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn an_unspecified_address_takes_the_port_on_all() {
        for (a, b, collide) in [
            ("8080:80", "8080:81", true),
            ("8080:80", "8081:80", false),
            ("0.0.0.0:8080:80", "8080:80", true),
            ("[::]:8080:80", "8080:80", true),
            ("[::]:8080:80", "[::1]:8080:80", true),
            ("0.0.0.0:8080:80", "[::1]:8080:80", false),
            ("127.0.0.2:8080:80", "8080:80", false),
        ] {
            let (a, b) = (publish(a), publish(b));
            assert_eq!((a.collides_with(&b), b.collides_with(&a)), (collide, collide), "{a} {b}");
        }
        let error = check_published(&[publish("1:1"), publish("2:1"), publish("1:2")]).unwrap_err();
        assert_eq!(error.to_string(), "127.0.0.1:1:1 and 127.0.0.1:1:2 listen on the same port");
        assert!(check_published(&vec![publish("1:1"); PUBLISH_MAX + 1]).is_err());
    }
}
