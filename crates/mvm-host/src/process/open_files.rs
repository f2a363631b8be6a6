//! How many files the agent may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as are ever asked for. What the agent starts inherits the limit, and some programs go through
/// all numbers up to it.
const WANTED: u64 = 65_536;

/// Raises the limit of open files as far as the administrator lets it go, and tells it. A soft limit
/// is for programs that wait with `select`; a service that has a connection for each of its clients
/// is expected to do this.
pub fn raise_open_files() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let now = current.unwrap_or(WANTED);
    let raised = maximum.unwrap_or(WANTED).min(WANTED);
    if raised <= now {
        return now;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }) {
        Ok(()) => raised,
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            now
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_goes_up_to_the_hard_one() {
        let limit = raise_open_files();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, Some(limit));
        assert!(limit >= maximum.unwrap_or(WANTED).min(WANTED));
    }
}
