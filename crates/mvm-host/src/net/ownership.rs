//! Which of the machine's links are ours.

use mvm_core::net::{LinkName, NetId};

use super::NetworkError;
use super::claims::Claims;
use super::links::{Link, LinkKind};
use super::owner::Owner;

/// First bytes of the MACs that the address plan gives.
const MAC_PREFIX: [u8; 2] = [0x02, 0x6d];

/// Tells one agent's links from all others.
#[derive(Debug)]
pub(super) struct Ownership {
    alias: String,
    claims: Claims,
}

impl Ownership {
    pub(super) fn new(owner: &Owner, claims: Claims) -> Self {
        Self { alias: owner.link_alias(), claims }
    }

    pub(super) fn alias(&self) -> &str {
        &self.alias
    }

    /// Whether a link carries our mark.
    ///
    /// A bridge cannot be created and marked in one step. One that is not marked, has a name and
    /// a MAC of the address plan, and a net id that we have claimed, is ours: its maker was ended
    /// between the two.
    pub(super) fn is_ours(&self, link: &Link) -> Result<bool, NetworkError> {
        if let Some(alias) = &link.alias {
            return Ok(*alias == self.alias);
        }
        let is_bridge = matches!(link.kind, LinkKind::Bridge { .. });
        let has_plan_mac = link.mac.is_some_and(|mac| mac.0.starts_with(&MAC_PREFIX));
        match LinkName::parse(&link.name) {
            Some(LinkName::Bridge(net_id)) if is_bridge && has_plan_mac => {
                self.claims.is_ours(net_id)
            }
            _ => Ok(false),
        }
    }

    /// Refuses a link of one of our names that is not ours.
    pub(super) fn check(&self, link: &Link) -> Result<(), NetworkError> {
        if self.is_ours(link)? {
            return Ok(());
        }
        Err(NetworkError::Taken { link: link.name.clone(), owner: describe(link) })
    }

    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Claims the net id, unless it is ours already.
    pub(super) fn claim(&self, net_id: NetId) -> Result<(), NetworkError> {
        self.claims.claim(net_id)
    }
}

/// Whose a link is that is not ours, in words.
pub(super) fn describe(link: &Link) -> String {
    match &link.alias {
        Some(alias) if alias.starts_with("mvm:") => format!("another agent (alias `{alias}`)"),
        Some(alias) => format!("other software (alias `{alias}`)"),
        None => "other software (it has no alias)".to_owned(),
    }
}
