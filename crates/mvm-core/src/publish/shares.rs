//! How many connections to published ports there may be: in all, and of each tenant, pool and client.
//!
//! Whoever connects to a published port is nobody in particular, and must not be able to keep others
//! out. One principle holds on each level: **nobody holds more than is left for the others**. So
//! whoever comes first gets half of everything at most, and there is always room for somebody new:
//!
//! ```text
//!  node   may hold as many as the machine has descriptors for
//!  tenant may hold as many as are left of the node's
//!  pool   may hold as many as are left of the tenant's, and POOL_MAX
//!  client may hold as many as are left of the pool's; clients of this machine itself may hold all
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use crate::name::{PoolPath, TenantName};

/// Most connections of one pool, those that wait for an instance included.
pub const POOL_MAX: usize = 1024;

/// Who is counted as one client: an address, or the network of an IPv6 address, which is one client's
/// to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Client(IpAddr);

impl Client {
    fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                IpAddr::V6(Ipv6Addr::from(u128::from(address) & !u128::from(u64::MAX)))
            }
            address => address,
        })
    }
}

/// Why one more connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The node has no more, or the tenant as many as are left.
    #[error(
        "{open} connections to this tenant's ports are open, and the rest are reserved for the node's other tenants"
    )]
    Tenant {
        /// How many the tenant has.
        open: usize,
    },
    /// The pool has as many as it may.
    #[error("{open} connections are open already")]
    Pool {
        /// How many the pool has.
        open: usize,
    },
    /// The client has as many as are left to others.
    #[error(
        "{open} connections of one client are open, and the rest are reserved for other clients"
    )]
    Client {
        /// How many the client has.
        open: usize,
    },
}

/// The connections that are open or wait.
#[derive(Debug, Clone)]
pub struct Shares {
    max: usize,
    open: usize,
    tenants: BTreeMap<TenantName, usize>,
    pools: BTreeMap<PoolPath, usize>,
    clients: BTreeMap<(PoolPath, IpAddr), usize>,
}

impl Shares {
    /// None yet, of this many at most.
    pub fn of(max: usize) -> Self {
        Self {
            max,
            open: 0,
            tenants: BTreeMap::new(),
            pools: BTreeMap::new(),
            clients: BTreeMap::new(),
        }
    }

    /// All that may be open.
    pub fn max(&self) -> usize {
        self.max
    }

    /// All that are open.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Those of a pool that are open or wait.
    pub fn of_pool(&self, pool: &PoolPath) -> usize {
        self.pools.get(pool).copied().unwrap_or(0)
    }

    /// The pools that have some, and how many.
    pub fn pools(&self) -> impl Iterator<Item = (&PoolPath, usize)> {
        self.pools.iter().map(|(pool, open)| (pool, *open))
    }

    /// Counts one more, if there is room for it.
    ///
    /// # Errors
    /// There is not.
    pub fn admit(&mut self, pool: &PoolPath, client: IpAddr) -> Result<(), Full> {
        let tenant_has = self.tenants.get(&pool.tenant).copied().unwrap_or(0);
        let pool_has = self.of_pool(pool);
        let left_for_tenants = self.max.saturating_sub(self.open);
        let left_for_pools = left_for_tenants.saturating_sub(tenant_has);
        let left_for_clients =
            left_for_pools.saturating_sub(pool_has).min(POOL_MAX.saturating_sub(pool_has));
        if left_for_pools == 0 {
            return Err(Full::Tenant { open: tenant_has });
        }
        if left_for_clients == 0 {
            return Err(Full::Pool { open: pool_has });
        }
        let key = (pool.clone(), Client::of(client).0);
        let client_has = self.clients.get(&key).copied().unwrap_or(0);
        // Others cannot come from there: it is the operator's own, such as a proxy.
        if client_has >= left_for_clients && !client.to_canonical().is_loopback() {
            return Err(Full::Client { open: client_has });
        }
        self.open += 1;
        *self.tenants.entry(pool.tenant.clone()).or_default() += 1;
        *self.pools.entry(pool.clone()).or_default() += 1;
        *self.clients.entry(key).or_default() += 1;
        Ok(())
    }

    /// Counts one less of those that were admitted.
    pub fn release(&mut self, pool: &PoolPath, client: IpAddr) {
        fn less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
        self.open = self.open.saturating_sub(1);
        less(&mut self.tenants, &pool.tenant);
        less(&mut self.pools, pool);
        less(&mut self.clients, &(pool.clone(), Client::of(client).0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::property::cases;

    fn pool(text: &str) -> PoolPath {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Takes all that a client can get.
    fn take_all(shares: &mut Shares, of: &str, client: &str) -> (usize, Full) {
        let mut count = 0;
        loop {
            match shares.admit(&pool(of), ip(client)) {
                Ok(()) => count += 1,
                Err(full) => return (count, full),
            }
        }
    }

    #[test]
    fn one_client_leaves_room_for_another_of_the_same_pool() {
        let mut shares = Shares::of(100_000);
        let (count, full) = take_all(&mut shares, "t/web", "198.51.100.1");
        assert_eq!((count, full), (POOL_MAX / 2, Full::Client { open: POOL_MAX / 2 }));
        shares.admit(&pool("t/web"), ip("198.51.100.2")).unwrap();
        // A network of IPv6 is one client, and IPv4 in IPv6's clothes the same as without.
        take_all(&mut shares, "t/web", "2001:db8::1");
        assert!(shares.admit(&pool("t/web"), ip("2001:db8::2")).is_err());
        assert!(shares.admit(&pool("t/web"), ip("::ffff:198.51.100.1")).is_err());
        shares.admit(&pool("t/web"), ip("2001:db8:0:1::1")).unwrap();
    }

    #[test]
    fn all_clients_of_one_pool_leave_room_for_others_and_those_for_other_tenants() {
        // As few as under a low limit of descriptors.
        let mut shares = Shares::of(512);
        let (count, full) = take_all(&mut shares, "t/web", "127.0.0.1");
        assert!(matches!(full, Full::Pool { .. }) && count < 256, "{count} {full}");
        let (count, _) = take_all(&mut shares, "t/api", "127.0.0.1");
        assert!(count > 50, "{count}");
        let mut more = 0;
        for number in 0..100 {
            more += take_all(&mut shares, &format!("t/p{number}"), "127.0.0.1").0;
        }
        assert!(more > 0);
        let (count, _) = take_all(&mut shares, "other/web", "127.0.0.1");
        assert!(count > 50, "{count}");
    }

    #[test]
    fn a_pool_has_an_end_of_its_own() {
        let mut shares = Shares::of(1_000_000);
        let (count, full) = take_all(&mut shares, "t/web", "127.0.0.1");
        assert_eq!((count, full), (POOL_MAX, Full::Pool { open: POOL_MAX }));
    }

    proptest! {
        #![proptest_config(cases(64))]

        /// Whatever came and went: the sums agree, the end is kept, and a tenant who has nothing gets
        /// something as long as anything is left.
        #[test]
        fn shares_are_kept_and_given_back(
            max in 2usize..200,
            steps in proptest::collection::vec((0u8..3, 0u8..3, 0u8..4, any::<bool>()), 1..400),
        ) {
            let mut shares = Shares::of(max);
            let mut held = Vec::new();
            for (tenant, of, client, is_new) in steps {
                let of = pool(&format!("t{tenant}/p{of}"));
                let client = ip(&format!("198.51.100.{client}"));
                if is_new {
                    if shares.admit(&of, client).is_ok() {
                        held.push((of, client));
                    }
                } else if let Some((of, client)) = held.pop() {
                    shares.release(&of, client);
                }
                prop_assert_eq!(shares.open(), held.len());
                prop_assert!(held.len() <= max);
                let newcomer = shares.clone().admit(&pool("new/web"), ip("198.51.100.9"));
                prop_assert!(newcomer.is_ok() || max - held.len() < 2);
            }
            for (of, client) in held.drain(..) {
                shares.release(&of, client);
            }
            prop_assert!(shares.tenants.is_empty() && shares.pools.is_empty());
            prop_assert!(shares.clients.is_empty() && shares.open() == 0);
        }
    }
}
