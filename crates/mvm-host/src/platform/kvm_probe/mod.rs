//! Runs a tiny guest through KVM, to learn what KVM is worth on this machine.
//!
//! It tells what happened and judges nothing: that is [`super::kvm`]'s part. The guest runs on a
//! thread of its own, with a deadline, so that a CPU that never leaves the guest harms nobody.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod memory;

use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::kvm::{Probe, Stage};

/// Time that the guest has. Hardware needs a few milliseconds.
const LIMIT: Duration = Duration::from_millis(700);
/// Time that the kernel has to take the CPU back from the guest after that.
const GRACE: Duration = Duration::from_millis(200);
/// Iterations of the guest's counted loop: 50 µs on hardware, 150 ms where each is emulated.
const ITERATIONS: u32 = 100_000;
/// Takes the CPU back from the guest. The process ignores it unless it says otherwise, so it does
/// no harm to any other thread.
const KICK: libc::c_int = libc::SIGURG;

/// Runs the guest and says what happened, within a second.
pub(super) fn run() -> Probe {
    run_within(LIMIT, ITERATIONS)
}

fn run_within(limit: Duration, iterations: u32) -> Probe {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        block_all_signals();
        // The receiver is gone if the deadline passed: nobody wants to know any more.
        let _ = sender.send(attempt(iterations, limit));
    };
    let thread = match thread::Builder::new().name("kvm-probe".to_owned()).spawn(work) {
        Ok(thread) => thread,
        Err(error) => return refused("be tried: no thread can be started", &error),
    };
    if let Ok(probe) = receiver.recv_timeout(limit) {
        return probe;
    }
    // SAFETY: the thread was neither joined nor detached, so its id is valid even if it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
    // A thread that stays in the kernel even now is left to itself; it owns all that it uses.
    let limit_ms = millis(limit);
    let stuck = Probe::Stalled { reached: Stage::Start, ran_ms: limit_ms, limit_ms };
    receiver.recv_timeout(GRACE).unwrap_or(stuck)
}

/// Blocks every signal on this thread; [`KICK`] stays pending until the guest is entered.
fn block_all_signals() {
    // SAFETY: a signal set is plain data that `sigfillset` initialises, and only the calling
    // thread's mask changes.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
}

#[cfg(target_arch = "x86_64")]
fn attempt(iterations: u32, limit: Duration) -> Probe {
    guest::attempt(iterations, limit).unwrap_or_else(|probe| probe)
}

/// KVM of other architectures works with hardware alone, so that making a CPU is proof enough.
#[cfg(not(target_arch = "x86_64"))]
fn attempt(_iterations: u32, _limit: Duration) -> Probe {
    let created = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()?.create_vcpu(0));
    match created {
        Ok(_) => Probe::Created,
        Err(error) => refused("make a VM with a CPU", &error),
    }
}

fn refused(step: &str, problem: &impl std::fmt::Display) -> Probe {
    Probe::Refused { step: step.to_owned(), problem: problem.to_string() }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[expect(clippy::print_stderr, reason = "a skipped test says why")]
    fn has_kvm() -> bool {
        let opens = kvm_ioctls::Kvm::new().is_ok();
        if !opens {
            eprintln!("skipped: /dev/kvm cannot be opened on this machine");
        }
        opens
    }

    /// Whatever the KVM, hardware or software: the guest must not crash.
    #[test]
    fn the_guest_runs_to_its_end_or_out_of_time() {
        if !has_kvm() {
            return;
        }
        match run_within(Duration::from_secs(20), 1_000) {
            Probe::Finished { .. } | Probe::Stalled { .. } => {}
            probe => panic!("{probe:?}"),
        }
    }

    #[test]
    fn a_guest_that_does_not_end_is_given_up() {
        if !has_kvm() {
            return;
        }
        let limit = Duration::from_millis(50);
        match run_within(limit, u32::MAX) {
            Probe::Stalled { limit_ms: 50, .. } => {}
            probe => panic!("{probe:?}"),
        }
    }
}
