//! The suites: which tests run in the lab, what they need, and the script that runs them there.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

/// Variable that names Firecracker's program; its jailer is beside it.
const FIRECRACKER: &str = "MVM_FIRECRACKER";

/// Variable that names a compiled seccomp filter.
const SECCOMP_FILTER: &str = "MVM_TEST_SECCOMP_FILTER";

/// How tests of guests run in a machine with two emulated processors.
const GUESTS: &str = "--test-threads=1 --nocapture";

/// A part of the lab's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// What every VMM driver promises, on QEMU with KVM.
    Qemu,
    /// What every VMM driver promises, and what Firecracker's adds, on real Firecracker.
    Firecracker,
    /// What a guest sees of sleeps, wakes and forks, with `mvm` itself, on QEMU with KVM.
    GuestsQemu,
    /// The same, on real Firecracker.
    GuestsFirecracker,
    /// An instance's whole life with `mvm` itself, on real Firecracker.
    Life,
    /// No tests: `bench --vmm firecracker`, whose times are an emulated machine's.
    BenchFirecracker,
    /// The same with an agent that runs microVMs as production has to.
    BenchProduction,
    /// No tests: a shell on the lab's console.
    Shell,
}

/// The name of this program in the lab.
pub(super) const XTASK: &str = "xtask";

/// A test program of the workspace, or this program itself.
#[derive(Debug)]
pub(super) struct TestProgram {
    pub(super) test: &'static str,
    /// Arguments of the program.
    pub(super) arguments: &'static str,
    /// The VMM that it is about, for tests of the whole product.
    pub(super) vmm: Option<&'static str>,
}

impl TestProgram {
    fn of_host(test: &'static str, arguments: &'static str) -> Self {
        Self { test, arguments, vmm: None }
    }

    fn whole(test: &'static str, arguments: &'static str, vmm: &'static str) -> Self {
        Self { test, arguments, vmm: Some(vmm) }
    }
}

impl Suite {
    /// What runs if nothing is named; guests' suites take long and are run by name.
    pub(super) const ALL: [Self; 3] = [Self::Qemu, Self::Firecracker, Self::Life];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::Life => "life",
            Self::GuestsQemu => "guests-qemu",
            Self::GuestsFirecracker => "guests-firecracker",
            Self::BenchFirecracker => "bench-firecracker",
            Self::BenchProduction => "bench-production",
            Self::Shell => "shell",
        }
    }

    /// What it runs.
    pub(super) fn programs(self) -> Vec<TestProgram> {
        match self {
            Self::Qemu => vec![TestProgram::of_host("vmm_contract", "--test-threads=2 qemu")],
            Self::Firecracker => vec![
                TestProgram::of_host("firecracker_api", "--nocapture the_real_one"),
                TestProgram::of_host("vmm_contract", "--test-threads=2 firecracker"),
            ],
            Self::Life => vec![TestProgram::whole("firecracker", GUESTS, "firecracker")],
            Self::GuestsQemu => {
                ["sleep", "rates"].map(|test| TestProgram::whole(test, GUESTS, "qemu")).into()
            }
            Self::GuestsFirecracker => ["sleep", "rates"]
                .map(|test| TestProgram::whole(test, GUESTS, "firecracker"))
                .into(),
            Self::BenchFirecracker | Self::BenchProduction => {
                vec![TestProgram::whole(XTASK, "bench --vmm firecracker --runs 5", "firecracker")]
            }
            Self::Shell => Vec::new(),
        }
    }

    /// Why it cannot run, if it cannot.
    pub(super) fn obstacle(self) -> Option<String> {
        match self {
            Self::Qemu | Self::GuestsQemu | Self::Shell => None,
            Self::Firecracker
            | Self::GuestsFirecracker
            | Self::Life
            | Self::BenchFirecracker
            | Self::BenchProduction => firecracker().is_none().then(|| {
                format!(
                    "there is no `firecracker` with its `jailer` in PATH; {FIRECRACKER} names \
                         one elsewhere"
                )
            }),
        }
    }
}

/// Firecracker's program and its jailer.
pub(super) fn firecracker() -> Option<[PathBuf; 2]> {
    let named = std::env::var_os(FIRECRACKER).map(PathBuf::from).into_iter();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|dir| dir.join("firecracker"));
    let pairs = named.chain(installed.collect::<Vec<_>>());
    let mut pairs = pairs.map(|program| {
        let jailer = program.with_file_name("jailer");
        [program, jailer]
    });
    pairs.find(|pair| pair.iter().all(|file| file.is_file()))
}

/// A compiled seccomp filter for Firecracker, for one that was built without its own.
pub(super) fn seccomp_filter() -> Option<PathBuf> {
    std::env::var_os(SECCOMP_FILTER).map(PathBuf::from)
}

/// The lab's script: each suite in turn, its output to the console and to a log.
pub(super) fn script(suites: &[Suite], repository: &str, limit_s: u64) -> String {
    // The tests of the whole program start it in the repository, which need not hold anything.
    let mut script = format!(
        "export MVM_TEST_KERNEL_DIR=/lab/guest-kernel MVM_TEST_ACCEL=kvm RUST_BACKTRACE=1\n\
         export MVM_FIRECRACKER=/lab/bin/firecracker MVM_BIN=/lab/bin/mvm\n\
         export MVM_TEST_SEED=/lab/seed PATH=\"$PATH:/lab/bin\"\n\
         mkdir -p '{repository}'\n",
    );
    if seccomp_filter().is_some() {
        let _ = writeln!(script, "export {SECCOMP_FILTER}=/lab/bin/seccomp.bpf");
    }
    for suite in suites {
        if *suite == Suite::Shell {
            script.push_str("echo 'the lab: `exit` ends it'\nbash -i\n");
            continue;
        }
        let name = suite.name();
        let mut commands = String::new();
        for program in suite.programs() {
            let (test, arguments) = (program.test, program.arguments);
            let mut variables =
                program.vmm.map(|vmm| format!("MVM_TEST_VMM={vmm} ")).unwrap_or_default();
            if *suite == Suite::BenchProduction {
                variables.push_str("MVM_PRODUCTION=1 ");
                if seccomp_filter().is_some() {
                    variables.push_str("MVM_SECCOMP_FILTER=/lab/bin/seccomp.bpf ");
                }
            }
            // Each failure is kept, and the next program runs all the same.
            let _ = write!(
                commands,
                "{variables}timeout -k 5 {limit_s} /lab/tests/{test} {arguments} || code=$?; "
            );
        }
        let _ = writeln!(
            script,
            "echo '── suite {name} ──'\n\
             (code=0; {commands}echo $code > /lab-out/{name}.status) 2>&1 | tee /lab-out/{name}.log"
        );
    }
    script
}

/// The names of the test programs in the lab's directory.
pub(super) fn binary_path(share: &Path, test: &str) -> PathBuf {
    share.join("tests").join(test)
}
