//! One state directory with all that runs for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_host::net::Owner;
use serde_json::Value;

use crate::run::{Output, Running};
use crate::wait::{LIMIT, until};
use crate::{binary, cleanup, host, seed};

/// What the command of a VMM has in it: a jailed Firecracker is at the root of its jail.
const VMMS: [&str; 2] = ["qemu-system-", "/firecracker --id"];
/// Which VMM and accelerator nodes use, where the tests are told: elsewhere what mvm chooses.
const VMM_VARIABLE: &str = "MVM_TEST_VMM";
const ACCEL_VARIABLE: &str = "MVM_TEST_ACCEL";
/// As much of a process's arguments as a message needs.
const COMMAND_CHARS: usize = 100;

/// A state directory of its own, ready to boot microVMs. Dropping it removes everything.
pub struct Node {
    dir: PathBuf,
    owner: Owner,
    vmm: Option<String>,
    variables: Vec<(&'static str, String)>,
}

impl Node {
    /// A node in a short temporary directory, or `None`, and the reason is printed.
    pub fn new() -> Option<Self> {
        if !can_run() {
            return None;
        }
        let dir = tempfile::Builder::new().prefix("mvm-e2e-").tempdir();
        Some(Self::in_dir(dir.expect("the temporary directory is writable").keep()))
    }

    /// A node in this directory, which is made, or `None`, and the reason is printed.
    pub fn at(dir: &Path) -> Option<Self> {
        can_run().then(|| {
            fs::create_dir_all(dir).expect("the directory can be made");
            Self::in_dir(dir.to_owned())
        })
    }

    fn in_dir(dir: PathBuf) -> Self {
        let dir = dir.canonicalize().expect("the directory exists");
        let owner = Owner::of(&dir).expect("the directory exists");
        let node =
            Self { dir, owner, vmm: std::env::var(VMM_VARIABLE).ok(), variables: Vec::new() };
        seed::fill(&node.dir);
        node
    }

    /// From now on every agent is started with this VMM.
    pub fn ask_for_vmm(&mut self, vmm: &str) {
        self.vmm = Some(vmm.to_owned());
    }

    /// From now on every command, and every agent that one starts, has this variable.
    pub fn set_variable(&mut self, name: &'static str, value: &str) {
        self.variables.push((name, value.to_owned()));
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whose the node's links and firewall tables are.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The program with these arguments, for this node, to be changed and started by the caller.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary::mvm());
        command.args(args).env("MVM_STATE_DIR", &self.dir).current_dir(binary::repository());
        for name in ["MVM_LOG", "MVM_VMM", "MVM_ACCEL", "MVM_KEEP_FREE"] {
            command.env_remove(name);
        }
        command.envs(self.vmm.as_ref().map(|vmm| ("MVM_VMM", vmm)));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.envs(std::env::var(ACCEL_VARIABLE).ok().map(|accel| ("MVM_ACCEL", accel)));
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// It takes longer than [`LIMIT`].
    #[track_caller]
    pub fn mvm(&self, args: &[&str]) -> Output {
        self.spawn(args).wait(LIMIT)
    }

    /// Runs a command with this standard input to its end.
    ///
    /// # Panics
    /// It takes longer than [`LIMIT`].
    #[track_caller]
    pub fn mvm_with_input(&self, args: &[&str], input: &[u8]) -> Output {
        Running::start(self.command(args), Some(input)).wait(LIMIT)
    }

    /// Starts a command.
    ///
    /// # Panics
    /// It does not start.
    #[track_caller]
    pub fn spawn(&self, args: &[&str]) -> Running {
        Running::start(self.command(args), None)
    }

    /// Runs a command that must succeed and returns its standard output.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.mvm(args).ok().stdout
    }

    /// Runs a command that must succeed with `-o json`.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        self.mvm(&[&["-o", "json"], args].concat()).ok().json()
    }

    /// All instances of the node.
    ///
    /// # Panics
    /// They cannot be listed.
    #[track_caller]
    pub fn instances(&self) -> Vec<Value> {
        self.json(&["ps", "-a"]).as_array().cloned().expect("a list")
    }

    /// One instance.
    ///
    /// # Panics
    /// It is not there.
    #[track_caller]
    pub fn instance(&self, path: &str) -> Value {
        let instances = self.instances();
        let found = instances.iter().find(|instance| instance["path"] == path).cloned();
        found.unwrap_or_else(|| panic!("{path} is not among {instances:#?}"))
    }

    /// Waits until an instance is in this state.
    ///
    /// # Panics
    /// It is not within [`LIMIT`].
    #[track_caller]
    pub fn until_state(&self, path: &str, state: &str) -> Value {
        until(&format!("{path} is {state}"), LIMIT, || {
            Some(self.instance(path)).filter(|instance| instance["state"] == state)
        })
    }

    /// Runs a shell command in a guest that must succeed and returns what it prints, trimmed.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn guest(&self, selector: &str, script: &str) -> String {
        self.ok(&["exec", selector, "--", "sh", "-c", script]).trim().to_owned()
    }

    /// Starts a program in a guest that ignores the request to end.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn start_deaf_program(&self, selector: &str) {
        let deaf = "setsid sh -c \"trap '' TERM; touch /tmp/deaf; while :; do sleep 1; done\"";
        let is_deaf = "while [ ! -e /tmp/deaf ]; do sleep 0.05; done";
        self.guest(selector, &format!("{deaf} >/dev/null 2>&1 & {is_deaf}"));
    }

    /// Makes a tenant and a pool of small microVMs with default settings.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn small_pool(&self, pool: &str, options: &[&str]) {
        let (tenant, _) = pool.split_once('/').expect("TENANT/POOL");
        if self.mvm(&["tenant", "info", tenant]).code != 0 {
            self.ok(&["tenant", "create", tenant]);
        }
        self.ok(&[&["pool", "create", pool, "--mem", "192M"], options].concat());
    }

    /// Creates and starts one instance of a pool and returns its path.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn boot(&self, pool: &str) -> String {
        let created = self.json(&["instance", "create", pool, "--start"]);
        let text = created.to_string();
        let start = text.find(&format!("{pool}/i-"));
        let path = start.and_then(|start| text[start..].split('"').next());
        path.unwrap_or_else(|| panic!("no instance of {pool} in {text}")).to_owned()
    }

    /// Agents that hold this state directory.
    pub fn agent_pids(&self) -> Vec<u32> {
        let processes = host::processes(&self.dir).into_iter();
        let agents = processes.filter(|process| cleanup::holds_lock(process, &self.dir));
        let pids: Vec<u32> = agents.map(|process| process.pid).collect();
        // What an agent starts has its files until it is the program that it is to be, or has ended by now.
        let is_agent = |pid: &u32| host::parent(*pid).is_some_and(|it| !pids.contains(&it));
        pids.iter().copied().filter(is_agent).collect()
    }

    /// The agent, if one runs.
    ///
    /// # Panics
    /// Several do.
    #[track_caller]
    pub fn agent_pid(&self) -> Option<u32> {
        let pids = self.agent_pids();
        assert!(pids.len() <= 1, "several agents: {pids:?}");
        pids.first().copied()
    }

    /// Ends the agent with SIGKILL, if one runs, and waits until it is gone.
    ///
    /// # Panics
    /// It does not go.
    pub fn kill_agent(&self) {
        let limit = Duration::from_secs(10);
        for pid in self.agent_pids() {
            kill(pid, rustix::process::Signal::KILL);
            // It lets go of the lock before it lets go of its socket.
            until("the agent is gone", limit, || host::has_ended(pid).then_some(()));
        }
    }

    /// The node's VMMs, sorted.
    pub fn vmm_pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = host::processes(&self.dir)
            .into_iter()
            .filter(|process| VMMS.iter().any(|vmm| process.command.contains(vmm)))
            .map(|process| process.pid)
            .collect();
        pids.sort_unstable();
        pids
    }

    /// What is on the host of this node's tenants and instances, one line each; its agent and its
    /// shared files are no leftovers.
    ///
    /// # Panics
    /// The host cannot be examined.
    pub fn leftovers(&self) -> Vec<String> {
        let processes = host::processes(&self.dir).into_iter();
        let processes = processes.filter(|process| !cleanup::holds_lock(process, &self.dir));
        let line = |process: host::Process| {
            let command: String = process.command.chars().take(COMMAND_CHARS).collect();
            format!("process {} {command}", process.pid)
        };
        let mut left: Vec<String> = processes.map(line).collect();
        left.extend(host::links(&self.owner).into_iter().map(|name| format!("link {name}")));
        let tables = host::tables(&self.owner).into_iter();
        left.extend(tables.map(|(family, name)| format!("table {family} {name}")));
        let paths = |kind: &str, paths: Vec<PathBuf>| {
            let lines = paths.iter().map(|path| format!("{kind} {}", path.display()));
            lines.collect::<Vec<_>>()
        };
        left.extend(paths("claim", host::claims(&self.dir)));
        left.extend(paths("mount", host::mounts(&self.dir)));
        left.extend(paths("directory", host::instance_dirs(&self.dir)));
        left.extend(paths("directory", host::disk_dirs(&self.dir)));
        left
    }

    /// The agent's log.
    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("── agent.log of {}\n{}", self.dir.display(), self.agent_log());
        }
        cleanup::remove_all(&self.dir, &self.owner);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Sends a signal to a process.
pub fn kill(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

fn can_run() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: microVMs and their networks need root");
        return false;
    }
    true
}
