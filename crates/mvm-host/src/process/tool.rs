//! Runs the host's tools to their end: argument lists, never a shell, every exit code checked.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use super::starting::starting;
use super::{contained, find};

/// Lines of a failed tool's output that its error keeps.
const KEPT_LINES: usize = 8;

/// How often, and how far apart, a program is started that somebody seems to be writing.
const BUSY_ATTEMPTS: u32 = 200;
const BUSY_PAUSE: Duration = Duration::from_millis(5);

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
    is_contained: bool,
}

impl Tool {
    /// A program found in `PATH` or given by its path. Its messages are in English and it reads
    /// no input; it is ended if its caller goes away.
    #[allow(clippy::disallowed_methods)] // this is the place that starts tools
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref().to_owned();
        let mut command = tokio::process::Command::new(find::program(&program));
        command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
        Self { program, command, limit: None, is_contained: false }
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

    /// For a tool that mounts filesystems or starts programs of its own: it has a mount and a PID
    /// namespace of its own, and nothing of it is left once it ends, is given up, or has lost its
    /// caller, however that ended. Only root can run it.
    pub(crate) fn contained(mut self) -> Self {
        self.is_contained = true;
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

    /// Starts it. A program that was just written may still be open in a process that another thread is
    /// starting: until that one is its own program, it has copies of all that was open.
    async fn start(&mut self) -> std::io::Result<tokio::process::Child> {
        let mut attempts = 1;
        loop {
            match starting(|| self.command.spawn()) {
                Err(error)
                    if error.kind() == std::io::ErrorKind::ExecutableFileBusy
                        && attempts < BUSY_ATTEMPTS =>
                {
                    attempts += 1;
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                started => return started,
            }
        }
    }

    async fn finish(
        mut self,
        on_line: impl FnMut(&str),
    ) -> Result<(ExitStatus, String, String), ToolError> {
        let program = self.program.to_string_lossy().into_owned();
        let spawn_error = |source| ToolError::Spawn { program: program.clone(), source };
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // Declared before what waits for it, so that it is still a child when that ends it.
        let mut child;
        let mut keeper = None;
        let started = match self.is_contained {
            true => contained::spawn(self.command).map(|(child, it)| {
                keeper = Some(it);
                child
            }),
            false => self.start().await,
        };
        child = started.map_err(|source| match source.kind() {
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
        let mut status = status.map_err(spawn_error)?;
        if keeper.is_some() {
            status = contained::tools_status(status);
        }
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
    async fn a_program_that_somebody_still_has_open_is_started_once_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::copy("/bin/true", &program).unwrap();
        let writer = std::fs::File::options().write(true).open(&program).unwrap();
        let run = Tool::new(&program).run();
        // It has failed to start by the time that the other half is looked at.
        let (ended, ()) = tokio::join!(biased; run, async { drop(writer) });
        ended.unwrap();
    }

    /// What a contained tool leaves behind, looked for from outside.
    struct Outside {
        dir: tempfile::TempDir,
        /// An argument that no other process has.
        mark: String,
    }

    impl Outside {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("mnt")).unwrap();
            std::fs::create_dir(dir.path().join("shm")).unwrap();
            std::fs::write(dir.path().join("shm/canary"), "x").unwrap();
            static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Self { mark: format!("{}{:04}", std::process::id(), 1000 + count), dir }
        }

        /// Mounts, and starts a child in a session of its own that nothing but SIGKILL ends.
        fn script(&self, end: &str) -> String {
            let (dir, mark) = (self.dir.path().display(), &self.mark);
            format!(
                "mount -t tmpfs none {dir}/mnt; mkdir {dir}/mnt/shm; \
                 mount --bind {dir}/shm {dir}/mnt/shm; \
                 setsid sh -c 'trap \"\" TERM HUP INT; sleep {mark} & echo ready; wait' & \
                 {end}"
            )
        }

        fn tool(&self, end: &str) -> Tool {
            Tool::new("sh").args(["-c", &self.script(end)]).contained()
        }

        fn processes(&self) -> usize {
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let words = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
            words
                .filter(|words| words.split(|b| *b == 0).any(|w| w == self.mark.as_bytes()))
                .count()
        }

        fn assert_clean(self) {
            assert_eq!(self.processes(), 0, "processes are left");
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(&self.dir.path().display().to_string()), "{mounts}");
            assert!(self.dir.path().join("shm/canary").exists());
            assert_eq!(std::fs::read_dir(self.dir.path().join("mnt")).unwrap().count(), 0);
        }
    }

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[tokio::test]
    async fn a_contained_tool_that_is_given_up_leaves_nothing() {
        if !is_root() {
            return;
        }
        let outside = Outside::new();
        let (ready, mut is_ready) = tokio::sync::mpsc::channel(1);
        let tool = outside.tool("wait");
        let work = tool.run_with(move |line| {
            let _ = ready.try_send(line == "ready");
        });
        tokio::select! {
            ended = work => panic!("it has ended: {ended:?}"),
            ready = is_ready.recv() => assert_eq!(ready, Some(true)),
        }
        outside.assert_clean();
    }

    #[tokio::test]
    async fn a_contained_tool_that_ends_fails_or_is_killed_leaves_nothing() {
        if !is_root() {
            return;
        }
        for (end, status) in [
            ("echo told", Ok("told")),
            ("exit 7", Err("exit status: 7")),
            ("kill -9 $$", Err("signal: 9")),
        ] {
            let outside = Outside::new();
            // It does not wait for the child's pipe, which outlives the tool.
            let script = outside.script(end).replace("& echo ready;", ">/dev/null 2>&1 & ");
            let ended = Tool::new("sh").args(["-c", &script]).contained().run().await;
            match (ended, status) {
                (Ok(output), Ok(expected)) => assert_eq!(output.trim(), expected),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().contains(expected), "{error}");
                }
                (ended, expected) => panic!("{ended:?} instead of {expected:?}"),
            }
            outside.assert_clean();
        }
    }

    #[tokio::test]
    async fn a_contained_tool_is_known_to_itself_and_cannot_be_missing() {
        if !is_root() {
            return;
        }
        let script = "test /proc/$$ -ef /proc/self && echo $$; trap - CHLD; kill -l | head -n1";
        let output = Tool::new("sh").args(["-c", script]).contained().run().await.unwrap();
        assert!(output.starts_with('2'), "the second process of its namespace: {output}");
        let missing = Tool::new("/no/such/program").contained().run().await.unwrap_err();
        assert!(matches!(missing, ToolError::Missing { .. }), "{missing}");
    }

    /// The agent of the next test.
    #[tokio::test]
    #[ignore = "it is run by another test"]
    async fn an_agent_that_is_killed() {
        let script = std::env::var("MVM_TEST_SCRIPT").unwrap();
        let tool = Tool::new("sh").args(["-c", &script]).contained();
        drop(tool.run_with(|line| assert!(std::fs::write("ready", line).is_ok())).await);
    }

    #[tokio::test]
    async fn a_contained_tool_whose_agent_is_killed_leaves_nothing() {
        if !is_root() {
            return;
        }
        let outside = Outside::new();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let wait_for = |is_so: &dyn Fn() -> bool| {
            while !is_so() {
                assert!(std::time::Instant::now() < deadline, "it takes too long");
                std::thread::yield_now();
            }
        };
        let mut agent = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "process::tool::tests::an_agent_that_is_killed"])
            .env("MVM_TEST_SCRIPT", outside.script("wait"))
            .current_dir(outside.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let ready = outside.dir.path().join("ready");
        wait_for(&|| ready.exists());
        wait_for(&|| outside.processes() != 0);
        agent.kill().unwrap();
        agent.wait().unwrap();
        wait_for(&|| outside.processes() == 0);
        outside.assert_clean();
    }

    #[tokio::test]
    async fn lines_are_passed_on_in_order() {
        let mut seen = Vec::new();
        let all = Tool::new("printf").arg("a\nb\nc").run_with(|l| seen.push(l.to_owned())).await;
        assert_eq!(all.unwrap(), "a\nb\nc");
        assert_eq!(seen, ["a", "b", "c"]);
    }
}
