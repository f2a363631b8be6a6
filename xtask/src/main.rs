//! The project's own tasks: the gate that CI, the README and contributors call, and the benchmarks.

mod gate;

use clap::{Parser, Subcommand};

/// Tasks of the mvm repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run the gate: format, lints, documents and every test, real microVMs included.
    Test(gate::TestArgs),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Test(args) => gate::run(&args),
    }
}
