//! What the agent may change around itself.
//!
//! As PID 1 the whole machine is its own: name, address, clock and power. Serving an inherited
//! socket, it is an ordinary process on someone else's machine and leaves all that alone.

mod clock;
mod disks;
mod names;
mod network;

use mvm_core::guest::{Configuration, ErrorKind, GuestError};

use crate::failure::{failure, invalid};
use crate::init::Init;

pub(crate) use disks::unmount_all as unmount_disks;
pub(crate) use network::bring_up_loopback;

/// The machine that the agent runs on.
#[derive(Debug)]
pub(crate) enum Machine {
    /// The agent is PID 1, or has left that to the image's init.
    Own {
        /// Why the root filesystem could not be mounted.
        root_failure: Option<String>,
        /// The image's own init.
        init: Option<Init>,
    },
    /// The agent is a process like any other.
    Borrowed,
}

impl Machine {
    /// Why there is no root filesystem to run programs in.
    pub(crate) fn root_failure(&self) -> Option<&str> {
        match self {
            Self::Own { root_failure, .. } => root_failure.as_deref(),
            Self::Borrowed => None,
        }
    }

    /// Lets the image's own init begin, unless it has.
    pub(crate) fn start_init(&mut self) -> Result<(), GuestError> {
        match self {
            Self::Own { init: Some(init), .. } => init.start(),
            _ => Err(invalid("this boot was not told of an init")),
        }
    }

    /// Takes on an identity. Doing it again, with the same or another one, is fine.
    pub(crate) fn configure(&self, configuration: &Configuration) -> Result<(), GuestError> {
        check(configuration)?;
        if let Self::Borrowed = self {
            return Ok(());
        }
        if let Some(reason) = self.root_failure() {
            let text = format!("the root is not mounted: {reason}");
            return Err(failure(ErrorKind::System, text));
        }
        if let Some(unix_ns) = configuration.wall_clock_unix_ns {
            clock::step_to(unix_ns)?;
        }
        if !configuration.hostname.is_empty() {
            let address = configuration.network.as_ref().map(|network| network.address);
            names::ensure_hostname(&configuration.hostname, address)?;
        }
        names::ensure_machine_id()?;
        if let Some(network) = &configuration.network {
            network::ensure(network)?;
            names::ensure_nameservers(&network.nameservers)?;
        }
        disks::ensure_mounted(&configuration.disks)?;
        Ok(())
    }

    /// Mixes a session's nonce into the kernel's random numbers. A guest that was woken or cloned
    /// from a snapshot would else draw the same numbers as its siblings.
    pub(crate) fn stir_entropy(&self, nonce: &[u8; 16]) {
        if let Self::Own { .. } = self {
            clock::stir_entropy(nonce);
        }
    }
}

fn check(configuration: &Configuration) -> Result<(), GuestError> {
    let name = &configuration.hostname;
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    if !name.is_empty() && (name.len() > 64 || !name.split('.').all(is_label)) {
        return Err(invalid(format!("`{name}` is not a host name")));
    }
    if let Some(network) = &configuration.network
        && !(1..=32).contains(&network.prefix_len)
    {
        let text = format!("a prefix of {} bits is not an IPv4 subnet's", network.prefix_len);
        return Err(invalid(text));
    }
    disks::check(&configuration.disks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::guest::NetworkConfiguration;
    use std::net::Ipv4Addr;

    fn named(hostname: &str) -> Configuration {
        Configuration { hostname: hostname.into(), ..Default::default() }
    }

    #[test]
    fn a_borrowed_machine_takes_an_identity_without_effect() {
        let before = rustix::system::uname().nodename().to_owned();
        Machine::Borrowed.configure(&named("somebody-else")).unwrap();
        assert_eq!(rustix::system::uname().nodename(), before.as_c_str());
    }

    #[test]
    fn an_identity_that_files_or_the_kernel_would_not_take_is_refused() {
        for bad in ["a b", "a\nb", "-x", "a..b", &"x".repeat(65)] {
            assert!(Machine::Borrowed.configure(&named(bad)).is_err(), "{bad:?}");
        }
        let address = Ipv4Addr::new(10, 240, 0, 3);
        for prefix_len in [0, 33] {
            let gateway = address;
            let network =
                NetworkConfiguration { address, prefix_len, gateway, nameservers: vec![] };
            let configuration = Configuration { network: Some(network), ..named("ok") };
            assert!(Machine::Borrowed.configure(&configuration).is_err());
        }
    }
}
