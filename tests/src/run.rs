//! Commands with a time limit, whose output is kept.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long an output may stay open after its program ended.
const HANG_UP_LIMIT: Duration = Duration::from_secs(5);
/// How often a program is looked at.
const POLL: Duration = Duration::from_millis(5);

/// What a command printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The exit code, or 128 + the signal.
    pub code: i32,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, stdout, stderr, code } = self;
        write!(f, "`{command}` ended with {code}\n── stdout\n{stdout}\n── stderr\n{stderr}")
    }
}

impl Output {
    /// The same, if the command succeeded.
    ///
    /// # Panics
    /// It failed.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.fails_with(0)
    }

    /// The same, if the command ended with this code.
    ///
    /// # Panics
    /// It ended with another.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> Self {
        assert!(self.code == code, "expected {code}: {self}");
        assert!(!self.stderr.contains("panicked at"), "it panicked: {self}");
        self
    }

    /// The same, if standard error says all of this.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "standard error lacks `{part}`: {self}");
        }
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// It is not JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("not JSON ({error}): {self}"),
        }
    }
}

/// A command that runs. It is killed when dropped.
pub struct Running {
    command: String,
    child: Child,
    stdout: Reader,
    stderr: Reader,
}

impl Running {
    /// Starts a command with this standard input.
    ///
    /// # Panics
    /// It does not start.
    #[track_caller]
    pub fn start(mut command: Command, stdin: Option<&[u8]>) -> Self {
        let name: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let name = name.join(" ");
        command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("`{name}` does not start: {error}"));
        if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), stdin.map(<[u8]>::to_vec)) {
            // A program that does not read it all is no failure of the test.
            std::thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        let stdout = Reader::start(child.stdout.take());
        let stderr = Reader::start(child.stderr.take());
        Self { command: name, child, stdout, stderr }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal; one that has ended stays as it is.
    pub fn signal(&mut self, signal: Signal) {
        if matches!(self.child.try_wait(), Ok(None))
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// What it has printed so far on standard output.
    pub fn stdout_so_far(&self) -> String {
        self.stdout.text()
    }

    /// What it has printed so far on standard error.
    pub fn stderr_so_far(&self) -> String {
        self.stderr.text()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// It does not end within the limit (it is killed then), or it leaves its output open to a
    /// program that goes on.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Output {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let output = self.output(-1);
                panic!("not done within {} s: {output}", limit.as_secs());
            }
            std::thread::sleep(POLL);
        };
        let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        let deadline = Instant::now() + HANG_UP_LIMIT;
        while !(self.stdout.is_done() && self.stderr.is_done()) {
            if Instant::now() >= deadline {
                let output = self.output(code);
                panic!("a program that goes on holds its output open: {output}");
            }
            std::thread::sleep(POLL);
        }
        self.output(code)
    }

    fn output(&self, code: i32) -> Output {
        let command = self.command.clone();
        Output { command, stdout: self.stdout.text(), stderr: self.stderr.text(), code }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Reads a pipe to its end on a thread.
struct Reader {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Reader {
    fn start(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let ours = Arc::clone(&bytes);
        let thread = std::thread::spawn(move || {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = [0; 8192];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if let Ok(mut bytes) = ours.lock() {
                    bytes.extend_from_slice(&buffer[..count]);
                }
            }
        });
        Self { bytes, thread }
    }

    fn is_done(&self) -> bool {
        self.thread.is_finished()
    }

    fn text(&self) -> String {
        let bytes = self.bytes.lock().map(|bytes| bytes.clone()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Runs a tool of the host to its end.
///
/// # Panics
/// It does not start, or does not end within a minute.
#[track_caller]
pub fn tool(program: &str, args: &[&str]) -> Output {
    tool_within(Duration::from_secs(60), program, args)
}

/// Runs a tool of the host that takes its time to its end.
///
/// # Panics
/// It does not start, or does not end within the limit.
#[track_caller]
pub fn tool_within(limit: Duration, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args);
    Running::start(command, None).wait(limit)
}
