//! A guest's part in its sleep and wake.

use std::time::{Duration, Instant};

use mvm_core::guest::{
    Feature, GuestMessage, HookReport, HostMessage, SleepRequest, WakeReason, WakeRequest,
};

use super::clock::unix_ns;
use super::error::SessionError;
use super::session::{Session, unexpected};

/// How late a guest may hear of the time.
const CLOCK_LATE: Duration = Duration::from_millis(20);
/// How often it is told at most.
const CLOCK_ATTEMPTS: u32 = 8;

impl Session {
    /// Prepares the guest for sleep: its hooks run, for `hooks` altogether, and its filesystems
    /// write what they hold back. A hook that fails is in the report and no error. If the answer
    /// does not come within `limit`, what runs in the guest for it is ended.
    ///
    /// # Errors
    /// The guest agent is older than sleep, refused, did not answer in time, or the session is
    /// over.
    pub async fn prepare_sleep(
        &self,
        hooks: Duration,
        limit: Duration,
    ) -> Result<HookReport, SessionError> {
        let request = HostMessage::PrepareSleep(SleepRequest { hooks_ms: millis(hooks) });
        self.request_hooks("prepare sleep", request, limit).await
    }

    /// Tells a guest that was configured after its sleep that it is awake: programs see it, and
    /// its hooks run, for `hooks` altogether.
    ///
    /// # Errors
    /// As for [`Session::prepare_sleep`].
    pub async fn woken(
        &self,
        reason: WakeReason,
        hooks: Duration,
        limit: Duration,
    ) -> Result<HookReport, SessionError> {
        let request = HostMessage::Woken(WakeRequest { hooks_ms: millis(hooks), reason });
        self.request_hooks("woken", request, limit).await
    }

    /// Steps the guest's wall clock to the host's. A guest that has just been woken, or whose host
    /// is busy, may hear of the time late, so this is done again until it was quick; the result is
    /// how far the clock may be off.
    ///
    /// # Errors
    /// As for [`Session::prepare_sleep`].
    pub async fn set_clock(&self, limit: Duration) -> Result<Duration, SessionError> {
        self.need(Feature::Sleep)?;
        let mut attempts = CLOCK_ATTEMPTS;
        loop {
            let sent = Instant::now();
            let message = HostMessage::SetClock { unix_ns: unix_ns() };
            self.request_done("set clock", message, limit).await?;
            let late = sent.elapsed();
            attempts -= 1;
            if late <= CLOCK_LATE || attempts == 0 {
                return Ok(late);
            }
        }
    }

    async fn request_hooks(
        &self,
        name: &'static str,
        request: HostMessage,
        limit: Duration,
    ) -> Result<HookReport, SessionError> {
        self.need(Feature::Sleep)?;
        match self.request(name, request, limit).await? {
            GuestMessage::Hooks(report) => Ok(report),
            other => Err(unexpected(name, &other)),
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
