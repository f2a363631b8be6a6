//! A running guest's wall clock, which follows the host's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_core::guest::{ClockCorrection, Feature, GuestMessage, HostMessage};

use super::error::SessionError;
use super::session::{Session, unexpected};

impl Session {
    /// Compares the guest's wall clock with the host's, and has the guest put it right if that is
    /// necessary; tells what was done. `host_jumped` says that the host's own time has not gone on
    /// evenly. A guest agent that cannot be asked for its clock is told the time in that case.
    ///
    /// # Errors
    /// The guest refused, did not answer in time, or the session is over.
    pub async fn check_clock(
        &self,
        host_jumped: bool,
        limit: Duration,
    ) -> Result<ClockCorrection, SessionError> {
        let correction = match self.need(Feature::Clock) {
            Ok(()) => self.judge_clock(host_jumped, limit).await?,
            Err(_) if host_jumped => ClockCorrection::Step,
            Err(_) => ClockCorrection::None,
        };
        match correction {
            ClockCorrection::None => {}
            ClockCorrection::Slew { by_ns } => {
                let message = HostMessage::SlewClock { by_ns };
                self.request_done("slew clock", message, limit).await?;
            }
            ClockCorrection::Step => {
                self.set_clock(limit).await?;
            }
        }
        Ok(correction)
    }

    async fn judge_clock(
        &self,
        host_jumped: bool,
        limit: Duration,
    ) -> Result<ClockCorrection, SessionError> {
        let sent = unix_ns();
        match self.request("read clock", HostMessage::ReadClock, limit).await? {
            GuestMessage::Clock(reading) => Ok(reading.correction(sent, unix_ns(), host_jumped)),
            other => Err(unexpected("read clock", &other)),
        }
    }
}

/// The host's wall clock in nanoseconds since the Unix epoch.
pub(super) fn unix_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}
