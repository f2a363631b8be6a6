//! Sessions of commands with everything that they print, in `tests/scenarios`: the real command line against an
//! agent in this process, on a simulated host, in virtual time.
//!
//! A scenario is plain text. `$ mvm …` is a command, `$ sleep 60` lets seconds pass, `$ cat > FILE <<END` writes a
//! file. Below a command stands what it printed: standard output as it is, standard error behind `! `, and an exit
//! code other than 0 as `= 3`. A line that begins with `#` says something. `UPDATE_SCENARIOS=1` writes anew what
//! commands print.

use std::ffi::OsString;
use std::fmt::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mvm_agent::{Clock, Host, NodeConfig, RunningNode};
use mvm_core::admit::Capacity;
use mvm_core::vmm::Accel;
use mvm_host::disks::SimDisks;
use mvm_host::images::SimImages;
use mvm_host::net::SimMachine;
use mvm_host::platform::MemoryGauge;
use mvm_host::state_dir::StateDir;
use mvm_host::vmm::sim::{SimTimes, SimVmm, SimWorld, guest_agents};
use mvm_store::MemoryStore;
use tempfile::TempDir;

use crate::cli;
use crate::error::Color;
use crate::output::capture;

/// Beyond the time of any machine that runs the tests, so that nothing has an age.
const START_UNIX_MS: u64 = 4_102_444_800_000;
const OPEN_FILES: u64 = 1_024;
/// Ports as scenarios write them; published are ones that are free on the machine.
const PORTS: [&str; 2] = ["47311", "47312"];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios")
}

/// A part of a scenario: what is said before a command, the command, and what it printed.
#[derive(Debug, Default, PartialEq)]
struct Part {
    said: String,
    command: String,
    printed: String,
}

fn parse(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut said = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("$ ") {
            let mut command = format!("{line}\n");
            if line.ends_with("<<END") {
                for line in lines.by_ref() {
                    command += &format!("{line}\n");
                    if line == "END" {
                        break;
                    }
                }
            }
            parts.push(Part { said: std::mem::take(&mut said), command, ..Part::default() });
        } else if line.starts_with('#') {
            said += &format!("{line}\n");
        } else if let Some(last) = parts.last_mut() {
            last.printed += &format!("{line}\n");
        }
    }
    for part in &mut parts {
        part.printed = format!("{}\n", part.printed.trim_end()).trim_start_matches('\n').to_owned();
    }
    parts
}

fn shown(parts: &[Part]) -> String {
    let parts = parts.iter().map(|Part { said, command, printed }| {
        let gap = if said.is_empty() { "" } else { "\n" };
        format!("{said}{gap}{command}{printed}")
    });
    parts.collect::<Vec<_>>().join("\n")
}

/// An agent on a simulated host of its own.
struct Fleet {
    dir: TempDir,
    /// Each of [`PORTS`] that the scenario writes, with the port that it stands for.
    ports: Vec<(&'static str, String)>,
    _node: Arc<RunningNode>,
}

impl Fleet {
    async fn start(scenario: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = NodeConfig {
            state_dir: dir.path().into(),
            capacity: Capacity { vcpus: 64, mem_mib: 65_536, disk_mib: 1 << 20 },
            max_starting: 8,
            chosen_because: "simulated".to_owned(),
            accel: Accel::Tcg,
            open_files: OPEN_FILES,
            clock: Clock::starting_at(START_UNIX_MS),
        };
        let world = SimWorld::new(SimTimes::default()).with_guests(guest_agents());
        let host = Host {
            vmm: Arc::new(SimVmm::new(world)),
            network: Arc::new(SimMachine::new().agent(dir.path())),
            images: Arc::new(SimImages::new(dir.path())),
            disks: Arc::new(SimDisks::new(dir.path())),
            memory: MemoryGauge::simulated(),
        };
        let ids = AtomicU32::new(1);
        let entropy = Arc::new(move || ids.fetch_add(1, Ordering::Relaxed));
        let store = Arc::new(MemoryStore::new());
        let node = Arc::new(RunningNode::start_with(config, host, store, entropy).await.unwrap());
        let listener = mvm_host::unix_socket::bind(&StateDir::from(dir.path()).socket()).unwrap();
        let server = node.clone();
        tokio::spawn(async move { server.listen(listener, OPEN_FILES).await });
        let written = PORTS.into_iter().filter(|port| scenario.contains(port));
        let listeners = written.map(|port| (port, TcpListener::bind("0.0.0.0:0").unwrap()));
        // All are held until each is another one.
        let listeners: Vec<_> = listeners.collect();
        let free = |listener: &TcpListener| listener.local_addr().unwrap().port().to_string();
        let ports = listeners.iter().map(|(port, listener)| (*port, free(listener))).collect();
        Self { dir, ports, _node: node }
    }

    /// Runs a command and returns what it printed, as a scenario has it.
    async fn run(&self, command: &str) -> String {
        let ports = self.ports.iter();
        let command = ports.fold(command.to_owned(), |text, (port, free)| text.replace(port, free));
        let mut words = command.split_whitespace().skip(1);
        match words.next() {
            Some("sleep") => {
                let seconds = words.next().unwrap().parse().unwrap();
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                String::new()
            }
            Some("cat") => {
                let name = words.nth(1).unwrap();
                let content = command.split_once('\n').unwrap().1.trim_end_matches("END\n");
                std::fs::write(self.file(name), content).unwrap();
                String::new()
            }
            Some("mvm") => self.mvm(words).await,
            other => panic!("{other:?} is no command of a scenario"),
        }
    }

    /// Files of a scenario lie outside of what the agent looks through.
    fn file(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join("scenario");
        std::fs::create_dir_all(&dir).unwrap();
        dir.join(name)
    }

    async fn mvm(&self, words: impl Iterator<Item = &str>) -> String {
        let of_word = |word: &str| match self.file(word) {
            file if file.is_file() => file.into_os_string(),
            _ => OsString::from(word),
        };
        let words: Vec<OsString> =
            std::iter::once("mvm".into()).chain(words.map(of_word)).collect();
        let (code, data, talk) = match cli::parse(words) {
            Err(error) => (error.exit_code(), String::new(), error.to_string()),
            Ok(cli) => {
                let (ui, captured) = capture::ui_with(cli.format());
                let state_dir = self.dir.path().to_owned();
                let (code, error) = match cli::ask(cli, state_dir, Rc::new(ui)).await {
                    Ok(code) => (code, String::new()),
                    Err(error) => (error.exit_code(), error.report(Color::Plain)),
                };
                (code.into(), captured.data(), captured.talk() + &error)
            }
        };
        let mut printed = data;
        talk.lines().for_each(|line| writeln!(printed, "! {line}").unwrap());
        if code != 0 {
            writeln!(printed, "= {code}").unwrap();
        }
        self.settled(&printed)
    }

    /// Without what differs from run to run: the directory, times, and blanks before the end of a line.
    fn settled(&self, printed: &str) -> String {
        let dir = self.dir.path().to_str().unwrap();
        let mut settled = String::new();
        let printed = printed.replace(dir, "/var/lib/mvm");
        let ports = self.ports.iter();
        let printed = ports.fold(printed, |text, (port, free)| text.replace(free, port));
        for line in printed.lines() {
            let words = line.split_inclusive(|c: char| !c.is_ascii_digit());
            let is_time = |word: &str| word.len() >= 13 && word.starts_with("41024");
            let words =
                words.map(|word| match word.trim_end_matches(|c: char| !c.is_ascii_digit()) {
                    digits if is_time(digits) => word.replace(digits, "<time>"),
                    _ => word.to_owned(),
                });
            writeln!(settled, "{}", words.collect::<String>().trim_end()).unwrap();
        }
        settled
    }
}

async fn check(name: &str) {
    let file = directory().join(format!("{name}.txt"));
    let text = std::fs::read_to_string(&file).unwrap();
    let fleet = Fleet::start(&text).await;
    let mut parts = parse(&text);
    let mut differences = String::new();
    for part in &mut parts {
        let printed = fleet.run(&part.command).await;
        if part.printed.trim_end() != printed.trim_end() {
            let Part { command, printed: before, .. } = &*part;
            write!(differences, "{command}--- expected\n{before}+++ printed\n{printed}\n").unwrap();
        }
        part.printed = printed;
    }
    let after = shown(&parts);
    if std::env::var_os("UPDATE_SCENARIOS").is_some() {
        std::fs::write(&file, after).unwrap();
        return;
    }
    let how = "UPDATE_SCENARIOS=1 writes what is printed now";
    assert!(differences.is_empty(), "{}: {how}\n{differences}", file.display());
    assert_eq!(text, after, "{}: {how}", file.display());
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                check(stringify!($name)).await;
            }
        )*

        #[test]
        fn each_scenario_is_run() {
            let files = std::fs::read_dir(directory()).unwrap();
            let mut files: Vec<String> =
                files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
            files.sort();
            let mut run = vec![$(concat!(stringify!($name), ".txt")),*];
            run.sort();
            assert_eq!(files, run);
        }
    };
}

scenarios! {
    data_disks,
    first_steps,
    forks,
    misspelt_names,
    outdated_instances,
    programs_read_it,
    published_ports,
    quotas,
    removal,
    sleep_and_wake,
    sleep_policies,
    stop_and_start,
}
