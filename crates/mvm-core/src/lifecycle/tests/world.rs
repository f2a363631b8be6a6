//! One instance on a simulated host: it performs effects faithfully, but in any order, and with
//! the failures that a real host has. It checks on the way what must never happen.

use super::*;
use crate::death::Cause;
use crate::guest::ExitStatus;
use crate::property::Choices;

/// What the actor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Boot,
    Restore { is_shared: bool },
    Pause,
    Resume,
    Suspend { request: u64 },
    Watch,
    Greet,
    Rejoin,
    Shutdown,
    Kill,
    Release { everything: bool },
}

/// A VMM process. It may be unknown to the status, if the agent died before it was recorded.
#[derive(Debug, Clone)]
struct Process {
    pid: u32,
    answers: bool,
    obeys: bool,
    is_paused: bool,
    /// The snapshot of its own that it was restored from, until its vCPUs run.
    restored: Option<u64>,
    /// Whether its vCPUs have run: before that, a guest that was restored has nothing to lose.
    has_run: bool,
    /// Whether its guest has said hello.
    is_up: bool,
    /// Whether the agent that lives has started its kernel.
    is_fresh: bool,
    /// Whether its vCPUs did not go on when they were to.
    is_stuck: bool,
    /// Whether its guest refused to shut down.
    has_refused: bool,
    /// Whether somebody asked for its end by force.
    is_unwanted: bool,
    /// Until when its guest has time to shut down.
    due: Option<u64>,
}

impl Process {
    /// Whether its guest would hear that it is to shut down, and has something to lose.
    fn is_reachable(&self) -> bool {
        self.answers && self.is_up && !self.is_stuck && self.has_run
    }

    /// Whether its power may be cut now.
    fn may_be_killed(&self, now: u64) -> bool {
        !self.is_reachable()
            || self.is_unwanted
            || self.has_refused
            || self.due.is_some_and(|due| now >= due)
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    pub(crate) status: InstanceStatus,
    /// Whether the records were removed.
    pub(crate) is_forgotten: bool,
    /// Whether no launch succeeds.
    pub(crate) is_broken: bool,
    tasks: Vec<Task>,
    process: Option<Process>,
    /// How the last process ended.
    end: Option<VmExit>,
    pids: u32,
    /// Raised whenever vCPUs begin to run, as that is when the disk goes on.
    disk: u64,
    /// The snapshot on disk: its number, and the disk that belongs to it.
    saved: Option<(u64, u64)>,
}

impl World {
    /// Lets the state machine take a step and begins its effects.
    pub(crate) fn feed(&mut self, event: Event, now: u64) {
        if let Some(process) = &mut self.process
            && let Event::Stop { grace_ms, .. } | Event::Destroy { grace_ms } = event
        {
            process.is_unwanted |= grace_ms == 0;
            // A guest that is shutting down may have to do so sooner.
            process.due = process.due.map(|due| due.min(now + grace_ms));
        }
        let has_run = self.status.boots + self.status.wakes > 0;
        let is_first = matches!(event, Event::Start { origin: Some(_), .. }) && !has_run;
        let (next, effects) = step(&self.status, event, now);
        assert!(
            !is_first || next.cold_boot.is_some() || !effects.contains(&Effect::Boot),
            "a fork boots although it has a snapshot: {self:?}"
        );
        let vm_ended = self.status.vm.is_some() && next.vm.is_none();
        self.status = next;
        if vm_ended {
            self.tasks.retain(|task| matches!(task, Task::Release { .. }));
        }
        for effect in effects {
            if let Some(process) = &mut self.process {
                match effect {
                    Effect::Shutdown { grace_ms } => process.due = Some(now + grace_ms),
                    Effect::Kill => {
                        let may_be = self.status.snapshot.is_some() || process.may_be_killed(now);
                        assert!(may_be, "its guest was not asked: {:?} at {now}", self.status);
                        // An agent that comes back goes on with that.
                        process.is_unwanted = true;
                    }
                    _ => {}
                }
            }
            self.begin(&effect);
        }
        self.check();
    }

    fn begin(&mut self, effect: &Effect) {
        let task = match effect {
            Effect::Boot => Task::Boot,
            Effect::Restore => {
                let begin = StartFrom::Shared { id: origin() };
                let phase = &self.status.phase;
                let is_shared =
                    matches!(phase, Phase::Starting { begin: from, .. } if *from == begin);
                Task::Restore { is_shared }
            }
            Effect::Pause => Task::Pause,
            Effect::Resume => Task::Resume,
            Effect::Suspend { request, .. } => Task::Suspend { request: *request },
            Effect::Watch => Task::Watch,
            Effect::Greet => Task::Greet,
            Effect::Rejoin => Task::Rejoin,
            Effect::Shutdown { .. } => Task::Shutdown,
            Effect::Kill => Task::Kill,
            Effect::Release => Task::Release { everything: false },
            Effect::ReleaseAll => Task::Release { everything: true },
            Effect::Forget => {
                self.is_forgotten = true;
                self.tasks.clear();
                return;
            }
        };
        let is_start = |task: &Task| matches!(task, Task::Boot | Task::Restore { .. });
        assert!(
            !is_start(&task) || !self.tasks.iter().any(is_start),
            "two starts at once: {self:?}"
        );
        let is_release = |task: &Task| matches!(task, Task::Release { .. });
        assert!(
            !is_release(&task) || !self.tasks.iter().any(is_release),
            "two releases at once: {self:?}"
        );
        self.tasks.push(task);
    }

    fn check(&self) {
        match &self.status.phase {
            Phase::Created
            | Phase::Stopped
            | Phase::Failed
            | Phase::Destroyed
            | Phase::Sleeping { .. } => {
                assert!(self.process.is_none(), "a VM leaked: {self:?}");
                assert!(!self.tasks.contains(&Task::Boot), "a boot leaked: {self:?}");
                let is_restore = |task: &Task| matches!(task, Task::Restore { .. });
                assert!(!self.tasks.iter().any(is_restore), "a restore leaked: {self:?}");
            }
            Phase::Running { .. } | Phase::Warm { .. } | Phase::Suspending { .. } => {
                assert!(self.status.vm.is_some(), "{self:?}");
            }
            Phase::Starting { .. } | Phase::Stopping { .. } | Phase::Releasing { .. } => {}
        }
        if matches!(self.status.phase, Phase::Sleeping { .. }) {
            let number = self.status.snapshot.as_ref().map(|snapshot| snapshot.number);
            assert_eq!(self.saved, number.map(|number| (number, self.disk)), "{self:?}");
        }
        if self.status.phase == Phase::Failed {
            let cause = self.status.last_death.as_ref().map(|death| &death.cause);
            assert!(cause.is_some_and(|cause| *cause != Cause::Operator), "{self:?}");
        }
    }

    /// Completes one task, if one can complete. `false` if nothing is left to do.
    pub(crate) fn progress(&mut self, now: u64, choices: &mut Choices) -> bool {
        let can_complete = |task: &Task| match task {
            Task::Watch => self.process.is_none(),
            // A guest that never answers is waited for until the deadline.
            Task::Greet => {
                self.process.as_ref().is_none_or(|process| process.answers && !process.is_paused)
            }
            // So is one that is to shut down, if it was not this agent that has just started it.
            Task::Shutdown => self.process.as_ref().is_none_or(|process| {
                !process.is_paused && (process.answers || process.is_fresh && !process.is_up)
            }),
            _ => true,
        };
        // What concerns the vCPUs is done in the order in which it was asked for.
        let is_on_vcpus =
            |task: &Task| matches!(task, Task::Pause | Task::Resume | Task::Suspend { .. });
        let first = self.tasks.iter().position(is_on_vcpus);
        let is_next = |index: usize| !is_on_vcpus(&self.tasks[index]) || first == Some(index);
        let ready: Vec<usize> = (0..self.tasks.len())
            .filter(|index| can_complete(&self.tasks[*index]) && is_next(*index))
            .collect();
        if ready.is_empty() {
            return false;
        }
        let task = self.tasks.remove(ready[choices.pick(ready.len())]);
        self.complete(task, now, choices);
        true
    }

    fn complete(&mut self, task: Task, now: u64, choices: &mut Choices) {
        match task {
            Task::Boot => self.launch(None, now, choices),
            Task::Restore { is_shared } => self.launch(Some(is_shared), now, choices),
            Task::Pause | Task::Resume if self.process.is_none() || choices.one_in(6) => {
                if let Some(process) = &mut self.process {
                    process.is_stuck |= task == Task::Resume;
                }
                let error = "no answer".to_owned();
                self.feed(
                    match task {
                        Task::Pause => Event::PauseFailed { error },
                        _ => Event::ResumeFailed { error },
                    },
                    now,
                );
            }
            Task::Pause => self.pause(),
            Task::Resume => self.run_vcpus(),
            Task::Suspend { request } if self.process.is_none() || choices.one_in(4) => {
                if choices.one_in(2) {
                    self.pause();
                }
                self.feed(sleep_failed(request), now);
            }
            Task::Suspend { .. } => {
                self.pause();
                let number = self.status.sleeps + 1;
                self.saved = Some((number, self.disk));
                self.feed(saved(number), now);
            }
            Task::Watch => {
                let exit = self.end.expect("a watched process has ended");
                self.feed(exited(exit), now);
            }
            Task::Greet => {
                let is_met = match &mut self.process {
                    Some(process) => {
                        process.is_up = true;
                        !choices.one_in(6)
                    }
                    None => false,
                };
                self.feed(if is_met { Event::Ready } else { boot_failed() }, now);
            }
            Task::Rejoin => {}
            Task::Shutdown => {
                let Some(process) = &mut self.process else {
                    return self.feed(Event::ShutdownFailed, now);
                };
                let boots = process.is_fresh && !process.is_up;
                if boots && (!process.answers || choices.one_in(2)) {
                    return self.feed(Event::ShutdownFailed, now);
                }
                process.is_up = true;
                if choices.one_in(4) {
                    process.has_refused = true;
                    return self.feed(Event::ShutdownFailed, now);
                }
                if process.obeys {
                    self.end_process(powered_off());
                }
            }
            Task::Kill => self.end_process(signalled(9)),
            Task::Release { .. } if choices.one_in(3) => self.feed(Event::ReleaseFailed, now),
            Task::Release { everything } => {
                self.end_stray();
                self.feed(Event::Released { everything }, now);
            }
        }
    }

    /// `restores` says of a restore whether its snapshot is a shared one.
    fn launch(&mut self, restores: Option<bool>, now: u64, choices: &mut Choices) {
        let (restores, is_shared) = (restores.is_some(), restores == Some(true));
        self.end_stray();
        if self.is_broken || choices.one_in(4) {
            return self.feed(boot_failed(), now);
        }
        if restores && choices.one_in(6) {
            return self.feed(restore_refused(), now);
        }
        self.pids += 1;
        let (answers, obeys) = (!choices.one_in(4), !choices.one_in(3));
        let restored = self.status.snapshot.as_ref().map(|snapshot| snapshot.number);
        assert_eq!(restored.is_some() || is_shared, restores, "{self:?}");
        let is_paused = true;
        self.process = Some(Process {
            pid: self.pids,
            answers,
            obeys,
            is_paused,
            restored,
            has_run: false,
            is_up: restores,
            is_fresh: !restores,
            is_stuck: false,
            has_refused: false,
            is_unwanted: false,
            due: None,
        });
        if !restores {
            self.run_vcpus();
        }
        if choices.one_in(8) {
            // The agent dies between the launch and its record.
            return self.restart_agent(now, false);
        }
        self.feed(Event::Launched(handle(self.pids)), now);
    }

    fn pause(&mut self) {
        if let Some(process) = &mut self.process {
            process.is_paused = true;
        }
    }

    /// A snapshot goes on once, and with the very disk that belongs to it.
    fn run_vcpus(&mut self) {
        let Some(process) = &mut self.process else { return };
        process.has_run = true;
        if let Some(number) = process.restored.take() {
            assert_eq!(self.saved.take(), Some((number, self.disk)), "{:?}", self.status);
            assert_eq!(self.status.snapshot, None, "used up before it is recorded");
        }
        if std::mem::take(&mut process.is_paused) {
            self.disk += 1;
        }
    }

    /// What boot and release do first. A VM that the status knows is not theirs to end.
    fn end_stray(&mut self) {
        assert!(
            self.process.is_none() || self.status.vm.is_none(),
            "a known VM would be pulled down: {self:?}"
        );
        self.process = None;
    }

    fn end_process(&mut self, exit: VmExit) {
        if self.process.take().is_some() {
            self.end = Some(exit);
        }
    }

    /// The VM ends without mvm's doing, if one runs.
    pub(crate) fn end_from_outside(&mut self, choices: &mut Choices) {
        let exits = [powered_off(), signalled(9), signalled(11)];
        self.end_process(exits[choices.pick(exits.len())]);
    }

    /// The agent dies with everything that it was doing, and comes back.
    pub(crate) fn restart_agent(&mut self, now: u64, host_rebooted: bool) {
        self.tasks.clear();
        if host_rebooted {
            self.process = None;
        }
        if let Some(process) = &mut self.process {
            (process.is_fresh, process.is_stuck) = (false, false);
        }
        let lives = match (&self.status.vm, &self.process) {
            (Some(vm), Some(process)) => vm.pid == process.pid,
            _ => false,
        };
        let exit = VmExit { process: ProcessEnd::Unobserved, reason: None };
        let found = match lives {
            true => Event::FoundAlive,
            false => Event::FoundGone { exit, host_rebooted, console_tail: vec![] },
        };
        self.feed(found, now);
    }

    /// One thing that nobody asked for.
    pub(crate) fn misfortune(&mut self, now: u64, choices: &mut Choices) {
        match choices.pick(6) {
            0 | 1 => self.end_from_outside(choices),
            2 => self.restart_agent(now, false),
            3 => self.end_main(now, choices),
            4 => self.feed(Event::LacksSpace, now),
            _ => self.restart_agent(now, true),
        }
    }

    /// The guest's main process ends, and its agent can say so.
    fn end_main(&mut self, now: u64, choices: &mut Choices) {
        let is_met = self.process.as_ref().is_some_and(|it| it.is_reachable() && !it.is_paused);
        if is_met && self.status.vm.is_some() {
            let code = choices.pick(2) as i32;
            self.feed(Event::MainExited(ExitStatus::Exited { code }), now);
        }
    }

    /// Whether a VM runs, known or not.
    pub(crate) fn has_process(&self) -> bool {
        self.process.is_some()
    }

    /// Whether nothing is under way and no VM runs.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.tasks.is_empty() && self.process.is_none()
    }
}
