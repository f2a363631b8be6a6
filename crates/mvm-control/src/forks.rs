//! Forks, and bases: new instances that begin where another one is.
//!
//! The node saves an instance, which goes on; new ones are asked for like any others, and begin from what was
//! saved when they are started for the first time. A base is saved from an instance that is made for it and that
//! nobody else uses, so that nothing of anybody's work is in what every later instance begins with. One
//! that is left over from before is destroyed at the start.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::{self, Request};
use mvm_core::lifecycle::State;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::record::{BuildState, Purpose};
use mvm_wire::door::{Answer, Question, base_failed, base_gone};
use mvm_wire::{Accepted, ApiError, ErrorCode, HangUp};
use tokio::time::timeout;

use crate::Control;
use crate::admission::{self, denied};
use crate::server::one;

/// How long the removal of the instance that was booted for a base is waited for.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// Makes so many forks of an instance, once it has settled; nothing if the caller hangs up before.
pub(crate) async fn fork(
    control: &Arc<Control>,
    selector: &Selector,
    count: u32,
    hang_up: &dyn HangUp,
) -> Option<Result<Accepted, ApiError>> {
    let source = match one(&control.state.now(), selector) {
        Ok(source) => source,
        Err(error) => return Some(Err(error)),
    };
    let settled = Question::Settled { instance: source.clone() };
    tokio::select! {
        settled = control.link.ask(settled) => if let Err(error) = settled {
            return Some(Err(error));
        },
        () = hang_up.wait() => return None,
    }
    Some(fork_from(control, source, count).await)
}

async fn fork_from(
    control: &Arc<Control>,
    source: InstancePath,
    count: u32,
) -> Result<Accepted, ApiError> {
    let mirror = control.state.now();
    if let Some(record) = mirror.desired.instances.get(&source) {
        // Before it is saved for nothing.
        admit::check_forkable(record).map_err(|denial| denied(&mirror, &denial))?;
    }
    let captured = control.link.ask(Question::Capture { instance: source.clone() }).await?;
    let Answer::Captured { snapshot, revision } = captured else {
        return Err(captured.unexpected());
    };
    let request = Request::InstanceFork { source, snapshot: snapshot.clone(), revision, count };
    let forked = admission::submit(control, request).await;
    // From now on it is the forks' records that keep it.
    let let_go = control.link.ask(Question::LetGo { snapshot }).await;
    let accepted = forked?;
    let_go?;
    Ok(accepted)
}

/// Makes a pool's base, or makes it anew. The one before serves until then.
pub(crate) async fn warm_up(control: &Arc<Control>, pool: &PoolPath) -> Result<(), ApiError> {
    let request = Request::PoolTemplate { path: pool.clone() };
    let accepted = admission::submit(control, request).await?;
    let Some(template) = accepted.instances.first().map(|target| target.path.clone()) else {
        return Err(base_gone(pool));
    };
    let made = make_base(control, &template).await;
    let destroyed = destroy(control, &template).await;
    // The next list shows only the pool's own instances, or why this one is still there.
    let mut state = control.state.follow();
    let is_gone = |mirror: &Arc<Mirror>| !mirror.desired.instances.contains_key(&template);
    drop(timeout(REMOVAL_LIMIT, state.wait_for(is_gone)).await);
    made.and(destroyed)
}

/// Destroys what was made for the bases that were being made before.
pub(crate) async fn end_leftovers(control: &Arc<Control>) {
    let mirror = control.state.now();
    let records = mirror.desired.instances.values();
    let leftover = records.filter(|record| record.purpose == Purpose::Base);
    for record in leftover {
        let what = format!("removing {}, which was made for its pool's base", record.path);
        let refusal = destroy(control, &record.path).await.err();
        control.set_problem(&what, refusal.map(|error| error.to_string()));
    }
}

async fn destroy(control: &Arc<Control>, template: &InstancePath) -> Result<(), ApiError> {
    let selector = Selector::from(template);
    let request = Request::InstanceDestroy { selector, all: false, force: true };
    match admission::submit(control, request).await {
        // Its pool may have been removed, and it with it.
        Err(error) if error.code != ErrorCode::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn make_base(control: &Control, template: &InstancePath) -> Result<(), ApiError> {
    until_running(control, template).await?;
    control.link.ask(Question::MakeBase { instance: template.clone() }).await.map(drop)
}

/// Waits until the guest answers, however long its image takes to build.
async fn until_running(control: &Control, template: &InstancePath) -> Result<(), ApiError> {
    let pool = &template.pool;
    let mut state = control.state.follow();
    loop {
        let mirror = state.borrow_and_update().clone();
        if !mirror.desired.instances.contains_key(template) {
            return Err(base_gone(pool));
        }
        let status = mirror.status(template);
        if status.state() == State::Running && status.activity().is_none() {
            return Ok(());
        }
        if let Some(death) = &status.last_death {
            let error = format!("the instance that boots for it ended: {}", death.cause);
            return Err(base_failed(pool, &error));
        }
        let image = mirror.observed.pools.get(pool).cloned().unwrap_or_default();
        let asked = mirror.desired.pools.get(pool).map_or(0, |record| record.build_generation);
        if let (None, BuildState::Failed { error, .. }) = (&image.revision, &image.build)
            && image.build_generation >= asked
        {
            return Err(base_failed(pool, &format!("its image cannot be built: {error}")));
        }
        if state.changed().await.is_err() {
            return Err(ApiError::new(ErrorCode::Internal, "the agent is ending"));
        }
    }
}
