//! What is to come out of a combination.

use mvm_wire::ErrorCode;

use crate::combination::{Agent, Beside, Client, Combination, Situation};
use crate::table::{Cell, End, cell};
use crate::verb::{Kind, Verb};

/// What a guest's programs may lose. What they synced is never lost, unless the instance is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing that they wrote.
    Nothing,
    /// What they wrote and did not sync: the power was cut, as asked for.
    Unsynced,
}

/// What is to come out of a combination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The code that it is refused with, if it is.
    pub refused: Option<ErrorCode>,
    /// Where the instance is in the end.
    pub end: End,
    /// Where it may be as well, if nobody knows whether the request was heard.
    pub or: Option<End>,
    /// How many instances of its pool there are more in the end, if it was heard.
    pub more: usize,
    /// What may be lost.
    pub loss: Loss,
}

/// Where an instance comes to if nobody asks for anything.
pub fn heading(situation: Situation, beside: Beside) -> End {
    match situation {
        Situation::Created => End::Created,
        Situation::Starting | Situation::Running => End::Running,
        Situation::Warm => End::Warm,
        Situation::Sleeping | Situation::FallingAsleep => End::Sleeping,
        Situation::Stopping | Situation::Stopped => stopped(beside),
        Situation::Failed if beside == Beside::RestartNever => End::Failed,
        // It is tried again after a while.
        Situation::Failed => End::Running,
        Situation::Destroying => End::Gone,
    }
}

/// What becomes of an instance that stops.
fn stopped(beside: Beside) -> End {
    if beside == Beside::AutoRemove { End::Gone } else { End::Stopped }
}

/// What is to come out of a combination. An agent that has just started makes no difference.
pub fn expected(combination: Combination) -> Expected {
    let Combination { verb, situation, moment, beside } = combination;
    // A new agent, and whatever it has or has not looked at yet, are no news to users.
    let (Agent::Settled | Agent::JustStarted) = moment.agent;
    let stays = heading(situation, beside);
    let (refused, end) = match beside_it(verb, situation, beside) {
        Cell::Stays => (None, stays),
        Cell::To(End::Stopped) => (None, stopped(beside)),
        Cell::To(end) => (None, end),
        Cell::No(code) => (Some(code), stays),
    };
    let is_more = match verb {
        Verb::Fork | Verb::Create | Verb::CreateStarted => true,
        Verb::ScaleToOne | Verb::Up => situation == Situation::Destroying,
        _ => false,
    };
    let or = match moment.client {
        Client::Stays => None,
        Client::Interrupted => Some(stays),
    };
    let loss = match verb {
        Verb::Kill => Loss::Unsynced,
        _ => Loss::Nothing,
    };
    Expected { refused, end, or, more: usize::from(is_more && refused.is_none()), loss }
}

/// The cell of the table, changed by what else there is.
fn beside_it(verb: Verb, situation: Situation, beside: Beside) -> Cell {
    const REFUSED: Cell = Cell::No(ErrorCode::Conflict);
    let cell = cell(verb, situation);
    // What is to go on, or is about to be started again, has its disks.
    let is_held = !matches!(
        situation,
        Situation::Created | Situation::Stopping | Situation::Stopped | Situation::Destroying
    );
    match (verb, beside) {
        // A disk has one writer.
        (Verb::Fork | Verb::WarmUp, Beside::DataDisk) => REFUSED,
        (Verb::CreateStarted | Verb::DiskResize, Beside::DataDisk) if is_held => REFUSED,
        (Verb::DiskResize, Beside::DataDisk) => Cell::Stays,
        // What stands by has a tap, too.
        (Verb::TenantMove, Beside::Spare) => REFUSED,
        // It is attached to the pool.
        (Verb::DiskRemove, Beside::DataDisk) => REFUSED,
        // A base would outlive the run that it is for.
        (Verb::WarmUp, Beside::AutoRemove) => REFUSED,
        // Its last pool is going.
        (Verb::TenantDestroy, Beside::AutoRemove) if situation == Situation::Destroying => {
            Cell::Stays
        }
        // The pool is going, too.
        (
            Verb::PoolBuild
            | Verb::PoolUpdate
            | Verb::PoolReady
            | Verb::PoolPolicy
            | Verb::Create
            | Verb::CreateStarted
            | Verb::ScaleToOne
            | Verb::ScaleToNone
            | Verb::Up,
            Beside::AutoRemove,
        ) if situation == Situation::Destroying => REFUSED,
        _ => cell,
    }
}

impl Verb {
    /// Whether a verb leaves everything as it was, whatever it is asked of.
    pub fn is_question(self) -> bool {
        self.kind() == Kind::Question
    }
}
