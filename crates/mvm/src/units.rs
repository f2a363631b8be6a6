//! Sizes and durations: how people type them and how they are shown.
//!
//! Commands parse with [`Mib`] and [`Seconds`]; the tables show with the functions. Nothing here
//! reads a clock.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ipnet::Ipv4Net;

/// A size in MiB, typed as `256`, `256M` or `2G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mib(pub(crate) u64);

/// A rate in Mbit/s, typed as `100`, `100M` or `1G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mbits(pub(crate) u32);

/// A time in seconds, typed as `90`, `90s`, `2m` or `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seconds(pub(crate) u64);

/// Why a size, a time or a subnet was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}")]
pub(crate) struct UnitError {
    expected: &'static str,
}

/// How a subnet is typed.
pub(crate) const SUBNET_EXPECTED: &str = "a subnet such as 10.240.7.0/24";

/// A subnet, typed as `10.240.7.0/24`.
pub(crate) fn subnet(text: &str) -> Result<Ipv4Net, UnitError> {
    text.parse().map_err(|_| UnitError { expected: SUBNET_EXPECTED })
}

impl FromStr for Mib {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = UnitError { expected: "a size such as 256, 256M or 2G" };
        let (number, unit) = split_number(text);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mib" => 1,
            "g" | "gib" => 1024,
            "t" | "tib" => 1024 * 1024,
            _ => return Err(error),
        };
        let number: u64 = number.parse().map_err(|_| error.clone())?;
        number.checked_mul(factor).map(Self).ok_or(error)
    }
}

impl FromStr for Mbits {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = UnitError { expected: "a rate in Mbit/s such as 100, 100M or 1G" };
        let (number, unit) = split_number(text);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mbit" => 1,
            "g" | "gbit" => 1000,
            _ => return Err(error),
        };
        let number: u32 = number.parse().map_err(|_| error.clone())?;
        number.checked_mul(factor).map(Self).ok_or(error)
    }
}

impl FromStr for Seconds {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = UnitError { expected: "a time such as 90, 90s, 2m or 1h" };
        let (number, unit) = split_number(text);
        let factor = match unit {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(error),
        };
        let number: u64 = number.parse().map_err(|_| error.clone())?;
        // Kept within what milliseconds can hold.
        let seconds = number.checked_mul(factor).filter(|s| s.checked_mul(1000).is_some());
        seconds.map(Self).ok_or(error)
    }
}

fn split_number(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

impl Mib {
    /// The size as the specs hold it; what does not fit is far above every limit.
    pub(crate) fn saturating_u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }
}

impl Seconds {
    /// The time as the specs hold it.
    pub(crate) fn saturating_u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }

    /// The time in milliseconds.
    pub(crate) fn as_millis(self) -> u64 {
        self.0.saturating_mul(1000)
    }

    /// The time as the standard library has it.
    pub(crate) fn as_duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            mib if mib > 0 && mib % (1 << 20) == 0 => write!(f, "{}T", mib >> 20),
            mib if mib > 0 && mib % 1024 == 0 => write!(f, "{}G", mib / 1024),
            mib => write!(f, "{mib}M"),
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            s if s > 0 && s % 3600 == 0 => write!(f, "{}h", s / 3600),
            s if s > 0 && s % 60 == 0 => write!(f, "{}m", s / 60),
            s => write!(f, "{s}s"),
        }
    }
}

/// A size in MiB for people.
pub(crate) fn mib_text(mib: u64) -> String {
    if mib == 0 {
        return "0 MiB".to_owned();
    }
    kib_text(mib.saturating_mul(1024))
}

/// A size in KiB for narrow columns, such as 4.3M.
pub(crate) fn kib_short(kib: u64) -> String {
    kib_text(kib).replace(' ', "").replace("iB", "")
}

/// A size in KiB for people, with at most one decimal.
pub(crate) fn kib_text(kib: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut tenths = u128::from(kib) * 10;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths = (tenths + 512) / 1024;
        unit += 1;
    }
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {}", UNITS[unit]),
        (whole, tenth) => format!("{whole}.{tenth} {}", UNITS[unit]),
    }
}

/// A duration in milliseconds for people: the two largest units.
pub(crate) fn duration_text(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

/// A moment for people, in UTC.
pub(crate) fn utc_text(unix_ms: u64) -> String {
    let (days, second) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// The Gregorian date of a day since 1970-01-01. Years are counted from March, so that the leap day
/// comes last, within eras of 400 years (146,097 days), which all have the same calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153; // from March
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_mbit_unless_they_say_otherwise() {
        for (text, mbit) in
            [("10", 10), ("10M", 10), ("10mbit", 10), ("2G", 2000), ("1Gbit", 1000), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(Mbits(mbit)), "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "5K", "10MB", "5000000G"] {
            assert!(bad.parse::<Mbits>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn sizes_are_mib_unless_they_say_otherwise() {
        for (text, mib) in
            [("256", 256), ("256M", 256), ("256MiB", 256), ("2G", 2048), ("1t", 1 << 20)]
        {
            assert_eq!(text.parse(), Ok(Mib(mib)), "{text}");
        }
        for bad in [
            "",
            "M",
            "-1",
            "1.5G",
            "2 G",
            "5K",
            "2GB",
            "99999999999999999999",
            "99999999999999999G",
        ] {
            assert!(bad.parse::<Mib>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(Mib(u64::MAX).saturating_u32(), u32::MAX);
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("2m", 120), ("1h", 3600), ("0", 0)] {
            assert_eq!(text.parse(), Ok(Seconds(seconds)), "{text}");
        }
        for bad in ["", "s", "1d", "1.5", "-3", "18446744073709551615"] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_subnet_has_a_prefix_length() {
        assert_eq!(subnet("10.1.0.0/24").unwrap().to_string(), "10.1.0.0/24");
        for bad in ["", "10.1.0.0", "10.1.0.0/33", "10.1.0/24", "fd00::/64"] {
            assert!(subnet(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn what_is_shown_as_a_default_can_be_typed() {
        for mib in [0, 1, 256, 1024, 1536, 2048, 3 << 20] {
            assert_eq!(Mib(mib).to_string().parse(), Ok(Mib(mib)));
        }
        for seconds in [0, 1, 60, 90, 900, 3600, 5400] {
            assert_eq!(Seconds(seconds).to_string().parse(), Ok(Seconds(seconds)));
        }
    }

    #[test]
    fn sizes_and_durations_are_short() {
        for (kib, text) in [
            (0, "0 KiB"),
            (1023, "1023 KiB"),
            (1024, "1 MiB"),
            (1536, "1.5 MiB"),
            (256 * 1024, "256 MiB"),
            (1024 * 1024, "1 GiB"),
            (u64::MAX, "17179869184 TiB"),
        ] {
            assert_eq!(kib_text(kib), text);
        }
        for (ms, text) in [
            (999, "0s"),
            (59_999, "59s"),
            (61_000, "1m 1s"),
            (3_600_000, "1h 0m"),
            (90_000_000, "1d 1h"),
        ] {
            assert_eq!(duration_text(ms), text);
        }
    }

    #[test]
    fn moments_are_shown_in_utc() {
        for (unix_ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_827_696_789, "2000-02-29 12:34:56 UTC"),
            (1_767_225_599_000, "2025-12-31 23:59:59 UTC"),
            (4_107_542_400_000, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc_text(unix_ms), text);
        }
    }
}
