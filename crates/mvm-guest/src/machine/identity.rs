//! Which instance the guest is, and what it took on as such.

use mvm_core::guest::{Configuration, GuestError};

use super::network::Announcement;
use super::{fork, keys, names, network};
use crate::console::complain;

/// The guest's identity; nobody's as long as no host has told.
#[derive(Debug, Default)]
pub(crate) struct Identity {
    instance: String,
    /// What was taken on last, unless that failed.
    taken_on: Option<TakenOn>,
}

#[derive(Debug)]
struct TakenOn {
    configuration: Configuration,
    announcement: Option<Announcement>,
}

impl Identity {
    /// Takes on the names and the network of a configuration. What is the same as last time is
    /// left as programs may have changed it since, and only announced: the link may be another one.
    pub(super) fn take_on(&mut self, configuration: &Configuration) -> Result<(), GuestError> {
        let lasting = lasting(configuration);
        if self.taken_on.as_ref().is_none_or(|last| last.configuration != lasting) {
            self.taken_on = None;
            let announcement = self.change_to(configuration)?;
            self.taken_on = Some(TakenOn { configuration: lasting, announcement });
        }
        let announcement = self.taken_on.as_ref().and_then(|last| last.announcement.as_ref());
        if let Some(Err(error)) = announcement.map(Announcement::send) {
            complain(&format!("cannot announce the network address: {error}"));
        }
        Ok(())
    }

    fn change_to(&mut self, to: &Configuration) -> Result<Option<Announcement>, GuestError> {
        if !to.hostname.is_empty() {
            let address = to.network.as_ref().map(|network| network.address);
            names::ensure_hostname(&to.hostname, address)?;
        }
        if fork::is_fork(&self.instance, &to.instance) {
            fork::draw_anew()?;
        }
        names::ensure_machine_id()?;
        keys::ensure();
        if !to.instance.is_empty() {
            self.instance.clone_from(&to.instance);
        }
        let Some(network) = &to.network else { return Ok(None) };
        let announcement = network::ensure(network)?;
        names::ensure_resolver(network)?;
        Ok(Some(announcement))
    }
}

/// What of a configuration stays until there is another one. Time passes, and disks are looked
/// after each time.
fn lasting(configuration: &Configuration) -> Configuration {
    Configuration { wall_clock_unix_ns: None, disks: Vec::new(), ..configuration.clone() }
}
