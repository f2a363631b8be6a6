//! The project's own tasks: the gate that CI, the README and contributors call, the benchmarks, and
//! the lab with a real KVM.

#![allow(clippy::print_stdout, reason = "a task talks to the person who runs it")]

mod bench;
mod cargo;
mod gate;
mod lab;

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
    /// Measure a promise of the README, against a peer in the same run.
    Bench(bench::BenchArgs),
    /// Run suites that need KVM in an emulated machine that has one; `lab shell` is its console.
    Lab(lab::LabArgs),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Test(args) => gate::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Lab(args) => lab::run(&args),
    }
}
