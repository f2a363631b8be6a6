//! Which of the levels of x86-64 processors images may need, so that of an index the best one that runs is
//! taken. Levels are those of the x86-64 psABI, 1 to 4.

/// The flags of `/proc/cpuinfo` that each level adds, from the second.
const FLAGS: [&[&str]; 3] = [
    &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
    &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"],
    &["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"],
];
/// The highest level that QEMU shows a guest in software, and most templates of processors do: an image
/// up to it goes on running when a machine changes from one to the other.
const MOST_IN_GUESTS: u8 = 3;

/// The levels of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    /// What the machine itself can run.
    pub(super) host: u8,
    /// What a guest on it can run, however it is run.
    pub(super) guests: u8,
}

impl Level {
    /// This machine's; the lowest one if it does not tell.
    pub(super) fn of_this_machine() -> Self {
        Self::of(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn of(cpuinfo: &str) -> Self {
        let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
        let flags: Vec<&str> =
            flags.map(|(_, f)| f.split_whitespace().collect()).unwrap_or_default();
        let has = |level: &&&[&str]| level.iter().all(|flag| flags.contains(flag));
        let host = 1 + FLAGS.iter().take_while(has).count() as u8;
        Self { host, guests: host.min(MOST_IN_GUESTS) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_reached_with_all_of_its_flags() {
        let level = |flags: &[&[&str]]| {
            Level::of(&format!("model name\t: x\nflags\t\t: fpu {}\n", flags.concat().join(" ")))
        };
        assert_eq!(Level::of(""), Level { host: 1, guests: 1 });
        for host in 1..=4 {
            let all = &FLAGS[..host - 1];
            let guests = host.min(3) as u8;
            assert_eq!(level(all), Level { host: host as u8, guests });
        }
        assert_eq!(level(&[FLAGS[0], &FLAGS[1][1..], FLAGS[2]]).host, 2);
    }
}
