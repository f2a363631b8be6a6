//! The programs of a simulated guest.

use std::time::Duration;

use mvm_core::guest::{ErrorKind, ExecRequest, GuestError};

use super::{KERNEL, SimGuest};

/// What a simulated guest shows as the host key of an SSH server that it does not have.
const HOST_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g";

/// What a program does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// Writes this and exits.
    Print { stdout: String, code: i32 },
    /// Exits after a time.
    Sleep(Duration),
    /// Copies standard input to standard output.
    Cat,
}

/// Finds the program that a request names.
pub(super) fn find(request: &ExecRequest, guest: &SimGuest) -> Result<Program, GuestError> {
    let argv: Vec<&str> = request.argv.iter().map(String::as_str).collect();
    let Some((name, arguments)) = argv.split_first() else {
        let message = "the command is empty".into();
        return Err(GuestError { kind: ErrorKind::Invalid, message });
    };
    let print = |stdout: String| Program::Print { stdout, code: 0 };
    let exit = |code: &str| Program::Print {
        stdout: String::new(),
        code: code.parse::<i32>().map_or(2, |code| code & 0xff),
    };
    Ok(match (*name, arguments) {
        ("echo", words) => print(words.join(" ") + "\n"),
        ("uname", ["-sr"]) => print(format!("Linux {KERNEL}\n")),
        ("hostname", []) => {
            print(guest.configuration().map(|known| known.hostname).unwrap_or_default() + "\n")
        }
        ("env", []) => {
            let lines = request.env.iter().map(|(name, value)| format!("{name}={value}\n"));
            print(lines.collect())
        }
        ("cat", []) if request.stdin => Program::Cat,
        ("busy", [switch]) => {
            guest.state().load.is_busy = *switch == "on";
            print(String::new())
        }
        ("compute", [ms]) => {
            guest.state().load.cpu_ms += ms.parse().unwrap_or(0);
            print(String::new())
        }
        ("talk", [bytes]) => {
            guest.state().load.net_bytes += bytes.parse().unwrap_or(0);
            print(String::new())
        }
        ("date", ["+%s"]) => print(format!("{}\n", guest.read_clock().unix_ns / 1_000_000_000)),
        ("date", ["-s", time]) => {
            let seconds: u64 = time.strip_prefix('@').and_then(|s| s.parse().ok()).unwrap_or(0);
            guest.set_clock(seconds.saturating_mul(1_000_000_000));
            print(String::new())
        }
        ("ntpd", []) => {
            guest.state().clock.is_disciplined = true;
            print(String::new())
        }
        ("prepare", [seconds]) => {
            let time = seconds.parse().map(Duration::from_secs);
            guest.state().load.hooks = time.unwrap_or_default();
            print(String::new())
        }
        ("silence", []) => {
            guest.state().load.is_silent = true;
            print(String::new())
        }
        ("write", [path, text]) => {
            guest.state().files.write(path, text);
            print(String::new())
        }
        ("read", [path]) => {
            let state = guest.state();
            let disks = state.configuration.as_ref().map(|known| known.disks.as_slice());
            match state.files.read(path, disks.unwrap_or_default()) {
                Some(text) => print(text),
                None => exit("1"),
            }
        }
        ("sync", []) => {
            guest.sync();
            print(String::new())
        }
        ("linger", [seconds]) => {
            let time = seconds.parse().map(Duration::from_secs);
            guest.state().lingers = time.unwrap_or_default();
            print(String::new())
        }
        ("ssh-prepare", [_key]) if request.builtin => print(format!("{HOST_KEY}\n")),
        ("true" | "cat", []) => print(String::new()),
        ("false", []) => exit("1"),
        ("exit", [code]) => exit(code),
        ("sh", ["-c", script]) if script.starts_with("exit ") => exit(script[5..].trim()),
        ("sleep", [seconds]) => match seconds.parse().map(Duration::try_from_secs_f64) {
            Ok(Ok(time)) => Program::Sleep(time),
            _ => exit("1"),
        },
        _ => {
            let message = format!("`{name}` was not found in PATH (the simulated guest's)");
            return Err(GuestError { kind: ErrorKind::NotFound, message });
        }
    })
}
