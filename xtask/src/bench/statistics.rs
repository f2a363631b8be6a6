//! Percentiles of measured times, pure. Every benchmark reports through them.

use serde::Serialize;

/// A series of measurements in one unit, as its percentiles (nearest rank: each one was measured).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    /// How many measurements there were.
    pub(super) samples: usize,
    /// The median.
    pub(super) p50: f64,
    /// 95 of 100 are at most this.
    pub(super) p95: f64,
    /// 99 of 100 are at most this.
    pub(super) p99: f64,
}

impl Summary {
    /// Summarises a series; `None` of an empty one.
    pub(super) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |percent| nearest_rank(&sorted, percent);
        Some(Self { samples: sorted.len(), p50: at(50)?, p95: at(95)?, p99: at(99)? })
    }
}

/// The smallest measurement that at least this many of 100 do not exceed.
fn nearest_rank(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// The median of a series, or 0 of an empty one.
pub(super) fn median(samples: &[f64]) -> f64 {
    Summary::of(samples).map_or(0.0, |summary| summary.p50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measurements_of_the_series() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let expected = Summary { samples: 200, p50: 100.0, p95: 190.0, p99: 198.0 };
        assert_eq!(Summary::of(&samples), Some(expected));
    }

    #[test]
    fn of_few_measurements_the_worst_ones_are_the_high_percentiles() {
        let expected = Summary { samples: 3, p50: 2.0, p95: 9.0, p99: 9.0 };
        assert_eq!(Summary::of(&[9.0, 1.0, 2.0]), Some(expected));
        let one = Summary::of(&[4.0]).unwrap();
        assert_eq!((one.p50, one.p99), (4.0, 4.0));
    }

    #[test]
    fn nothing_measured_has_no_percentiles() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}
