//! The table itself: a row for each verb, a column for each state.

use mvm_wire::ErrorCode;

use crate::combination::Situation;
use crate::verb::Verb;

/// Where an instance is once nothing is under way any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It has never been started.
    Created,
    /// It runs.
    Running,
    /// Its vCPUs are stopped.
    Warm,
    /// It sleeps.
    Sleeping,
    /// It does not run.
    Stopped,
    /// It has failed.
    Failed,
    /// It is gone, and all that it had.
    Gone,
}

/// What a verb does in a state, if nothing special is beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// It works, and the instance stays, or goes on becoming, what it was.
    Stays,
    /// It works, and the instance becomes this.
    To(End),
    /// It is refused with this code, and the instance stays what it was.
    No(ErrorCode),
}

/// It works, and changes nothing about the instance.
const OK: Cell = Cell::Stays;
/// It works, and the instance runs.
const RUN: Cell = Cell::To(End::Running);
/// It works, and the instance stands still.
const WARM: Cell = Cell::To(End::Warm);
/// It works, and the instance sleeps.
const DOZE: Cell = Cell::To(End::Sleeping);
/// It works, and the instance is stopped.
const STOP: Cell = Cell::To(End::Stopped);
/// It works, and the instance is gone.
const GONE: Cell = Cell::To(End::Gone);
/// It is refused: the state does not allow it.
const NO: Cell = Cell::No(ErrorCode::Conflict);
/// It is refused: there is no such thing.
const NONE: Cell = Cell::No(ErrorCode::NotFound);

/// What a verb does, in the order of [`Situation::ALL`].
pub fn row(verb: Verb) -> [Cell; 10] {
    match verb {
        // created, starting, running, warm, sleeping, falling asleep, stopping, stopped, failed, destroying
        Verb::Start => [RUN, RUN, OK, RUN, RUN, RUN, RUN, RUN, RUN, NO],
        Verb::Stop => [OK, STOP, STOP, STOP, STOP, STOP, OK, OK, STOP, NO],
        Verb::Kill => [OK, STOP, STOP, STOP, STOP, STOP, OK, OK, STOP, NO],
        Verb::Restart => [RUN, RUN, RUN, RUN, RUN, RUN, RUN, RUN, RUN, NO],
        Verb::Warm => [NO, WARM, WARM, OK, WARM, WARM, NO, NO, NO, NO],
        Verb::Sleep => [NO, DOZE, DOZE, DOZE, OK, OK, NO, NO, NO, NO],
        Verb::SleepForce => [NO, DOZE, DOZE, DOZE, OK, OK, NO, NO, NO, NO],
        Verb::Pin | Verb::Unpin => [OK, OK, OK, OK, OK, OK, OK, OK, OK, NO],
        Verb::Destroy => [GONE, NO, NO, NO, NO, NO, GONE, GONE, GONE, OK],
        Verb::DestroyForce => [GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, OK],
        // Another instance runs besides.
        Verb::Fork => [NO, OK, OK, OK, OK, OK, NO, NO, NO, NO],

        Verb::Exec | Verb::Locate | Verb::Ssh | Verb::Forward | Verb::Attach | Verb::LogsKernel => {
            [NO, RUN, OK, RUN, RUN, RUN, NO, NO, NO, NO]
        }
        Verb::AttachEarly => [OK; 10],
        Verb::Logs | Verb::LogsFollow | Verb::Stats | Verb::Why | Verb::Instances | Verb::Watch => {
            [OK; 10]
        }

        // Another instance is there besides.
        Verb::Create | Verb::CreateStarted => [OK; 10],
        Verb::PoolCreate | Verb::PoolRollback => [NO; 10],
        Verb::PoolBuild
        | Verb::PoolUpdate
        | Verb::PoolReady
        | Verb::PoolPolicy
        | Verb::WarmUp
        | Verb::Pools => [OK; 10],
        // One that is on its way out is replaced.
        Verb::ScaleToOne | Verb::Up => [RUN, RUN, OK, RUN, RUN, RUN, RUN, RUN, RUN, OK],
        // What rests is not counted as running, and goes on resting.
        Verb::ScaleToNone => [OK, STOP, STOP, OK, OK, OK, OK, OK, STOP, OK],
        Verb::PoolDestroy => [GONE, NO, NO, NO, NO, NO, GONE, GONE, GONE, OK],
        Verb::PoolDestroyForce => [GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, OK],

        Verb::TenantCreate | Verb::TenantDestroy => [NO; 10],
        Verb::TenantUpdate | Verb::Tenants => [OK; 10],
        // Whatever has a tap has it in the old subnet.
        Verb::TenantMove => [OK, NO, NO, NO, OK, NO, NO, OK, NO, NO],
        Verb::TenantDestroyForce | Verb::Down => {
            [GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE, OK]
        }

        Verb::DiskCreate | Verb::Disks => [OK; 10],
        Verb::DiskResize | Verb::DiskRemove => [NONE; 10],

        Verb::Images | Verb::ImageCollect => [OK; 10],
        Verb::ImageRemove => [NO; 10],
        Verb::Node | Verb::NetVerify | Verb::Records | Verb::AgentStop => [OK; 10],
        Verb::RecordMend => [NO; 10],
        Verb::Unknown => [Cell::No(ErrorCode::Unsupported); 10],
    }
}

/// What a verb does in a state.
pub(crate) fn cell(verb: Verb, situation: Situation) -> Cell {
    row(verb)[situation as usize]
}
