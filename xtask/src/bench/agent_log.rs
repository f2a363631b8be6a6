//! Figures that the agent writes into its log: how long the parts of a sleep and a wake took.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;

use super::lab::Lab;
use super::report::Report;
use super::statistics::median;

/// The end of an agent's log, from a moment on.
pub(super) struct LogMark {
    path: PathBuf,
    from: usize,
}

impl LogMark {
    /// From now on.
    pub(super) fn now(lab: &Lab) -> anyhow::Result<Self> {
        let path = lab.state_dir().join("agent.log");
        let from =
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
        Ok(Self { path, from })
    }

    /// All values of a field that were logged since.
    pub(super) fn values(&self, field: &str) -> anyhow::Result<Vec<f64>> {
        let bytes = fs::read(&self.path)?;
        let text = String::from_utf8_lossy(bytes.get(self.from..).unwrap_or_default());
        Ok(values_of(&text, field))
    }

    /// Adds the medians of fields to a report, each with what it is.
    pub(super) fn report(
        &self,
        report: &mut Report,
        fields: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        for (field, name) in fields {
            report.part(*name, median(&self.values(field)?), "ms");
        }
        Ok(())
    }
}

fn values_of(text: &str, field: &str) -> Vec<f64> {
    let name = format!("{field}=");
    let words = text.split_ascii_whitespace();
    words.filter_map(|word| word.strip_prefix(&name)?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "DEBUG a: restored instance=x load_ms=1.5 preload_ms=9\nload_ms=2";
        assert_eq!(values_of(text, "load_ms"), [1.5, 2.0]);
        assert_eq!(values_of(text, "ms"), [0.0; 0]);
    }
}
