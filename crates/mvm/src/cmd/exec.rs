//! `mvm exec`, `mvm instance exec`.

use std::io::{self, Read};

use clap::Args;
use mvm_core::guest::ExecRequest;
use mvm_core::name::Selector;
use mvm_wire::Call;
use mvm_wire::connection::DATA_PIECE;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::process_args::variable;
use crate::cli::Context;
use crate::error::{Error, Result};
use crate::exec::{SIGINT, SIGTERM, Streams, attach};
use crate::units::Seconds;

/// Run a program in an instance.
///
/// Its output, errors and exit code are passed on as they are. Standard input is not read unless
/// -i is given. Ctrl-C goes to the program; a second one within two seconds hangs up, which ends
/// the program.
#[derive(Debug, Args)]
#[command(override_usage = "mvm exec [OPTIONS] <SELECTOR> [--] <COMMAND>...")]
#[command(after_help = "\
Examples:
  mvm exec demo/hello -- uname -sr
  mvm exec i-3f2a -e GREETING=hello -w /tmp -- sh -c 'echo $GREETING from $PWD'
  mvm exec demo/hello -i -- tar -xf - -C /srv
  mvm exec demo/hello --timeout 10 -u nobody -- sleep 60

The exit code is the program's own, 128 + the signal that ended it, 124 if it ran into
--timeout, 126 if it may not be run and 127 if it does not exist.")]
pub(crate) struct Exec {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL for any running one of the pool.
    selector: Selector,
    /// Set a variable in the program's environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The directory to run in; the user's home if absent.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The user to run as: NAME, UID or either with :GROUP; root if absent.
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Kill the program after this long.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<Seconds>,
    /// Pass standard input on to the program.
    #[arg(short, long)]
    interactive: bool,
    /// The program and its arguments; `--` before it may be left out.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    /// Runs the verb; the result is the program's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let is_interactive = self.interactive;
        let request = ExecRequest {
            argv: self.command,
            env: self.env,
            cwd: self.workdir,
            user: self.user,
            stdin: is_interactive,
            timeout_ms: self.timeout.map(Seconds::as_millis),
        };
        let connection =
            context.client.start(&Call::Exec { selector: self.selector, request }).await?;
        let signals =
            signals().map_err(|source| Error::Read { what: "signals".to_owned(), source })?;
        let streams = Streams {
            stdin: is_interactive.then(standard_input),
            signals,
            stdout: tokio::io::stdout(),
            stderr: tokio::io::stderr(),
        };
        let code = attach(connection, streams).await?.shell_code();
        Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
    }
}

/// Reads standard input in a thread of its own, which nothing waits for: a read of a terminal
/// cannot be called off.
pub(crate) fn standard_input() -> mpsc::Receiver<Vec<u8>> {
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

/// The signals that are forwarded, as they arrive.
pub(crate) fn signals() -> io::Result<mpsc::Receiver<i32>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (sender, receiver) = mpsc::channel(8);
    // It ends with the runtime, which ends with the command.
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                Some(()) = interrupt.recv() => SIGINT,
                Some(()) = terminate.recv() => SIGTERM,
            };
            if sender.send(number).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
