//! What a benchmark found, as text for people and JSON for programs: pure.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::statistics::Summary;

/// What one benchmark found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    /// The benchmark's name.
    pub(super) name: &'static str,
    /// What one sample is, in words.
    pub(super) sample: String,
    /// mvm's times in milliseconds.
    pub(super) ours_ms: Summary,
    /// The peer's times in milliseconds, taken in the same run; none where there is no peer.
    pub(super) raw_ms: Option<Summary>,
    /// The medians' ratio, ours to the peer's.
    pub(super) ratio_p50: Option<f64>,
    /// Where the time goes, and what else was measured.
    pub(super) parts: Vec<Part>,
    /// What was to be reached.
    pub(super) targets: Vec<Target>,
}

/// One more measured figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Part {
    /// What it is, in words.
    pub(super) name: String,
    /// The figure; the median where there were several.
    pub(super) value: f64,
    /// The figure's unit.
    pub(super) unit: &'static str,
}

/// A figure with a bound.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Target {
    /// What it is, in words.
    pub(super) name: String,
    /// What was measured.
    pub(super) value: f64,
    /// What it may be, if that is bounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) at_most: Option<f64>,
    /// What it has to be, if that is bounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) at_least: Option<f64>,
    /// The unit of both; empty for a ratio.
    pub(super) unit: &'static str,
    /// Whether the measured value is within the bound.
    pub(super) is_met: bool,
}

impl Report {
    /// A report without parts and targets.
    pub(super) fn new(
        name: &'static str,
        sample: impl Into<String>,
        ours_ms: Summary,
        raw_ms: Option<Summary>,
    ) -> Self {
        let ratio_p50 = raw_ms.filter(|raw| raw.p50 > 0.0).map(|raw| ours_ms.p50 / raw.p50);
        let (parts, targets) = (Vec::new(), Vec::new());
        Self { name, sample: sample.into(), ours_ms, raw_ms, ratio_p50, parts, targets }
    }

    /// Adds a figure.
    pub(super) fn part(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.parts.push(Part { name: name.into(), value, unit });
    }

    /// Adds an upper bound on a figure.
    pub(super) fn target(
        &mut self,
        name: impl Into<String>,
        value: f64,
        at_most: f64,
        unit: &'static str,
    ) {
        let (name, is_met) = (name.into(), value <= at_most);
        let (at_most, at_least) = (Some(at_most), None);
        self.targets.push(Target { name, value, at_most, at_least, unit, is_met });
    }

    /// Adds a lower bound on a figure.
    pub(super) fn target_at_least(
        &mut self,
        name: impl Into<String>,
        value: f64,
        at_least: f64,
        unit: &'static str,
    ) {
        let (name, is_met) = (name.into(), value >= at_least);
        let (at_most, at_least) = (None, Some(at_least));
        self.targets.push(Target { name, value, at_most, at_least, unit, is_met });
    }

    /// Bounds the ratio of the medians.
    pub(super) fn target_ratio(&mut self, at_most: f64) {
        if let Some(ratio) = self.ratio_p50 {
            self.target("ratio at p50", ratio, at_most, "");
        }
    }

    /// The names of the bounds that were exceeded.
    pub(super) fn missed(&self) -> Vec<&str> {
        let missed = self.targets.iter().filter(|target| !target.is_met);
        missed.map(|target| target.name.as_str()).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, self.sample)?;
        writeln!(f, "{:8}{:>12}{:>12}{:>12}{:>10}", "", "p50", "p95", "p99", "samples")?;
        let rows = [("ours", Some(&self.ours_ms)), ("raw", self.raw_ms.as_ref())];
        for (name, row) in rows.into_iter().filter_map(|(name, row)| Some((name, row?))) {
            let Summary { samples, p50, p95, p99 } = row;
            writeln!(f, "{name:8}{p50:>9.1} ms{p95:>9.1} ms{p99:>9.1} ms{samples:>10}")?;
        }
        if let Some(ratio) = self.ratio_p50 {
            writeln!(f, "{:8}{ratio:>9.3} x", "ratio")?;
        }
        let widths = self.parts.iter().map(|part| part.name.len());
        let width = widths.chain(self.targets.iter().map(|target| target.name.len())).max();
        let width = width.unwrap_or(0);
        for Part { name, value, unit } in &self.parts {
            writeln!(f, "  {name:width$}  {value:>10.2} {unit}")?;
        }
        for Target { name, value, at_most, at_least, unit, is_met } in &self.targets {
            let mut line = format!("  {name:width$}  {value:>10.2} {unit}");
            let verdict = if *is_met { "met" } else { "MISSED" };
            for (words, bound) in [("at most", at_most), ("at least", at_least)] {
                if let Some(bound) = bound {
                    write!(line, "  ({words} {bound} {unit}: {verdict})")?;
                }
            }
            writeln!(f, "{}", line.replace(" :", ":"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let ours = Summary::of(&[110.0, 100.0, 130.0]).unwrap();
        let raw = Summary::of(&[100.0, 90.0, 120.0]).unwrap();
        let mut report = Report::new("start", "one start", ours, Some(raw));
        report.part("accepted", 3.25, "ms");
        report.target_ratio(1.05);
        report.target("disk", 0.5, 1.0, "MiB");
        report.target_at_least("rate", 40.0, 50.0, "MB/s");
        report
    }

    #[test]
    fn the_text_has_every_figure_with_its_unit_and_its_verdict() {
        let expected = "\
start: one start
                 p50         p95         p99   samples
ours        110.0 ms    130.0 ms    130.0 ms         3
raw         100.0 ms    120.0 ms    120.0 ms         3
ratio       1.100 x
  accepted            3.25 ms
  ratio at p50        1.10   (at most 1.05: MISSED)
  disk                0.50 MiB  (at most 1 MiB: met)
  rate               40.00 MB/s  (at least 50 MB/s: MISSED)
";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn without_a_peer_there_is_no_ratio_to_bound() {
        let ours = Summary::of(&[7.0]).unwrap();
        let mut report = Report::new("create", "one", ours, None);
        report.target_ratio(1.0);
        assert_eq!(report.to_string().lines().count(), 3);
        assert!(report.targets.is_empty() && report.ratio_p50.is_none());
    }

    #[test]
    fn a_bound_is_missed_only_beyond_it() {
        assert_eq!(report().missed(), ["ratio at p50", "rate"]);
        let mut report = Report { targets: Vec::new(), ..report() };
        report.target("exact", 2.0, 2.0, "ms");
        report.target_at_least("exact", 2.0, 2.0, "ms");
        assert!(report.missed().is_empty());
    }

    #[test]
    fn programs_find_the_figures_by_name() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["name"], "start");
        assert_eq!(json["ours_ms"]["p50"], 110.0);
        assert_eq!(json["raw_ms"]["p99"], 120.0);
        assert_eq!(json["ratio_p50"], 1.1);
        assert_eq!(json["parts"][0]["value"], 3.25);
        assert_eq!(json["targets"][0]["is_met"], false);
    }
}
