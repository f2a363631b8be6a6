//! Makes a copied state directory one of its own, while no agent serves it.
//!
//! The records come first and the new identity last, so that a copy that was left in the middle is still refused
//! as one, and is claimed anew.

use std::path::PathBuf;
use std::sync::Arc;

use mvm_control::Kept;
use mvm_core::admit::{self, Denial, NodeFacts};
use mvm_host::net::{NetworkError, Occupied, Owner, Registry};
use mvm_host::state_dir::{self, StateDir, StateDirError};
use mvm_node::Clock;
use mvm_store::{ChangeError, SqliteStore, StoreError};

use crate::{AgentError, lock, setup, spare_of};

/// Why a copy was not made a state directory of its own.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// It cannot be examined, or not be written to.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// There is no state in it.
    #[error("{} is not a state directory: it has no mvm.db", .0.display())]
    NoState(PathBuf),
    /// It is one of its own already.
    #[error("{} is no copy of a state directory that is still there", .0.display())]
    NoCopy(PathBuf),
    /// The machine's network cannot be examined.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A record does not parse: what it holds is not known.
    #[error("the record `{0}` does not parse")]
    BadRecord(String),
    /// Its tenants cannot have networks.
    #[error(transparent)]
    Denied(Box<Denial>),
    /// A record cannot be written.
    #[error("cannot encode a record")]
    Encode(#[from] StoreError),
}

/// What became of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// What it was a copy of.
    pub copied_from: PathBuf,
    /// What is different in it now, one line each.
    pub notes: Vec<String>,
}

/// Makes a copy a state directory of its own: with another identity, nothing that runs, and networks that nobody
/// else on this machine has.
///
/// # Errors
/// It is not a copy, an agent serves it, or it cannot be changed.
pub async fn claim(dir: impl Into<StateDir>, is_simulated: bool) -> Result<Claimed, AgentError> {
    let dir = &dir.into();
    let registry = Registry::of_machine();
    let copied_from = match state_dir::examine(dir, &registry) {
        Err(StateDirError::Copy { of, .. }) => of,
        Ok(()) => return Err(ClaimError::NoCopy(dir.to_path_buf()).into()),
        Err(error) => return Err(ClaimError::StateDir(error).into()),
    };
    let database = dir.database();
    if !database.exists() {
        return Err(ClaimError::NoState(dir.to_path_buf()).into());
    }
    let _lock = lock::acquire(dir)?;
    // As a stranger: all that is there is somebody else's.
    let occupied = match is_simulated {
        true => Occupied::default(),
        false => {
            let owner = Owner::of(dir).map_err(ClaimError::Network)?;
            let network = setup::real_network(owner).map_err(ClaimError::Network)?;
            network.occupied().await.map_err(ClaimError::Network)?
        }
    };
    let facts = NodeFacts {
        foreign_net_ids: occupied.net_ids,
        foreign_subnets: occupied.subnets.into_iter().collect(),
        ..NodeFacts::default()
    };
    let store = Arc::new(SqliteStore::open(database).await?);
    let kept = Kept::load(store, spare_of(dir)).await?;
    let now = Clock::start().now_ms();
    let changed = kept.change(|desired, bad| {
        if let Some(key) = bad {
            return Err(ClaimError::BadRecord(key.to_owned()));
        }
        let made = admit::make_own(desired, &facts, now);
        let edit = made.map_err(|denial| ClaimError::Denied(Box::new(denial)))?;
        Ok((edit.desired, edit.notes))
    });
    let notes = match changed.await {
        Ok(notes) => notes,
        Err(ChangeError::Refused(refusal)) => return Err(refusal.into()),
        Err(ChangeError::Store(error)) => return Err(error.into()),
    };
    state_dir::make_own(dir, &registry).map_err(ClaimError::StateDir)?;
    Ok(Claimed { copied_from, notes })
}
