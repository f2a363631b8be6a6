//! The process's own standard streams, for the bytes of a program, a log or a file, which must come out
//! as they are. What mvm itself has to say goes through [`super::Ui`]; `clippy.toml` denies these
//! streams elsewhere.
#![allow(clippy::disallowed_methods)] // this is the place that hands them out

use std::io::{self, IsTerminal};

/// Standard output, to be written at once.
pub(crate) fn stdout() -> io::Stdout {
    io::stdout()
}

/// Standard error, to be written at once.
pub(crate) fn stderr() -> io::Stderr {
    io::stderr()
}

/// Standard output for a task.
pub(crate) fn async_stdout() -> tokio::io::Stdout {
    tokio::io::stdout()
}

/// Standard error for a task.
pub(crate) fn async_stderr() -> tokio::io::Stderr {
    tokio::io::stderr()
}

/// Whether standard output is a terminal.
pub(crate) fn is_stdout_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether standard error is a terminal.
pub(crate) fn is_stderr_terminal() -> bool {
    io::stderr().is_terminal()
}
