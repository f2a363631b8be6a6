//! Opening a microVM's disk so that it has one writer or only readers. Every driver opens disks
//! with it and keeps what it returns open for as long as its VMM runs.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Disk, DiskAccess, VmmError, file_error};
use crate::process::between_starts;

/// A disk that is open and locked. Unless a VMM has taken it over, the lock goes with this value,
/// and not only with the last copy of the descriptor: a process that is just being started for
/// another microVM has one, until it becomes its program.
#[derive(Debug)]
pub(super) struct LockedDisk {
    file: File,
    is_taken_over: bool,
}

impl LockedDisk {
    /// A VMM that runs has a copy, with which the lock goes from now on.
    pub(super) fn leave_to_vmm(mut self) {
        self.is_taken_over = true;
    }
}

impl Drop for LockedDisk {
    fn drop(&mut self) {
        if !self.is_taken_over
            && let Err(error) = flock(&self.file, FlockOperation::Unlock)
        {
            tracing::warn!(%error, "cannot unlock a disk");
        }
    }
}

impl AsFd for LockedDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for LockedDisk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Opens and locks a disk, shared to read and alone to write. The lock belongs to the open file: a
/// VMM that has it keeps it locked, whatever becomes of the agent. QEMU's own locks, on byte ranges,
/// are independent of it.
pub(super) fn open(disk: &Disk) -> Result<LockedDisk, VmmError> {
    let writes = disk.access == DiskAccess::ReadWrite;
    let file = OpenOptions::new().read(true).write(writes).open(&disk.path);
    let file = file.map_err(file_error(&disk.path))?;
    let operation = match disk.access {
        DiskAccess::ReadOnly => FlockOperation::NonBlockingLockShared,
        DiskAccess::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    let locked = match flock(&file, operation) {
        // Perhaps what has it is no VMM.
        Err(Errno::WOULDBLOCK) => between_starts(|| flock(&file, operation)),
        locked => locked,
    };
    match locked {
        Ok(()) => Ok(LockedDisk { file, is_taken_over: false }),
        Err(Errno::WOULDBLOCK) => Err(VmmError::DiskInUse { path: disk.path.clone() }),
        Err(error) => Err(file_error(&disk.path)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_goes_with_a_start_that_failed_and_stays_with_a_vmm() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = Disk { path: file.path().to_owned(), access: DiskAccess::ReadWrite };
        let is_in_use = || matches!(open(&disk), Err(VmmError::DiskInUse { .. }));
        // The copy that a process has which is just being started.
        let locked = open(&disk).unwrap();
        let copy = locked.file.try_clone().unwrap();
        assert!(is_in_use());
        drop(locked);
        assert!(!is_in_use());
        drop(copy);

        // One of a VMM that has ended since.
        let locked = open(&disk).unwrap();
        let copy = locked.file.try_clone().unwrap();
        locked.leave_to_vmm();
        let (begin, begun) = std::sync::mpsc::channel();
        let being_started = std::thread::spawn(move || {
            crate::process::starting(|| {
                begin.send(()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(50));
                drop(copy);
            });
        });
        begun.recv().unwrap();
        assert!(!is_in_use());
        being_started.join().unwrap();

        let locked = open(&disk).unwrap();
        let vmm = locked.file.try_clone().unwrap();
        locked.leave_to_vmm();
        assert!(is_in_use());
        drop(vmm);
        assert!(!is_in_use());
    }
}
