//! `mvm exec`, `mvm instance exec`.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use mvm_core::guest::{ExecRequest, ExitStatus};
use mvm_core::name::Selector;
use mvm_wire::connection::DATA_PIECE;
use mvm_wire::{Call, Connection};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::process_args::variable;
use crate::cli::Context;
use crate::detach_keys::{DetachFilter, DetachKeys};
use crate::error::{Error, Result, exit};
use crate::exec::{Event, Outcome, SIGHUP, SIGINT, SIGQUIT, SIGTERM, Signals, Streams, attach};
use crate::output::raw;
use crate::terminal::{self, RawTerminal};
use crate::units::Seconds;

/// Run a program in an instance.
///
/// Its output, errors and exit code are passed on as they are. Standard input is not read unless
/// -i is given. Without -t, Ctrl-C goes to the program as a signal; a second one within two seconds
/// hangs up, which ends the program. With -t the program has a terminal, and every key goes to it;
/// Ctrl-P Ctrl-Q leaves the program running and comes back.
#[derive(Debug, Args)]
#[command(override_usage = "mvm exec [OPTIONS] <SELECTOR> [--] <COMMAND>...")]
#[command(after_help = "\
Examples:
  mvm exec demo/hello -- uname -sr
  mvm exec -it demo/hello -- sh
  mvm exec i-3f2a -e GREETING=hello -w /tmp -- sh -c 'echo $GREETING from $PWD'
  mvm exec demo/hello -i -- tar -xf - -C /srv
  mvm exec demo/hello --timeout 10 -u nobody -- sleep 60
  mvm exec demo/hello -d -- sh -c 'sleep 5; sync'

The exit code is the program's own, 128 + the signal that ended it, 124 if it ran into
--timeout, 126 if it may not be run and 127 if it does not exist.")]
pub(crate) struct Exec {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL for any running one of the pool.
    selector: Selector,
    /// Set a variable in the program's environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The directory to run in; if absent that of the image or the pool, or else the user's home.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The user to run as: NAME, UID or either with :GROUP; root if absent. A UID that the image
    /// does not know has group 0.
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Kill the program after this long.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<Seconds>,
    /// Pass standard input on to the program.
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal: yours. Its errors come with its output.
    #[arg(short, long)]
    tty: bool,
    /// Start the program and leave it running; its output is dropped.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// The keys that leave the program running, or `none`.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", requires = "tty")]
    detach_keys: DetachKeys,
    /// The program and its arguments; `--` before it may be left out.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    /// Runs the verb; the result is the program's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let mut env = self.env;
        if self.tty {
            need_terminal()?;
            let is_set = env.iter().any(|(name, _)| name == "TERM");
            if let Some(term) = std::env::var("TERM").ok().filter(|_| !is_set) {
                env.push(("TERM".to_owned(), term));
            }
        }
        let request = ExecRequest {
            argv: self.command,
            env,
            cwd: self.workdir,
            is_cwd_default: false,
            user: self.user,
            stdin: self.interactive,
            timeout_ms: self.timeout.map(Seconds::as_millis),
            terminal: self.tty.then(terminal::size),
            detach: self.detach,
            builtin: false,
        };
        let keys = (self.tty && self.interactive).then_some(self.detach_keys);
        run(context, self.selector, request, keys).await
    }
}

/// Refuses -t without a terminal.
pub(crate) fn need_terminal() -> Result<()> {
    match terminal::is_present() {
        true => Ok(()),
        false => Err(Error::Usage {
            message: "-t needs a terminal, and standard input is none".to_owned(),
            hint: "leave -t out: -i alone passes standard input on".to_owned(),
        }),
    }
}

/// Runs a program in a guest with this command's standard streams, and with its terminal if the
/// request has one; the result is the program's exit code.
///
/// # Errors
/// The program could not be run, or the connection to it was lost.
pub(crate) async fn run(
    context: &Context,
    selector: Selector,
    request: ExecRequest,
    detach_keys: Option<DetachKeys>,
) -> Result<u8> {
    let (has_stdin, has_terminal) = (request.stdin, request.terminal.is_some());
    let connection = context.client.start(&Call::Exec { selector, request }).await?;
    let signals = if has_terminal { Signals::None } else { Signals::All };
    let mut attached = Attached::new(has_stdin, has_terminal, detach_keys, signals)?;
    let outcome = attached.carry(connection).await;
    tell_memory(context, &outcome);
    match outcome {
        Ok(Outcome::Exited(status)) => Ok(exit_code(status)),
        Ok(Outcome::Detached) => {
            drop(attached);
            context.ui.remark("detached: the program runs on");
            Ok(exit::OK)
        }
        Err(Error::Connection(source)) => Err(Error::ProgramLost(source)),
        Err(error) => Err(error),
    }
}

/// Says that a program died of the guest's memory, which its exit code does not tell.
pub(crate) fn tell_memory(context: &Context, outcome: &Result<Outcome>) {
    if let Ok(Outcome::Exited(ExitStatus::Signaled { out_of_memory: true, .. })) = outcome {
        context.ui.remark("the guest ran out of memory, and its kernel killed the program");
    }
}

/// What this command ends with after a program has.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    u8::try_from(status.shell_code() & 0xff).unwrap_or(u8::MAX)
}

/// This command's own streams, signals and terminal, for a program in a guest; over one connection
/// after another, if need be.
pub(crate) struct Attached {
    streams: Streams<tokio::io::Stdout, tokio::io::Stderr>,
    /// It does not end; the terminal is given back when it is dropped.
    follow: Pin<Box<dyn Future<Output = ()>>>,
    sizes: Option<mpsc::Sender<Event>>,
}

impl Attached {
    /// Takes them: the terminal is raw from now on if the program has it and its input.
    ///
    /// # Errors
    /// The terminal or the signals cannot be had.
    pub(crate) fn new(
        has_stdin: bool,
        has_terminal: bool,
        detach_keys: Option<DetachKeys>,
        signals: Signals,
    ) -> Result<Self> {
        let signals_failed = |source| Error::Read { what: "signals".to_owned(), source };
        let terminal = match has_terminal && has_stdin {
            true => RawTerminal::enter()
                .map_err(|source| Error::Read { what: "the terminal".to_owned(), source })?,
            false => None,
        };
        let (sender, events) = mpsc::channel(8);
        forward_signals(sender.clone()).map_err(signals_failed)?;
        let sizes = has_terminal.then(|| sender.clone());
        let follow = follow_terminal(terminal, has_terminal, sender).map_err(signals_failed)?;
        let streams = Streams {
            stdin: has_stdin.then(standard_input),
            detach: detach_keys.map(DetachFilter::new),
            events,
            signals,
            has_started: AtomicBool::new(false),
            hung_up_by: None,
            stdout: raw::async_stdout(),
            stderr: raw::async_stderr(),
        };
        Ok(Self { streams, follow: Box::pin(follow), sizes })
    }

    /// Whether the program is known to run, or to have run.
    pub(crate) fn has_started(&self) -> bool {
        self.streams.has_started.load(Ordering::Relaxed)
    }

    /// The signal at which the person hung up, if one did that.
    pub(crate) fn hung_up_by(&self) -> Option<i32> {
        self.streams.hung_up_by
    }

    /// Says something between what the program writes.
    pub(crate) fn remark(&self, context: &Context, line: &str) {
        // In a raw terminal the next line would begin below this one's end.
        let end = if self.sizes.is_some() { "\r" } else { "" };
        context.ui.remark(&format!("{line}{end}"));
    }

    /// Carries streams, signals and sizes over a connection, until that or the program ends.
    ///
    /// # Errors
    /// The program could not be run, the connection to it was lost, or the person hung up.
    pub(crate) async fn carry(&mut self, connection: Connection) -> Result<Outcome> {
        if let Some(sizes) = &self.sizes {
            // A full queue has a newer one.
            let _ = sizes.try_send(Event::Resize(terminal::size()));
        }
        tokio::select! {
            outcome = attach(connection, &mut self.streams) => outcome,
            () = &mut self.follow => Err(Error::HungUp),
        }
    }

    /// Waits for something while there is no connection, unless a signal ends that.
    ///
    /// # Errors
    /// It failed, or the person hung up.
    pub(crate) async fn meanwhile<T>(
        &mut self,
        wait: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let events = &mut self.streams.events;
        let interrupted = async {
            while let Some(event) = events.recv().await {
                if let Event::Signal(signal) = event {
                    return signal;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            waited = wait => waited,
            signal = interrupted => {
                self.streams.hung_up_by = Some(signal);
                Err(Error::HungUp)
            }
            () = &mut self.follow => Err(Error::HungUp),
        }
    }
}

/// Tells of the terminal's sizes, and keeps it raw over a stop of this command. It does not end; the
/// terminal is given back when it is dropped.
fn follow_terminal(
    terminal: Option<RawTerminal>,
    has_terminal: bool,
    events: mpsc::Sender<Event>,
) -> io::Result<impl Future<Output = ()>> {
    let mut resized = signal(SignalKind::window_change())?;
    // There is no name for SIGCONT.
    let mut continued = signal(SignalKind::from_raw(SIGCONT))?;
    Ok(async move {
        loop {
            tokio::select! {
                Some(()) = resized.recv() => {}
                Some(()) = continued.recv() => {
                    if let Some(terminal) = &terminal {
                        // One that refuses now is gone.
                        let _ = terminal.make_raw();
                    }
                }
            }
            if has_terminal && events.send(Event::Resize(terminal::size())).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    })
}

/// The Linux number of SIGCONT.
const SIGCONT: i32 = 18;

/// Reads standard input in a thread of its own, which nothing waits for: a read of a terminal
/// cannot be called off.
fn standard_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; DATA_PIECE];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) if sender.blocking_send(buffer[..n].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What cannot be read has ended.
                Err(_) => return,
            }
        }
    });
    receiver
}

/// Tells of the signals that may be for the program, as they arrive.
fn forward_signals(events: mpsc::Sender<Event>) -> io::Result<()> {
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // It ends with the runtime, which ends with the command.
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                Some(()) = hang_up.recv() => SIGHUP,
                Some(()) = interrupt.recv() => SIGINT,
                Some(()) = quit.recv() => SIGQUIT,
                Some(()) = terminate.recv() => SIGTERM,
            };
            if events.send(Event::Signal(number)).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}
