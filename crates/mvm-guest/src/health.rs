//! How the guest is, read from `/proc` when asked.

use std::fs;

use mvm_core::guest::Health;

/// A tick of `/proc/stat` in milliseconds: 100 Hz for user space on every architecture of mvm's.
const TICK_MS: u64 = 10;

/// Measures; what cannot be read is 0.
pub(crate) fn measure(ready: bool, execs: usize, connections: usize) -> Health {
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
        connections: u32::try_from(connections).unwrap_or(u32::MAX),
        cpu_ms: cpu_ms(&read("/proc/stat")),
        net_bytes: Some(net_bytes(&read("/proc/net/dev"))),
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

/// What all processors have computed, from the line of `/proc/stat` that sums them up: user, nice,
/// system, interrupts and soft interrupts, but not the time that they waited.
fn cpu_ms(stat: &str) -> Option<u64> {
    let mut words = stat.lines().next()?.split_ascii_whitespace();
    if words.next() != Some("cpu") {
        return None;
    }
    let ticks: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks.as_slice() else {
        return None;
    };
    Some((user + nice + system + irq + softirq) * TICK_MS)
}

/// Bytes received and sent by all interfaces but loopback: the first and ninth number behind each
/// name.
fn net_bytes(dev: &str) -> u64 {
    let of_interface = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> =
            numbers.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        let is_counted = name.trim() != "lo";
        is_counted.then(|| numbers.first().unwrap_or(&0) + numbers.get(8).unwrap_or(&0))
    };
    dev.lines().filter_map(of_interface).sum()
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
        assert_eq!(cpu_ms("cpu  1 2 4 1000 2000 8 16 32 64 0\ncpu0 9 9\n"), Some(310));
        let dev = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    \
            lo: 7 0 0 0 0 0 0 0 7 0 0 0 0 0 0 0\n  \
            eth0: 100 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n";
        assert_eq!(net_bytes(dev), 120);
        assert_eq!(field("oom_kill_x 3\noom_kill 7\n", "oom_kill"), 7);
    }

    #[test]
    fn garbage_measures_as_nothing() {
        assert_eq!((uptime_ms(""), load("x"), field("", "a")), (0, [0.0; 3], 0));
        assert_eq!((cpu_ms(""), cpu_ms("cpu 1 2"), net_bytes("x: y\nz")), (None, None, 0));
    }

    #[test]
    fn a_running_linux_has_memory_and_a_past() {
        let health = measure(true, 3, 4);
        assert!(health.cpu_ms > Some(0) && health.net_bytes.is_some());
        assert_eq!((health.execs, health.connections), (3, 4));
        assert!(health.mem_total_kib > health.mem_available_kib && health.mem_available_kib > 0);
        assert!(health.uptime_ms > 0 && health.disk_total_kib >= health.disk_free_kib);
    }
}
