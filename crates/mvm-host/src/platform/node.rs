//! What a node is called, what it can hold, and which name servers it uses.

use std::fs;
use std::io;
use std::path::Path;

use mvm_core::admit::Capacity;

const MIB: u64 = 1 << 20;
/// Memory that is left to the host: its kernel, the agent, and the VMMs' own share.
const RESERVED_MEM_MIB: u64 = 512;
/// Virtual CPUs per core. Guests wait for requests most of the time, and a busy one only slows
/// down its neighbours; at 16 a node full of idle guests still runs out of memory first.
const VCPUS_PER_CORE: u64 = 16;
/// How many times the disk may be promised. Writable layers are sparse files, of which a guest
/// fills a small part.
const DISK_OVERCOMMIT: u64 = 4;

/// The machine's host name, or `localhost` if it has none that is UTF-8.
pub fn hostname() -> String {
    let uname = rustix::system::uname();
    match uname.nodename().to_str() {
        Ok(name) if !name.is_empty() => name.to_owned(),
        _ => "localhost".to_owned(),
    }
}

/// What this machine can hold, overcommit included.
///
/// # Errors
/// `/proc` is not mounted, or the directory does not exist.
pub fn capacity(state_dir: &Path) -> io::Result<Capacity> {
    let total_kib = meminfo_kib(&fs::read_to_string("/proc/meminfo")?, "MemTotal")
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
    let cores = std::thread::available_parallelism()?.get() as u64;
    let disk = rustix::fs::statvfs(state_dir)?;
    Ok(capacity_of(total_kib, cores, disk.f_frsize.saturating_mul(disk.f_blocks)))
}

fn capacity_of(mem_kib: u64, cores: u64, disk_bytes: u64) -> Capacity {
    Capacity {
        vcpus: cores.saturating_mul(VCPUS_PER_CORE),
        mem_mib: (mem_kib / 1024).saturating_sub(RESERVED_MEM_MIB),
        disk_mib: (disk_bytes / MIB).saturating_mul(DISK_OVERCOMMIT),
    }
}

/// A field of `/proc/meminfo`, in KiB.
pub(super) fn meminfo_kib(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_memory_and_shares_the_rest_out() {
        let capacity = capacity_of(8 * 1024 * 1024, 4, 100 << 30);
        assert_eq!(capacity, Capacity { vcpus: 64, mem_mib: 7680, disk_mib: 409_600 });
    }

    #[test]
    fn a_machine_smaller_than_the_reserve_holds_nothing() {
        assert_eq!(capacity_of(256 * 1024, 1, 0).mem_mib, 0);
    }

    #[test]
    fn this_machine_can_hold_something() {
        let capacity = capacity(Path::new("/")).unwrap();
        assert!(capacity.vcpus >= 16 && capacity.mem_mib > 0 && capacity.disk_mib > 0);
        assert!(super::capacity(Path::new("/no/such/directory")).is_err());
        assert!(!hostname().is_empty());
    }

    #[test]
    fn a_field_of_meminfo_is_not_taken_for_one_that_it_begins() {
        let text = "MemTotalHuge:  1 kB\nMemTotal:       24684084 kB\n";
        assert_eq!(meminfo_kib(text, "MemTotal"), Some(24_684_084));
        assert_eq!(meminfo_kib(text, "MemFree"), None);
    }
}
