//! What the image tests share: a package cache, a stored kernel and programs of the host.
// Each test binary uses a part; a skipped test says why.
#![allow(dead_code, clippy::print_stdout, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_host::bootstrap::{Kernel, KernelStore};
use mvm_host::image::build::BuildInputs;
use mvm_host::image::progress::Progress;
use mvm_host::image::source::ImageSource;
use mvm_host::process::find_program;
use tokio::sync::OnceCell;

/// Ignores progress.
pub(crate) fn quiet(_: Progress) {}

/// Says why a test is skipped, unless everything it needs is there.
pub(crate) fn can_run(programs: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return false;
    }
    for program in programs {
        if find_program(program).is_none() {
            println!("skipped: `{program}` is not installed");
            return false;
        }
    }
    true
}

/// Downloads are kept here from run to run.
pub(crate) fn cache() -> PathBuf {
    let dir = std::env::var_os("MVM_TEST_CACHE").map(PathBuf::from);
    dir.unwrap_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("mvm-test-cache"))
}

/// The packages of [`cache`].
pub(crate) fn packages() -> PathBuf {
    cache().join("packages")
}

fn kernels() -> KernelStore {
    KernelStore::new(cache()).with_cache(packages())
}

/// A kernel for tests that are not about fetching it; each test binary unpacks it once.
pub(crate) async fn kernel() -> Kernel {
    static KERNEL: OnceCell<Kernel> = OnceCell::const_new();
    let fetch = async || {
        let (kernel, _) = kernels().fetch(&quiet).await.expect("a guest kernel can be fetched");
        kernels().set_default(&kernel).expect("the cache is writable");
        kernel
    };
    KERNEL.get_or_init(fetch).await.clone()
}

/// The kernel that another process got from [`kernel`].
pub(crate) fn kernel_of_parent() -> Kernel {
    kernels().default_kernel().unwrap().expect("the parent has fetched one")
}

/// Inputs with a program that stands for the guest agent.
pub(crate) fn inputs<'a>(source: &'a dyn ImageSource, kernel: &'a Kernel) -> BuildInputs<'a> {
    BuildInputs { source, kernel, agent: b"agent", agent_version: "1.2.3", created_by: "0.1.0" }
}

/// Runs a program of the host and returns whether it succeeded and what it printed.
#[allow(clippy::disallowed_methods)] // the tests check results with the system's own tools
pub(crate) fn run(program: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(args).output().expect("the program starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("the directory is readable")
        .map(|entry| entry.expect("the entry is readable").file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Runs `work` on a thread with mounts of its own, which go away with it.
#[allow(unsafe_code)]
pub(crate) fn with_own_mounts(work: impl FnOnce() + Send + 'static) {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    let body = move || {
        // SAFETY: only this thread's filesystem context changes; no file descriptors do.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }.expect("unshare");
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags).expect("private mounts");
        work();
    };
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}
