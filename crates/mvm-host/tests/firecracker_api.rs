//! Conversations with Firecracker's API, recorded from a real one. They are held with the program
//! that stands in for it always, and with the real one wherever there is one and `/dev/kvm`: what
//! the driver is tested against everywhere is what it meets.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod elf_support;
mod stand_in_program;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mvm_host::process::find_program;
use mvm_host::vmm::firecracker::FirecrackerConfig;
use serde::Deserialize;

const RECORDED: &str = include_str!("firecracker_api/conversations.json");
/// What the answers have in place of the version.
const VERSION: &str = "VERSION";
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recorded {
    /// The version that it was recorded from.
    recorded_from: String,
    conversations: Vec<Conversation>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Conversation {
    about: String,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Step {
    Ask(Ask),
    Then { then: Then },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    ask: String,
    #[serde(default)]
    body: String,
    status: u16,
    #[serde(default)]
    answer: String,
    /// The exit code of the process, which ends.
    ends_with: Option<i32>,
}

#[derive(Deserialize)]
enum Then {
    #[serde(rename = "a new process")]
    Again,
    #[serde(rename = "a new process, with half of the state")]
    AgainWithHalf,
}

#[test]
fn the_stand_in_answers_as_was_recorded() {
    hold_all(stand_in_program::path().unwrap(), "1.15.1");
}

#[test]
fn the_real_one_answers_as_was_recorded() {
    let program = FirecrackerConfig::from_environment().program;
    let program = find_program(&program).or_else(|| program.is_file().then_some(program));
    let Some(program) = program else {
        return eprintln!("skipped: there is no firecracker: MVM_FIRECRACKER names one");
    };
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return eprintln!("skipped: /dev/kvm cannot be opened");
    }
    let said = Command::new(&program).arg("--version").output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    let version = said.lines().find_map(|line| line.strip_prefix("Firecracker v")).unwrap();
    hold_all(&program, version);
}

/// Texts may change from one version to the next; statuses and ends are what the driver relies on.
fn hold_all(program: &Path, version: &str) {
    let recorded: Recorded = serde_json::from_str(RECORDED).unwrap();
    let with_texts = recorded.recorded_from == version;
    for conversation in &recorded.conversations {
        let mut party = Party::new(program);
        for (number, step) in conversation.steps.iter().enumerate() {
            let ask = match step {
                Step::Ask(ask) => ask,
                Step::Then { then } => {
                    party.start_again(then);
                    continue;
                }
            };
            let place = format!("{}, step {number}: {} {}", conversation.about, ask.ask, ask.body);
            let (status, answer) = party.ask(ask);
            assert_eq!(status, ask.status, "{place}: {answer}");
            if with_texts {
                assert_eq!(
                    parsed(&answer.replace(version, VERSION)),
                    parsed(&ask.answer),
                    "{place}"
                );
            }
            if let Some(code) = ask.ends_with {
                assert_eq!(party.end(), Some(code), "{place}");
            }
        }
    }
}

/// The meaning of an answer; some are no JSON.
fn parsed(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

/// A program that halts for ever.
const HALTS: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// A Firecracker, without a jail, in a directory with files to name.
struct Party {
    program: PathBuf,
    dir: tempfile::TempDir,
    process: Child,
}

impl Party {
    fn new(program: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), elf_support::kernel(&HALTS)).unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
        File::create(dir.path().join("metrics")).unwrap();
        let process = start(program, dir.path());
        Self { program: program.to_owned(), dir, process }
    }

    fn start_again(&mut self, then: &Then) {
        self.stop();
        let path = |name: &str| self.dir.path().join(name);
        if let Then::AgainWithHalf = then {
            let state = File::options().write(true).open(path("state")).unwrap();
            state.set_len(state.metadata().unwrap().len() / 2).unwrap();
        }
        for socket in ["api.sock", "v.sock"] {
            // Not every conversation has made it.
            let _ = std::fs::remove_file(path(socket));
        }
        self.process = start(&self.program, self.dir.path());
    }

    /// Makes one request on a connection of its own, and reads its answer.
    fn ask(&self, ask: &Ask) -> (u16, String) {
        let mut stream = UnixStream::connect(self.dir.path().join("api.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (length, body) = (ask.body.len(), &ask.body);
        let head = format!("{} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}", ask.ask);
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
        stream.read_exact(&mut body).unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), String::from_utf8(body).unwrap())
    }

    /// The exit code of a process that ends by itself.
    fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts a program, and waits until it serves its API.
fn start(program: &Path, dir: &Path) -> Child {
    let process = Command::new(program)
        .args(["--id", "recorded", "--api-sock", "api.sock"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(dir.join("api.sock")).is_err() {
        assert!(Instant::now() < deadline, "its API is not served");
        std::thread::sleep(Duration::from_millis(5));
    }
    process
}
