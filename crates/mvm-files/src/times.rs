//! Times of files to the nanosecond, also before 1970: what a plain header cannot hold goes into an
//! extension of the format, which every `tar` of today reads.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;

/// The extension's name for when a file was changed.
pub(crate) const MTIME: &str = "mtime";
const NANOSECONDS: i64 = 1_000_000_000;

/// A time since the Unix epoch: whole seconds, rounded down, and what comes on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: i64,
}

impl Time {
    /// When a file was changed.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self { seconds: metadata.mtime(), nanoseconds: metadata.mtime_nsec() }
    }

    /// What a plain header says, which has neither fractions nor times before 1970.
    pub(crate) fn in_header(self) -> u64 {
        u64::try_from(self.seconds).unwrap_or(0)
    }

    /// From a plain header. One of an earlier version is a negative number there.
    #[allow(clippy::cast_possible_wrap, reason = "that is how it was written")]
    pub(crate) fn from_header(seconds: u64) -> Self {
        Self { seconds: seconds as i64, nanoseconds: 0 }
    }

    /// The decimal number of an extension; nothing if a plain header says it all.
    pub(crate) fn extension(self) -> Option<String> {
        let Self { seconds, nanoseconds } = self;
        match (seconds < 0, nanoseconds) {
            (false, 0) => None,
            (true, 0) => Some(seconds.to_string()),
            (false, _) => Some(format!("{seconds}.{nanoseconds:09}")),
            // -1.25 is two seconds before, and three quarters after that.
            (true, _) => Some(format!("-{}.{:09}", -(seconds + 1), NANOSECONDS - nanoseconds)),
        }
    }

    /// From the decimal number of an extension.
    pub(crate) fn from_extension(text: &str) -> Option<Self> {
        let (is_negative, text) = match text.strip_prefix('-') {
            Some(text) => (true, text),
            None => (false, text),
        };
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_number(whole) || !is_number(fraction) {
            return None;
        }
        let seconds: i64 = whole.parse().ok()?;
        let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
        let nanoseconds: i64 = digits.parse().ok()?;
        Some(match (is_negative, nanoseconds) {
            (false, _) => Self { seconds, nanoseconds },
            (true, 0) => Self { seconds: -seconds, nanoseconds },
            (true, _) => Self { seconds: -seconds - 1, nanoseconds: NANOSECONDS - nanoseconds },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_comes_back_as_it_was() {
        for (seconds, nanoseconds, text) in [
            (0, 1, "0.000000001"),
            (1_700_000_000, 123_456_789, "1700000000.123456789"),
            (-1, 0, "-1"),
            (-2, 750_000_000, "-1.250000000"),
            (-1, 999_999_999, "-0.000000001"),
            (-86_400, 0, "-86400"),
        ] {
            let time = Time { seconds, nanoseconds };
            assert_eq!(time.extension().as_deref(), Some(text));
            assert_eq!(Time::from_extension(text), Some(time));
        }
        assert_eq!(Time { seconds: 7, nanoseconds: 0 }.extension(), None);
        let short = Time { seconds: 5, nanoseconds: 500_000_000 };
        assert_eq!(Time::from_extension("5.5"), Some(short));
        for bad in ["", "-", ".5", "1.x", "1e9", "--1", "99999999999999999999"] {
            assert_eq!(Time::from_extension(bad), None, "{bad}");
        }
        assert_eq!(Time::from_header((-1i64).cast_unsigned()).seconds, -1);
    }
}
