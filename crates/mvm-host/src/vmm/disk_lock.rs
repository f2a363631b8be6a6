//! Opening a microVM's disk so that it has one writer or only readers. Every driver opens disks
//! with it and keeps what it returns open for as long as its VMM runs.

use std::fs::{File, OpenOptions};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Disk, DiskAccess, VmmError, file_error};

/// Opens and locks a disk, shared to read and alone to write. The lock belongs to the open file, so
/// it lasts exactly as long as that is open in any process, whatever becomes of the agent. QEMU's
/// own locks, on byte ranges, are independent of it.
pub(super) fn open(disk: &Disk) -> Result<File, VmmError> {
    let writes = disk.access == DiskAccess::ReadWrite;
    let file = OpenOptions::new().read(true).write(writes).open(&disk.path);
    let file = file.map_err(file_error(&disk.path))?;
    let operation = match disk.access {
        DiskAccess::ReadOnly => FlockOperation::NonBlockingLockShared,
        DiskAccess::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(&file, operation) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(VmmError::DiskInUse { path: disk.path.clone() }),
        Err(error) => Err(file_error(&disk.path)(error.into())),
    }
}
