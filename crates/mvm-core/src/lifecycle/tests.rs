//! What the tests of the state machine share.

mod causes;
mod liveness;
mod properties;
mod records;
mod sleep;
mod transitions;
pub(crate) mod world;

use super::*;
use crate::vmm::{Accel, ProcessEnd, ShutdownReason, VmmKind};

use crate::snapshot::{ImageRef, OwnSnapshot};

/// The default time of the tests, in milliseconds.
pub(super) const NOW: u64 = 1_000_000;
pub(super) const BOOT_TIMEOUT_MS: u64 = 30_000;
pub(super) const GRACE_MS: u64 = 10_000;

pub(super) fn handle(pid: u32) -> VmHandle {
    VmHandle {
        vmm: VmmKind::Sim,
        accel: Accel::Tcg,
        pid,
        start_ticks: u64::from(pid) * 100,
        host_boot_id: "boot-1".to_owned(),
    }
}

pub(super) fn revision(number: u8) -> RevisionId {
    RevisionId::from_digest([number; 8])
}

pub(super) fn start(generation: u64) -> Event {
    let boot_timeout_ms = BOOT_TIMEOUT_MS;
    Event::Start { generation, revision: revision(1), boot_timeout_ms, origin: None }
}

/// The snapshot that forks begin with.
pub(crate) fn origin() -> SnapshotId {
    SnapshotId::from_bits(1)
}

/// The start of a fork.
pub(super) fn start_fork(generation: u64) -> Event {
    let boot_timeout_ms = BOOT_TIMEOUT_MS;
    let origin = Some(origin());
    Event::Start { generation, revision: revision(1), boot_timeout_ms, origin }
}

pub(super) fn sleep(request: u64) -> Event {
    Event::Sleep { request, hooks_ms: 1_000 }
}

pub(super) fn saved(number: u64) -> Event {
    Event::Saved(OwnSnapshot { number, memory: ImageRef::Own { number } })
}

pub(super) fn sleep_failed(request: u64) -> Event {
    Event::SleepFailed { error: "no space".to_owned(), request }
}

pub(super) fn restore_refused() -> Event {
    Event::RestoreRefused { error: "its VMM version has changed".to_owned() }
}

pub(super) fn stop(generation: u64) -> Event {
    Event::Stop { grace_ms: GRACE_MS, generation }
}

pub(super) fn destroy() -> Event {
    Event::Destroy { grace_ms: GRACE_MS }
}

pub(super) fn boot_failed() -> Event {
    Event::BootFailed { error: "no tap".to_owned(), program: None }
}

pub(super) fn powered_off() -> VmExit {
    VmExit { process: ProcessEnd::Exited { code: 0 }, reason: Some(ShutdownReason::GuestShutdown) }
}

pub(super) fn signalled(signal: i32) -> VmExit {
    VmExit { process: ProcessEnd::Signaled { signal }, reason: None }
}

pub(super) fn exited(exit: VmExit) -> Event {
    Event::Exited { exit, console_tail: vec![] }
}

pub(super) fn found_gone() -> Event {
    let exit = VmExit { process: ProcessEnd::Unobserved, reason: None };
    Event::FoundGone { exit, host_rebooted: false, console_tail: vec![] }
}

/// Feeds events in, one millisecond apart from [`NOW`] on, and returns the status and the last
/// event's effects.
pub(super) fn run(events: impl IntoIterator<Item = Event>) -> (InstanceStatus, Vec<Effect>) {
    let mut status = InstanceStatus::default();
    let mut effects = vec![];
    for (at, event) in (NOW..).zip(events) {
        (status, effects) = step(&status, event, at);
    }
    (status, effects)
}

/// The events that lead to each phase, by the phase's name.
pub(super) fn path_to(name: &str) -> Vec<Event> {
    let launched = || Event::Launched(handle(1));
    match name {
        "created" => vec![],
        "starting" => vec![start(1)],
        "launched" => vec![start(1), launched()],
        "running" => vec![start(1), launched(), Event::Ready],
        "warm" => [path_to("running"), vec![Event::Pause]].concat(),
        "suspending" => [path_to("running"), vec![sleep(1)]].concat(),
        "saved" => [path_to("suspending"), vec![saved(1)]].concat(),
        "sleeping" => {
            let end = [exited(signalled(9)), Event::Released { everything: false }];
            [path_to("saved"), end.to_vec()].concat()
        }
        "waking" => [path_to("sleeping"), vec![start(1)]].concat(),
        "woken" => [path_to("waking"), vec![launched()]].concat(),
        "stopping" => vec![start(1), launched(), Event::Ready, stop(2)],
        "stopping before launch" => vec![start(1), stop(2)],
        "stopping to fail" => vec![start(1), launched(), boot_failed()],
        "stopping to go" => vec![start(1), launched(), Event::Ready, destroy()],
        "releasing" => vec![start(1), launched(), Event::Ready, exited(powered_off())],
        "releasing to fail" => vec![start(1), boot_failed()],
        "releasing to go" => vec![destroy()],
        "stopped" => [path_to("releasing"), vec![Event::Released { everything: false }]].concat(),
        "failed" => {
            [path_to("releasing to fail"), vec![Event::Released { everything: false }]].concat()
        }
        "destroyed" => vec![destroy(), Event::Released { everything: true }],
        other => panic!("no phase is called {other}"),
    }
}

pub(super) const PHASES: [&str; 20] = [
    "warm",
    "suspending",
    "saved",
    "sleeping",
    "waking",
    "woken",
    "created",
    "starting",
    "launched",
    "running",
    "stopping",
    "stopping before launch",
    "stopping to fail",
    "stopping to go",
    "releasing",
    "releasing to fail",
    "releasing to go",
    "stopped",
    "failed",
    "destroyed",
];

pub(super) fn at(name: &str) -> InstanceStatus {
    run(path_to(name)).0
}
