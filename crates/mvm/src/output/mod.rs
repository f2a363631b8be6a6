//! The terminal: data on standard output, talk on standard error.
//!
//! Every command prints through [`Ui`], which knows the format that was asked for. The views of the
//! wire are shown as they are with `-o json|yaml`, and as tables for people.

pub(crate) mod disks;
pub(crate) mod images;
pub(crate) mod instances;
pub(crate) mod node;
pub(crate) mod policy;
mod printable;
pub(crate) mod raw;
pub(crate) mod spinner;
pub(crate) mod table;
pub(crate) mod tenants;

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::error::{Color, Error, Result};
pub(crate) use printable::{TerminalFilter, printable, printable_text};
pub(crate) use spinner::Spinner;

/// How data is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table for people.
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Whether a person sits at the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Standard error is a terminal.
    Person,
    /// It goes to a file or a program.
    Program,
}

/// Where a command's output goes.
pub(crate) struct Ui {
    format: Format,
    color: Color,
    audience: Audience,
    data: RefCell<Box<dyn Write>>,
    talk: RefCell<Box<dyn Write>>,
}

impl Ui {
    /// The process's own standard output and error. Colours are left out if asked for, if
    /// `NO_COLOR` is set, and where nobody sees them.
    pub(crate) fn standard(format: Format, no_color: bool) -> Self {
        let is_person = raw::is_stderr_terminal();
        let no_color = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self {
            format,
            color: if is_person && !no_color { Color::Ansi } else { Color::Plain },
            audience: if is_person { Audience::Person } else { Audience::Program },
            data: RefCell::new(Box::new(raw::stdout())),
            talk: RefCell::new(Box::new(raw::stderr())),
        }
    }

    /// Whether data is printed for people.
    pub(crate) fn is_for_people(&self) -> bool {
        self.format == Format::Table
    }

    /// Prints an error.
    pub(crate) fn error(&self, error: &Error) {
        let _ = writeln!(self.talk.borrow_mut(), "{}", error.report(self.color));
    }

    /// Says a line on standard error, or several. It goes unsaid if nobody can read it.
    pub(crate) fn say(&self, line: &str) {
        let _ = writeln!(self.talk.borrow_mut(), "{}", printable_text(line));
    }

    /// Says a line on standard error, unless the output is for programs.
    pub(crate) fn remark(&self, line: &str) {
        if self.is_for_people() {
            self.say(line);
        }
    }

    /// A line that changes while something is waited for.
    pub(crate) fn spinner(&self) -> Spinner<'_> {
        match (self.format, self.audience) {
            (Format::Json | Format::Yaml, _) => Spinner::quiet(),
            (Format::Table, Audience::Person) => Spinner::animated(self.color),
            (Format::Table, Audience::Program) => Spinner::lines(self),
        }
    }

    /// Prints data: `text` for people, the value itself for programs.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub(crate) fn data<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<()> {
        let text = match self.format {
            Format::Table => printable_text(&text()),
            Format::Json => {
                let json = serde_json::to_string_pretty(value).map_err(Error::output)?;
                printable::printable_json(&json)
            }
            Format::Yaml => serde_saphyr::to_string(value)
                .map_err(|error| Error::output(io::Error::other(error)))?,
        };
        self.text(&text)
    }

    /// Prints text of mvm's own, such as a script, with a line end if it has none.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub(crate) fn text(&self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let end = if text.ends_with('\n') { "" } else { "\n" };
        let mut out = self.data.borrow_mut();
        write!(out, "{text}{end}").and_then(|()| out.flush()).map_err(Error::output)
    }

    /// Asks a question that is answered with yes or no. Without a person at the terminal there is
    /// no answer.
    ///
    /// # Errors
    /// Standard input cannot be read.
    pub(crate) fn confirm(&self, question: &str) -> Result<Option<bool>> {
        if self.audience == Audience::Program || !io::stdin().is_terminal() {
            return Ok(None);
        }
        let _ = write!(self.talk.borrow_mut(), "{} [y/N] ", printable_text(question));
        let _ = self.talk.borrow_mut().flush();
        let mut answer = String::new();
        io::stdin()
            .read_line(&mut answer)
            .map_err(|source| Error::Read { what: "the answer".to_owned(), source })?;
        Ok(Some(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes")))
    }
}

/// A [`Ui`] whose output can be looked at.
#[cfg(test)]
pub(crate) mod capture {
    use std::rc::Rc;

    use super::*;

    /// What was printed.
    #[derive(Clone, Default)]
    pub(crate) struct Captured {
        data: Rc<RefCell<Vec<u8>>>,
        talk: Rc<RefCell<Vec<u8>>>,
    }

    struct Sink(Rc<RefCell<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Captured {
        /// Standard output so far.
        pub(crate) fn data(&self) -> String {
            String::from_utf8(self.data.borrow().clone()).unwrap()
        }

        /// Standard error so far.
        pub(crate) fn talk(&self) -> String {
            String::from_utf8(self.talk.borrow().clone()).unwrap()
        }
    }

    /// For people, without a terminal.
    pub(crate) fn ui() -> (Ui, Captured) {
        ui_with(Format::Table)
    }

    /// In a format, without a terminal.
    pub(crate) fn ui_with(format: Format) -> (Ui, Captured) {
        let captured = Captured::default();
        let ui = Ui {
            format,
            color: Color::Plain,
            audience: Audience::Program,
            data: RefCell::new(Box::new(Sink(captured.data.clone()))),
            talk: RefCell::new(Box::new(Sink(captured.talk.clone()))),
        };
        (ui, captured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn programs_get_the_same_fields_in_json_and_yaml() {
        let views = vec![samples::instance("demo/hello/i-00000001")];
        let print = |format| {
            let (ui, captured) = capture::ui_with(format);
            ui.data(&views, || "a table".to_owned()).unwrap();
            captured.data()
        };
        let json: serde_json::Value = serde_json::from_str(&print(Format::Json)).unwrap();
        let yaml: serde_json::Value = serde_saphyr::from_str(&print(Format::Yaml)).unwrap();
        assert_eq!(json, yaml);
        assert_eq!(json[0]["path"], "demo/hello/i-00000001");
        assert_eq!(json[0]["state"], "running");
        assert_eq!(print(Format::Table), "a table\n");
    }

    const HOSTILE: &str = "\u{1b}]0;x\u{7}\u{1b}[2J\u{9b}1m\u{202e}";

    fn assert_tame(text: &str) {
        let steers = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
        assert!(!text.contains(steers), "{text:?}");
        assert!(text.contains("[2J"), "it is still told: {text:?}");
    }

    #[test]
    fn nothing_that_is_printed_steers_the_terminal() {
        for format in [Format::Table, Format::Json] {
            let (ui, captured) = capture::ui_with(format);
            ui.data(&serde_json::json!({ HOSTILE: [HOSTILE] }), || HOSTILE.to_owned()).unwrap();
            assert_tame(&captured.data());
        }
        for c in (0..0x100).filter_map(char::from_u32).filter(|c| c.is_control()) {
            let (ui, captured) = capture::ui_with(Format::Yaml);
            ui.data(&serde_json::json!({ "a": format!("b{c}c") }), String::new).unwrap();
            let yaml = captured.data();
            assert!(!yaml.contains(|c: char| c.is_control() && c != '\n'), "{yaml:?}");
        }
        let (ui, captured) = capture::ui();
        ui.say(HOSTILE);
        assert_tame(&captured.talk());
        let (ui, captured) = capture::ui();
        ui.remark(HOSTILE);
        assert_tame(&captured.talk());
        let (ui, captured) = capture::ui();
        ui.spinner().show(HOSTILE);
        assert_tame(&captured.talk());
        let quoted = crate::wait::Failure {
            message: HOSTILE.to_owned(),
            console: vec![HOSTILE.to_owned()],
            hint: HOSTILE.to_owned(),
            superseded: false,
            others: 0,
            program: None,
        };
        let source = io::Error::other(HOSTILE);
        for error in [
            Error::Failed(quoted),
            Error::Api(mvm_wire::ApiError::new(mvm_wire::ErrorCode::Guest, HOSTILE)),
            Error::Read { what: "x".to_owned(), source },
        ] {
            let (ui, captured) = capture::ui();
            ui.error(&error);
            assert_tame(&captured.talk());
        }
    }

    #[test]
    fn what_an_image_says_stays_in_its_cell() {
        let words = format!("{HOSTILE}\nused by:   nobody");
        let config = mvm_core::image::ImageConfig {
            entrypoint: vec![words.clone()],
            cmd: vec![words.clone()],
            user: words.clone(),
            working_dir: words.clone(),
            stop_signal: Some(words.clone()),
            exposed_ports: [words.clone()].into(),
            init: Some(words.clone()),
            ..Default::default()
        };
        let image = mvm_wire::view::ImageView {
            revision: mvm_core::name::RevisionId::from_digest([1; 8]),
            source: words.clone(),
            bytes: 0,
            built_unix_ms: 0,
            kernel: words.clone(),
            config: config.into(),
            layers: vec![words.clone()],
            used_by: vec![],
            damage: Some(words.clone()),
        };
        let failed = mvm_core::record::BuildState::Failed {
            error: words.clone(),
            at_unix_ms: 0,
            failures: 1,
        };
        let pool = mvm_wire::view::PoolView {
            exposed_ports: [words.clone()].into(),
            publish_problems: vec![words.clone()],
            build: failed,
            ..samples::pool("demo/hello")
        };
        let instance = mvm_wire::view::InstanceView {
            exposed_ports: [words].into(),
            ..samples::instance("demo/hello/i-00000001")
        };
        for text in [
            images::info(&image),
            images::list(std::slice::from_ref(&image)),
            tenants::pool_info(&pool),
            instances::info(&instance, 0),
        ] {
            assert!(!text.contains("\nused by:   nobody"), "{text}");
            let text = printable_text(&text);
            if text.contains('x') && text.contains("[2J") {
                assert_tame(&text);
            }
        }
    }

    #[test]
    fn remarks_are_for_people_only() {
        let (ui, captured) = capture::ui_with(Format::Json);
        ui.remark("x");
        assert_eq!(captured.talk(), "");
    }

    #[test]
    fn a_reader_that_went_away_is_an_error_without_words() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (mut ui, _) = capture::ui();
        ui.data = RefCell::new(Box::new(Closed));
        assert!(ui.text("x").unwrap_err().is_silent());
    }
}
