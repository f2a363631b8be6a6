//! `mvm`: the command line itself, or where that cannot run, the way into a Lima machine.

use mvm_lima::{Platform, VARIABLE};

fn main() {
    let code = match mvm_lima::machine(Platform::HERE, std::env::var_os(VARIABLE)) {
        Some(machine) => mvm_lima::hand_over(&machine),
        None => run_here(),
    };
    // Not a return: a thread may still be blocked in a read of standard input.
    std::process::exit(code)
}

#[cfg(target_os = "linux")]
fn run_here() -> i32 {
    mvm::run()
}

#[cfg(not(target_os = "linux"))]
#[allow(clippy::print_stderr)] // there is nobody else to say it
fn run_here() -> i32 {
    eprintln!("error: microVMs need Linux, and {VARIABLE} is empty");
    eprintln!("hint: unset {VARIABLE}, or name a Lima machine in it");
    1
}
