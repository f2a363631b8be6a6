//! Builds the guest agent as a small static program, to be embedded in this crate.
//!
//! It is a program for another machine: with a profile, flags and a target directory of its own,
//! whatever the host's build uses.
#![allow(clippy::print_stdout)] // how a build script speaks to cargo

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Largest agent: it is a part of every initial RAM filesystem.
const MAX_LEN: usize = 2 * 1024 * 1024;
/// ELF's program header type of a dynamic loader's name.
const PT_INTERP: u32 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let crates = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for source in [
        "mvm-guest/src",
        "mvm-guest/Cargo.toml",
        "mvm-core/src",
        "mvm-core/Cargo.toml",
        "mvm-files/src",
        "mvm-files/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", crates.join(source).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", crates.join("../Cargo.toml").display());

    let agent = out.join("mvm-guest");
    if env::var("CARGO_CFG_TARGET_OS")? == "linux" {
        let built = build(&crates.join("mvm-guest/Cargo.toml"), &out.join("guest"))?;
        check(&fs::read(&built)?).map_err(|problem| format!("{}: {problem}", built.display()))?;
        fs::copy(&built, &agent)?;
    } else {
        fs::write(&agent, [])?;
    }
    Ok(())
}

/// Runs a cargo inside this one, on a target directory of its own.
fn build(manifest: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let target = env::var("TARGET")?;
    let mut command = Command::new(env::var("CARGO")?);
    command
        .args(["build", "--locked", "--profile", "guest", "--target", &target])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(target_dir)
        // `--target` keeps these from build scripts and macros, which cannot be static.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static",
        );
    // The outer build's lints, flags and places are not the agent's.
    for name in [
        "RUSTFLAGS",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
    ] {
        command.env_remove(name);
    }
    let status = command.status().map_err(|error| format!("cannot start cargo: {error}"))?;
    if !status.success() {
        return Err(format!("the guest agent does not build ({status}); see above").into());
    }
    Ok(target_dir.join(target).join("guest").join("mvm-guest"))
}

/// Whether the agent can run where there is nothing but itself.
fn check(elf: &[u8]) -> Result<(), Box<dyn Error>> {
    if elf.len() > MAX_LEN {
        return Err(format!("{} bytes are over the limit of {MAX_LEN}", elf.len()).into());
    }
    let number = |at: usize, len: usize| -> Result<u64, Box<dyn Error>> {
        let bytes = elf.get(at..at + len).ok_or("the file is cut")?;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    // Class 2 is 64 bits, data 1 is little-endian.
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF file".into());
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for header in 0..count {
        let at = usize::try_from(table + header * size)?;
        if number(at, 4)? == u64::from(PT_INTERP) {
            return Err("dynamically linked: is the static C library installed?".into());
        }
    }
    Ok(())
}
