//! Why a microVM ended: classified from what the VMM reported, what the guest's console said last
//! and what mvm itself had asked for.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guest::ExitStatus;
use crate::shown::Shown;
use crate::vmm::{ProcessEnd, ShutdownReason, VmExit};

/// Lines of the console that are kept with a death.
pub const CONSOLE_TAIL_LINES: usize = 40;
/// Lines of the main process's output that are shown with an explanation.
pub const OUTPUT_TAIL_LINES: usize = 20;
/// Lines at the end of the console among which those are chosen: as many as a panic may print.
pub const CONSOLE_SEARCH_LINES: usize = 200;

/// The cause of a microVM's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum Cause {
    /// Somebody asked mvm to stop or destroy it.
    Operator,
    /// Its main process exited.
    Exited {
        /// The exit code, 0 to 255.
        code: i32,
    },
    /// A signal ended its main process.
    Signaled {
        /// The Linux signal number.
        signal: i32,
        /// Whether the guest's kernel sent it because memory ran out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        out_of_memory: bool,
    },
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest rebooted itself: its microVM ends, and a fresh one follows.
    GuestReboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest's kernel panicked because its memory ran out.
    GuestOom,
    /// The guest did not answer within the pool's boot time limit.
    BootTimeout,
    /// The microVM could not be started.
    StartFailed {
        /// Why, with sources.
        error: String,
        /// What is wrong with the main program, if it is that.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        program: Option<ProgramFault>,
    },
    /// The VMM ended on a fault of its own.
    VmmCrash,
    /// Something else than mvm ended the VMM with a signal.
    KilledFromOutside {
        /// The Linux signal number.
        signal: i32,
    },
    /// The host was rebooted.
    HostReboot,
    /// The VMM went away while no agent was watching.
    Unobserved,
    /// A cause of a newer version.
    #[serde(other)]
    Unknown,
}

/// Why a program cannot be started, as far as shells tell it by exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramFault {
    /// It, its directory or its user does not exist: 127.
    NotFound,
    /// It may not be run: 126.
    Denied,
    /// A fault of a newer version.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => write!(f, "stopped by an operator"),
            Self::Exited { code } => write!(f, "exited with code {code}"),
            Self::Signaled { signal, out_of_memory: true } => {
                write!(f, "ended by signal {signal}: the guest ran out of memory")
            }
            Self::Signaled { signal, .. } => write!(f, "ended by signal {signal}"),
            Self::GuestShutdown => write!(f, "the guest powered off"),
            Self::GuestReboot => write!(f, "the guest rebooted"),
            Self::GuestPanic => write!(f, "guest kernel panic"),
            Self::GuestOom => write!(f, "guest out of memory"),
            Self::BootTimeout => write!(f, "the guest agent did not answer in time"),
            Self::StartFailed { error, .. } => write!(f, "start failed: {error}"),
            Self::VmmCrash => write!(f, "VMM crash"),
            Self::KilledFromOutside { signal } => {
                write!(f, "VMM killed from outside by signal {signal}")
            }
            Self::HostReboot => write!(f, "the host was rebooted"),
            Self::Unobserved => write!(f, "the VMM went away while no agent was running"),
            Self::Unknown => write!(f, "it ended for a reason that this version does not know"),
        }
    }
}

impl From<ExitStatus> for Cause {
    /// The end of a main process.
    fn from(status: ExitStatus) -> Self {
        match status {
            ExitStatus::Exited { code } => Self::Exited { code },
            ExitStatus::Signaled { signal, out_of_memory } => {
                Self::Signaled { signal, out_of_memory }
            }
            // A main process has no time limit; a shell would say 124.
            ExitStatus::TimedOut => Self::Exited { code: status.shell_code() },
        }
    }
}

/// How one run of a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// How the VMM's process ended, if there was one.
    #[serde(default)]
    pub exit: Option<Shown<VmExit>>,
    /// The console's last lines.
    #[serde(default)]
    pub console_tail: Vec<String>,
}

/// Classifies an end that mvm did not ask for.
pub fn classify(exit: &VmExit, console_tail: &[String]) -> Cause {
    let says = |text: &str| console_tail.iter().any(|line| line.contains(text));
    if says(PANIC) || exit.reason == Some(ShutdownReason::GuestPanic) {
        let out_of_memory = says("Kernel panic - not syncing: Out of memory")
            || says("System is deadlocked on memory")
            || says("panic_on_oom");
        return if out_of_memory { Cause::GuestOom } else { Cause::GuestPanic };
    }
    match exit.reason {
        Some(ShutdownReason::GuestShutdown) => return Cause::GuestShutdown,
        Some(ShutdownReason::GuestReset) => return Cause::GuestReboot,
        Some(ShutdownReason::HostSignal) => return Cause::KilledFromOutside { signal: SIGTERM },
        Some(ShutdownReason::HostQuit | ShutdownReason::GuestPanic) | None => {}
    }
    match exit.process {
        // What a VMM does to itself: illegal instruction, abort, bus error, arithmetic,
        // segmentation fault, bad system call (the seccomp filter).
        ProcessEnd::Signaled { signal: 4 | 6 | 7 | 8 | 11 | 31 } => Cause::VmmCrash,
        ProcessEnd::Signaled { signal } => Cause::KilledFromOutside { signal },
        ProcessEnd::Exited { .. } => Cause::VmmCrash,
        ProcessEnd::Unobserved => Cause::Unobserved,
    }
}

/// The lines of a console's end that tell most: its last ones, or, if the kernel's panic came
/// before those, the first ones of the panic: its reason is worth more than the end of its trace.
pub fn last_words(lines: &[String], limit: usize) -> &[String] {
    let last = lines.len().saturating_sub(limit);
    match lines.iter().rposition(|line| line.contains(PANIC)) {
        Some(panic) if panic < last => &lines[panic..panic + limit],
        _ => &lines[last..],
    }
}

const PANIC: &str = "Kernel panic - not syncing";
const SIGTERM: i32 = 15;

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn each_kind_of_end_is_told_apart() {
        let exit = |process, reason| VmExit { process, reason };
        let exited = |reason| exit(ProcessEnd::Exited { code: 0 }, reason);
        let killed = |signal| exit(ProcessEnd::Signaled { signal }, None);
        let panic = lines("x\n[ 1.0] Kernel panic - not syncing: Attempted to kill init!\ny");
        let oom = lines("Kernel panic - not syncing: System is deadlocked on memory");
        for (exit, console, cause) in [
            (exited(Some(ShutdownReason::GuestShutdown)), vec![], Cause::GuestShutdown),
            (exited(Some(ShutdownReason::GuestReset)), vec![], Cause::GuestReboot),
            (exited(Some(ShutdownReason::GuestReset)), panic, Cause::GuestPanic),
            (exited(Some(ShutdownReason::GuestReset)), oom, Cause::GuestOom),
            (exited(Some(ShutdownReason::GuestPanic)), vec![], Cause::GuestPanic),
            (
                exited(Some(ShutdownReason::HostSignal)),
                vec![],
                Cause::KilledFromOutside { signal: 15 },
            ),
            (killed(9), vec![], Cause::KilledFromOutside { signal: 9 }),
            (killed(11), vec![], Cause::VmmCrash),
            (killed(31), vec![], Cause::VmmCrash),
            (exited(None), vec![], Cause::VmmCrash),
            (exit(ProcessEnd::Unobserved, None), vec![], Cause::Unobserved),
        ] {
            assert_eq!(classify(&exit, &console), cause, "{exit:?}");
        }
    }

    #[test]
    fn the_reason_of_a_panic_is_kept_however_long_its_trace_is() {
        let boot = "booting\nbooting\n";
        let panic = "Kernel panic - not syncing: Out of memory\nCall Trace:\n a\n b\n c";
        let console = lines(&format!("{boot}{panic}"));
        assert_eq!(last_words(&console, 3), &console[2..5]);
        assert_eq!(last_words(&console, 6), &console[1..]);
        assert_eq!(last_words(&console, 10), &console[..]);
        let calm = lines("a\nb\nc");
        assert_eq!(last_words(&calm, 2), &calm[1..]);
        assert!(last_words(&[], 2).is_empty());
    }
}
