//! Makes the machine and puts mvm's Linux program into it. What is there already stays, and the
//! program is brought up to date; doing it again is fine.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::machine::{self, Arch, Computer};
use crate::{Error, is_installed, limactl, run_failed};

/// Names mvm's Linux program, to be put into the machine.
pub(crate) const BINARY_VARIABLE: &str = "MVM_LINUX_BINARY";
/// Where the program is in the machine, and where it lies before it is installed.
const INSTALLED: &str = "/usr/local/bin/mvm";
const UPLOADED: &str = "/tmp/mvm.new";

/// Makes the machine, starts it and brings its mvm up to date.
pub(crate) fn ensure_machine(name: &str) -> Result<(), Error> {
    if !is_installed()? {
        return Err(Error::NoLima);
    }
    let binary = binary()?;
    let arch = arch_of(&binary)?;
    if machine::exists(name) {
        say(&format!("starting the Lima machine {name}"));
        step(["start", "--tty=false", name])?;
    } else {
        say(&format!("making the Lima machine {name}; this takes some minutes"));
        make(name, &machine::template(&computer(), arch))?;
    }
    say(&format!("installing {} in it", binary.display()));
    let there = format!("{name}:{UPLOADED}");
    step([OsStr::new("copy"), binary.as_os_str(), there.as_ref()])?;
    let install = ["sudo", "install", "-m", "0755", UPLOADED, INSTALLED];
    step(["shell", "--workdir", "/", name].into_iter().chain(install))
}

fn make(name: &str, template: &str) -> Result<(), Error> {
    let path = std::env::temp_dir().join(format!("mvm-lima-{}.yaml", std::process::id()));
    let written = File::create_new(&path).and_then(|mut file| file.write_all(template.as_bytes()));
    written.map_err(|source| Error::File { path: path.clone(), source })?;
    let name = format!("--name={name}");
    let made = step([OsStr::new("start"), name.as_ref(), "--tty=false".as_ref(), path.as_ref()]);
    // A leftover in the temporary directory is no reason to fail.
    let _ = fs::remove_file(&path);
    made
}

/// Runs `limactl` with these arguments, with its output on this terminal.
fn step<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<(), Error> {
    let arguments: Vec<S> = arguments.into_iter().collect();
    // What a step reads would be missing in what follows.
    let mut command = limactl();
    command.args(&arguments).stdin(std::process::Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let step = arguments.first().map(|first| first.as_ref().to_string_lossy().into_owned());
            Err(Error::Step { step: step.unwrap_or_default(), status })
        }
        Err(error) => Err(run_failed(error)),
    }
}

/// mvm's Linux program: the one that is named, this one if this is Linux, or one beside this one.
fn binary() -> Result<PathBuf, Error> {
    if let Some(named) = std::env::var_os(BINARY_VARIABLE) {
        return Ok(named.into());
    }
    let here = std::env::current_exe()
        .map_err(|source| Error::File { path: "the running program".into(), source })?;
    if cfg!(target_os = "linux") {
        return Ok(here);
    }
    let beside = candidates(&here, Arch::here());
    let found = beside.iter().find(|path| path.is_file()).cloned();
    found.ok_or_else(|| Error::NoBinary {
        looked: beside.iter().map(|path| path.display().to_string()).collect(),
    })
}

/// Programs beside this one, those of this computer's architecture first.
fn candidates(program: &Path, here: Arch) -> [PathBuf; 2] {
    let other = if here == Arch::X86 { Arch::Arm } else { Arch::X86 };
    [here, other].map(|arch| program.with_file_name(format!("mvm-linux-{arch}")))
}

fn arch_of(binary: &Path) -> Result<Arch, Error> {
    let mut header = [0; 20];
    let read = File::open(binary).and_then(|mut file| file.read_exact(&mut header));
    match read {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(Error::File { path: binary.to_owned(), source: error })
        }
        _ => Arch::of_program(&header).ok_or_else(|| Error::NotLinux { path: binary.to_owned() }),
    }
}

fn computer() -> Computer {
    Computer {
        arch: Arch::here(),
        macos: answer("sw_vers", &["-productVersion"]),
        chip: answer("sysctl", &["-n", "machdep.cpu.brand_string"]).unwrap_or_default(),
    }
}

/// What a tool of macOS prints; `None` where there is no such tool.
#[allow(clippy::disallowed_methods)] // they tell what the machine can be
fn answer(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

#[allow(clippy::print_stderr)] // there is nobody else to say it
fn say(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_this_computers_architecture_is_preferred() {
        let found = candidates(Path::new("/opt/mvm/bin/mvm"), Arch::Arm);
        assert_eq!(found[0], Path::new("/opt/mvm/bin/mvm-linux-aarch64"));
        assert_eq!(found[1], Path::new("/opt/mvm/bin/mvm-linux-x86_64"));
    }

    #[test]
    fn what_is_no_program_for_linux_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for content in [&b""[..], b"#!/bin/sh\nexit 0\n and more"] {
            fs::write(file.path(), content).unwrap();
            let error = arch_of(file.path()).unwrap_err();
            assert!(matches!(error, Error::NotLinux { .. }), "{error}");
        }
        assert!(arch_of(Path::new("/no/such/mvm")).is_err());
        assert_eq!(arch_of(&std::env::current_exe().unwrap()).unwrap(), Arch::here());
    }
}
