//! What every program of a guest starts with that no request names: its limits, and the process
//! namespace of a main process that is the first of one.
//!
//! ```text
//!  the machine's processes:   1 agent ──┬── 70 main process ── 71 …      its own namespace: 1, 2 …
//!                                       └── 90 an exec, which joins it:                   9
//! ```
//!
//! A main process that insists on being process 1 has a namespace of processes, and one of mounts
//! for the `/proc` that shows them. Everything else stays the machine's.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;

use mvm_core::guest::GuestError;
use mvm_core::settings::{Ulimit, limit_number};

use crate::console::complain;
use crate::failure::invalid;

/// The open-files limits that programs start with, whatever the agent raised its own to. The soft
/// one is enough for servers, and small enough for programs that close all that they could have
/// open before they begin.
const NOFILE: libc::rlimit = libc::rlimit { rlim_cur: 65_536, rlim_max: 1_048_576 };
/// Those that the kernel gives to an init, which gives its services others.
const INIT_NOFILE: libc::rlimit = libc::rlimit { rlim_cur: 1024, rlim_max: 524_288 };

/// A limit that a program starts with.
#[derive(Debug, Clone, Copy)]
struct Limit {
    number: u32,
    value: libc::rlimit,
    /// Whether the host asked for it: a program does not run without.
    is_required: bool,
}

/// What programs start with.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    is_own: bool,
    limits: Vec<Limit>,
    namespace: Option<Namespace>,
}

/// The namespaces of a main process that is the first of its own, and the agent's.
#[derive(Debug)]
struct Namespace {
    pids: OwnedFd,
    mounts: OwnedFd,
    agents_pids: OwnedFd,
}

/// What a child does before its program, besides what the request says. Prepared memory: a forked
/// child may not allocate.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    limits: &'a [Limit],
    is_own: bool,
    place: Place<'a>,
}

#[derive(Debug)]
enum Place<'a> {
    /// The agent's own namespaces.
    Agents,
    /// New ones, of which it is the first process.
    New,
    /// Those of the main process.
    Join(&'a Namespace),
}

impl Surroundings {
    /// Those of a machine that is the agent's own, or of one that is not.
    pub(crate) fn of(is_own: bool) -> Self {
        let number = libc::RLIMIT_NOFILE;
        let usual = Limit { number, value: NOFILE, is_required: false };
        Self { is_own, limits: if is_own { vec![usual] } else { Vec::new() }, namespace: None }
    }

    /// Those of the image's own init.
    pub(crate) fn of_init(ulimit: &BTreeMap<String, Ulimit>) -> Result<Self, GuestError> {
        let mut surroundings = Self::of(true);
        for limit in &mut surroundings.limits {
            limit.value = INIT_NOFILE;
        }
        surroundings.add(ulimit)?;
        Ok(surroundings)
    }

    /// Sets the limits that the host asks for, instead of those that it asked for before.
    pub(crate) fn limit(&mut self, ulimit: &BTreeMap<String, Ulimit>) -> Result<(), GuestError> {
        let Self { limits, .. } = Self::of(self.is_own);
        self.limits = limits;
        self.add(ulimit)
    }

    fn add(&mut self, ulimit: &BTreeMap<String, Ulimit>) -> Result<(), GuestError> {
        for (name, Ulimit { soft, hard }) in ulimit {
            let number = limit_number(name)
                .ok_or_else(|| invalid(format!("the guest agent knows no ulimit `{name}`")))?;
            let [rlim_cur, rlim_max] =
                [soft, hard].map(|limit| limit.unwrap_or(libc::RLIM_INFINITY));
            let value = libc::rlimit { rlim_cur, rlim_max };
            self.limits.retain(|limit| limit.number != number);
            self.limits.push(Limit { number, value, is_required: true });
        }
        Ok(())
    }

    /// From now on programs join the namespaces of this process, which is the first of them.
    pub(super) fn join(&mut self, pid: i32) -> io::Result<()> {
        let open = |path: &str| File::open(path).map(OwnedFd::from);
        self.namespace = Some(Namespace {
            pids: open(&format!("/proc/{pid}/ns/pid"))?,
            mounts: open(&format!("/proc/{pid}/ns/mnt"))?,
            agents_pids: open("/proc/self/ns/pid")?,
        });
        Ok(())
    }

    /// The main process has ended, and all of its namespace with it.
    pub(crate) fn leave_namespace(&mut self) {
        self.namespace = None;
    }

    /// What a child is to do; `is_first` makes it the first of new namespaces.
    pub(super) fn entry(&self, is_first: bool) -> Entry<'_> {
        let place = match &self.namespace {
            _ if is_first => Place::New,
            Some(namespace) => Place::Join(namespace),
            None => Place::Agents,
        };
        Entry { limits: &self.limits, is_own: self.is_own, place }
    }

    /// Sets the limits for this process.
    pub(crate) fn set_limits(&self) -> io::Result<()> {
        self.entry(false).set_limits()
    }
}

impl Entry<'_> {
    /// Forks. In a child that is told 0, [`Entry::enter`] comes next.
    ///
    /// # Safety
    /// As with `fork`, the child of a process with threads may only make system calls.
    pub(super) unsafe fn fork(&self) -> io::Result<i32> {
        match self.place {
            Place::Agents => plain_fork(),
            Place::New => {
                let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::SIGCHLD;
                let (flags, none) = (libc::c_long::from(flags), libc::c_long::from(0));
                // SAFETY: without a stack of its own the child goes on as that of `fork` does; the
                // caller keeps to system calls there.
                checked(unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) })
            }
            Place::Join(namespace) => {
                // Only what is forked from now on is in the namespace, not this process.
                set_namespace_of_children(&namespace.pids)?;
                let forked = plain_fork();
                if !matches!(forked, Ok(0))
                    && let Err(error) = set_namespace_of_children(&namespace.agents_pids)
                {
                    complain(&format!("cannot return to the agent's own processes: {error}"));
                }
                forked
            }
        }
    }

    /// The child's way into its namespaces; an error number if it cannot go it.
    pub(super) fn enter(&self) -> Result<(), i32> {
        let none = ptr::null::<libc::c_char>();
        // SAFETY: plain system calls on constant strings and an open descriptor.
        let results = unsafe {
            match self.place {
                Place::Agents => [0, 0],
                Place::New => {
                    // What is mounted later shows here too, and this `/proc` nowhere else.
                    let (apart, safe) = (
                        libc::MS_REC | libc::MS_SLAVE,
                        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
                    );
                    let proc = c"proc".as_ptr();
                    let path = c"/proc".as_ptr();
                    let root = c"/".as_ptr();
                    match libc::mount(none, root, none, apart, ptr::null()) {
                        0 => [0, libc::mount(proc, path, proc, safe, ptr::null())],
                        failed => [failed, 0],
                    }
                }
                Place::Join(namespace) => {
                    [libc::setns(namespace.mounts.as_raw_fd(), libc::CLONE_NEWNS), 0]
                }
            }
        };
        if results == [0, 0] { Ok(()) } else { Err(errno()) }
    }

    /// Sets the limits; those that nobody asked for as far as they can be set.
    pub(super) fn set_limits(&self) -> io::Result<()> {
        for limit in self.limits {
            // SAFETY: a plain system call on a live structure.
            let set = unsafe { libc::setrlimit(limit.number, &limit.value) };
            if set != 0 && limit.is_required {
                return Err(io::Error::last_os_error());
            }
        }
        if self.is_own {
            // SAFETY: a plain system call.
            unsafe { libc::umask(0o022) };
        }
        Ok(())
    }
}

fn plain_fork() -> io::Result<i32> {
    // SAFETY: the caller keeps to system calls in the child.
    checked(unsafe { libc::fork() }.into())
}

fn set_namespace_of_children(pids: &OwnedFd) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor.
    checked(unsafe { libc::setns(pids.as_raw_fd(), libc::CLONE_NEWPID) }.into()).map(drop)
}

fn checked(result: libc::c_long) -> io::Result<i32> {
    match i32::try_from(result) {
        Ok(pid) if pid >= 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_asks_for_replaces_the_usual_and_what_it_asked_for_before() {
        let mut surroundings = Surroundings::of(true);
        let limits = |surroundings: &Surroundings| -> Vec<(u32, u64, bool)> {
            let limit = |limit: &Limit| (limit.number, limit.value.rlim_cur, limit.is_required);
            surroundings.limits.iter().map(limit).collect()
        };
        assert_eq!(limits(&surroundings), [(libc::RLIMIT_NOFILE, 65_536, false)]);
        let of = |name: &str, value: &str| [(name.to_owned(), value.parse().unwrap())].into();
        surroundings.limit(&of("nofile", "10:20")).unwrap();
        assert_eq!(limits(&surroundings), [(libc::RLIMIT_NOFILE, 10, true)]);
        surroundings.limit(&of("core", "unlimited")).unwrap();
        let both = [(libc::RLIMIT_NOFILE, 65_536, false), (libc::RLIMIT_CORE, u64::MAX, true)];
        assert_eq!(limits(&surroundings), both);
        assert!(surroundings.limit(&of("files", "1")).is_err());
    }
}
