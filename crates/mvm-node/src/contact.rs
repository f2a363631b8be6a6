//! Whether a VM's guest can be talked to, as its instance's actor and the tasks of the actor know it.
//!
//! A guest serves one session at a time, and a second one that is opened beside one that is being
//! taken up has both wait for each other. So one task at a time opens a session, and whoever has
//! to tell the guest something before that is done waits for it here. A session is known here from
//! the guest's hello on, which is before it is configured and open to everybody.

use std::time::Duration;

use mvm_host::guest::Session;
use tokio::sync::watch;
use tokio::time::timeout;

/// How long a session that has been opened may take until it is open to everybody.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who opens a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Opener {
    #[default]
    Nobody,
    /// Whoever started the guest's kernel, which may not have got to its agent yet.
    Boot,
    /// Whoever takes a running guest up.
    Rejoin,
}

#[derive(Debug, Default)]
struct State {
    opener: Opener,
    session: Option<Session>,
}

/// What is known of the way to one VM's guest.
#[derive(Debug, Default)]
pub(crate) struct Contact(watch::Sender<State>);

/// How a guest can be told something.
#[derive(Debug)]
pub(crate) enum Reach {
    /// Over this session.
    Open(Session),
    /// Its kernel has been started, and nobody has answered yet.
    Booting,
    /// Nobody has a session, and nobody opens one.
    Lost,
}

impl Contact {
    /// Forgets everything: another VM, or none.
    pub(crate) fn reset(&self) {
        self.0.send_replace(State::default());
    }

    /// Takes it upon the caller to open a session, with a guest whose kernel was just started or
    /// with one that runs; `false` if somebody does that already.
    pub(crate) fn begin(&self, is_boot: bool) -> bool {
        self.0.send_if_modified(|state| {
            let is_free = state.opener == Opener::Nobody;
            if is_free {
                state.opener = if is_boot { Opener::Boot } else { Opener::Rejoin };
            }
            is_free
        })
    }

    /// Notes that the opening has ended, whether it came to a session or not.
    pub(crate) fn end(&self) {
        self.0.send_modify(|state| state.opener = Opener::Nobody);
    }

    /// Lets the present session go, so that another can be opened.
    pub(crate) fn let_go(&self) {
        self.0.send_modify(|state| state.session = None);
    }

    /// Lets a session go that is over, if it is the present one.
    pub(crate) fn forget(&self, session: &Session) {
        self.0.send_if_modified(|state| {
            let is_present = state.session.as_ref().is_some_and(|present| present.is_same(session));
            if is_present {
                state.session = None;
            }
            is_present
        });
    }

    /// Notes that the guest has said hello.
    pub(crate) fn met(&self, session: &Session) {
        self.0.send_modify(|state| state.session = Some(session.clone()));
    }

    /// Waits until it is known how the guest can be reached. One that is being taken up has a while to
    /// be, so that its main process's last words are heard, and is reached as soon as it can be then.
    pub(crate) async fn reach(&self) -> Reach {
        let mut state = self.0.subscribe();
        let is_booting = |state: &State| state.opener == Opener::Boot && state.session.is_none();
        let is_settled =
            state.wait_for(|state| state.opener == Opener::Nobody || is_booting(state));
        drop(timeout(PATIENCE, is_settled).await);
        let known =
            state.wait_for(|state| state.session.is_some() || state.opener != Opener::Rejoin).await;
        match known.as_deref() {
            Ok(State { session: Some(session), .. }) => Reach::Open(session.clone()),
            Ok(State { opener: Opener::Boot, .. }) => Reach::Booting,
            // The sender lives in `self`.
            Ok(State { .. }) | Err(_) => Reach::Lost,
        }
    }
}
