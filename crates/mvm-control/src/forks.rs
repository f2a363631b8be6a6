//! Forks: new instances that begin where another one is.
//!
//! A fork is asked for durably, under the id of its request. Its node saves the instance, which goes on, and reports
//! that; then the forks are made like any other instances, and what the request is answered is kept. Whoever asks
//! waits for that answer, and may ask the next agent for it: nothing rests on the one that waits.

use std::sync::Arc;

use mvm_core::admit::OwnRequest;
use mvm_core::document::NodeReport;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, RequestId, Selector};
use mvm_core::record::{self, Captured};
use mvm_store::{ChangeError, Op, Room, StoreError};
use mvm_wire::{Accepted, ApiError, ErrorCode, HangUp, chain};

use crate::Control;
use crate::admission::{self, Answered};
use crate::server::one;

/// Makes so many forks of an instance, once it has settled; nothing if the caller hangs up before, which leaves
/// the request to go on.
pub(crate) async fn fork(
    control: &Arc<Control>,
    id: &RequestId,
    selector: &Selector,
    count: u32,
    hang_up: &dyn HangUp,
) -> Option<Result<Accepted, ApiError>> {
    if let Err(error) = begin(control, id, selector, count).await {
        return Some(Err(error));
    }
    let mut state = control.state.follow();
    loop {
        let mirror = state.borrow_and_update().clone();
        if let Some(answered) = admission::answered(&mirror, id) {
            let answer: Result<Accepted, ApiError> = answered.into();
            return Some(answer.map(|accepted| Accepted { revision: mirror.version, ..accepted }));
        }
        if !mirror.desired.forks.contains_key(id) {
            let message = format!("the request to fork {selector} was removed");
            return Some(Err(ApiError::new(ErrorCode::Conflict, message)));
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return Some(Err(ApiError::new(ErrorCode::Internal, "the agent is ending")));
            },
            () = hang_up.wait() => return None,
        }
    }
}

/// Asks for forks, unless that was done before.
async fn begin(
    control: &Arc<Control>,
    id: &RequestId,
    selector: &Selector,
    count: u32,
) -> Result<(), ApiError> {
    let mirror = control.state.now();
    if mirror.requests.contains_key(id) || mirror.desired.forks.contains_key(id) {
        return Ok(());
    }
    let source = one(&mirror, selector)?;
    let request = OwnRequest::BeginFork { id: id.clone(), source, count };
    admission::submit_own(control, &request, Some(id)).await.map(drop)
}

/// Makes the forks of what the node has saved, and tells why those that cannot be made are not.
pub(crate) async fn conclude(control: &Arc<Control>, report: &NodeReport) {
    let mirror = control.state.now();
    for (id, fork) in &mirror.desired.forks {
        let error = match report.observed.captures.get(id).map(|it| it.outcome.clone()) {
            None => continue,
            Some(Captured::Saved { snapshot, revision }) => {
                let request = OwnRequest::MakeForks { id: id.clone(), snapshot, revision };
                match admission::submit_own(control, &request, Some(id)).await {
                    Ok(_) => continue,
                    // That may pass: a store that is full, a record that is mended.
                    Err(error)
                        if matches!(error.code, ErrorCode::Internal | ErrorCode::BadRecord) =>
                    {
                        control.set_problem(&what(&fork.source), Some(error.to_string()));
                        continue;
                    }
                    Err(error) => error,
                }
            }
            Some(Captured::Failed { error }) => {
                let message = format!("{} cannot be forked: {error}", fork.source);
                ApiError::new(ErrorCode::Conflict, message)
                    .hint(format!("see `mvm why {}`", fork.source.id))
            }
        };
        let problem = give_up(control, id, &error).await.err();
        control.set_problem(&what(&fork.source), problem);
    }
}

fn what(source: &InstancePath) -> String {
    format!("forking {source}")
}

/// Answers a request for forks with why there are none.
async fn give_up(control: &Control, id: &RequestId, error: &ApiError) -> Result<(), String> {
    let change = async |mirror: Arc<Mirror>| {
        let Some(fork) = mirror.desired.forks.get(id) else { return Ok((vec![], ())) };
        let answered = Answered::Refused(error.clone());
        let now = (control.ambient.now_ms)();
        let mut ops = admission::remembered(&mirror, id, &answered, now)?;
        ops.push(Op::Delete { key: record::fork_key(&fork.source.pool.tenant, id) });
        Ok::<_, StoreError>((ops, ()))
    };
    match control.change(Room::Reserved, change).await {
        Ok(_) => Ok(()),
        Err(ChangeError::Refused(error)) => Err(chain(&error)),
        Err(ChangeError::Store(error)) => Err(chain(&error)),
    }
}
