//! Machine-wide claims on net ids, so that two agents never pick the same one.
//!
//! A claim is a symbolic link `<net id> -> <state directory>` in a directory that all agents of
//! the machine share. It outlives a reboot: a tenant keeps its net id while its agent has not started yet. A
//! claim whose state directory is gone is void. A lock on the directory makes checking and changing
//! a claim one step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use mvm_core::net::NetId;
use rustix::fs::{FlockOperation, flock};

use super::NetworkError;
use super::owner::state_dir_exists;

/// Where the agents of a machine keep their claims.
pub const CLAIMS_DIR: &str = "/var/lib/mvm-claims";
/// Where agents of earlier versions keep theirs, which are respected.
const EARLIER_CLAIMS_DIR: &str = "/run/mvm/net";

/// The claims directory, as one agent uses it. All methods block briefly.
#[derive(Debug, Clone)]
pub(super) struct Claims {
    dir: PathBuf,
    /// Another directory, whose claims count too.
    earlier: Option<PathBuf>,
    state_dir: PathBuf,
}

impl Claims {
    pub(super) fn new(dir: PathBuf, state_dir: &Path) -> Self {
        let earlier = (dir == Path::new(CLAIMS_DIR)).then(|| EARLIER_CLAIMS_DIR.into());
        Self { dir, earlier, state_dir: state_dir.to_owned() }
    }

    /// Claims a net id for this agent, or confirms that it has it.
    pub(super) fn claim(&self, net_id: NetId) -> Result<(), NetworkError> {
        let _lock = self.lock()?;
        for dir in self.dirs() {
            let claim = path_in(dir, net_id);
            match holder_of(&claim)? {
                Some(owner) if owner != self.state_dir && state_dir_exists(&owner) => {
                    return Err(NetworkError::Claimed { net_id, owner, claim });
                }
                _ => {}
            }
        }
        let claim = path_in(&self.dir, net_id);
        match holder_of(&claim)? {
            Some(owner) if owner == self.state_dir => return Ok(()),
            Some(_) => remove(&claim)?,
            None => {}
        }
        std::os::unix::fs::symlink(&self.state_dir, &claim)
            .map_err(NetworkError::system(format!("create the claim {}", claim.display())))
    }

    /// Gives up a claim of this agent; others' stay.
    pub(super) fn release(&self, net_id: NetId) -> Result<(), NetworkError> {
        let _lock = self.lock()?;
        for claim in self.dirs().map(|dir| path_in(dir, net_id)) {
            if holder_of(&claim)?.is_some_and(|owner| owner == self.state_dir) {
                remove(&claim)?;
            }
        }
        Ok(())
    }

    /// All claims that are not void, with their holders.
    pub(super) fn all(&self) -> Result<BTreeMap<NetId, PathBuf>, NetworkError> {
        let mut claims = self.by_net_id()?;
        claims.retain(|_, owner| state_dir_exists(owner));
        Ok(claims)
    }

    /// All claims. Of two of one net id, the one whose holder is there counts.
    fn by_net_id(&self) -> Result<BTreeMap<NetId, PathBuf>, NetworkError> {
        let mut claims = BTreeMap::<NetId, PathBuf>::new();
        for dir in self.dirs() {
            let failed = |error| {
                NetworkError::system(format!("read the claims directory {}", dir.display()))(error)
            };
            let entries = match fs::read_dir(dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            for entry in entries {
                let name = entry.map_err(failed)?.file_name();
                let Some(net_id) = name.to_str().and_then(|name| name.parse().ok()).map(NetId)
                else {
                    continue;
                };
                if let Some(owner) = holder_of(&path_in(dir, net_id))?
                    && claims.get(&net_id).is_none_or(|before| !state_dir_exists(before))
                {
                    claims.insert(net_id, owner);
                }
            }
        }
        Ok(claims)
    }

    /// Claims whose state directory is gone, with where it was.
    pub(super) fn void(&self) -> Result<BTreeMap<NetId, PathBuf>, NetworkError> {
        let mut claims = self.by_net_id()?;
        claims.retain(|_, owner| !state_dir_exists(owner));
        Ok(claims)
    }

    /// Removes a claim whose state directory is gone.
    pub(super) fn release_void(&self, net_id: NetId) -> Result<(), NetworkError> {
        let _lock = self.lock()?;
        for claim in self.dirs().map(|dir| path_in(dir, net_id)) {
            if holder_of(&claim)?.is_some_and(|owner| !state_dir_exists(&owner)) {
                remove(&claim)?;
            }
        }
        Ok(())
    }

    /// Whether this agent has the claim.
    pub(super) fn is_ours(&self, net_id: NetId) -> Result<bool, NetworkError> {
        let holder = holder_of(&path_in(&self.dir, net_id))?;
        Ok(holder.is_some_and(|owner| owner == self.state_dir))
    }

    fn dirs(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.dir), self.earlier.as_ref()].into_iter().flatten().map(PathBuf::as_path)
    }

    /// Holds the directory's lock until the returned file is dropped.
    fn lock(&self) -> Result<File, NetworkError> {
        let failed = |error: io::Error| {
            NetworkError::system(format!("lock the claims directory {}", self.dir.display()))(error)
        };
        fs::create_dir_all(&self.dir).map_err(failed)?;
        let dir = File::open(&self.dir).map_err(failed)?;
        flock(&dir, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        Ok(dir)
    }
}

fn path_in(dir: &Path, net_id: NetId) -> PathBuf {
    dir.join(net_id.0.to_string())
}

fn holder_of(claim: &Path) -> Result<Option<PathBuf>, NetworkError> {
    match fs::read_link(claim) {
        Ok(owner) => Ok(Some(owner)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(NetworkError::system(format!("read the claim {}", claim.display()))(error))
        }
    }
}

fn remove(claim: &Path) -> Result<(), NetworkError> {
    fs::remove_file(claim)
        .map_err(NetworkError::system(format!("remove the claim {}", claim.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        root: tempfile::TempDir,
    }

    impl Machine {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap() }
        }

        fn agent(&self, name: &str) -> Claims {
            let state_dir = self.root.path().join(name);
            fs::create_dir_all(&state_dir).unwrap();
            Claims::new(self.root.path().join("run/claims"), &state_dir)
        }
    }

    #[test]
    fn a_net_id_is_claimed_by_one_agent_until_it_is_released() {
        let machine = Machine::new();
        let (a, b) = (machine.agent("a"), machine.agent("b"));
        a.claim(NetId(3)).unwrap();
        a.claim(NetId(3)).unwrap();
        let refused = b.claim(NetId(3)).unwrap_err();
        assert!(matches!(&refused, NetworkError::Claimed { owner, .. } if *owner == a.state_dir));
        b.release(NetId(3)).unwrap();
        assert_eq!(b.all().unwrap(), BTreeMap::from([(NetId(3), a.state_dir.clone())]));
        a.release(NetId(3)).unwrap();
        b.claim(NetId(3)).unwrap();
    }

    #[test]
    fn claims_of_an_earlier_version_count_and_are_given_up_too() {
        let machine = Machine::new();
        let earlier = machine.root.path().join("run/earlier");
        let with_earlier = |claims: Claims| Claims { earlier: Some(earlier.clone()), ..claims };
        let (a, b) = (with_earlier(machine.agent("a")), with_earlier(machine.agent("b")));
        fs::create_dir_all(&earlier).unwrap();
        std::os::unix::fs::symlink(&a.state_dir, earlier.join("3")).unwrap();
        assert!(matches!(b.claim(NetId(3)), Err(NetworkError::Claimed { .. })));
        assert_eq!(b.all().unwrap(), BTreeMap::from([(NetId(3), a.state_dir.clone())]));
        a.claim(NetId(3)).unwrap();
        a.release(NetId(3)).unwrap();
        b.claim(NetId(3)).unwrap();
    }

    #[test]
    fn a_claim_is_void_once_its_state_directory_is_gone() {
        let machine = Machine::new();
        let (a, b) = (machine.agent("a"), machine.agent("b"));
        a.claim(NetId(3)).unwrap();
        fs::remove_dir(&a.state_dir).unwrap();
        assert!(b.all().unwrap().is_empty());
        b.claim(NetId(3)).unwrap();
        assert!(b.is_ours(NetId(3)).unwrap());
    }

    #[test]
    fn of_many_agents_that_claim_a_void_net_id_at_once_one_gets_it() {
        let machine = Machine::new();
        for net_id in (1..50).map(NetId) {
            let gone = machine.agent("gone");
            gone.claim(net_id).unwrap();
            fs::remove_dir(&gone.state_dir).unwrap();
            let agents = ["a", "b", "c", "d"].map(|name| machine.agent(name));
            let winners = std::thread::scope(|scope| {
                let race =
                    agents.each_ref().map(|agent| scope.spawn(|| agent.claim(net_id).is_ok()));
                race.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
            });
            assert_eq!(winners, 1);
        }
    }
}
