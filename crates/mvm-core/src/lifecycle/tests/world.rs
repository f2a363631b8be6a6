//! One instance on a simulated host: it performs effects faithfully, but in any order, and with
//! the failures that a real host has. It checks on the way what must never happen.

use super::*;
use crate::death::Cause;
use crate::property::Choices;

/// What the actor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Boot,
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
}

impl World {
    /// Lets the state machine take a step and begins its effects.
    pub(crate) fn feed(&mut self, event: Event, now: u64) {
        let (next, effects) = step(&self.status, event, now);
        let vm_ended = self.status.vm.is_some() && next.vm.is_none();
        self.status = next;
        if vm_ended {
            self.tasks.retain(|task| matches!(task, Task::Release { .. }));
        }
        for effect in effects {
            self.begin(&effect);
        }
        self.check();
    }

    fn begin(&mut self, effect: &Effect) {
        let task = match effect {
            Effect::Boot => Task::Boot,
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
        assert!(
            task != Task::Boot || !self.tasks.contains(&Task::Boot),
            "two boots at once: {self:?}"
        );
        self.tasks.push(task);
    }

    fn check(&self) {
        match &self.status.phase {
            Phase::Created | Phase::Stopped | Phase::Failed | Phase::Destroyed => {
                assert!(self.process.is_none(), "a VM leaked: {self:?}");
                assert!(!self.tasks.contains(&Task::Boot), "a boot leaked: {self:?}");
            }
            Phase::Running { .. } => assert!(self.status.vm.is_some(), "{self:?}"),
            Phase::Starting { .. } | Phase::Stopping { .. } | Phase::Releasing { .. } => {}
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
            Task::Greet => self.process.as_ref().is_none_or(|process| process.answers),
            _ => true,
        };
        let ready: Vec<usize> =
            (0..self.tasks.len()).filter(|index| can_complete(&self.tasks[*index])).collect();
        if ready.is_empty() {
            return false;
        }
        let task = self.tasks.remove(ready[choices.pick(ready.len())]);
        self.complete(task, now, choices);
        true
    }

    fn complete(&mut self, task: Task, now: u64, choices: &mut Choices) {
        match task {
            Task::Boot => self.boot(now, choices),
            Task::Watch => {
                let exit = self.end.expect("a watched process has ended");
                self.feed(exited(exit), now);
            }
            Task::Greet if self.process.is_none() || choices.one_in(6) => {
                self.feed(boot_failed(), now);
            }
            Task::Greet => self.feed(Event::Ready, now),
            Task::Rejoin => {}
            Task::Shutdown if self.process.is_none() || choices.one_in(4) => {
                self.feed(Event::ShutdownFailed, now);
            }
            Task::Shutdown => {
                if self.process.as_ref().is_some_and(|process| process.obeys) {
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

    fn boot(&mut self, now: u64, choices: &mut Choices) {
        self.end_stray();
        if self.is_broken || choices.one_in(4) {
            return self.feed(boot_failed(), now);
        }
        self.pids += 1;
        let (answers, obeys) = (!choices.one_in(4), !choices.one_in(3));
        self.process = Some(Process { pid: self.pids, answers, obeys });
        if choices.one_in(8) {
            // The agent dies between the launch and its record.
            return self.restart_agent(now, false);
        }
        self.feed(Event::Launched(handle(self.pids)), now);
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
        match choices.pick(4) {
            0 | 1 => self.end_from_outside(choices),
            2 => self.restart_agent(now, false),
            _ => self.restart_agent(now, true),
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
