//! Serves the protocol: one thread that owns every stream, and waits in one `poll` for all of them.

mod main_process;
mod requests;
mod sleep;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mvm_core::accept::{self, Accepted};
use mvm_core::guest::{ExitStatus, Feature, GuestError, GuestMessage, Hello, Parts, Preamble};
use mvm_core::settings::Ulimit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::console::note;
use crate::exec::{Exec, Hooks, MainProcess, Pipe, Surroundings};
use crate::failure::invalid;
use crate::forward::{End, Forward};
use crate::kernel_log::{self, KernelLog};
use crate::machine::{Machine, Wakes};
use crate::process::{self, ChildEnds};
use crate::session::{Event, Inbox, Link, Outbox, Port, Waker};

/// Events handled before the pipes get their turn.
const EVENTS_AT_ONCE: usize = 64;
/// How long a host may take to read the last answers.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The byte stream ended for good.
    Closed,
    /// The host asked for a shutdown.
    Shutdown {
        /// Time between SIGTERM and SIGKILL.
        grace: Duration,
    },
}

/// What runs for a stream.
#[derive(Debug)]
enum Stream {
    Exec(Box<Exec>),
    Forward(Box<Forward>),
    KernelLog(KernelLog),
    Hooks(Box<Hooks>),
}

/// What a ready descriptor belongs to.
#[derive(Debug, Clone, Copy)]
enum Source {
    Waker,
    ChildEnds,
    /// The wall clock, which was set.
    Clock,
    Exec(u32, Pipe),
    Main(Pipe),
    /// Of a program that runs without the host, by its process id.
    Detached(i32, Pipe),
    Forward(u32, End),
    KernelLog(u32),
    Hooks(u32, Pipe),
}

/// The agent's state while it serves.
#[derive(Debug)]
pub(crate) struct Server<'a> {
    machine: &'a mut Machine,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    waker: Arc<Waker>,
    children: ChildEnds,
    streams: BTreeMap<u32, Stream>,
    /// Of messages that are longer than a frame.
    parts: Parts,
    /// What programs start with.
    surroundings: Surroundings,
    /// Limits that the host asks for.
    ulimit: BTreeMap<String, Ulimit>,
    /// The main process, or why there is none although the host asked for one.
    main: Option<Result<MainProcess, GuestError>>,
    /// Until when the main process has time to end, once a shutdown was asked for.
    stop_by: Option<Instant>,
    /// When disks that were frozen for a sleep are thawed, if it does not come.
    thaw_by: Option<Instant>,
    /// Programs that run without the host, by process id.
    detached: BTreeMap<i32, Box<Exec>>,
    /// The kernel's boot id: what stands in its place in a fork is the fork's.
    boot_id: String,
    /// Sessions so far.
    sessions: u64,
    /// Whether frames of the current session are served.
    is_open: bool,
    is_configured: bool,
    /// What programs see of sleep and wake, where there is a place for it.
    wakes: Option<Wakes>,
    ending: Option<Ending>,
}

impl<'a> Server<'a> {
    /// Prepares to serve; blocks `SIGCHLD` in this thread.
    pub(crate) fn new(machine: &'a mut Machine) -> io::Result<Self> {
        let waker = Arc::new(Waker::new()?);
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let surroundings = Surroundings::of(machine.is_own());
        let wakes = machine.root().map(|root| Wakes::begin(&root.join("run/mvm")));
        Ok(Self {
            machine,
            inbox: Arc::new(Inbox::new(waker.clone())),
            outbox: Arc::new(Outbox::new(waker.clone())),
            waker,
            children: ChildEnds::watch()?,
            streams: BTreeMap::new(),
            parts: Parts::default(),
            surroundings,
            ulimit: BTreeMap::new(),
            main: None,
            stop_by: None,
            thaw_by: None,
            detached: BTreeMap::new(),
            boot_id: boot_id.unwrap_or_default().trim().into(),
            sessions: 0,
            is_open: false,
            is_configured: false,
            wakes,
            ending: None,
        })
    }

    /// Serves the port until it ends or a shutdown is asked for. No process that it started for a
    /// host is left.
    pub(crate) fn serve(&mut self, port: Port) -> io::Result<Ending> {
        port.start(self.inbox.clone(), self.outbox.clone())?;
        loop {
            let ready = self.wait()?;
            let now = Instant::now();
            for source in ready {
                self.handle(source, now);
            }
            self.settle(now);
            if self.thaw_by.is_some_and(|at| at <= now) {
                self.thaw();
            }
            if self.outbox.has_room() {
                self.take_events(now);
            }
            if let Some(ending) = self.ending {
                self.end_streams();
                if let Some(Ok(main)) = &self.main {
                    main.kill();
                }
                if ending != Ending::Closed {
                    self.outbox.flush(FAREWELL);
                }
                return Ok(ending);
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let has_room = self.outbox.has_room();
        let mut sources = vec![Source::Waker, Source::ChildEnds];
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.waker.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.children.as_fd(), PollFlags::IN),
        ];
        let now = Instant::now();
        let (clock, look_at) = self.machine.clock_wants();
        if let Some(clock) = clock {
            sources.push(Source::Clock);
            fds.push(PollFd::from_borrowed_fd(clock, PollFlags::IN));
        }
        let mut alarm = [self.stop_by, self.thaw_by, look_at].into_iter().flatten().min();
        if let Some(Ok(main)) = &self.main {
            main.wants(|pipe, fd, flags| {
                sources.push(Source::Main(pipe));
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            });
            alarm = [alarm, main.alarm()].into_iter().flatten().min();
        }
        for (&id, stream) in &self.streams {
            match stream {
                Stream::Exec(exec) => {
                    exec.wants(has_room, |pipe, fd, flags| {
                        sources.push(Source::Exec(id, pipe));
                        fds.push(PollFd::from_borrowed_fd(fd, flags));
                    });
                    alarm = [alarm, exec.alarm(now)].into_iter().flatten().min();
                }
                Stream::Forward(forward) => {
                    forward.wants(has_room, |end, fd, flags| {
                        sources.push(Source::Forward(id, end));
                        fds.push(PollFd::from_borrowed_fd(fd, flags));
                    });
                    alarm = [alarm, forward.alarm()].into_iter().flatten().min();
                }
                Stream::KernelLog(log) => {
                    if let Some(fd) = log.wants().filter(|_| has_room) {
                        sources.push(Source::KernelLog(id));
                        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                    }
                }
                Stream::Hooks(hooks) => {
                    hooks.wants(|pipe, fd| {
                        sources.push(Source::Hooks(id, pipe));
                        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                    });
                    alarm = [alarm, hooks.alarm()].into_iter().flatten().min();
                }
            }
        }
        for (&pid, exec) in &self.detached {
            exec.wants(true, |pipe, fd, flags| {
                sources.push(Source::Detached(pid, pipe));
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            });
            alarm = [alarm, exec.alarm(now)].into_iter().flatten().min();
        }
        let left = alarm.map(|alarm| alarm.saturating_duration_since(now));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = fds.iter().zip(sources).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(ready.map(|(_, source)| source).collect())
    }

    fn handle(&mut self, source: Source, now: Instant) {
        match source {
            Source::Waker => self.waker.clear(),
            Source::ChildEnds => self.reap(now),
            Source::Clock => {
                if let Some(clock) = self.machine.clock_mut() {
                    clock.was_set(now);
                }
            }
            Source::Exec(id, pipe) => {
                if let Some(Stream::Exec(exec)) = self.streams.get_mut(&id) {
                    exec.ready(pipe, Link { outbox: &self.outbox, stream: id }, now);
                }
            }
            Source::Main(pipe) => {
                if let Some(Ok(main)) = &mut self.main {
                    main.ready(pipe, &self.outbox, now);
                }
            }
            Source::Detached(pid, pipe) => {
                if let Some(exec) = self.detached.get_mut(&pid) {
                    exec.ready(pipe, Link { outbox: &self.outbox, stream: 0 }, now);
                }
            }
            Source::Forward(id, end) => {
                if let Some(Stream::Forward(forward)) = self.streams.get_mut(&id) {
                    forward.ready(end, Link { outbox: &self.outbox, stream: id }, now);
                }
            }
            Source::Hooks(id, pipe) => {
                if let Some(Stream::Hooks(hooks)) = self.streams.get_mut(&id) {
                    hooks.ready(pipe);
                }
            }
            Source::KernelLog(id) => {
                let link = Link { outbox: &self.outbox, stream: id };
                if let Some(Stream::KernelLog(log)) = self.streams.get_mut(&id)
                    && let Some(last) = log.advance(link)
                {
                    link.message(&last);
                    self.streams.remove(&id);
                }
            }
        }
    }

    /// Reaps every ended child: those of execs, and the orphans that PID 1 inherits.
    fn reap(&mut self, now: Instant) {
        self.children.clear();
        while let Some((pid, status)) = process::reap() {
            let status = self.with_reason(pid, status);
            if let Some(Ok(main)) = self.main.as_mut()
                && main.runs_as(pid)
            {
                main.ended(status, now);
                // With it ended whatever it was the first process of.
                self.surroundings.leave_namespace();
                continue;
            }
            if let Some(exec) = self.detached.get_mut(&pid) {
                exec.ended(status, now);
            }
            for stream in self.streams.values_mut() {
                match stream {
                    Stream::Exec(exec) if exec.runs_as(pid) => exec.ended(status, now),
                    Stream::Hooks(hooks) if hooks.runs_as(pid) => hooks.ended(status, now),
                    _ => {}
                }
            }
        }
    }

    /// The end of a process of the host's, with whether it died of the guest's memory.
    fn with_reason(&self, pid: i32, status: ExitStatus) -> ExitStatus {
        const KILLED: i32 = 9;
        let ExitStatus::Signaled { signal: signal @ KILLED, .. } = status else { return status };
        let is_main = matches!(&self.main, Some(Ok(main)) if main.runs_as(pid));
        let is_exec = self
            .streams
            .values()
            .any(|stream| matches!(stream, Stream::Exec(exec) if exec.runs_as(pid)));
        let out_of_memory = (is_main || is_exec) && kernel_log::died_of_memory(pid);
        ExitStatus::Signaled { signal, out_of_memory }
    }

    fn settle(&mut self, now: Instant) {
        let (outbox, surroundings) = (&self.outbox, &self.surroundings);
        let mut detaching = Vec::new();
        self.streams.retain(|&stream, state| {
            let last = match state {
                Stream::Exec(exec) if exec.is_detached() => {
                    detaching.push(stream);
                    None
                }
                Stream::Exec(exec) => exec.settle(now),
                Stream::Forward(forward) => forward.settle(now),
                Stream::KernelLog(_) => None,
                Stream::Hooks(hooks) => hooks.settle(surroundings, now),
            };
            let Some(last) = last else { return true };
            Link { outbox, stream }.message(&last);
            false
        });
        for id in detaching {
            self.detach(id);
        }
        self.detached.retain(|_, exec| exec.settle(now).is_none());
        if let Some(clock) = self.machine.clock_mut() {
            clock.settle(now);
        }
        self.settle_main(now);
    }

    /// Lets a program run on without its stream.
    fn detach(&mut self, id: u32) {
        if let Some(Stream::Exec(mut exec)) = self.streams.remove(&id) {
            exec.abandon();
            self.detached.insert(exec.pid(), exec);
            self.link(id).message(&GuestMessage::Done);
        }
    }

    fn take_events(&mut self, now: Instant) {
        for _ in 0..EVENTS_AT_ONCE {
            if self.ending.is_some() || !self.outbox.has_room() {
                return;
            }
            match self.inbox.pop() {
                None => return,
                Some(Event::Closed) => self.ending = Some(Ending::Closed),
                Some(Event::HostGone) => self.abandon_main(),
                Some(Event::Accepted(Accepted::Session(host))) => self.open_session(&host),
                Some(Event::Accepted(Accepted::Lost(error))) => {
                    if self.is_open {
                        self.fail(0, invalid(error.to_string()));
                    }
                    self.is_open = false;
                    self.end_streams();
                }
                Some(Event::Accepted(Accepted::Frame(frame))) => {
                    if self.is_open {
                        self.take_frame(frame, now);
                    }
                }
            }
        }
        // More may be waiting.
        self.waker.wake();
    }

    fn open_session(&mut self, host: &Preamble) {
        self.end_streams();
        let answer = accept::answer(host);
        self.is_open = answer.version != 0;
        self.outbox.open_session(&answer);
        if !self.is_open {
            return;
        }
        self.sessions += 1;
        self.machine.stir_entropy(&host.nonce);
        // Whoever had disks frozen is not there any more.
        self.thaw();
        let uname = rustix::system::uname();
        self.link(0).message(&GuestMessage::Hello(Hello {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            boot_id: self.boot_id.clone(),
            kernel: uname.release().to_string_lossy().into_owned(),
            session: self.sessions,
            configured: self.is_configured,
            features: Feature::ALL.map(|feature| feature.name().into()).into(),
        }));
        note(&format!("session {} with the host", self.sessions));
    }

    /// Lets data disks be written again that were frozen for a sleep.
    fn thaw(&mut self) {
        self.thaw_by = None;
        self.machine.thaw();
    }

    /// Ends whatever runs for any stream, without a word: the host that asked is gone, or told.
    fn end_streams(&mut self) {
        self.parts.clear();
        for stream in std::mem::take(&mut self.streams).into_values() {
            self.stop(stream);
        }
        self.detach_main();
    }

    /// Ends a stream with an error.
    fn fail(&mut self, id: u32, error: GuestError) {
        if let Some(stream) = self.streams.remove(&id) {
            self.stop(stream);
        }
        if let Some(main) = self.main_on(id) {
            main.detach();
        }
        self.link(id).message(&GuestMessage::Error(error));
    }

    /// Ends what runs on a stream that is over.
    fn stop(&mut self, stream: Stream) {
        match stream {
            Stream::Exec(mut exec) => {
                if exec.stop(Instant::now()) {
                    self.detached.insert(exec.pid(), exec);
                }
            }
            Stream::Hooks(hooks) => hooks.kill(),
            Stream::Forward(_) | Stream::KernelLog(_) => {}
        }
    }

    fn link(&self, stream: u32) -> Link<'_> {
        Link { outbox: &self.outbox, stream }
    }
}
