//! How fast each instance of a pool may use what it shares with others: the network and the disks.
//!
//! A pool's spec carries them. The node's firewall holds a guest to its network rate, whatever VMM it
//! runs on, and the VMM holds it to those of its disks.

use serde::{Deserialize, Serialize};

/// Bits per second in one Mbit/s.
const MEGABIT: u64 = 1_000_000;
/// The least that one can be.
const LEAST: u32 = 1;
/// The fastest network that can be asked for, in Mbit/s.
pub const NET_MBIT_S_MAX: u32 = 100_000;
/// The fastest disk that can be asked for, in MiB/s.
pub const DISK_MIB_S_MAX: u32 = 100_000;
/// The most requests per second that can be asked for.
pub const DISK_OPS_S_MAX: u32 = 10_000_000;

/// Upper limits; one that is absent is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// What it sends, and what it receives, in Mbit/s (10^6 bits per second) each.
    pub net_mbit_s: Option<u32>,
    /// What it reads and writes together on each of its disks, in MiB per second.
    pub disk_mib_s: Option<u32>,
    /// Requests to each of its disks per second.
    pub disk_ops_s: Option<u32>,
}

/// A limit that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, but must be {LEAST} to {most}")]
pub struct RateError {
    field: &'static str,
    value: u32,
    most: u32,
}

impl Rates {
    /// Whether nothing is limited.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the first that is out of range.
    pub fn check(&self) -> Result<(), RateError> {
        for (field, value, most) in [
            ("net_mbit_s", self.net_mbit_s, NET_MBIT_S_MAX),
            ("disk_mib_s", self.disk_mib_s, DISK_MIB_S_MAX),
            ("disk_ops_s", self.disk_ops_s, DISK_OPS_S_MAX),
        ] {
            if let Some(value) = value.filter(|value| !(LEAST..=most).contains(value)) {
                return Err(RateError { field, value, most });
            }
        }
        Ok(())
    }

    /// What a disk may carry in bytes per second.
    pub fn disk_bytes_s(&self) -> Option<u64> {
        self.disk_mib_s.map(|mib| u64::from(mib) << 20)
    }
}

/// The same rate in bytes per second.
pub fn bytes_per_second(mbit_s: u32) -> u64 {
    u64::from(mbit_s) * MEGABIT / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_named() {
        let check = |rates: Rates| rates.check().map_err(|error| error.to_string());
        assert_eq!(check(Rates::default()), Ok(()));
        let most = Rates {
            net_mbit_s: Some(NET_MBIT_S_MAX),
            disk_mib_s: Some(1),
            disk_ops_s: Some(DISK_OPS_S_MAX),
        };
        assert_eq!(check(most), Ok(()));
        let error = check(Rates { net_mbit_s: Some(0), ..most }).unwrap_err();
        assert_eq!(error, "net_mbit_s is 0, but must be 1 to 100000");
        let error = check(Rates { disk_ops_s: Some(u32::MAX), ..most }).unwrap_err();
        assert!(error.starts_with("disk_ops_s is 4294967295"), "{error}");
    }

    #[test]
    fn rates_are_converted_without_a_loss() {
        assert_eq!(bytes_per_second(1), 125_000);
        assert_eq!(bytes_per_second(NET_MBIT_S_MAX), 12_500_000_000);
        let rates = Rates { disk_mib_s: Some(3), ..Rates::default() };
        assert_eq!((rates.disk_bytes_s(), Rates::default().disk_bytes_s()), (Some(3 << 20), None));
    }
}
