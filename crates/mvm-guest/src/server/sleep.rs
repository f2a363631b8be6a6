//! The guest's part in its sleep and wake: its programs' hooks, one run of them at a time.

use std::time::{Duration, Instant, SystemTime};

use mvm_core::guest::{ErrorKind, GuestError, SleepRequest, WakeRequest};

use super::{Server, Stream};
use crate::exec::{Hooks, Last};
use crate::failure::failure;
use crate::machine::Machine;

/// Where a root has the hooks to run before sleep.
const PRE_SLEEP: &str = "etc/mvm/hooks/pre-sleep.d";
/// How long after its hooks a guest may take to be put to sleep, before its disks may be written again.
const FROZEN_LIMIT: Duration = Duration::from_secs(90);
/// Where a root has the hooks to run after a wake.
const POST_WAKE: &str = "etc/mvm/hooks/post-wake.d";

impl Server<'_> {
    /// Runs the hooks before sleep, then has the filesystems write what they hold back.
    pub(super) fn prepare_sleep(
        &mut self,
        id: u32,
        request: SleepRequest,
        now: Instant,
    ) -> Result<(), GuestError> {
        self.check_hooks()?;
        let env = vec![("MVM_EVENT".to_owned(), "pre-sleep".to_owned())];
        // What a borrowed machine holds back is none of the agent's business.
        let last = match &self.machine {
            Machine::Own { .. } => Last::Sync,
            Machine::Borrowed { .. } => Last::Nothing,
        };
        self.start_hooks(id, PRE_SLEEP, env, last, request.hooks_ms, now);
        if last == Last::Sync {
            let hooks = Duration::from_millis(request.hooks_ms);
            self.thaw_by = now.checked_add(hooks.saturating_add(FROZEN_LIMIT));
        }
        Ok(())
    }

    /// Shows programs that the guest was asleep, and runs the hooks after a wake.
    pub(super) fn wake(
        &mut self,
        id: u32,
        request: WakeRequest,
        now: Instant,
    ) -> Result<(), GuestError> {
        self.check_hooks()?;
        self.thaw();
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let unix_ms = since_epoch.unwrap_or_default().as_millis();
        let wakes = self.wakes.as_mut().map_or(0, |wakes| wakes.raise(request.reason, unix_ms));
        let env = [
            ("MVM_EVENT", "post-wake".to_owned()),
            ("MVM_WAKE_REASON", request.reason.to_string()),
            ("MVM_WAKES", wakes.to_string()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).into();
        self.start_hooks(id, POST_WAKE, env, Last::Nothing, request.hooks_ms, now);
        Ok(())
    }

    fn start_hooks(
        &mut self,
        id: u32,
        dir: &str,
        env: Vec<(String, String)>,
        last: Last,
        limit_ms: u64,
        now: Instant,
    ) {
        let dir = self.machine.root().map(|root| root.join(dir));
        let hooks = Hooks::new(dir.as_deref(), env, last, Duration::from_millis(limit_ms), now);
        self.streams.insert(id, Stream::Hooks(Box::new(hooks)));
        // The next turn starts the first one.
        self.waker.wake();
    }

    fn check_hooks(&self) -> Result<(), GuestError> {
        if let Some(reason) = self.machine.root_failure() {
            return Err(failure(ErrorKind::System, format!("the root is not mounted: {reason}")));
        }
        if self.streams.values().any(|stream| matches!(stream, Stream::Hooks(_))) {
            return Err(failure(ErrorKind::Limit, "hooks are being run already"));
        }
        Ok(())
    }
}
