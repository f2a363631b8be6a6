//! Calling cargo from within a task.

use std::process::Command;

/// Variables that cargo sets for the program that it runs, by how their names begin. A build script
/// that looks at them would run again, with all that follows, whenever the next cargo has others.
const OF_THIS_PROGRAM: [&str; 2] = ["CARGO_PKG_", "CARGO_MANIFEST_"];

/// Cargo, as from a shell: what it has built is not built again there, nor the other way round.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if OF_THIS_PROGRAM.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}
