//! Control: what people and programs ask for is admitted, kept, handed to nodes, and answered from.
//!
//! ```text
//!  caller ── Call ──> server ── admission (pure core) ──> state (store + mirror) ── document ──> node
//!                        ^                                   ^                                    │
//!                        └──────────── views, watches ───────┴──── upkeep <───── report ──────────┘
//! ```
//!
//! Nothing here does an instance's work: admission writes what is desired and answers. A node is reached
//! through its [`Link`] alone; what it reports is what is observed, and what it decided by itself is taken over.

mod admission;
mod bases;
mod configs;
mod forks;
mod link;
mod lists;
mod scope;
mod server;
mod state;
mod suggest;
mod upkeep;
mod views;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use mvm_core::document::NodeDocument;
use mvm_core::name::RequestId;
use mvm_core::record::Desired;
use mvm_store::{ChangeError, CommitError, GiveUpSpace, Op, Room, Store, StoreError};
use mvm_wire::door::Machine;
use mvm_wire::{ApiError, Connection, HangUp};
use tokio::sync::Notify;
use tokio::task::JoinSet;

pub use link::{Link, Prepared};

use configs::ImageConfigs;
use state::State;

/// What control would otherwise take from its surroundings.
#[derive(Clone)]
pub struct Ambient {
    /// What time it is, in milliseconds since the Unix epoch.
    pub now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Random bits, for ids.
    pub entropy: Arc<dyn Fn() -> u32 + Send + Sync>,
}

/// Who calls, as the transport knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Principal {
    /// A user of this machine, by number.
    User(u32),
    /// The process itself.
    Process,
}

impl std::fmt::Display for Principal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User(uid) => write!(f, "uid {uid}"),
            Self::Process => f.write_str("the agent itself"),
        }
    }
}

/// What is kept, before there is a node.
pub struct Kept {
    state: State,
}

impl Kept {
    /// Reads what is desired. `give_up_space` is asked when the filesystem is full.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn load(
        store: Arc<dyn Store>,
        give_up_space: GiveUpSpace,
    ) -> Result<Self, CommitError> {
        Ok(Self { state: State::load(store, give_up_space).await? })
    }

    /// What the node is to have.
    pub fn document(&self) -> NodeDocument {
        self.state.document()
    }

    /// Replaces what is kept by what `change` returns. Its second argument is the key of a record that does not
    /// parse, if there is one.
    ///
    /// # Errors
    /// `change` refused, or the store failed.
    pub async fn change<T, E>(
        &self,
        change: impl Fn(&Desired, Option<&str>) -> Result<(Desired, T), E>,
    ) -> Result<T, ChangeError<E>>
    where
        E: From<StoreError>,
    {
        let change = async |mirror: Arc<mvm_core::mirror::Mirror>| {
            let bad = mirror.bad.keys().next().map(String::as_str);
            let (after, answer) = change(&mirror.desired, bad)?;
            Ok((admission::difference(&mirror.desired, &after)?, answer))
        };
        Ok(self.state.change(Room::Ordinary, change).await?.1)
    }
}

/// Control with its node.
pub struct Control {
    state: State,
    link: Arc<dyn Link>,
    /// What the node is; its problems are those of the start.
    machine: Machine,
    ambient: Ambient,
    started_unix_ms: u64,
    image_configs: ImageConfigs,
    problems: Mutex<BTreeMap<String, String>>,
    /// The generation of the document that the node was told last.
    told: Mutex<u64>,
    /// Told to end.
    stop: Notify,
}

impl Control {
    /// Takes charge of a node that has the document of what is kept. The tasks are control's own: it works
    /// as long as they run.
    ///
    /// # Errors
    /// The node does not say what it is.
    pub async fn start(
        kept: Kept,
        link: Arc<dyn Link>,
        ambient: Ambient,
    ) -> Result<(Arc<Self>, JoinSet<()>), ApiError> {
        let machine = match link.ask(mvm_wire::door::Question::Machine).await? {
            mvm_wire::door::Answer::Machine(machine) => *machine,
            other => return Err(other.unexpected()),
        };
        let reports = link.reports();
        kept.state.set_report(&reports.borrow());
        let told = Mutex::new(kept.document().generation);
        let control = Arc::new(Self {
            started_unix_ms: (ambient.now_ms)(),
            state: kept.state,
            link,
            machine,
            ambient,
            image_configs: ImageConfigs::default(),
            problems: Mutex::default(),
            told,
            stop: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(upkeep::run(control.clone(), reports));
        tasks.spawn(upkeep::tell(control.clone()));
        Ok((control, tasks))
    }

    /// An id for a request whose caller drew none.
    fn request_id(&self) -> RequestId {
        let bits = || u128::from((self.ambient.entropy)());
        RequestId::from_bits((0..4).fold(0, |id, _| id << 32 | bits()))
    }

    /// Serves one connection, which carries one call of this principal.
    pub async fn serve(
        self: &Arc<Self>,
        connection: Connection,
        principal: Principal,
        hang_up: &dyn HangUp,
    ) {
        server::serve(self, connection, principal, hang_up).await;
    }

    /// Resolves when a caller asked for the end.
    pub async fn stopped(&self) {
        self.stop.notified().await;
    }

    /// Changes what is desired, and tells the node before it answers.
    async fn change<T, E, F>(
        &self,
        room: Room,
        change: impl Fn(Arc<mvm_core::mirror::Mirror>) -> F,
    ) -> Result<(u64, T), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, T), E>>,
    {
        let (version, answer) = self.state.change(room, change).await?;
        self.tell();
        Ok((version.get(), answer))
    }

    /// The node is told what it is to have, unless it was.
    fn tell(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let document = self.state.document();
        if document.generation != *told {
            self.link.set_document(&document);
            *told = document.generation;
        }
    }

    /// Records that something of control's own work fails, or works again.
    fn set_problem(&self, what: &str, problem: Option<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => {
                if problems.get(what) != Some(&problem) {
                    tracing::warn!(what, problem, "control has a problem");
                }
                problems.insert(what.to_owned(), problem);
            }
            None => drop(problems.remove(what)),
        }
    }

    /// What fails at present.
    fn problems(&self) -> Vec<String> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems.iter().map(|(what, problem)| format!("{what}: {problem}")).collect()
    }
}
