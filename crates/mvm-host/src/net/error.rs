//! Why a network operation failed.

use std::io;
use std::path::PathBuf;

use mvm_core::net::{NetId, NetworkConflict};

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A program that the network needs is not installed.
    #[error("`{program}` is not installed: `mvm bootstrap` installs what is missing")]
    MissingProgram {
        /// The program's name.
        program: &'static str,
    },
    /// A link has a name of ours but somebody else's mark, or none.
    #[error("the network link {link} belongs to {owner}")]
    Taken {
        /// The link's name.
        link: String,
        /// Its mark in words.
        owner: String,
    },
    /// Another agent on this machine has the net id.
    #[error("net id {} is used by the agent of {} (says {})", net_id.0, owner.display(), claim.display())]
    Claimed {
        /// The net id.
        net_id: NetId,
        /// The other agent's state directory.
        owner: PathBuf,
        /// The claim's path.
        claim: PathBuf,
    },
    /// The machine was not made to agree with anything yet, so that there is nothing to add to.
    #[error("the network was not set up since this agent started")]
    NotEnsured,
    /// The instance or tenant does not fit to what the agent has.
    #[error("the network does not fit this node")]
    Conflict(#[from] NetworkConflict),
    /// `nft` refused a batch.
    #[error("cannot {operation}: nft ended with {status}: {message}")]
    Nft {
        /// What was being done.
        operation: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        message: String,
    },
    /// `nft` printed something that is not its JSON.
    #[error("cannot understand what nft lists")]
    NftOutput(#[source] serde_json::Error),
    /// The operating system refused.
    #[error("cannot {operation}")]
    System {
        /// What was being done.
        operation: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Several things failed; the rest was done.
    #[error("{}", join(.0))]
    Several(Vec<NetworkError>),
}

impl NetworkError {
    /// Wraps the operating system's refusal of `operation`, which reads on from "cannot".
    pub(super) fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::System { operation, source }
    }

    /// One error for all of them, or none.
    pub(super) fn all(mut errors: Vec<Self>) -> Result<(), Self> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

/// Errors with their sources, since a list of errors has no one source.
fn join(errors: &[NetworkError]) -> String {
    let chain = |error: &NetworkError| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        text
    };
    errors.iter().map(chain).collect::<Vec<_>>().join("; ")
}
