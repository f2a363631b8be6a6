//! Subnets of tenants that the machine has come to reach by other links.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use mvm_core::net::LinkName;

use super::NetworkError;
use super::links::{Links, Route};

/// A tenant's subnet, and another route that overlaps it.
pub type Conflict = (Ipv4Net, Ipv4Net);

/// Those of the tenants of all agents, by the addresses of their bridges.
///
/// # Errors
/// The machine's links and routes cannot be read.
pub async fn route_conflicts() -> Result<Vec<Conflict>, NetworkError> {
    let links = Links::open()?;
    let all = links.all().await?;
    let bridges: BTreeSet<u32> = all
        .iter()
        .filter(|link| matches!(LinkName::parse(&link.name), Some(LinkName::Bridge(_))))
        .map(|link| link.index)
        .collect();
    let addresses = links.addresses().await?.into_iter();
    let subnets = addresses.filter(|(link, _)| bridges.contains(link)).map(|(_, net)| net.trunc());
    Ok(among(subnets, &links.routes().await?, |link| bridges.contains(&link)))
}

/// Those of these subnets, where links that are `ours` do not count.
pub(super) fn among(
    subnets: impl IntoIterator<Item = Ipv4Net>,
    routes: &[Route],
    is_ours: impl Fn(u32) -> bool,
) -> Vec<Conflict> {
    let mut conflicts = BTreeSet::new();
    for subnet in subnets {
        let others = routes.iter().filter(|route| !route.link.is_some_and(&is_ours));
        let overlapping = others.map(|route| route.destination.trunc());
        let overlapping = overlapping.filter(|to| to.contains(&subnet) || subnet.contains(to));
        conflicts.extend(overlapping.map(|to| (subnet, to)));
    }
    conflicts.into_iter().collect()
}
