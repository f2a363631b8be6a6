//! The line about what is waited for: animated on a terminal, plain lines elsewhere, and nothing
//! when the output is for programs.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::{Ui, printable};
use crate::error::Color;

/// A line that changes. Dropping it clears it.
pub(crate) struct Spinner<'a> {
    kind: Kind<'a>,
}

enum Kind<'a> {
    Quiet,
    Animated(ProgressBar),
    Lines { ui: &'a Ui, last: String },
}

impl<'a> Spinner<'a> {
    pub(super) fn quiet() -> Self {
        Self { kind: Kind::Quiet }
    }

    pub(super) fn animated(color: Color) -> Self {
        let template = match color {
            Color::Ansi => "{spinner:.cyan} {wide_msg}",
            Color::Plain => "{spinner} {wide_msg}",
        };
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { kind: Kind::Animated(bar) }
    }

    pub(super) fn lines(ui: &'a Ui) -> Self {
        Self { kind: Kind::Lines { ui, last: String::new() } }
    }

    /// Shows another line. Where lines are not animated, a number that counts down is no news.
    pub(crate) fn show(&mut self, line: &str) {
        let line = &*printable(line);
        match &mut self.kind {
            Kind::Quiet => {}
            Kind::Animated(bar) => bar.set_message(line.to_owned()),
            Kind::Lines { ui, last } => {
                let words = line.replace(|c: char| c.is_ascii_digit(), "");
                if *last != words {
                    ui.say(line);
                    *last = words;
                }
            }
        }
    }
}

impl Drop for Spinner<'_> {
    fn drop(&mut self) {
        if let Kind::Animated(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Format, capture};

    #[test]
    fn without_a_terminal_only_news_are_printed() {
        let (ui, captured) = capture::ui();
        let mut spinner = ui.spinner();
        for line in ["waiting 5s", "waiting 4s", "starting", "starting"] {
            spinner.show(line);
        }
        assert_eq!(captured.talk(), "waiting 5s\nstarting\n");
    }

    #[test]
    fn programs_are_not_talked_to() {
        let (ui, captured) = capture::ui_with(Format::Json);
        ui.spinner().show("waiting");
        assert_eq!(captured.talk(), "");
    }
}
