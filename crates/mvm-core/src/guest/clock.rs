//! A guest's wall clock, compared with its host's, and what is done about a difference.

use serde::{Deserialize, Serialize};

/// What a guest's wall clock shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClockReading {
    /// Nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Whether a program in the guest, such as an NTP daemon, keeps the clock right by itself.
    pub is_disciplined: bool,
}

/// What is done about a guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockCorrection {
    /// Nothing: it is right, or not the host's to set.
    None,
    /// It gains so many nanoseconds gradually (or loses them, below zero).
    Slew {
        /// How many.
        by_ns: i64,
    },
    /// It is set to the host's.
    Step,
}

/// A difference that is left alone, in nanoseconds: 50 ms.
const TOLERATED_NS: i128 = 50_000_000;
/// The smallest difference that is not corrected gradually, in nanoseconds: 500 ms.
const STEPPED_NS: i128 = 500_000_000;

impl ClockReading {
    /// What is to be done about a clock that was read between these two times of the host, in
    /// nanoseconds since the Unix epoch.
    ///
    /// A clock that a program in the guest disciplines may be better than the host's and is left
    /// alone, unless the host's own time has just jumped (its clock was set, or it was suspended):
    /// the guest's program would take long to follow.
    pub fn correction(
        self,
        sent_unix_ns: u64,
        received_unix_ns: u64,
        host_jumped: bool,
    ) -> ClockCorrection {
        if self.is_disciplined && !host_jumped {
            return ClockCorrection::None;
        }
        let (sent, received) = (i128::from(sent_unix_ns), i128::from(received_unix_ns));
        let doubt = (received - sent).max(0) / 2;
        let ahead = i128::from(self.unix_ns) - (sent + doubt);
        // What it is off by at least, however late it was asked.
        match ahead.abs() - doubt {
            ..=TOLERATED_NS => ClockCorrection::None,
            STEPPED_NS.. => ClockCorrection::Step,
            _ => ClockCorrection::Slew { by_ns: i64::try_from(-ahead).unwrap_or(0) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const NOON: u64 = 1_700_000_000_000 * MS;

    fn read(unix_ns: u64, is_disciplined: bool) -> ClockReading {
        ClockReading { unix_ns, is_disciplined }
    }

    #[test]
    fn a_clock_is_left_alone_slewed_or_stepped_by_how_far_it_is_off() {
        let judge = |unix_ns| read(unix_ns, false).correction(NOON, NOON + 2 * MS, false);
        assert_eq!(judge(NOON + MS), ClockCorrection::None);
        assert_eq!(judge(NOON + 40 * MS), ClockCorrection::None);
        let by_ns = 199 * MS as i64;
        assert_eq!(judge(NOON - 198 * MS), ClockCorrection::Slew { by_ns });
        assert_eq!(judge(NOON + 200 * MS), ClockCorrection::Slew { by_ns: -by_ns });
        for far in [NOON + 600 * MS, NOON - 600 * MS, 0, u64::MAX] {
            assert_eq!(judge(far), ClockCorrection::Step, "{far}");
        }
    }

    #[test]
    fn what_a_late_answer_explains_is_no_error() {
        // The guest was asked or answered up to three seconds late.
        let judge = |unix_ns| read(unix_ns, false).correction(NOON, NOON + 3000 * MS, false);
        assert_eq!(judge(NOON + 10 * MS), ClockCorrection::None);
        assert_eq!(judge(NOON + 2990 * MS), ClockCorrection::None);
        assert_eq!(judge(NOON + 4000 * MS), ClockCorrection::Step);
        // A host whose clock went back between the two.
        assert_eq!(read(NOON, false).correction(NOON, NOON - MS, false), ClockCorrection::None);
    }

    #[test]
    fn a_disciplined_clock_follows_only_a_jump_of_the_host() {
        let hour = read(NOON + 3_600_000 * MS, true);
        assert_eq!(hour.correction(NOON, NOON + MS, false), ClockCorrection::None);
        assert_eq!(hour.correction(NOON, NOON + MS, true), ClockCorrection::Step);
    }
}
