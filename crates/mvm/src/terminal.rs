//! The person's terminal: raw while a program in a guest has it, and always given back.

use std::io;
use std::os::fd::BorrowedFd;

use mvm_core::guest::TerminalSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The standard input's terminal in raw mode: every key is a byte for the program. Dropping it
/// gives the terminal back as it was, also when the command fails, panics or is told to end.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes the terminal raw; `None` if standard input is none.
    ///
    /// # Errors
    /// The terminal refuses.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let terminal = Self { before: tcgetattr(stdin())? };
        terminal.make_raw()?;
        Ok(Some(terminal))
    }

    /// Makes the terminal raw again, after whoever stopped and continued this command has used it.
    ///
    /// # Errors
    /// The terminal refuses.
    pub(crate) fn make_raw(&self) -> io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        Ok(tcsetattr(stdin(), OptionalActions::Drain, &raw)?)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode. What was typed and not read is for who comes next.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Whether standard input is a terminal.
pub(crate) fn is_present() -> bool {
    isatty(stdin())
}

/// The terminal's size now; unknown (0) if it has none.
pub(crate) fn size() -> TerminalSize {
    tcgetwinsize(stdin()).map_or_else(
        |_| TerminalSize::default(),
        |size| TerminalSize { rows: size.ws_row, columns: size.ws_col },
    )
}

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}
