//! What `/proc` says about a process: its CPU time, its memory and its arguments.

use std::fs;

use anyhow::Context;

/// What the VMM driver names the memory of its guests.
const GUEST_MEMORY: &str = "/memfd:mvm-guest-memory";

/// The files that restored guests' memories are mapped from, on disk and shared.
const IMAGES: [&str; 2] = ["/memory.image", "/memfd:mvm-"];

/// The CPU time that a process has used, in milliseconds.
pub(super) fn cpu_ms(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = cpu_ticks(&text).with_context(|| format!("{path} does not parse"))?;
    Ok(ticks as f64 * 1000.0 / rustix::param::clock_ticks_per_second().max(1) as f64)
}

/// User and system time in what `/proc/PID/stat` holds. The name before may have any character.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// The memory of a VMM in KiB, that of its guest apart from its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Guest memory that is resident.
    pub(super) guest_rss_kib: u64,
    /// Everything else that is resident, with what others share.
    pub(super) own_rss_kib: u64,
    /// The same with the shared part divided among those that share it.
    pub(super) own_pss_kib: u64,
}

/// How a process uses memory.
pub(super) fn memory(pid: u32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(memory_of(&text))
}

fn memory_of(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let Some((field, value)) = line.split_once(':') else { continue };
        let kib = || kib_in(value);
        match (field, is_guest) {
            // A mapping: `start-end mode offset device inode path`, of which the device has a colon.
            (field, _) if field.contains('-') => is_guest = line.contains(GUEST_MEMORY),
            ("Rss", true) => memory.guest_rss_kib += kib().unwrap_or(0),
            ("Rss", false) => memory.own_rss_kib += kib().unwrap_or(0),
            ("Pss", false) => memory.own_pss_kib += kib().unwrap_or(0),
            _ => {}
        }
    }
    memory
}

/// What a VMM has made its own of the memory image that its guest was restored from, in bytes.
pub(super) fn private_bytes(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(private_kib(&text) as f64 * 1024.0)
}

/// Pages of private, writable mappings of a file that were written, and so are anonymous.
fn private_kib(smaps: &str) -> u64 {
    let mut kib = 0;
    let mut is_image = false;
    for line in smaps.lines() {
        let Some((field, value)) = line.split_once(':') else { continue };
        if field.contains('-') {
            is_image = line.contains(" rw-p ") && IMAGES.iter().any(|name| line.contains(name));
        } else if field == "Anonymous" && is_image {
            kib += kib_in(value).unwrap_or(0);
        }
    }
    kib
}

/// Resident memory of a VMM without that of its guest, which is the mapping of at least this size, in
/// KiB. What it shares with others is divided among them.
pub(super) fn own_memory_kib(pid: u32, guest_bytes: u64) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(own_kib(&text, guest_bytes))
}

fn own_kib(smaps: &str, guest_bytes: u64) -> u64 {
    let mut kib = 0;
    let mut is_guest = false;
    for line in smaps.lines() {
        let Some((field, value)) = line.split_once(':') else { continue };
        match field {
            "Size" => is_guest = kib_in(value).is_some_and(|size| size * 1024 >= guest_bytes),
            "Pss" if !is_guest => kib += kib_in(value).unwrap_or(0),
            _ => {}
        }
    }
    kib
}

/// The number of a field of `smaps`.
fn kib_in(value: &str) -> Option<u64> {
    value.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// What the agent and those of its VMMs that have ended have written so far, in bytes, together with
/// one that runs: to disks, and also to filesystems in memory, for which the kernel has no account of
/// its own.
pub(super) fn written_bytes(agent: u32, vmm: Option<u32>) -> anyhow::Result<f64> {
    let mut written = 0.0;
    for pid in [Some(agent), vmm].into_iter().flatten() {
        let path = format!("/proc/{pid}/io");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("wchar:"));
        let value = line.and_then(|value| value.trim().parse::<f64>().ok());
        written += value.context("the kernel counts no writes")?;
    }
    Ok(written)
}

/// The arguments of a process, without the program's name.
pub(super) fn arguments(pid: u32) -> anyhow::Result<Vec<String>> {
    let path = format!("/proc/{pid}/cmdline");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{path} is not text"))?;
    Ok(text.split_terminator('\0').skip(1).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) (b) S 1 42 42 0 -1 4194560 100 0 0 0 70 30 5 5 20 0 9 0 123 4 5";
        assert_eq!(cpu_ticks(stat), Some(100));
        assert_eq!(cpu_ticks("42 (a) S 1"), None);
    }

    #[test]
    fn guest_memory_is_told_from_the_vmm_s_own() {
        let smaps = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 1042  /memfd:mvm-guest-memory (deleted)
Size:             262144 kB
Rss:              100000 kB
Pss:              100000 kB
VmFlags: rd wr sh
7f0020000000-7f0020100000 r-xp 00000000 fe:00 77    /usr/bin/qemu-system-x86_64
Rss:                 900 kB
Pss:                  45 kB
Pss_Dirty:             4 kB
7f0030000000-7f0030100000 rw-p 00000000 00:00 0
Rss:                 100 kB
Pss:                 100 kB
";
        let expected = Memory { guest_rss_kib: 100_000, own_rss_kib: 1000, own_pss_kib: 145 };
        assert_eq!(memory_of(smaps), expected);
    }

    #[test]
    fn the_mapping_of_the_guest_s_size_is_not_the_vmm_s_own() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262148 kB
Pss:              100000 kB
7f0020000000-7f0020100000 r-xp 00000000 fe:00 77    /firecracker
Size:               1024 kB
Pss:                 900 kB
Pss_Dirty:             4 kB
";
        assert_eq!(own_kib(smaps, 256 << 20), 900);
        assert_eq!(own_kib(smaps, 512 << 20), 100_900);
    }

    #[test]
    fn what_a_restored_guest_has_written_is_its_own() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:01 1042  /memfd:mvm-shared (deleted)
Anonymous:          1200 kB
7f0020000000-7f0020100000 r-xp 00000000 fe:00 77    /usr/bin/qemu-system-x86_64
Anonymous:             8 kB
7f0030000000-7f0030100000 rw-p 00000000 00:00 0
Anonymous:           100 kB
7f0040000000-7f0050000000 rw-p 00000000 fe:00 78    /x/sleep-1/memory.image
Anonymous:            34 kB
";
        assert_eq!(private_kib(smaps), 1234);
    }

    #[test]
    fn this_process_has_arguments_memory_and_time() {
        let pid = std::process::id();
        assert!(arguments(pid).is_ok());
        let memory = memory(pid).unwrap();
        assert!(memory.own_rss_kib > 0 && memory.own_pss_kib > 0 && memory.guest_rss_kib == 0);
        assert!(cpu_ms(pid).is_ok());
    }
}
