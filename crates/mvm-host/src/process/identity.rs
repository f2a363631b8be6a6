//! What `/proc` says about a process: who it is and what it uses.

use std::io;

use mvm_core::vmm::VmHandle;

/// Which process: a pid alone is reused by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// The start time in clock ticks since the host booted.
    pub start_ticks: u64,
    /// The host's boot id when the process was started.
    pub host_boot_id: String,
}

impl ProcessIdentity {
    /// The identity of the process that has this pid now.
    ///
    /// # Errors
    /// No process has it.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_ticks: start_ticks(pid)?, host_boot_id: boot_id()? })
    }
}

impl From<&VmHandle> for ProcessIdentity {
    fn from(handle: &VmHandle) -> Self {
        Self {
            pid: handle.pid,
            start_ticks: handle.start_ticks,
            host_boot_id: handle.host_boot_id.clone(),
        }
    }
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceUsage {
    /// CPU time of all its threads, user and system, in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory in KiB, shared memory included.
    pub rss_kib: u64,
    /// What was read from storage for it, in KiB.
    pub disk_read_kib: u64,
    /// What it wrote to storage, or to the page cache on the way there, in KiB.
    pub disk_written_kib: u64,
}

/// The host's boot id, which changes with each boot.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Whether reading `/proc/PID` failed because the process is gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The start time of the process that has this pid now.
pub(super) fn start_ticks(pid: u32) -> io::Result<u64> {
    Ok(read_stat(pid)?.start_ticks)
}

/// What this process uses, or an error if it has ended.
pub(super) fn usage(identity: &ProcessIdentity) -> io::Result<ResourceUsage> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", identity.pid))?;
    // A kernel may be built without it.
    let io = std::fs::read_to_string(format!("/proc/{}/io", identity.pid)).unwrap_or_default();
    // Read last, so that a match vouches for all files.
    let stat = read_stat(identity.pid)?;
    if stat.start_ticks != identity.start_ticks {
        return Err(io::ErrorKind::NotFound.into());
    }
    let pages: u64 = statm
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|field| field.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    let page_kib = rustix::param::page_size() as u64 / 1024;
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(ResourceUsage {
        cpu_ms: stat.cpu_ticks * 1000 / ticks_per_second,
        rss_kib: pages * page_kib,
        disk_read_kib: io_bytes(&io, "read_bytes") / 1024,
        disk_written_kib: io_bytes(&io, "write_bytes") / 1024,
    })
}

/// A field of `/proc/PID/io` (proc_pid_io(5)).
fn io_bytes(text: &str, name: &str) -> u64 {
    let mut fields = text.lines().filter_map(|line| line.split_once(": "));
    let value = fields.find_map(|(field, value)| (field == name).then_some(value));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    start_ticks: u64,
}

fn read_stat(pid: u32) -> io::Result<Stat> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&String::from_utf8_lossy(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Parses `/proc/PID/stat` (proc_pid_stat(5)): utime is field 14, stime 15, starttime 22.
fn parse_stat(text: &str) -> Option<Stat> {
    // The second field is the program's name in parentheses and may itself contain any of them.
    let (_, after_name) = text.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Stat { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_and_written_is_found_by_its_whole_name() {
        let io = "rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 8192\n\
                  cancelled_write_bytes: 5\n";
        assert_eq!((io_bytes(io, "read_bytes"), io_bytes(io, "write_bytes")), (4096, 8192));
        assert_eq!(io_bytes(io, "bytes"), 0);
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let rest = "S 1 42 42 0 -1 4194304 100 0 0 0 30 12 0 0 20 0 4 0 98765 1000 200 1844";
        for name in ["qemu", "a) R 1 (b", ") ) )"] {
            let stat = parse_stat(&format!("42 ({name}) {rest}"));
            assert_eq!(stat, Some(Stat { cpu_ticks: 42, start_ticks: 98765 }), "{name}");
        }
        assert_eq!(parse_stat("42 (qemu S 1"), None);
        assert_eq!(parse_stat("42 (qemu) S 1 2"), None);
    }
}
