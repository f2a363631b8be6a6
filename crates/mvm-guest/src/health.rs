//! How the guest is, read from `/proc` when asked.

use std::fs;

use mvm_core::guest::Health;

/// Measures; what cannot be read is 0.
pub(crate) fn measure(ready: bool, execs: usize) -> Health {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let disk = rustix::fs::statvfs("/").ok();
    let disk_kib = |blocks: fn(&rustix::fs::StatVfs) -> u64| {
        disk.as_ref().map_or(0, |disk| blocks(disk).saturating_mul(disk.f_frsize) / 1024)
    };
    Health {
        ready,
        uptime_ms: uptime_ms(&read("/proc/uptime")),
        load: load(&read("/proc/loadavg")),
        mem_total_kib: field(&meminfo, "MemTotal:"),
        mem_available_kib: field(&meminfo, "MemAvailable:"),
        disk_total_kib: disk_kib(|disk| disk.f_blocks),
        disk_free_kib: disk_kib(|disk| disk.f_bavail),
        oom_kills: field(&read("/proc/vmstat"), "oom_kill"),
        execs: u32::try_from(execs).unwrap_or(u32::MAX),
        busy: false,
    }
}

fn uptime_ms(text: &str) -> u64 {
    let seconds: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

fn load(text: &str) -> [f64; 3] {
    let mut words = text.split(' ').map(|word| word.parse().unwrap_or(0.0));
    [(); 3].map(|()| words.next().unwrap_or(0.0))
}

/// The number behind a name at a line's start.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some(name)).then(|| words.next())?
    });
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        assert_eq!(uptime_ms("12.34 40.01\n"), 12_340);
        assert_eq!(load("0.50 1.25 2.00 1/123 4567\n"), [0.5, 1.25, 2.0]);
        assert_eq!(field("MemFree: 1 kB\nMemTotal:   2048 kB\n", "MemTotal:"), 2048);
        assert_eq!(field("oom_kill_x 3\noom_kill 7\n", "oom_kill"), 7);
    }

    #[test]
    fn garbage_measures_as_nothing() {
        assert_eq!((uptime_ms(""), load("x"), field("", "a")), (0, [0.0; 3], 0));
    }

    #[test]
    fn a_running_linux_has_memory_and_a_past() {
        let health = measure(true, 3);
        assert!(health.mem_total_kib > health.mem_available_kib && health.mem_available_kib > 0);
        assert!(health.uptime_ms > 0 && health.disk_total_kib >= health.disk_free_kib);
    }
}
