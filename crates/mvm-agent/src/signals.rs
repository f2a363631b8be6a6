//! The signals that reach the agent: each is either an orderly end or nothing, and said in the log.
//!
//! A terminal that is closed and a tool that asks for a report must not end an agent on which microVMs
//! wait, least of all without a word.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal with its name.
type Named = (&'static str, Signal);

/// The agent's signals, none of which is missed from the moment on that they are watched.
pub(crate) struct Signals {
    ending: Vec<Named>,
    /// Those that would end a program that does not know them.
    ignored: Vec<Named>,
}

impl Signals {
    /// Watches from now on.
    pub(crate) fn watch() -> Self {
        let ending = [
            watched("SIGTERM", SignalKind::terminate()),
            watched("SIGINT", SignalKind::interrupt()),
            watched("SIGQUIT", SignalKind::quit()),
        ];
        let ignored = [
            watched("SIGHUP", SignalKind::hangup()),
            watched("SIGUSR1", SignalKind::user_defined1()),
            watched("SIGUSR2", SignalKind::user_defined2()),
            watched("SIGALRM", SignalKind::alarm()),
        ];
        Self {
            ending: ending.into_iter().flatten().collect(),
            ignored: ignored.into_iter().flatten().collect(),
        }
    }

    /// Resolves when one comes that ends the agent.
    pub(crate) async fn until_end(self) {
        let Self { mut ending, mut ignored } = self;
        loop {
            tokio::select! {
                name = any(&mut ending) => {
                    tracing::info!(signal = name, "told to end by a signal");
                    return;
                }
                name = any(&mut ignored) => {
                    tracing::info!(signal = name, "ignored a signal: SIGTERM ends the agent");
                }
            }
        }
    }
}

fn watched(name: &'static str, kind: SignalKind) -> Option<Named> {
    match signal(kind) {
        Ok(signal) => Some((name, signal)),
        Err(error) => {
            tracing::warn!(signal = name, %error, "a signal cannot be handled");
            None
        }
    }
}

/// The name of the next one that comes.
async fn any(signals: &mut [Named]) -> &'static str {
    std::future::poll_fn(|context| {
        for (name, signal) in signals.iter_mut() {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*name);
            }
        }
        std::task::Poll::Pending
    })
    .await
}
