//! A VMM that was started and has yet to prove itself. Every driver's launch goes through it.

use std::time::Duration;

use super::{VmSpec, VmmError};
use crate::console;
use crate::process::Process;
use crate::state_dir::InstanceDir;

/// Lines of the VMM's own messages that an error keeps.
const LOG_LINES: usize = 10;
/// How long a VMM that has hung up may take to end.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// A VMM that is ended when this is dropped, unless it succeeds.
#[derive(Debug)]
pub(super) struct Starting(Option<Process>);

impl Starting {
    pub(super) fn new(process: Process) -> Self {
        Self(Some(process))
    }

    /// The process, for as long as it has not succeeded.
    pub(super) fn process(&self) -> Result<&Process, VmmError> {
        self.0.as_ref().ok_or_else(died_unheard)
    }

    /// Lets it run on.
    pub(super) fn succeed(mut self) -> Result<Process, VmmError> {
        self.0.take().ok_or_else(died_unheard)
    }
}

fn died_unheard() -> VmmError {
    VmmError::DiedAtStart { log: String::new() }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            process.kill_now();
        }
    }
}

/// Waits for `work`; if the VMM ends meanwhile, what it said is the error.
pub(super) async fn or_last_words<T>(
    process: &Process,
    spec: &VmSpec,
    work: impl Future<Output = Result<T, VmmError>>,
) -> Result<T, VmmError> {
    let done = tokio::select! {
        biased;
        _ = process.wait() => return Err(VmmError::DiedAtStart { log: last_words(&spec.dir) }),
        done = work => done,
    };
    let error = match done {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    // A VMM that gives up hangs up first: what it says then is worth more than that it did.
    match tokio::time::timeout(LAST_WORDS_LIMIT, process.wait()).await {
        Ok(_) => Err(VmmError::DiedAtStart { log: last_words(&spec.dir) }),
        Err(_) => Err(error),
    }
}

fn last_words(dir: &InstanceDir) -> String {
    match console::tail(&dir.vmm_log(), LOG_LINES) {
        Ok(lines) if lines.is_empty() => "it said nothing".to_owned(),
        Ok(lines) => lines.join("; "),
        Err(error) => format!("its log cannot be read: {error}"),
    }
}
