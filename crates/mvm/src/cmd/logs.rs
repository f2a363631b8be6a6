//! `mvm logs`, `mvm instance logs`.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use mvm_core::frame::{KIND_STDERR, KIND_STDOUT};
use mvm_core::name::Selector;
use mvm_wire::{Call, Connection, ConnectionError, Item, LogKind, Reply};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::cli::Context;
use crate::client::unexpected;
use crate::error::{Error, Result};
use crate::output::{TerminalFilter, raw};
use crate::wait::now_unix_ms;

/// Which log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Source {
    /// The main process's standard output.
    Stdout,
    /// The main process's standard error.
    Stderr,
    /// What mvm has to say about the main process: boots, ends, what was dropped.
    Agent,
    /// All three of the main process, in the order in which they came.
    All,
    /// The serial console, kept on the host, also of an instance that has ended.
    Console,
    /// The guest kernel's messages, from the guest.
    Kernel,
    /// What the VMM itself printed.
    Vmm,
}

/// Show a log of an instance.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm logs demo/hello
  mvm logs i-3f2a -f -n 20
  mvm logs i-3f2a --since 10m --timestamps --source all
  mvm logs i-3f2a --source kernel

Without --source it is what the main process wrote, standard output and error each to its own, or
the console of an instance without a main process. Logs stay after an instance has ended, until it
is destroyed; of a flood only the newest part is kept.")]
pub(crate) struct Logs {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
    /// Go on with what comes later, until the instance has ended for good, or until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// Which log.
    #[arg(long, value_enum)]
    source: Option<Source>,
    /// Only the last lines.
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u32>,
    /// Only what came since: a time such as 2026-01-31T12:00:00Z, or how long ago, such as 10m.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<SystemTime>,
    /// Begin each line with the time at which it came, in UTC.
    #[arg(short, long)]
    timestamps: bool,
}

impl Logs {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let kind = match self.source {
            None => LogKind::Auto,
            Some(Source::Stdout) => LogKind::Stdout,
            Some(Source::Stderr) => LogKind::Stderr,
            Some(Source::Agent) => LogKind::Agent,
            Some(Source::All) => LogKind::All,
            Some(Source::Console) => LogKind::Console,
            Some(Source::Kernel) => LogKind::Kernel,
            Some(Source::Vmm) => LogKind::Vmm,
        };
        let Self { selector, follow, tail, timestamps, .. } = self;
        let since_unix_ms = self.since.map(|since| {
            let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        let mut call = Call::Logs { selector, kind, follow, tail, since_unix_ms, timestamps };
        let mut connection = context.client.start(&call).await?;
        let mut shown = Shown {
            stdout: Sink::new(raw::async_stdout(), raw::is_stdout_terminal()),
            stderr: Sink::new(raw::async_stderr(), raw::is_stderr_terminal()),
            last_unix_ms: None,
        };
        loop {
            match shown.show(&mut connection).await {
                Err(Error::Connection(ConnectionError::HungUp | ConnectionError::Io(_)))
                    if follow =>
                {
                    context.ui.remark("the agent went away: this goes on once an agent runs again");
                    go_on_from(&mut call, shown.last_unix_ms);
                    connection = context.client.start_again(&call).await?;
                }
                ended => return ended,
            }
        }
    }
}

/// Makes of a call for a log one for what has come since that moment.
fn go_on_from(call: &mut Call, last_unix_ms: Option<u64>) {
    if let Call::Logs { kind, tail, since_unix_ms, .. } = call
        && last_unix_ms.is_some()
    {
        match kind {
            // They have no times.
            LogKind::Console | LogKind::Kernel | LogKind::Vmm => *tail = Some(0),
            _ => (*tail, *since_unix_ms) = (None, last_unix_ms),
        }
    }
}

/// What was shown of a log so far.
struct Shown {
    stdout: Sink<tokio::io::Stdout>,
    stderr: Sink<tokio::io::Stderr>,
    /// When the last of it came.
    last_unix_ms: Option<u64>,
}

impl Shown {
    /// Shows what comes over a connection.
    async fn show(&mut self, connection: &mut Connection) -> Result<()> {
        loop {
            match connection.read.next().await?.ok_or(ConnectionError::HungUp)? {
                Item::Data { kind: KIND_STDOUT, bytes } => {
                    self.last_unix_ms = Some(now_unix_ms());
                    self.stdout.write(&bytes).await?;
                }
                Item::Data { kind: KIND_STDERR, bytes } => {
                    self.last_unix_ms = Some(now_unix_ms());
                    self.stderr.write(&bytes).await?;
                }
                Item::Data { .. } => {}
                message @ Item::Message(_) => match message.parse()? {
                    Reply::Done => {
                        self.stdout.end().await?;
                        return self.stderr.end().await;
                    }
                    Reply::Error(error) => return Err(error.into()),
                    other => return Err(unexpected(&other)),
                },
            }
        }
    }
}

/// Where the lines of a log go.
struct Sink<W> {
    to: W,
    /// On a terminal, which a guest must not steer.
    filter: Option<TerminalFilter>,
}

impl<W: AsyncWrite + Unpin> Sink<W> {
    fn new(to: W, is_terminal: bool) -> Self {
        Self { to, filter: is_terminal.then(TerminalFilter::default) }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let shown = match &mut self.filter {
            Some(filter) => &filter.pass(bytes),
            None => bytes,
        };
        self.to.write_all(shown).await.map_err(Error::output)?;
        self.to.flush().await.map_err(Error::output)
    }

    async fn end(&mut self) -> Result<()> {
        let end = self.filter.as_ref().map_or(&b""[..], TerminalFilter::end);
        self.to.write_all(end).await.map_err(Error::output)?;
        self.to.flush().await.map_err(Error::output)
    }
}

/// Parses a time, or how long ago it was.
fn since(text: &str) -> std::result::Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(time);
    }
    let ago =
        humantime::parse_duration(text).ok().and_then(|ago| SystemTime::now().checked_sub(ago));
    ago.ok_or_else(|| "expected a time such as 2026-01-31T12:00:00Z, or 10m, 2h or 1day".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_followed_goes_on_where_it_was() {
        let call = |kind| Call::Logs {
            selector: "demo/hello".parse().unwrap(),
            kind,
            follow: true,
            tail: Some(20),
            since_unix_ms: None,
            timestamps: false,
        };
        for (kind, last, expected) in [
            (LogKind::All, Some(7), (None, Some(7))),
            (LogKind::All, None, (Some(20), None)),
            (LogKind::Console, Some(7), (Some(0), None)),
        ] {
            let mut again = call(kind);
            go_on_from(&mut again, last);
            let Call::Logs { tail, since_unix_ms, .. } = again else { panic!("{again:?}") };
            assert_eq!((tail, since_unix_ms), expected);
        }
    }

    #[test]
    fn a_time_is_a_moment_or_a_while_ago() {
        let moment = since("1970-01-01T00:01:00Z").unwrap();
        assert_eq!(moment.duration_since(UNIX_EPOCH).unwrap().as_secs(), 60);
        assert_eq!(since("1970-01-01 00:01:00").unwrap(), moment);
        let then = since("10m").unwrap();
        let ago = SystemTime::now().duration_since(then).unwrap().as_secs();
        assert!((600..660).contains(&ago), "{ago}");
        for bad in ["", "soon", "10", "-5m", "2026-13-01"] {
            assert!(since(bad).is_err(), "{bad:?}");
        }
    }
}
