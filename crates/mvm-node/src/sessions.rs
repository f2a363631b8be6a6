//! Sessions with guests: of which instance somebody means one, and what is waited for until there is one.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::ErrorKind;
use mvm_core::lifecycle::{Outcome, Phase, State};
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::plan::Waiting;
use mvm_core::record::DesiredState;
use mvm_host::guest::{Session, SessionError};
use mvm_wire::{ApiError, ErrorCode};
use tokio::time::Instant;

use crate::node::{Node, chain};
use crate::{space, wake};

/// How long a guest has to answer a question.
pub(crate) const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest whose session is over has to open another one.
const REJOIN_LIMIT: Duration = Duration::from_secs(10);
/// How often sessions are looked for while one is waited for.
const SESSION_POLL: Duration = Duration::from_millis(20);

/// A session with an instance that a selector means: any running one will do, and if none runs, one
/// that is at rest is woken. One that is starting is waited for, and so, for a while, is a guest
/// that an agent has just adopted.
pub(crate) async fn session(
    node: &Arc<Node>,
    selector: &Selector,
) -> Result<(InstancePath, Session), ApiError> {
    let mut state = node.state.follow();
    let rejoined_by = Instant::now() + REJOIN_LIMIT;
    // One that is there for something else than use is meant only by its own name.
    let is_named = matches!(selector, Selector::Id { .. });
    loop {
        let mirror = state.borrow_and_update().clone();
        let candidates: Vec<&InstancePath> = mirror
            .desired
            .instances_meant(selector)
            .filter(|record| is_named || record.purpose.is_use())
            .map(|record| &record.path)
            .collect();
        let can_answer =
            |path: &InstancePath| is_ready(node, &mirror, path) && !node.lacks_space(path);
        if let Some(path) = candidates.iter().find(|path| can_answer(path))
            && let Some(session) = session_of(node, path)
        {
            return Ok(((*path).clone(), session));
        }
        if let Some(path) = candidates.iter().find(|path| node.lacks_space(path)) {
            return Err(space::refusal(node, path));
        }
        let is_near = |path: &&InstancePath| {
            let Some(record) = mirror.desired.instances.get(*path) else { return false };
            let status = mirror.status(path);
            let is_held_up = || {
                let waiting = node.waiting();
                let waiting = waiting.borrow();
                let waiting = waiting.get(*path);
                !matches!(
                    waiting,
                    None | Some(Waiting::Step | Waiting::StartSlot | Waiting::Network)
                )
            };
            record.desired == DesiredState::Running
                && match status.phase {
                    Phase::Starting { .. }
                    | Phase::Warm { .. }
                    | Phase::Suspending { .. }
                    | Phase::Sleeping { .. }
                    | Phase::Stopping { outcome: Outcome::Asleep, .. }
                    | Phase::Releasing { outcome: Outcome::Asleep, .. } => true,
                    Phase::Running { .. } => Instant::now() < rejoined_by,
                    // The next round starts it, if nothing is in its way.
                    Phase::Created => !is_held_up(),
                    // It was asked to start anew.
                    _ => status.generation < record.generation && !is_held_up(),
                }
        };
        if !candidates.iter().copied().any(|path| is_near(&path)) {
            let Some(resting) = candidates.iter().find(|path| is_at_rest(&mirror, path)) else {
                return Err(unavailable(&mirror, selector, &candidates));
            };
            wake::wake(node, resting).await?;
            continue;
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return Err(ApiError::new(ErrorCode::Internal, "the agent is ending"));
            },
            // Sessions are not part of the state that is followed.
            () = tokio::time::sleep(SESSION_POLL) => {}
        }
    }
}

/// The instances of a pool whose guests answer, with their sessions.
pub(crate) fn ready(node: &Node, pool: &PoolPath) -> Vec<(InstancePath, Session)> {
    let mirror = node.state.now();
    let of_use = mirror.desired.instances_in(pool).filter(|record| record.purpose.is_use());
    let running = of_use.map(|record| &record.path);
    let ready = running.filter(|path| is_ready(node, &mirror, path));
    ready.filter_map(|path| Some((path.clone(), session_of(node, path)?))).collect()
}

fn session_of(node: &Node, path: &InstancePath) -> Option<Session> {
    node.instance(path)?.session.borrow().clone()
}

fn is_ready(node: &Node, mirror: &Mirror, path: &InstancePath) -> bool {
    is_up(mirror, path) && session_of(node, path).is_some()
}

/// Whether an instance runs, and nobody is about to put it to rest or to stop it.
pub(crate) fn is_up(mirror: &Mirror, path: &InstancePath) -> bool {
    matches!(mirror.status(path).phase, Phase::Running { .. }) && !is_at_rest(mirror, path)
}

/// Whether an instance is to rest, and would go on where it was.
pub(crate) fn is_at_rest(mirror: &Mirror, path: &InstancePath) -> bool {
    let desired = mirror.desired.instances.get(path).map(|record| record.desired);
    let is_to_rest = matches!(desired, Some(DesiredState::Warm | DesiredState::Sleeping));
    let status = mirror.status(path);
    is_to_rest && !status.has_ended() && !matches!(status.phase, Phase::Created)
}

fn unavailable(mirror: &Mirror, selector: &Selector, candidates: &[&InstancePath]) -> ApiError {
    match candidates {
        [] => {
            let message = format!("there is no instance {selector} any more");
            ApiError::new(ErrorCode::NotFound, message).hint("see `mvm ps -a`")
        }
        [path] => {
            let status = mirror.status(path);
            let state = status.state();
            if let Some(activity @ ("stopping" | "destroying")) = status.activity() {
                let message = format!("{path} is {activity}");
                let hint = match activity {
                    "stopping" => format!("start it again with `mvm start {}`", path.id),
                    _ => "see `mvm ps -a`".to_owned(),
                };
                return ApiError::new(ErrorCode::Conflict, message).hint(hint);
            }
            if state == State::Running {
                let message = format!("the guest agent of {path} does not answer");
                return ApiError::new(ErrorCode::Guest, message)
                    .hint(format!("see `mvm why {}`, or `mvm restart {}`", path.id, path.id));
            }
            ApiError::new(ErrorCode::Conflict, format!("{path} is {state}, not running")).hint(
                format!("start it with `mvm start {}`, or see `mvm why {}`", path.id, path.id),
            )
        }
        several => {
            let message =
                format!("none of the {} instances of {selector} is running", several.len());
            ApiError::new(ErrorCode::Conflict, message)
                .hint(format!("start them with `mvm start {selector} --all`"))
        }
    }
}

/// Why a session with an instance ended under a program or a copy.
pub(crate) fn session_over(node: &Node, instance: &InstancePath) -> ApiError {
    let mirror = node.state.now();
    let status = mirror.status(instance);
    let desired = mirror.desired.instances.get(instance).map(|record| record.desired);
    let (how, hint) = match (desired, &status.phase) {
        (None | Some(DesiredState::Destroyed), _) => ("was removed", None),
        (Some(DesiredState::Sleeping), _)
        | (
            _,
            Phase::Suspending { .. }
            | Phase::Sleeping { .. }
            | Phase::Stopping { outcome: Outcome::Asleep, .. }
            | Phase::Releasing { outcome: Outcome::Asleep, .. },
        ) => (
            "fell asleep, and what ran over its session ended",
            Some(format!(
                "run it again, which wakes {}; with `mvm exec -d` it outlives a sleep",
                instance.id
            )),
        ),
        (Some(DesiredState::Stopped), _) => ("was stopped", None),
        _ if status.has_ended() => ("ended", Some(format!("see `mvm why {}`", instance.id))),
        _ => ("is no longer reached: the session with it ended", None),
    };
    let error = ApiError::new(ErrorCode::Guest, format!("{instance} {how}"));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

pub(crate) fn guest_error(instance: &InstancePath, error: &SessionError) -> ApiError {
    if let SessionError::Missing { .. } = error {
        return ApiError::new(ErrorCode::Unsupported, format!("{instance}: {error}"))
            .hint(format!("`mvm restart {}` gives it this version's", instance.id));
    }
    let SessionError::Guest { error: guest, .. } = error else {
        return ApiError::new(ErrorCode::Guest, format!("{instance}: {}", chain(error)));
    };
    let code = match guest.kind {
        ErrorKind::NotFound => ErrorCode::GuestNotFound,
        ErrorKind::Denied => ErrorCode::GuestDenied,
        ErrorKind::Invalid => ErrorCode::Invalid,
        _ => ErrorCode::Guest,
    };
    // What was asked for is what the person typed: the guest's own words say what is wrong with it.
    ApiError::new(code, format!("{instance}: {}", chain(guest)))
}
