//! `mvm bootstrap`, and the offer of it by `mvm up`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use clap::Args;
use mvm_core::image::ImageSpec;
use mvm_host::bootstrap::firecracker::{self, RELEASES, Wanted};
use mvm_host::bootstrap::packages::{PackageManager, Program, ensure_installed, missing_programs};
use mvm_host::bootstrap::{BootstrapError, Kernel, KernelStore, Outcome};
use mvm_host::image::progress::Progress;
use mvm_host::state_dir::StateDir;

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::output::Spinner;

/// Make this machine ready for microVMs.
///
/// Installs the tools that mvm runs, as far as they are missing, and fetches a guest kernel from
/// the distribution's packages without installing it. What is there stays, so a second run changes
/// nothing. With `--firecracker` it installs a Firecracker and its jailer, too, for `--vmm firecracker`:
/// the programs of a path, or a release, whose published checksum is verified. Each version is kept
/// beside the others, because what sleeps on one is restored by it; agents that start later use the
/// newest.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm bootstrap
  mvm bootstrap --yes
  mvm bootstrap --firecracker 1.15.1
  mvm bootstrap --firecracker ./firecracker
  mvm bootstrap --kernel ./vmlinuz --modules /lib/modules/6.1.0-18-amd64")]
pub(crate) struct Bootstrap {
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Use this kernel for guests instead of fetching one.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The modules of that kernel; without it, all that a microVM needs must be built in.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Install this Firecracker: a version such as 1.15.1, or a program with its jailer beside it.
    #[arg(long, value_name = "VERSION|PATH")]
    firecracker: Option<Wanted>,
    /// Where releases of Firecracker are downloaded from.
    #[arg(
        long,
        value_name = "URL",
        env = "MVM_FIRECRACKER_MIRROR",
        default_value = RELEASES
    )]
    firecracker_mirror: String,
}

/// What a machine lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Programs, by the name of their executable.
    pub(crate) programs: Vec<&'static str>,
    /// Why there is no usable guest kernel.
    pub(crate) kernel: Option<String>,
}

impl Missing {
    /// What the machine lacks of these programs, and for the agent of this state directory.
    pub(crate) fn look(state_dir: &StateDir, wanted: &[Program]) -> Self {
        let programs =
            missing_programs(wanted).iter().map(|program| program.executable()).collect();
        let kernel = match KernelStore::new(state_dir).default_kernel() {
            Ok(Some(_)) => None,
            Ok(None) => Some("a guest kernel".to_owned()),
            Err(error) => Some(format!("a guest kernel ({error})")),
        };
        Self { programs, kernel }
    }

    fn text(&self) -> Option<String> {
        let programs = self.programs.iter().map(|program| format!("`{program}`"));
        let parts: Vec<String> = programs.chain(self.kernel.clone()).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// The programs that these images need.
fn needed_for<'a>(images: impl IntoIterator<Item = &'a ImageSpec>) -> &'static [Program] {
    match images.into_iter().any(|image| matches!(image, ImageSpec::Debian { .. })) {
        true => &Program::ALL,
        false => &Program::NEEDED,
    }
}

/// Has what is missing for these images fetched, if the person agrees.
///
/// # Errors
/// Something is missing and nobody agreed, or it could not be fetched.
pub(crate) async fn ensure_ready<'a>(
    context: &Context,
    yes: bool,
    images: impl IntoIterator<Item = &'a ImageSpec>,
) -> Result<()> {
    let wanted = needed_for(images);
    let missing = Missing::look(context.state_dir(), wanted);
    let Some(missing) = missing.text() else { return Ok(()) };
    if !yes {
        let question = format!("This machine lacks {missing}. Fetch it now?");
        if context.ui.confirm(&question)? != Some(true) {
            return Err(Error::NotReady { missing: format!("it lacks {missing}") });
        }
    }
    fetch(context, wanted, None).await
}

impl Bootstrap {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let own_kernel = self.kernel.map(|kernel| (kernel, self.modules));
        // Elsewhere there are no packages that a Debian system could be made of.
        let wanted: &[Program] = match PackageManager::detect() {
            Some(PackageManager::Apt) => &Program::ALL,
            _ => &Program::NEEDED,
        };
        let mut missing = Missing::look(context.state_dir(), wanted);
        if own_kernel.is_some() {
            missing.kernel = None;
        }
        if let (Some(missing), false) = (missing.text(), self.yes) {
            let question = format!("Fetch {missing}?");
            if context.ui.confirm(&question)? != Some(true) {
                return Err(Error::Usage {
                    message: format!("nothing was done; this machine lacks {missing}"),
                    hint: "pass --yes to have it fetched without being asked".to_owned(),
                });
            }
        }
        if let Some(wanted) = &self.firecracker {
            install_firecracker(context, wanted, &self.firecracker_mirror).await?;
        }
        fetch(context, wanted, own_kernel).await
    }
}

async fn install_firecracker(context: &Context, wanted: &Wanted, mirror: &str) -> Result<()> {
    needs_root()?;
    let steps = Steps::default();
    let spinner = RefCell::new(context.ui.spinner());
    let progress = |news| steps.add(news);
    let work = firecracker::install(context.state_dir(), wanted, mirror, &progress);
    let installed = show_while(&steps, &spinner, work).await;
    drop(spinner);
    let (version, outcome) =
        installed.map_err(|error| Error::Host(Box::new(BootstrapError::from(error))))?;
    context.ui.remark(&match outcome {
        Outcome::Made => format!(
            "Firecracker {version} is installed; agents that start from now on can use it: \
             `mvm agent stop`, then any command with `--vmm firecracker`"
        ),
        Outcome::AlreadyThere => format!("Firecracker {version} is there"),
    });
    Ok(())
}

fn needs_root() -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::NeedsRoot { what: "making the machine ready for microVMs".to_owned() }),
    }
}

async fn fetch(
    context: &Context,
    wanted: &[Program],
    own: Option<(PathBuf, Option<PathBuf>)>,
) -> Result<()> {
    needs_root()?;
    let failed = |error: BootstrapError| Error::Host(Box::new(error));
    let steps = Steps::default();
    let spinner = RefCell::new(context.ui.spinner());
    spinner.borrow_mut().show("looking for packages");
    let progress = |news| steps.add(news);
    let state_dir = context.state_dir();
    let work = async {
        let packages = ensure_installed(wanted, &progress).await?;
        let store = KernelStore::new(state_dir);
        let (kernel, outcome) = match &own {
            None => store.ensure_default(&progress).await?,
            Some((kernel, modules)) => import(&store, kernel, modules.as_deref()).await?,
        };
        Ok((packages, kernel, outcome))
    };
    let (packages, kernel, outcome) = show_while(&steps, &spinner, work).await.map_err(failed)?;
    drop(spinner);
    match packages.installed.as_slice() {
        [] => context.ui.remark("the tools that mvm runs are there"),
        installed => context.ui.remark(&format!("installed {}", installed.join(", "))),
    }
    let kernel = kernel.id();
    context.ui.remark(&match outcome {
        Outcome::Made => format!("guest kernel {kernel} is ready"),
        Outcome::AlreadyThere => format!("guest kernel {kernel} is there"),
    });
    Ok(())
}

async fn import(
    store: &KernelStore,
    kernel: &Path,
    modules: Option<&Path>,
) -> Result<(Kernel, Outcome), BootstrapError> {
    let (kernel, outcome) = store.import(kernel, modules).await?;
    store.set_default(&kernel)?;
    Ok((kernel, outcome))
}

/// The news of a long operation, told from wherever it runs.
#[derive(Default)]
struct Steps {
    line: Mutex<String>,
    news: tokio::sync::Notify,
}

impl Steps {
    fn add(&self, news: Progress) {
        if let Ok(mut line) = self.line.lock() {
            match news {
                Progress::Began(step) => *line = step,
                Progress::Percent(percent) => {
                    let step = line.split(": ").next().unwrap_or_default();
                    *line = format!("{step}: {percent} %");
                }
                Progress::Ended => return,
            }
        }
        self.news.notify_one();
    }

    fn line(&self) -> String {
        self.line.lock().map(|line| line.clone()).unwrap_or_default()
    }
}

async fn show_while<T>(
    steps: &Steps,
    spinner: &RefCell<Spinner<'_>>,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            () = steps.news.notified() => spinner.borrow_mut().show(&steps.line()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Missing { programs: vec!["nft"], ..Missing::look(&dir.path().into(), &[]) };
        assert_eq!(missing.text().as_deref(), Some("`nft`, a guest kernel"));
        assert_eq!(Missing::default().text(), None);
    }

    #[test]
    fn only_an_image_of_a_debian_system_needs_what_makes_one() {
        let image = |text: &str| text.parse::<ImageSpec>().unwrap();
        let images = [image("builtin"), image("nginx")];
        assert_eq!(needed_for(&images), Program::NEEDED);
        let images = [image("builtin"), image("mmdebstrap:bookworm")];
        assert_eq!(needed_for(&images), Program::ALL);
    }

    #[test]
    fn steps_become_one_line() {
        let steps = Steps::default();
        steps.add(Progress::Began("downloading linux (9 MB)".into()));
        steps.add(Progress::Percent(5));
        steps.add(Progress::Percent(40));
        assert_eq!(steps.line(), "downloading linux (9 MB): 40 %");
        steps.add(Progress::Ended);
        steps.add(Progress::Began("unpacking".into()));
        assert_eq!(steps.line(), "unpacking");
    }
}
