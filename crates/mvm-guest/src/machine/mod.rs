//! What the agent may change around itself.
//!
//! As PID 1 the whole machine is its own: name, address, clock and power. Serving an inherited
//! socket, it is an ordinary process on someone else's machine and leaves all that alone.

mod clock;
mod disks;
mod entropy;
mod files;
mod fork;
mod identity;
pub(crate) mod keys;
mod names;
mod network;
mod settings;
mod wakes;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mvm_core::guest::{ClockReading, Configuration, ErrorKind, GuestError, MainProgram};
use mvm_core::settings::Ulimit;

use crate::console::complain;
use crate::failure::{failure, invalid};
use crate::init::Init;
use clock::WallClock;
use identity::Identity;

pub(crate) use disks::{
    freeze_all as freeze_disks, takes_discards, thaw_all as thaw_disks,
    unmount_all as unmount_disks,
};
pub(crate) use network::{bring_up_loopback, outside_address};
pub(crate) use settings::{Applied, set_defaults};
pub(crate) use wakes::Wakes;

/// The machine that the agent runs on.
#[derive(Debug)]
pub(crate) enum Machine {
    /// The agent is PID 1, or has left that to the image's init.
    Own {
        /// Why the root filesystem could not be mounted.
        root_failure: Option<String>,
        /// The image's own init.
        init: Option<Init>,
        /// Which instance the guest is.
        identity: Box<Identity>,
        /// The wall clock.
        clock: Box<WallClock>,
        /// What was set in its kernel.
        settings: Applied,
    },
    /// The agent is a process like any other.
    Borrowed {
        /// What stands for the root directory where hooks and the files of wakes are concerned.
        root: Option<PathBuf>,
    },
}

impl Machine {
    /// Whether the agent may change it.
    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::Own { .. })
    }

    /// Why there is no root filesystem to run programs in.
    pub(crate) fn root_failure(&self) -> Option<&str> {
        match self {
            Self::Own { root_failure, .. } => root_failure.as_deref(),
            Self::Borrowed { .. } => None,
        }
    }

    /// Where hooks and the files of wakes are found.
    pub(crate) fn root(&self) -> Option<&Path> {
        match self {
            Self::Own { .. } => Some(Path::new("/")),
            Self::Borrowed { root } => root.as_deref(),
        }
    }

    /// Lets the image's own init begin, unless it has.
    pub(crate) fn start_init(
        &mut self,
        program: Option<&MainProgram>,
        ulimit: &BTreeMap<String, Ulimit>,
    ) -> Result<(), GuestError> {
        match self {
            Self::Own { init: Some(init), .. } => init.start(program, ulimit),
            _ => Err(invalid("this boot was not told of an init")),
        }
    }

    /// Takes on an identity. Doing it again, with the same or another one, is fine.
    pub(crate) fn configure(&mut self, configuration: &Configuration) -> Result<(), GuestError> {
        check(configuration)?;
        let Self::Own { root_failure, identity, clock, settings, .. } = self else {
            return Ok(());
        };
        if let Some(reason) = root_failure {
            let text = format!("the root is not mounted: {reason}");
            return Err(failure(ErrorKind::System, text));
        }
        if let Some(unix_ns) = configuration.wall_clock_unix_ns {
            clock.step_to(unix_ns)?;
        }
        identity.take_on(configuration)?;
        settings.ensure(&configuration.settings)?;
        disks::ensure_mounted(&configuration.disks)
    }

    /// Lets data disks be written again that were frozen for a sleep.
    pub(crate) fn thaw(&self) {
        if let Self::Own { .. } = self {
            thaw_disks();
        }
    }

    /// Steps the wall clock.
    pub(crate) fn set_clock(&mut self, unix_ns: u64) -> Result<(), GuestError> {
        self.clock_mut().map_or(Ok(()), |clock| clock.step_to(unix_ns))
    }

    /// Lets the wall clock gain so much gradually, or lose it.
    pub(crate) fn slew_clock(&mut self, by_ns: i64) -> Result<(), GuestError> {
        self.clock_mut().map_or(Ok(()), |clock| clock.slew(by_ns))
    }

    /// What the wall clock shows. That of a borrowed machine is not the host's to set.
    pub(crate) fn read_clock(&self) -> ClockReading {
        let is_own = matches!(self, Self::Own { .. });
        let reading = clock::reading();
        ClockReading { is_disciplined: reading.is_disciplined || !is_own, ..reading }
    }

    /// The wall clock, where it is the agent's to look after.
    pub(crate) fn clock_mut(&mut self) -> Option<&mut WallClock> {
        match self {
            Self::Own { clock, .. } => Some(clock),
            Self::Borrowed { .. } => None,
        }
    }

    /// Becomes readable when the wall clock was set, and when there is something to do about it.
    pub(crate) fn clock_wants(&self) -> (Option<BorrowedFd<'_>>, Option<Instant>) {
        match self {
            Self::Own { clock, .. } => (clock.wants(), clock.alarm()),
            Self::Borrowed { .. } => (None, None),
        }
    }

    /// Mixes a session's nonce into the kernel's random numbers. A guest that was woken or cloned
    /// from a snapshot would else draw the same numbers as its siblings.
    pub(crate) fn stir_entropy(&self, nonce: &[u8; 16]) {
        if let Self::Own { .. } = self
            && let Err(error) = entropy::stir(nonce)
        {
            complain(&format!("cannot stir the random numbers: {error}"));
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

    fn borrowed() -> Machine {
        Machine::Borrowed { root: None }
    }

    fn named(hostname: &str) -> Configuration {
        Configuration { hostname: hostname.into(), ..Default::default() }
    }

    #[test]
    fn a_borrowed_machine_takes_an_identity_without_effect() {
        let before = rustix::system::uname().nodename().to_owned();
        borrowed().configure(&named("somebody-else")).unwrap();
        assert_eq!(rustix::system::uname().nodename(), before.as_c_str());
    }

    #[test]
    fn an_identity_that_files_or_the_kernel_would_not_take_is_refused() {
        for bad in ["a b", "a\nb", "-x", "a..b", &"x".repeat(65)] {
            assert!(borrowed().configure(&named(bad)).is_err(), "{bad:?}");
        }
        let address = Ipv4Addr::new(10, 240, 0, 3);
        for prefix_len in [0, 33] {
            let gateway = address;
            let network = NetworkConfiguration {
                address,
                prefix_len,
                gateway,
                nameservers: vec![],
                search: Vec::new(),
                resolver_options: Vec::new(),
                mtu: None,
                mac: None,
            };
            let configuration = Configuration { network: Some(network), ..named("ok") };
            assert!(borrowed().configure(&configuration).is_err());
        }
    }
}
