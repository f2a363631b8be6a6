//! The terminal: data on standard output, talk on standard error.
//!
//! Every command prints through [`Ui`], which knows the format that was asked for. The views of the
//! wire are shown as they are with `-o json|yaml`, and as tables for people.

pub(crate) mod disks;
pub(crate) mod images;
pub(crate) mod instances;
pub(crate) mod node;
pub(crate) mod policy;
pub(crate) mod spinner;
pub(crate) mod table;
pub(crate) mod tenants;

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::error::{Color, Error, Result};
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

/// A line that a guest wrote, without what would steer the terminal.
pub(crate) fn printable(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    for c in line.trim_end().chars() {
        match c {
            '\t' => text.push(c),
            c if c.is_control() => text.extend(c.escape_default()),
            c => text.push(c),
        }
    }
    text
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
        let is_person = io::stderr().is_terminal();
        let no_color = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self {
            format,
            color: if is_person && !no_color { Color::Ansi } else { Color::Plain },
            audience: if is_person { Audience::Person } else { Audience::Program },
            data: RefCell::new(Box::new(io::stdout())),
            talk: RefCell::new(Box::new(io::stderr())),
        }
    }

    /// Whether data is printed for people.
    pub(crate) fn is_for_people(&self) -> bool {
        self.format == Format::Table
    }

    /// Prints an error.
    pub(crate) fn error(&self, error: &Error) {
        self.say(&error.report(self.color));
    }

    /// Says a line on standard error. It goes unsaid if nobody can read it.
    pub(crate) fn say(&self, line: &str) {
        let _ = writeln!(self.talk.borrow_mut(), "{line}");
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
            Format::Table => text(),
            Format::Json => serde_json::to_string_pretty(value).map_err(Error::output)?,
            Format::Yaml => serde_saphyr::to_string(value)
                .map_err(|error| Error::output(io::Error::other(error)))?,
        };
        self.text(&text)
    }

    /// Prints text, with a line end if it has none.
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
        let _ = write!(self.talk.borrow_mut(), "{question} [y/N] ");
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

    #[test]
    fn a_guests_line_cannot_steer_the_terminal() {
        assert_eq!(printable("a\tb \u{1b}[2Jc\u{9b}1m\r"), "a\tb \\u{1b}[2Jc\\u{9b}1m");
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
