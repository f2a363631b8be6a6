//! Runs the host's tools to their end: argument lists, never a shell, every exit code checked.

use std::ffi::{OsStr, OsString};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::find;

/// How long a tool may run under [`run`].
const DEFAULT_LIMIT: Duration = Duration::from_secs(300);
/// Lines of a failed tool's messages that its error keeps.
const KEPT_LINES: usize = 8;

/// What a tool that succeeded wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error("`{program}` is not installed")]
    Missing {
        /// The program's name.
        program: String,
    },
    /// The program could not be started, fed or waited for.
    #[error("cannot run `{program}`")]
    Run {
        /// The program's name.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program reported failure.
    #[error("`{program}` failed ({status}): {stderr}")]
    Failed {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its standard error.
        stderr: String,
    },
    /// The program did not end in time and was killed.
    #[error("`{program}` did not end within {} s", limit.as_secs())]
    TimedOut {
        /// The program's name.
        program: String,
        /// The time that it had.
        limit: Duration,
    },
}

/// Runs a program with this standard input; success is exit code 0 within five minutes.
///
/// # Errors
/// The program is missing, failed or did not end in time; it does not run any more.
pub async fn run<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
    stdin: &[u8],
) -> Result<Output, CommandError> {
    run_within(DEFAULT_LIMIT, program, args, stdin).await
}

/// Like [`run`], with a time limit of the caller's.
///
/// # Errors
/// As [`run`].
pub async fn run_within<A: AsRef<OsStr>>(
    limit: Duration,
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
    stdin: &[u8],
) -> Result<Output, CommandError> {
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let program = program.as_ref();
    let name = || program.to_string_lossy().into_owned();
    let run_error = |source| CommandError::Run { program: name(), source };
    let mut child = tokio::process::Command::new(find::program(program))
        .args(&args)
        .env("LC_ALL", "C") // messages end up in errors, which are in English
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => CommandError::Missing { program: name() },
            _ => run_error(source),
        })?;
    let pipe = child.stdin.take();
    let feed = async {
        if let Some(mut pipe) = pipe {
            // A program that ends without reading everything tells why by its exit code.
            match pipe.write_all(stdin).await {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    let work = async { tokio::try_join!(child.wait_with_output(), feed) };
    let Ok(ended) = tokio::time::timeout(limit, work).await else {
        return Err(CommandError::TimedOut { program: name(), limit });
    };
    let (output, ()) = ended.map_err(run_error)?;
    if !output.status.success() {
        let stderr = last_lines(&String::from_utf8_lossy(&output.stderr));
        return Err(CommandError::Failed { program: name(), status: output.status, stderr });
    }
    Ok(Output { stdout: output.stdout, stderr: output.stderr })
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(KEPT_LINES)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn input_larger_than_a_pipe_comes_back() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(run("cat", [""; 0], &input).await.unwrap().stdout, input);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = run("no-such-program-at-all", [""; 0], b"").await.unwrap_err();
        assert_eq!(error.to_string(), "`no-such-program-at-all` is not installed");
    }

    #[tokio::test]
    async fn a_failure_tells_the_code_and_the_last_words_even_if_input_is_left() {
        let args = ["-c", "seq 20 >&2; exit 3"];
        let error = run("sh", args, &[b'x'; 1 << 20]).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("13; 14; 15; 16; 17; 18; 19; 20"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed() {
        let limit = Duration::from_millis(50);
        let error = run_within(limit, "sleep", ["600"], b"").await.unwrap_err();
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
    }
}
