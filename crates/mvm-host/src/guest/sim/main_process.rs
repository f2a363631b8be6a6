//! The main process of a simulated guest: it belongs to the boot, not to a connection.

use mvm_core::credit::{ReceiveWindow, SendWindow};
use mvm_core::guest::{ErrorKind, ExecRequest, ExitStatus, GuestError, MainRequest, MainState};
use tokio::time::Instant;

use super::SimGuest;
use super::programs::{Program, find};

/// The main process of a boot.
#[derive(Debug)]
pub(super) struct SimMain {
    pid: u32,
    program: Program,
    /// Everything that it wrote to its standard output.
    output: Vec<u8>,
    wakes: Option<Instant>,
    /// The signal that asks it to end.
    stop_signal: i32,
    status: Option<ExitStatus>,
}

/// A connection's view of it.
#[derive(Debug)]
pub(super) struct MainStream {
    sent: usize,
    pub(super) window: SendWindow,
    pub(super) stdin: ReceiveWindow,
}

impl SimGuest {
    /// Starts the main process unless that was done before, and attaches to it.
    pub(super) fn attach(
        &self,
        request: &MainRequest,
        now: Instant,
    ) -> Result<(MainState, MainStream), GuestError> {
        let Some(wanted) = &request.program else {
            let message = "a simulated guest has no init".into();
            return Err(GuestError { kind: ErrorKind::Invalid, message });
        };
        if self.state().main.is_none() {
            let argv = wanted.argv.clone();
            let exec = ExecRequest { argv, stdin: wanted.stdin, ..ExecRequest::default() };
            let (program, pid) = (find(&exec, self)?, self.next_pid());
            let main = SimMain::start(program, pid, wanted.stop_signal, now);
            self.state().main = Some(main);
        }
        let state = self.state();
        let (pid, len) = state.main.as_ref().map_or((0, 0), |main| (main.pid, main.output.len()));
        let sent = usize::try_from(request.stdout_from).unwrap_or(len).min(len);
        let answer = MainState { pid, stdout: sent as u64, stderr: 0 };
        let stream =
            MainStream { sent, window: SendWindow::default(), stdin: ReceiveWindow::default() };
        Ok((answer, stream))
    }

    /// Lets the main process do something.
    pub(super) fn with_main<T>(&self, act: impl FnOnce(&mut SimMain) -> T) -> Option<T> {
        self.state().main.as_mut().map(act)
    }
}

impl SimMain {
    fn start(program: Program, pid: u32, stop_signal: i32, now: Instant) -> Self {
        let (output, status, wakes) = match &program {
            Program::Print { stdout, code } => {
                (stdout.clone().into_bytes(), Some(ExitStatus::Exited { code: *code }), None)
            }
            Program::Sleep(time) => (Vec::new(), None, now.checked_add(*time)),
            Program::Cat => (Vec::new(), None, None),
        };
        Self { pid, program, output, wakes, stop_signal, status }
    }

    /// Takes standard input.
    pub(super) fn input(&mut self, data: &[u8]) {
        if self.program == Program::Cat && self.status.is_none() {
            self.output.extend_from_slice(data);
        }
    }

    /// Notes that standard input has ended.
    pub(super) fn end_input(&mut self) {
        if self.program == Program::Cat {
            self.status.get_or_insert(ExitStatus::Exited { code: 0 });
        }
    }

    /// Ends by a signal, unless it has ended.
    pub(super) fn signal(&mut self, signal: i32) {
        self.status.get_or_insert(ExitStatus::Signaled { signal, out_of_memory: false });
    }

    /// Sends it its stop signal, unless it has ended.
    pub(super) fn ask_to_end(&mut self) {
        self.signal(self.stop_signal);
    }

    /// What is to be sent next, and the end once that is all.
    pub(super) fn advance(
        &mut self,
        stream: &mut MainStream,
        longest: usize,
        now: Instant,
    ) -> (Vec<u8>, Option<ExitStatus>) {
        if self.wakes.is_some_and(|wakes| wakes <= now) {
            self.status.get_or_insert(ExitStatus::Exited { code: 0 });
        }
        let rest = self.output.get(stream.sent..).unwrap_or_default();
        let piece = rest[..stream.window.take(rest.len().min(longest))].to_vec();
        stream.sent += piece.len();
        let status = self.status.filter(|_| stream.sent == self.output.len());
        (piece, status)
    }

    /// When it has something to do by itself.
    pub(super) fn alarm(&self) -> Option<Instant> {
        self.wakes.filter(|_| self.status.is_none())
    }
}
