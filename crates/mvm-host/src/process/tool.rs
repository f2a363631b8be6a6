//! Runs the host's tools to their end: argument lists, never a shell, every exit code checked.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use super::find;
use super::starting::starting;

/// Lines of a failed tool's output that its error keeps.
const KEPT_LINES: usize = 8;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program is not installed.
    #[error("`{program}` is not installed: `mvm bootstrap` installs what is missing")]
    Missing {
        /// The program's name.
        program: String,
    },
    /// The program could not be started or waited for.
    #[error("cannot run `{program}`")]
    Spawn {
        /// The program's name.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program reported failure.
    #[error("`{program}` failed ({status}): {output}")]
    Failed {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it wrote to its standard error, or else to its standard output.
        output: String,
    },
    /// The program did not end in time and was ended.
    #[error("`{program}` did not end within {} s", limit.as_secs())]
    TimedOut {
        /// The program's name.
        program: String,
        /// The time that it had.
        limit: Duration,
    },
}

impl ToolError {
    /// Whether the tool failed because a filesystem was full.
    pub(crate) fn is_no_space(&self) -> bool {
        match self {
            Self::Failed { output, .. } => output.contains("No space left on device"),
            Self::Spawn { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            Self::Missing { .. } | Self::TimedOut { .. } => false,
        }
    }
}

/// One invocation of a program.
pub(crate) struct Tool {
    program: OsString,
    command: tokio::process::Command,
    limit: Option<Duration>,
}

impl Tool {
    /// A program found in `PATH` or given by its path. Its messages are in English and it reads
    /// no input; it is ended if its caller goes away.
    #[allow(clippy::disallowed_methods)] // this is the place that starts tools
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref().to_owned();
        let mut command = tokio::process::Command::new(find::program(&program));
        command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
        Self { program, command, limit: None }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Ends the program if it runs longer.
    pub(crate) fn within(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Runs to the end and returns the standard output.
    pub(crate) async fn run(self) -> Result<String, ToolError> {
        self.run_with(|_| ()).await
    }

    /// Like [`Self::run`], with each line of the standard output passed on as it comes.
    pub(crate) async fn run_with(self, on_line: impl FnMut(&str)) -> Result<String, ToolError> {
        let program = self.program.to_string_lossy().into_owned();
        let (status, stdout, stderr) = self.finish(on_line).await?;
        if status.success() {
            return Ok(stdout);
        }
        let told = if stderr.trim().is_empty() { &stdout } else { &stderr };
        Err(ToolError::Failed { program, status, output: last_lines(told) })
    }

    /// The first line that the program prints. Some programs print their version and then fail,
    /// so here alone the exit code does not count.
    pub(crate) async fn first_line(self) -> Result<String, ToolError> {
        let (_, stdout, _) = self.finish(|_| ()).await?;
        Ok(stdout.lines().next().unwrap_or_default().trim().to_owned())
    }

    async fn finish(
        mut self,
        on_line: impl FnMut(&str),
    ) -> Result<(ExitStatus, String, String), ToolError> {
        let program = self.program.to_string_lossy().into_owned();
        let spawn_error = |source| ToolError::Spawn { program: program.clone(), source };
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            starting(|| self.command.spawn()).map_err(|source| match source.kind() {
                std::io::ErrorKind::NotFound => ToolError::Missing { program: program.clone() },
                _ => spawn_error(source),
            })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let work =
            async { tokio::join!(lines(stdout, on_line), lines(stderr, |_| ()), child.wait()) };
        let ended = match self.limit {
            None => Some(work.await),
            Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        };
        // A child that is dropped before its end is killed and reaped.
        let Some((stdout, stderr, status)) = ended else {
            let limit = self.limit.unwrap_or_default();
            return Err(ToolError::TimedOut { program: program.clone(), limit });
        };
        let status = status.map_err(spawn_error)?;
        Ok((status, stdout.map_err(spawn_error)?, stderr.map_err(spawn_error)?))
    }
}

async fn lines(
    pipe: Option<impl AsyncRead + Unpin>,
    mut on_line: impl FnMut(&str),
) -> std::io::Result<String> {
    let mut text = String::new();
    let Some(pipe) = pipe else { return Ok(text) };
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).await? > 0 {
        let decoded = String::from_utf8_lossy(&line);
        on_line(decoded.trim_end());
        text.push_str(&decoded);
        line.clear();
    }
    Ok(text)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(KEPT_LINES)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Tool::new("no-such-program-at-all").run().await.unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("`no-such-program-at-all` is not installed: `mvm "), "{error}");
    }

    #[tokio::test]
    async fn a_failure_keeps_the_last_words() {
        let error = Tool::new("ls").arg("/no/such/directory").run().await.unwrap_err();
        assert!(error.to_string().contains("/no/such/directory"), "{error}");
        assert!(error.to_string().contains("exit status: 2"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_takes_too_long_is_ended() {
        let tool = Tool::new("sleep").arg("600").within(Duration::from_millis(50));
        let error = tool.run().await.unwrap_err();
        assert!(matches!(error, ToolError::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn lines_are_passed_on_in_order() {
        let mut seen = Vec::new();
        let all = Tool::new("printf").arg("a\nb\nc").run_with(|l| seen.push(l.to_owned())).await;
        assert_eq!(all.unwrap(), "a\nb\nc");
        assert_eq!(seen, ["a", "b", "c"]);
    }
}
