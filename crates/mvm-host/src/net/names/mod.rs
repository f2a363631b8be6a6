//! Name servers for guests: one at each tenant's gateway, which asks whomever the machine itself asks.
//!
//! So names are found in guests wherever the machine finds them, also with a resolver that only the machine
//! reaches (on its loopback, on a link-local address, in a tenant's range), and a change of the machine's
//! resolver is followed at once.

mod relay;
mod resolv_conf;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use mvm_core::net::TenantNetwork;
use tokio::sync::Mutex;

use super::NetworkError;
use relay::Relay;
use resolv_conf::Followed;

pub use resolv_conf::ResolvConf;
pub(crate) use resolv_conf::read;

/// The machine's file.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The name servers of all tenants.
#[derive(Debug)]
pub(super) struct Names {
    conf: Arc<Followed>,
    relays: Mutex<BTreeMap<TenantNetwork, Relay>>,
}

impl Names {
    pub(super) fn new(resolv_conf: PathBuf) -> Self {
        Self { conf: Arc::new(Followed::new(resolv_conf)), relays: Mutex::default() }
    }

    /// What the machine's file says now.
    pub(super) fn conf(&self) -> Arc<ResolvConf> {
        self.conf.now()
    }

    /// Makes these tenants have a name server, and no others. Their bridges must be there.
    pub(super) async fn ensure(
        &self,
        tenants: &BTreeSet<TenantNetwork>,
    ) -> Result<(), NetworkError> {
        let mut relays = self.relays.lock().await;
        relays.retain(|tenant, _| tenants.contains(tenant));
        let mut errors = Vec::new();
        for tenant in tenants {
            if relays.contains_key(tenant) {
                continue;
            }
            match relay::start(*tenant, self.conf.clone()).await {
                Ok(relay) => drop(relays.insert(*tenant, relay)),
                Err(error) => {
                    let operation = format!("answer questions for names at {}", tenant.gateway());
                    errors.push(NetworkError::system(operation)(error));
                }
            }
        }
        NetworkError::all(errors)
    }
}
