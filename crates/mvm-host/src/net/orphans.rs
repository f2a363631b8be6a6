//! What state directories that are gone have left on this machine, and its removal.
//!
//! An object is a leftover only if it can be proved: its mark, or its claim, is that of a state directory which
//! the machine's registry knows and which is no longer there. What cannot be told is somebody's.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mvm_core::net::{NetId, NodeNetwork, StateDirId, VMM_UID_BASE};
use mvm_core::nft::render_full;
use serde::Serialize;

use super::claims::{CLAIMS_DIR, Claims};
use super::links::{Link, LinkKind, Links};
use super::owner::{digest_of, state_dir_exists, table_of};
use super::{NetworkError, Registry, nft};
use crate::process::{Process, ProcessIdentity};
use crate::state_dir;

/// What a leftover is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OrphanKind {
    /// A microVM's process, all of whose files are deleted.
    Process,
    /// An instance's tap.
    Tap,
    /// A tenant's bridge.
    Bridge,
    /// The firewall's tables.
    Firewall,
    /// A reserved net id.
    Claim,
}

/// One leftover.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Orphan {
    /// What it is.
    pub kind: OrphanKind,
    /// Its name: of a process the number, of a claim the net id.
    pub name: String,
    /// The state directory that is gone.
    pub state_dir: PathBuf,
}

/// Everything that is left of state directories that are gone, in the order of removal.
///
/// # Errors
/// The machine's links, firewall or claims cannot be read.
pub async fn orphans() -> Result<Vec<Orphan>, NetworkError> {
    orphans_of(Path::new(CLAIMS_DIR)).await
}

/// The same, of the state directories whose agents have their claims here.
///
/// # Errors
/// Those of [`orphans`].
pub async fn orphans_of(claims_dir: &Path) -> Result<Vec<Orphan>, NetworkError> {
    Leftovers::find(claims_dir).await.map(|found| found.all)
}

/// Removes what is left of state directories that are gone, and returns what was removed.
///
/// # Errors
/// It goes on past errors and reports all of them.
pub async fn prune_orphans() -> Result<Vec<Orphan>, NetworkError> {
    prune_orphans_of(Path::new(CLAIMS_DIR)).await
}

/// The leftovers that the claims of a directory prove.
struct Leftovers {
    gone: BTreeMap<StateDirId, PathBuf>,
    all: Vec<Orphan>,
}

impl Leftovers {
    async fn find(claims_dir: &Path) -> Result<Self, NetworkError> {
        let claims = Claims::new(claims_dir.to_owned(), Path::new(""));
        let gone = gone(claims_dir, &claims)?;
        let mut all = Vec::new();
        if gone.is_empty() {
            return Ok(Self { gone, all });
        }
        let orphan = |kind, name: String, state_dir: &Path| {
            let state_dir = state_dir.to_owned();
            Orphan { kind, name, state_dir }
        };
        for (pid, state_dir) in processes(&gone) {
            all.push(orphan(OrphanKind::Process, pid.to_string(), &state_dir));
        }
        for link in Links::open()?.all().await? {
            if let Some((kind, state_dir)) = owner_of(&link, &gone) {
                all.push(orphan(kind, link.name, state_dir));
            }
        }
        let tables = nft::tables().await?;
        for (mark, state_dir) in &gone {
            let table = table_of(state_dir, *mark);
            if tables.contains(table.as_str()) {
                all.push(orphan(OrphanKind::Firewall, table.as_str().to_owned(), state_dir));
            }
        }
        for (net_id, state_dir) in claims.void()? {
            all.push(orphan(OrphanKind::Claim, net_id.0.to_string(), &state_dir));
        }
        all.sort();
        Ok(Self { gone, all })
    }
}

/// The same, of the state directories whose agents have their claims here.
///
/// # Errors
/// Those of [`prune_orphans`].
pub async fn prune_orphans_of(claims_dir: &Path) -> Result<Vec<Orphan>, NetworkError> {
    let Leftovers { gone, all } = Leftovers::find(claims_dir).await?;
    let claims = Claims::new(claims_dir.to_owned(), Path::new(""));
    let links = Links::open()?;
    let (mut removed, mut errors) = (Vec::new(), Vec::new());
    for orphan in all {
        match remove(&orphan, &links, &claims, &gone).await {
            Ok(()) => removed.push(orphan),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() {
        // Nothing has these marks any more.
        let registry = Registry::at(claims_dir);
        for mark in gone.keys() {
            let forgotten = registry.forget(*mark);
            errors.extend(forgotten.map_err(NetworkError::system("forget a mark")).err());
        }
    }
    NetworkError::all(errors).map(|()| removed)
}

async fn remove(
    orphan: &Orphan,
    links: &Links,
    claims: &Claims,
    gone: &BTreeMap<StateDirId, PathBuf>,
) -> Result<(), NetworkError> {
    match orphan.kind {
        OrphanKind::Process => end(orphan).await.map_err(NetworkError::system(format!(
            "end process {} of {}",
            orphan.name,
            orphan.state_dir.display()
        ))),
        OrphanKind::Tap | OrphanKind::Bridge => match links.get(&orphan.name).await? {
            // Looked at anew: the name may be somebody else's by now.
            Some(link) if owner_of(&link, gone).is_some() => links.delete(&link).await,
            _ => Ok(()),
        },
        OrphanKind::Firewall => {
            let marks = gone.iter().map(|(mark, path)| table_of(path, *mark));
            for table in marks.filter(|table| table.as_str() == orphan.name) {
                nft::apply(render_full(&table, &NodeNetwork::default())).await?;
            }
            Ok(())
        }
        OrphanKind::Claim => match orphan.name.parse() {
            Ok(net_id) => claims.release_void(NetId(net_id)),
            Err(_) => Ok(()),
        },
    }
}

/// The state directories that are known to have been there and are not, by their marks.
fn gone(claims_dir: &Path, claims: &Claims) -> Result<BTreeMap<StateDirId, PathBuf>, NetworkError> {
    let registered = Registry::at(claims_dir).all();
    let mut known = registered.map_err(NetworkError::system("read the registry of marks"))?;
    // Of agents of earlier versions, which register nothing.
    for (_, path) in claims.void()? {
        known.entry(digest_of(&path)).or_insert(path);
    }
    known.retain(|mark, path| is_gone(*mark, path));
    Ok(known)
}

/// Whether the state directory with this mark is neither there nor has been moved to where it is known.
fn is_gone(mark: StateDirId, path: &Path) -> bool {
    if !state_dir_exists(path) {
        return true;
    }
    // Another one may have taken its place.
    state_dir::mark_at(path).is_ok_and(|found| found.is_some_and(|found| found != mark))
}

fn owner_of<'a>(
    link: &Link,
    gone: &'a BTreeMap<StateDirId, PathBuf>,
) -> Option<(OrphanKind, &'a Path)> {
    let alias = link.alias.as_deref()?;
    let (_, path) = gone.iter().find(|(mark, _)| mark.link_alias() == alias)?;
    let kind = match link.kind {
        LinkKind::Bridge { .. } => OrphanKind::Bridge,
        LinkKind::Tap { .. } => OrphanKind::Tap,
        LinkKind::Other => return None,
    };
    Some((kind, path))
}

/// Processes of VMMs' users that have deleted files of such a directory open.
fn processes(gone: &BTreeMap<StateDirId, PathBuf>) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.filter_map(|pid| {
        let mut dirs = gone.values();
        let state_dir = dirs.find(|dir| !state_dir_exists(dir) && holds_deleted(pid, dir))?;
        Some((pid, state_dir.clone()))
    });
    found.collect()
}

fn holds_deleted(pid: u32, state_dir: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let is_vmm =
        |metadata: fs::Metadata| std::os::unix::fs::MetadataExt::uid(&metadata) >= VMM_UID_BASE;
    if !process.metadata().is_ok_and(is_vmm) {
        return false;
    }
    let fds = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    targets.any(|target| {
        target.starts_with(state_dir)
            && target.as_os_str().as_encoded_bytes().ends_with(b" (deleted)")
    })
}

async fn end(orphan: &Orphan) -> io::Result<()> {
    let Ok(pid) = orphan.name.parse() else { return Ok(()) };
    let Ok(identity) = ProcessIdentity::of(pid) else { return Ok(()) };
    match Process::adopt(identity)? {
        // Asked once more, now that the number is pinned.
        Some(process) if holds_deleted(pid, &orphan.state_dir) => process.kill().await,
        _ => Ok(()),
    }
}
