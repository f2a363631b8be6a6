//! Work in the network namespace of another process: where a VMM has one of its own, its tap is made
//! there, and taken from there once it is open.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::tap::NewTap;

/// Does something on a thread that is in the network namespace of this process.
pub(super) fn within<T: Send>(
    pid: u32,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = of(&pid.to_string())?;
    let enter_and_work = || {
        // The thread ends with this, so that nothing else is ever done there.
        move_into_thread_name_spaces(namespace.as_fd(), ThreadNameSpaceType::NETWORK)?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into());
        let done = thread.spawn_scoped(scope, enter_and_work)?.join();
        done.map_err(|_| io::Error::other("the thread that works in a namespace panicked"))?
    })
}

/// The network namespace of a process, by its name in `/proc`.
pub(super) fn of(process: &str) -> io::Result<File> {
    File::open(format!("/proc/{process}/ns/net"))
}

/// Makes a tap in the network namespace of a process, for its user. It is gone with that
/// namespace, unless the network [takes it](super::Network::take_tap).
///
/// # Errors
/// The process has ended, or the operating system refused.
pub(crate) fn make_tap(pid: u32, name: &str, owner_uid: u32) -> io::Result<()> {
    within(pid, || NewTap::create(name, owner_uid)?.persist())
}
