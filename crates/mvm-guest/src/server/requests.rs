//! What a host asks for: each frame of a session, and what it starts or changes.

use std::time::{Duration, Instant};

use mvm_core::frame::{Frame, KIND_LAST_PART, KIND_MESSAGE, KIND_PART, KIND_STDIN};
use mvm_core::guest::{
    ErrorKind, ExecRequest, ForwardTarget, GuestError, GuestMessage, HostMessage, LogSource,
    MAX_PUBLISHED, MAX_STREAMS,
};

use super::{Server, Source, Stream, main_process};
use crate::exec::Exec;
use crate::failure::{failure, invalid};
use crate::forward::Forward;
use crate::health;
use crate::kernel_log::KernelLog;
use crate::machine::Machine;

impl Server<'_> {
    /// Takes a frame of the current session.
    pub(super) fn take_frame(&mut self, frame: Frame, now: Instant) {
        let stream = frame.stream;
        let result = match frame.kind {
            KIND_MESSAGE => self.take_body(stream, &frame.body, now),
            KIND_PART => self.parts.push(stream, &frame.body),
            KIND_LAST_PART => match self.parts.complete(stream, &frame.body) {
                Ok(whole) => self.take_body(stream, &whole, now),
                Err(error) => Err(error),
            },
            KIND_STDIN => self.take_input(stream, frame.body),
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.fail(stream, error);
        }
    }

    fn take_body(&mut self, id: u32, body: &[u8], now: Instant) -> Result<(), GuestError> {
        match serde_json::from_slice(body) {
            Ok(message) => self.take_message(id, message, now),
            Err(error) => Err(invalid(format!("malformed message: {error}"))),
        }
    }

    fn take_message(
        &mut self,
        id: u32,
        message: HostMessage,
        now: Instant,
    ) -> Result<(), GuestError> {
        if let Some(main) = self.main_on(id) {
            let told = main_process::tell(main, id, message);
            // Credit lets more output go.
            self.waker.wake();
            return told;
        }
        let stream = self.streams.get_mut(&id);
        match (message, stream) {
            (HostMessage::Unknown, _) => {
                let text = "the guest agent does not know this message";
                Err(failure(ErrorKind::Unsupported, text))
            }
            (HostMessage::Cancel, _) => {
                self.parts.forget(id);
                if let Some(stream) = self.streams.remove(&id) {
                    self.stop(stream);
                }
                Ok(())
            }
            (HostMessage::Credit { kind, bytes }, Some(Stream::Exec(exec))) => {
                exec.grant(kind, bytes)
            }
            (HostMessage::Credit { kind, bytes }, Some(Stream::Forward(forward))) => {
                forward.grant(kind, bytes)
            }
            (HostMessage::Credit { kind, bytes }, Some(Stream::KernelLog(log))) => {
                log.grant(kind, bytes)
            }
            (HostMessage::Resize(size), Some(Stream::Exec(exec))) => {
                exec.resize(size);
                Ok(())
            }
            (HostMessage::Detach, Some(Stream::Exec(exec))) => {
                exec.detach();
                self.waker.wake();
                Ok(())
            }
            (HostMessage::Signal { signal }, Some(Stream::Exec(exec))) => {
                exec.signal(signal);
                Ok(())
            }
            (HostMessage::Eof { kind }, Some(Stream::Exec(exec))) => {
                exec.end_of(kind);
                Ok(())
            }
            (HostMessage::Eof { kind }, Some(Stream::Forward(forward))) => {
                forward.end_of(kind);
                self.waker.wake();
                Ok(())
            }
            // They may have crossed the stream's last message on the way.
            (
                HostMessage::Credit { .. }
                | HostMessage::Signal { .. }
                | HostMessage::Eof { .. }
                | HostMessage::Resize(_)
                | HostMessage::Detach,
                _,
            ) => Ok(()),
            (_, Some(_)) => Err(invalid(format!("stream {id} is in use"))),
            (_, None) if id == 0 => Err(invalid("stream 0 takes no requests")),
            (request, None) => self.take_request(id, request, now),
        }
    }

    fn take_request(
        &mut self,
        id: u32,
        request: HostMessage,
        now: Instant,
    ) -> Result<(), GuestError> {
        match request {
            HostMessage::Configure(configuration) => {
                self.thaw();
                self.machine.configure(&configuration)?;
                self.surroundings.limit(&configuration.settings.ulimit)?;
                self.ulimit = configuration.settings.ulimit;
                self.is_configured = true;
                self.link(id).message(&GuestMessage::Done);
            }
            HostMessage::Health => {
                let ready = self.is_configured && self.machine.root_failure().is_none();
                let count = |is: fn(&&Stream) -> bool| self.streams.values().filter(is).count();
                let execs = count(|stream| matches!(stream, Stream::Exec(_)));
                let connections = count(|stream| matches!(stream, Stream::Forward(_)));
                let execs = execs + self.detached.len();
                let mut health = health::measure(ready, execs, connections);
                if let Some(wakes) = &self.wakes {
                    wakes.ensure_shown();
                    health.busy = wakes.is_busy();
                }
                self.link(id).message(&GuestMessage::Health(health));
            }
            HostMessage::Exec(request) => self.start_exec(id, &request, now)?,
            HostMessage::Forward(target) => {
                match target {
                    ForwardTarget::Published { .. } => self.check_published()?,
                    _ => self.check_limit()?,
                }
                let is_own = matches!(self.machine, Machine::Own { .. });
                let forward = Forward::open(&target, is_own, now)?;
                self.streams.insert(id, Stream::Forward(Box::new(forward)));
            }
            HostMessage::Logs { source: LogSource::Kernel, follow } => {
                self.check_limit()?;
                self.streams.insert(id, Stream::KernelLog(KernelLog::open(follow)?));
                self.handle(Source::KernelLog(id), now);
            }
            HostMessage::Logs { source: LogSource::Unknown, .. } => {
                let text = "the guest agent does not know this log";
                return Err(failure(ErrorKind::Unsupported, text));
            }
            HostMessage::Main(request) => self.attach_to_main(id, &request)?,
            HostMessage::SetClock { unix_ns } => {
                self.machine.set_clock(unix_ns)?;
                self.link(id).message(&GuestMessage::Done);
            }
            HostMessage::ReadClock => {
                self.link(id).message(&GuestMessage::Clock(self.machine.read_clock()));
            }
            HostMessage::SlewClock { by_ns } => {
                self.machine.slew_clock(by_ns)?;
                self.link(id).message(&GuestMessage::Done);
            }
            HostMessage::PrepareSleep(request) => self.prepare_sleep(id, request, now)?,
            HostMessage::Woken(request) => self.wake(id, request, now)?,
            HostMessage::Shutdown { grace_ms } => {
                self.link(id).message(&GuestMessage::Done);
                self.begin_shutdown(Duration::from_millis(grace_ms), now);
            }
            HostMessage::Signal { .. }
            | HostMessage::Eof { .. }
            | HostMessage::Credit { .. }
            | HostMessage::Resize(_)
            | HostMessage::Detach
            | HostMessage::Cancel
            | HostMessage::Unknown => {}
        }
        Ok(())
    }

    fn start_exec(
        &mut self,
        id: u32,
        request: &ExecRequest,
        now: Instant,
    ) -> Result<(), GuestError> {
        self.check_limit()?;
        if let Some(reason) = self.machine.root_failure() {
            return Err(failure(ErrorKind::System, format!("the root is not mounted: {reason}")));
        }
        self.streams
            .insert(id, Stream::Exec(Box::new(Exec::start(request, &self.surroundings, now)?)));
        Ok(())
    }

    fn check_limit(&self) -> Result<(), GuestError> {
        if self.streams.len() + self.detached.len() < MAX_STREAMS {
            return Ok(());
        }
        Err(failure(ErrorKind::Limit, format!("{MAX_STREAMS} streams are open already")))
    }

    /// Strangers leave room for everything else.
    fn check_published(&self) -> Result<(), GuestError> {
        let is_published =
            |stream: &&Stream| matches!(stream, Stream::Forward(it) if it.is_published());
        if self.streams.values().filter(is_published).count() < MAX_PUBLISHED {
            return Ok(());
        }
        let text = format!("{MAX_PUBLISHED} connections to published ports are open already");
        Err(failure(ErrorKind::Limit, text))
    }
}
