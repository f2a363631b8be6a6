//! What follows from a node's reports: what it decided is taken over, what is gone is forgotten, and what only
//! control can do is done.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::{self, OwnRequest, Request};
use mvm_core::document::NodeReport;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::record::DesiredState;
use mvm_store::{ChangeError, Room, StoreError};
use mvm_wire::{ErrorCode, chain};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::{Control, admission, forks};

/// How often what could not be done is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Runs as long as control does.
pub(crate) async fn run(control: Arc<Control>, mut reports: watch::Receiver<Arc<NodeReport>>) {
    let mut spares = Spares { asked: BTreeMap::new(), at: Instant::now() };
    loop {
        let report = reports.borrow_and_update().clone();
        control.state.set_report(&report);
        settle(&control, &report).await;
        forks::conclude(&control, &report).await;
        for path in &report.needs.removal {
            remove(&control, path).await;
        }
        spares.ask(&control, &report.needs.spares).await;
        if let Ok(Err(_)) = timeout(AGAIN, reports.changed()).await {
            return;
        }
    }
}

/// Gives the node each new document, whoever changed the records. Runs as long as control does.
pub(crate) async fn tell(control: Arc<Control>) {
    let mut present = control.state.follow();
    loop {
        control.tell();
        if present.changed().await.is_err() {
            return;
        }
    }
}

/// Takes over what the node decided, and forgets what is gone.
async fn settle(control: &Control, report: &NodeReport) {
    let settled = |mirror: &Mirror| {
        let taken_over = admit::take_over(&mirror.desired, &report.local);
        admit::forget(&taken_over, &report.gone)
    };
    if settled(&control.state.now()) == control.state.now().desired {
        return;
    }
    let change = async |mirror: Arc<Mirror>| {
        let ops = admission::difference(&mirror.desired, &settled(&mirror))?;
        Ok::<_, StoreError>((ops, ()))
    };
    let problem = match control.change(Room::Reserved, change).await {
        Ok(_) => None,
        Err(ChangeError::Refused(error)) => Some(chain(&error)),
        Err(ChangeError::Store(error)) => Some(chain(&error)),
    };
    control.set_problem("taking over what the node reports", problem);
}

/// Removes an instance that goes at its end, or after what it was made for.
async fn remove(control: &Arc<Control>, path: &InstancePath) {
    let desired = control.state.now().desired.instances.get(path).map(|record| record.desired);
    if desired.is_none_or(|desired| desired == DesiredState::Destroyed) {
        return;
    }
    let selector = Selector::from(path);
    let request = Request::InstanceDestroy { selector, all: false, force: true };
    let refusal = admission::submit(control, request).await.err();
    // Somebody may have removed it already.
    let refusal = refusal.filter(|e| !matches!(e.code, ErrorCode::NotFound | ErrorCode::Conflict));
    let what = format!("removing {path}, which is not needed any more");
    control.set_problem(&what, refusal.map(|error| error.to_string()));
}

/// How many instances were asked to stand by last, and when.
struct Spares {
    asked: BTreeMap<PoolPath, u32>,
    at: Instant,
}

impl Spares {
    /// Makes the instances that stand by be so many, where others do: once, until the node needs something
    /// else, or a while has passed.
    async fn ask(&mut self, control: &Arc<Control>, needed: &BTreeMap<PoolPath, u32>) {
        let is_due = self.at.elapsed() >= AGAIN;
        for (pool, count) in needed {
            if !is_due && self.asked.get(pool) == Some(count) {
                continue;
            }
            let request = OwnRequest::Spares { pool: pool.clone(), count: *count };
            let refusal = admission::submit_own(control, &request, None).await.err();
            let what = format!("keeping instances of {pool} ready");
            control.set_problem(&what, refusal.map(|error| error.to_string()));
        }
        if is_due {
            self.at = Instant::now();
        }
        self.asked.clone_from(needed);
    }
}
