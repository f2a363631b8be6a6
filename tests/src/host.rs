//! What of this machine belongs to one state directory, seen from outside.

use std::fs;
use std::path::{Path, PathBuf};

use mvm_host::net::{CLAIMS_DIR, Owner};
use serde_json::Value;

use crate::run::tool;

/// Whether a process has given back everything that it had: all its threads have ended.
pub fn has_ended(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The state follows the name, which is in parentheses; `Z` has nothing but its exit code.
    let is_zombie = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'));
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    is_zombie && threads <= 1
}

/// The process that started a process, if that is still there.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

/// A process of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its arguments, joined by blanks.
    pub command: String,
    /// Files that it holds open.
    pub files: Vec<PathBuf>,
}

/// Processes that hold files of this directory open, work in it or name it; never this one.
pub fn processes(dir: &Path) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    others.filter_map(|pid| process(pid).filter(|process| concerns(process, dir))).collect()
}

fn process(pid: u32) -> Option<Process> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let command = fs::read(proc.join("cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
    let links = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
    let links = links.map(|entry| entry.path()).chain([proc.join("cwd")]);
    let files = links.filter_map(|link| fs::read_link(link).ok()).collect();
    Some(Process { pid, command, files })
}

fn concerns(process: &Process, dir: &Path) -> bool {
    let is_named = dir.to_str().is_some_and(|dir| process.command.contains(dir));
    is_named || process.files.iter().any(|file| file.starts_with(dir))
}

/// Names of links that carry the state directory's mark.
pub fn links(owner: &Owner) -> Vec<String> {
    let links = tool("ip", &["-j", "-d", "link", "show"]).ok().json();
    let ours = |link: &&Value| link["ifalias"].as_str() == Some(owner.link_alias().as_str());
    let links = links.as_array().into_iter().flatten().filter(ours);
    links.filter_map(|link| Some(link["ifname"].as_str()?.to_owned())).collect()
}

/// Firewall tables of the state directory, as `FAMILY NAME`.
pub fn tables(owner: &Owner) -> Vec<(String, String)> {
    let tables = tool("nft", &["-j", "list", "tables"]).ok().json();
    let tables = tables["nftables"].as_array().into_iter().flatten();
    let named = tables.filter_map(|entry| {
        let table = entry.get("table")?;
        Some((table["family"].as_str()?.to_owned(), table["name"].as_str()?.to_owned()))
    });
    named.filter(|(_, name)| *name == owner.table().to_string()).collect()
}

/// Claims on net ids that point to the state directory.
pub fn claims(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(CLAIMS_DIR).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| fs::read_link(path).is_ok_and(|target| target == dir)).collect()
}

/// Mount points below the state directory.
pub fn mounts(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    points.filter(|point| point.starts_with(dir) && point != dir).collect()
}

/// The directories of instances.
pub fn instance_dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("instances")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The directories of tenants with data disks.
pub fn disk_dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("disks")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The machine's links and firewall rules that are no agent's, for comparison with later.
///
/// # Panics
/// The host cannot be examined.
pub fn foreign_network() -> Vec<String> {
    let links = tool("ip", &["-j", "-d", "link", "show"]).ok().json();
    let is_agents = |link: &Value| {
        let (name, alias) = (link["ifname"].as_str(), link["ifalias"].as_str());
        // A bridge has no alias for a moment after its creation.
        name.is_some_and(|name| name.starts_with("br-tenant-"))
            || alias.is_some_and(|alias| alias.starts_with("mvm:"))
    };
    let stable = ["ifname", "address", "flags", "mtu", "master", "ifalias"];
    let links = links.as_array().cloned().unwrap_or_default();
    let links = links.iter().filter(|link| !is_agents(link));
    let links = links.map(|link| stable.map(|field| format!("{field} {}", link[field])).join(", "));
    let rules = tool("nft", &["-s", "-j", "list", "ruleset"]).ok().json();
    let rules = rules["nftables"].as_array().cloned().unwrap_or_default();
    let is_foreign = |rule: &&Value| {
        let object = rule.as_object().and_then(|object| object.iter().next());
        object.is_some_and(|(kind, value)| {
            let field = if kind == "table" { "name" } else { "table" };
            kind != "metainfo" && !value[field].as_str().is_some_and(|name| name.starts_with("mvm"))
        })
    };
    links.chain(rules.iter().filter(is_foreign).map(Value::to_string)).collect()
}
