//! The exit status of a process that is not our child, from kernels that keep it (Linux 6.15).

use std::os::fd::{AsRawFd, BorrowedFd};

use mvm_core::vmm::ProcessEnd;

/// What the kernel says about a pidfd's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExitInfo {
    /// The process was reaped; this is how it ended.
    Known(ProcessEnd),
    /// The process's parent has not reaped it yet.
    NotYet,
    /// This kernel does not keep exit statuses.
    Unsupported,
}

/// Asks the kernel.
#[allow(unsafe_code)]
pub(super) fn of(pidfd: BorrowedFd<'_>) -> ExitInfo {
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = u64::from(libc::PIDFD_INFO_EXIT);
    // SAFETY: the request carries the size of this very structure, which outlives the call.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &mut info) };
    if result == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0 {
        return ExitInfo::Known(decode(info.exit_code));
    }
    match std::io::Error::last_os_error().raw_os_error() {
        // Success without the bit: a zombie on this kernel, or a kernel that ignores the bit.
        _ if result == 0 => ExitInfo::NotYet,
        Some(libc::ESRCH) => ExitInfo::NotYet,
        _ => ExitInfo::Unsupported,
    }
}

/// Decodes a wait status.
fn decode(status: i32) -> ProcessEnd {
    if libc::WIFSIGNALED(status) {
        ProcessEnd::Signaled { signal: libc::WTERMSIG(status) }
    } else {
        ProcessEnd::Exited { code: libc::WEXITSTATUS(status) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_told_apart() {
        assert_eq!(decode(7 << 8), ProcessEnd::Exited { code: 7 });
        assert_eq!(decode(9), ProcessEnd::Signaled { signal: 9 });
        assert_eq!(decode(0x80 | 11), ProcessEnd::Signaled { signal: 11 });
    }
}
