//! The benchmarks: what mvm promises in numbers, measured on the release binary.
//!
//! Speed is a ratio to a peer that is measured in the same run: the bare VMM, or the program doing
//! nothing. A benchmark fails if a target is missed. It cleans up after itself however it ends.

mod adopt;
mod agent_log;
mod asleep;
mod client;
mod cp;
mod create;
mod create_many;
mod exec;
mod files;
mod firecracker;
mod fleet;
mod fork;
mod idle;
mod image;
mod lab;
mod list;
mod logs;
mod microvm;
mod on_demand;
mod parallel;
mod plan;
mod process;
mod raw;
mod report;
mod rest;
mod round;
mod sleep;
mod start;
mod statistics;
mod wake;

use std::io::Write;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};

use lab::{Lab, Machines};
use report::Report;

use crate::cargo::cargo;

/// Measures one promise.
#[derive(Args)]
pub(crate) struct BenchArgs {
    /// What to measure.
    #[arg(value_enum, required_unless_present = "vmm")]
    name: Option<Name>,
    /// Measure starts, wakes, sleeps and memory on this VMM instead, against a bare one.
    #[arg(long, value_enum, value_name = "VMM", conflicts_with = "name")]
    vmm: Option<Vmm>,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
    /// How many samples to take.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
}

impl BenchArgs {
    fn name(&self) -> Name {
        // One of them is there.
        self.name.unwrap_or(Name::Firecracker)
    }
}

/// A VMM that is measured by itself; the named benchmarks measure the one that mvm chooses.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Vmm {
    /// Firecracker on KVM.
    Firecracker,
}

/// The benchmarks.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// One start to the first program, against a bare VMM.
    Start,
    /// What an instance costs before it runs.
    Create,
    /// 20 starts at once, against 20 bare VMMs.
    Parallel,
    /// A revision from a local image, against umoci and mkfs.erofs by hand.
    Image,
    /// `mvm ps -a` of 1,000 instances, against `mvm --version`.
    List,
    /// CPU and memory of an agent with 20 idle instances.
    Idle,
    /// `true` in a guest, against an echo; and data out of the guest and into it.
    Exec,
    /// `mvm cp` both ways, against `cat` and `tar` over an exec.
    Cp,
    /// Writing and reading a log, against writing into an exec.
    Logs,
    /// CPU and memory of an agent with 500 sleeping instances, and their list.
    Asleep,
    /// A start from an image of 50,000 files, against one of ten.
    Files,
    /// A wake to the first program, against a bare QEMU that is restored from its own file.
    Wake,
    /// How long a guest stands still to be saved, and what is written, against the same QEMU.
    Sleep,
    /// New instances from a base, one by one and 20 at once, against as many bare restores.
    Fork,
    /// A connection that wakes an instance, against a wake by request.
    OnDemand,
    /// A round of the loop with nothing to do for 10,000 simulated instances, and CPU of that agent.
    Round,
    /// Planning the start of 10,000 instances.
    Plan,
    /// An agent's start with 1,000 simulated instances that run; memory of one that sleeps.
    Adopt,
    /// Requests for one instance each from 50 clients at once, and the list of 10,000.
    CreateMany,
    /// Starts, wakes, sleeps and memory on Firecracker, against a bare one.
    #[value(skip)]
    Firecracker,
}

impl Name {
    /// What the agent of the release binary runs; none where it is not that binary which is measured, but
    /// its parts in this process.
    fn machines(self) -> Option<Machines> {
        match self {
            Self::Round | Self::Plan | Self::Adopt | Self::CreateMany => None,
            Self::List | Self::Asleep => Some(Machines::Simulated),
            Self::Firecracker => Some(Machines::Firecracker),
            Self::Start
            | Self::Create
            | Self::Parallel
            | Self::Image
            | Self::Idle
            | Self::Exec
            | Self::Cp
            | Self::Logs
            | Self::Files
            | Self::Wake
            | Self::Sleep
            | Self::Fork
            | Self::OnDemand => Some(Machines::Real),
        }
    }

    fn default_runs(self) -> u32 {
        match self {
            Self::Start | Self::Files | Self::OnDemand | Self::Sleep | Self::Firecracker => 10,
            Self::Wake | Self::Fork => 20,
            Self::Create | Self::Parallel | Self::Image => 3,
            Self::List | Self::Asleep => 30,
            Self::Idle => 1,
            Self::Exec => 100,
            Self::Cp | Self::Logs | Self::Adopt | Self::CreateMany => 5,
            Self::Plan => 20,
            Self::Round => 50,
        }
    }
}

/// Runs one benchmark and prints what it found.
///
/// # Errors
/// It could not be carried out, or a target was missed.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if args.name().machines().is_none() && cfg!(debug_assertions) {
        return run_optimised();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(measure(args))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    let missed = report.missed();
    if !missed.is_empty() {
        bail!("missed: {}", missed.join(", "));
    }
    Ok(())
}

/// Runs this benchmark in an optimised build of this program.
fn run_optimised() -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["run", "--release", "--quiet", "--package", "xtask", "--"]);
    let status = command.args(std::env::args_os().skip(1)).status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the benchmark failed");
    }
    Ok(())
}

/// Measures, and cleans up whether that succeeded or not.
async fn measure(args: &BenchArgs) -> anyhow::Result<Report> {
    // Caught from here on, so that nothing is left by a Ctrl-C at any point.
    let mut interrupts = Interrupts::new()?;
    let runs = args.runs.unwrap_or(args.name().default_runs());
    let Some(machines) = args.name().machines() else {
        return tokio::select! {
            measured = measure_here(args.name(), runs) => measured,
            () = interrupts.next() => Err(anyhow::anyhow!("interrupted")),
        };
    };
    let lab = tokio::select! {
        lab = Lab::open(machines) => lab?,
        () = interrupts.next() => bail!("interrupted"),
    };
    let measuring = async {
        match args.name() {
            Name::Start => start::run(&lab, runs).await,
            Name::Create => create::run(&lab, runs).await,
            Name::Parallel => parallel::run(&lab, runs).await,
            Name::Image => image::run(&lab, runs).await,
            Name::List => list::run(&lab, runs).await,
            Name::Idle => idle::run(&lab, runs).await,
            Name::Exec => exec::run(&lab, runs).await,
            Name::Cp => cp::run(&lab, runs).await,
            Name::Logs => logs::run(&lab, runs).await,
            Name::Asleep => asleep::run(&lab, runs).await,
            Name::Files => files::run(&lab, runs).await,
            Name::Wake => wake::run(&lab, runs).await,
            Name::Sleep => sleep::run(&lab, runs).await,
            Name::Fork => fork::run(&lab, runs).await,
            Name::OnDemand => on_demand::run(&lab, runs).await,
            Name::Firecracker => firecracker::run(&lab, runs).await,
            Name::Round | Name::Plan | Name::Adopt | Name::CreateMany => {
                measure_here(args.name(), runs).await
            }
        }
    };
    let measured = tokio::select! {
        measured = measuring => measured,
        () = interrupts.next() => Err(anyhow::anyhow!("interrupted")),
    };
    match (measured, lab.close().await) {
        (Ok(report), Ok(())) => Ok(report),
        (Err(error), Ok(())) => Err(error),
        (Ok(_), Err(error)) => Err(error.context("cannot clean up")),
        (Err(error), Err(left)) => Err(error.context(format!("cannot clean up: {left:#}"))),
    }
}

/// Measures what is in this process.
async fn measure_here(name: Name, runs: u32) -> anyhow::Result<Report> {
    match name {
        Name::Round => round::run(runs).await,
        Name::Plan => plan::run(runs),
        Name::Adopt => adopt::run(runs).await,
        Name::CreateMany => create_many::run(runs).await,
        _ => bail!("it is the release binary that is measured"),
    }
}

/// Tells the person who waits; standard output is the report's.
fn say(line: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// What a person or a supervisor ends a program with.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Interrupts {
    fn new() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hangup: catch(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
