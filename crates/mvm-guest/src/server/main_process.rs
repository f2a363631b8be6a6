//! The server and the main process, which is bound to no session and has no stream of its own.

use std::time::{Duration, Instant};

use mvm_core::guest::{ErrorKind, GuestError, GuestMessage, HostMessage, MainRequest, MainState};

use super::{Ending, Server, Stream};
use crate::exec::MainProcess;
use crate::failure::{failure, invalid};
use crate::session::Link;

impl Server<'_> {
    /// No host listens to the main process any more.
    pub(super) fn detach_main(&mut self) {
        if let Some(Ok(main)) = &mut self.main {
            main.detach();
        }
    }

    /// There is no host any more.
    pub(super) fn abandon_main(&mut self) {
        if let Some(Ok(main)) = &mut self.main {
            main.abandon();
        }
    }

    /// The main process, if the host listens to it on this stream.
    pub(super) fn main_on(&mut self, stream: u32) -> Option<&mut MainProcess> {
        self.main.as_mut()?.as_mut().ok().filter(|main| main.is_on(stream))
    }

    /// Data for a standard input; for a stream that has ended it is dropped.
    pub(super) fn take_input(&mut self, stream: u32, data: Vec<u8>) -> Result<(), GuestError> {
        let outbox = self.outbox.clone();
        let link = Link { outbox: &outbox, stream };
        if let Some(main) = self.main_on(stream) {
            return main.input(data, link);
        }
        match self.streams.get_mut(&stream) {
            Some(Stream::Exec(exec)) => exec.input(data, link),
            Some(Stream::Forward(forward)) => forward.input(data, link),
            _ => Ok(()),
        }
    }

    /// Starts the main process unless that was tried in this boot, and attaches the host to it.
    pub(super) fn attach_to_main(
        &mut self,
        id: u32,
        request: &MainRequest,
    ) -> Result<(), GuestError> {
        if let Some(reason) = self.machine.root_failure() {
            return Err(failure(ErrorKind::System, format!("the root is not mounted: {reason}")));
        }
        let Some(program) = &request.program else {
            self.machine.start_init(request.init_program.as_ref(), &self.ulimit)?;
            let init = MainState { pid: 1, ..MainState::default() };
            self.link(id).message(&GuestMessage::Main(init));
            return Ok(());
        };
        if self.main.is_none() {
            self.main = Some(MainProcess::start(program, &mut self.surroundings));
        }
        let Some(main) = &mut self.main else { return Ok(()) };
        match main {
            Ok(main) => main.attach(id, [request.stdout_from, request.stderr_from]),
            Err(error) => return Err(error.clone()),
        }
        self.waker.wake();
        Ok(())
    }

    /// Asks the main process to end; the machine follows when it has, or when its time is over.
    pub(super) fn begin_shutdown(&mut self, grace: Duration, now: Instant) {
        if let Some(Ok(main)) = &self.main {
            main.ask_to_end();
        }
        self.stop_by = now.checked_add(grace).or(Some(now));
        self.waker.wake();
    }

    /// Sends what the main process has to say, and ends the service once that is over and a
    /// shutdown was asked for.
    pub(super) fn settle_main(&mut self, now: Instant) {
        if let Some(Ok(main)) = &mut self.main {
            main.settle(&self.outbox, now);
        }
        let is_over = !matches!(&self.main, Some(Ok(main)) if !main.is_over());
        if let Some(stop_by) = self.stop_by.filter(|stop_by| is_over || *stop_by <= now) {
            let grace = stop_by.saturating_duration_since(now);
            self.ending.get_or_insert(Ending::Shutdown { grace });
        }
    }
}

/// What the host says on the stream on which it listens to the main process.
pub(super) fn tell(
    main: &mut MainProcess,
    id: u32,
    message: HostMessage,
) -> Result<(), GuestError> {
    match message {
        HostMessage::Unknown => {
            let text = "the guest agent does not know this message";
            return Err(failure(ErrorKind::Unsupported, text));
        }
        HostMessage::Credit { kind, bytes } => return main.grant(kind, bytes),
        HostMessage::Signal { signal } => main.signal(signal),
        HostMessage::Eof { kind } => main.end_of(kind),
        HostMessage::Resize(size) => main.resize(size),
        HostMessage::Cancel => main.detach(),
        _ => return Err(invalid(format!("stream {id} is in use"))),
    }
    Ok(())
}
