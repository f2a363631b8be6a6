//! Leases: keys that go away with a holder that no longer renews them.
//!
//! The embedded stores count time by a [`Clock`], and a task for each lease waits for its end. What
//! remains of a lease is not stored: when a store is opened, each lease begins anew.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::StoreError;

/// How long after a failure an expiry is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The name that a store gave to a lease; it is never given again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(u64);

impl LeaseId {
    /// The lease with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The lease's number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What time it is, for leases.
#[async_trait]
pub trait Clock: fmt::Debug + Send + Sync {
    /// The time since a fixed moment; it never goes back.
    fn now(&self) -> Duration;

    /// Returns at this time, or soon after it.
    async fn sleep_until(&self, time: Duration);
}

/// The machine's clock, as the runtime has it.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    async fn sleep_until(&self, time: Duration) {
        tokio::time::sleep(time.saturating_sub(self.now())).await;
    }
}

/// A clock that stands still until it is told otherwise: for tests and simulations.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: watch::Sender<Duration>,
}

impl ManualClock {
    /// Lets so much time pass.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now += by);
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    async fn sleep_until(&self, time: Duration) {
        // Without the clock there is nobody to be woken.
        let _ = self.now.subscribe().wait_for(|now| *now >= time).await;
    }
}

/// What removes the keys of a lease. It does not keep the store alive.
#[async_trait]
pub(crate) trait Holder: Send + Sync + 'static {
    /// Ends the lease unless it was renewed meanwhile.
    async fn expire(&self, lease: LeaseId) -> Result<(), StoreError>;
}

/// The leases of an embedded store, and when they end.
#[derive(Debug)]
pub(crate) struct Leases {
    clock: Arc<dyn Clock>,
    terms: Mutex<BTreeMap<LeaseId, Term>>,
    /// They end with the store.
    expiries: Mutex<JoinSet<()>>,
}

#[derive(Debug, Clone, Copy)]
struct Term {
    ttl: Duration,
    end: Duration,
}

impl Leases {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, terms: Mutex::default(), expiries: Mutex::default() })
    }

    /// From now on there is this lease.
    pub(crate) fn begin(self: &Arc<Self>, lease: LeaseId, ttl: Duration, holder: impl Holder) {
        self.terms().insert(lease, Term { ttl, end: self.clock.now().saturating_add(ttl) });
        let mut expiries = self.expiries.lock().unwrap_or_else(PoisonError::into_inner);
        while expiries.try_join_next().is_some() {}
        expiries.spawn(end_in_time(Arc::downgrade(self), lease, holder));
    }

    /// The lease's time starts again.
    pub(crate) fn renew(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.require(lease)?;
        let now = self.clock.now();
        if let Some(term) = self.terms().get_mut(&lease) {
            term.end = now.saturating_add(term.ttl);
        }
        Ok(())
    }

    /// Refuses a lease that was never granted or has ended.
    pub(crate) fn require(&self, lease: LeaseId) -> Result<(), StoreError> {
        let now = self.clock.now();
        match self.terms().get(&lease) {
            Some(term) if term.end > now => Ok(()),
            _ => Err(StoreError::NoSuchLease { lease }),
        }
    }

    /// The lease has ended, and its keys are gone.
    pub(crate) fn end(&self, lease: LeaseId) {
        self.terms().remove(&lease);
    }

    fn terms(&self) -> MutexGuard<'_, BTreeMap<LeaseId, Term>> {
        self.terms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn end_in_time(leases: Weak<Leases>, lease: LeaseId, holder: impl Holder) {
    loop {
        let (clock, end) = {
            let Some(leases) = leases.upgrade() else { return };
            let Some(term) = leases.terms().get(&lease).copied() else { return };
            (leases.clock.clone(), term.end)
        };
        clock.sleep_until(end).await;
        match holder.expire(lease).await {
            Ok(()) => {}
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::warn!(%lease, %error, "cannot remove the keys of a lease that has ended");
                clock.sleep_until(clock.now() + RETRY).await;
            }
        }
    }
}
