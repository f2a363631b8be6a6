//! Debian systems: `mmdebstrap` makes one out of the host's package sources, as a tar archive that
//! becomes the image's only layer.
//!
//! The same packages give the same archive: the files that are made along the way get a fixed time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mvm_core::image::ImageSpec;

use super::ImageError;
use super::durable::{Named, ensure_dir, names};
use super::oci::{LayerCache, OciSource};
use super::progress::{OnProgress, Progress};
use crate::bootstrap::packages::{Program, not_installed};
use crate::process::{Tool, ToolError, find_program};
use crate::removal::TempDir;

/// Files that are newer than this get this time, in seconds since 1970: the first one of 2023-11-15
/// (UTC).
const EPOCH: &str = "1700006400";
/// Removes what packages drew at random as they were installed: all instances of the image, and all who
/// can read it, would share it. Guests make it anew. `$1` is the system's root.
const FORGET: &str = "rm -f \
    \"$1\"/etc/ssh/ssh_host_*_key \"$1\"/etc/ssh/ssh_host_*_key.pub \
    \"$1\"/etc/ssl/private/ssl-cert-snakeoil.key \"$1\"/etc/ssl/certs/ssl-cert-snakeoil.pem \
    \"$1\"/var/lib/dbus/machine-id \"$1\"/var/lib/systemd/random-seed \
    \"$1\"/var/lib/systemd/credential.secret \"$1\"/var/lib/urandom/random-seed; \
    if [ -e \"$1\"/etc/machine-id ]; then : >\"$1\"/etc/machine-id; fi; \
    if [ -d \"$1\"/etc/ssl/certs ]; then \
        find \"$1\"/etc/ssl/certs -lname ssl-cert-snakeoil.pem -delete; \
    fi";
/// The host's package sources.
const SOURCES: &str = "/etc/apt/sources.list";
const SOURCES_DIR: &str = "/etc/apt/sources.list.d";

/// Makes a Debian system and takes it over as an image.
///
/// # Errors
/// `mmdebstrap` is missing, or fails, as for a suite or package that the sources do not have.
pub(crate) async fn make(
    suite: &str,
    packages: &BTreeSet<String>,
    cache: &LayerCache,
    progress: OnProgress<'_>,
) -> Result<OciSource, ImageError> {
    let program = Program::Mmdebstrap;
    if find_program(program.executable()).is_none() {
        return Err(not_installed(program).into());
    }
    let description = format!(
        "Debian {}",
        ImageSpec::Debian { suite: suite.to_owned(), packages: packages.clone() }
    );
    progress(Progress::Began(format!("making a Debian {suite} system")));
    let scratch = cache.scratch();
    ensure_dir(&scratch)?;
    let dir = TempDir::new_in(&scratch, "debian-").named("create a directory in", &scratch)?;
    let archive = dir.path().join("root.tar");
    let mut tool = Tool::new(program.executable())
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .env("TMPDIR", &dir.path().display().to_string())
        .args(["--mode=root", "--variant=minbase", "--format=tar"]);
    if !packages.is_empty() {
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        tool = tool.arg(format!("--include={}", packages.join(",")));
    }
    tool = tool.arg(format!("--customize-hook={FORGET}"));
    tool = tool.arg(suite).arg(&archive);
    // Its own default is the public mirror; the host's sources are what works here. It mounts what the
    // packages' own programs need, the host's `/dev/shm` among it.
    let made = tool.args(sources(suite)).contained().run().await;
    made.map_err(|error| explained(error).at(&scratch))?;
    progress(Progress::Ended);
    OciSource::root_archive(&archive, description, cache, progress).await
}

/// The host's package sources, if they are for this suite.
fn sources(suite: &str) -> Vec<PathBuf> {
    let dir = Path::new(SOURCES_DIR);
    let listed = names(dir).unwrap_or_default().into_iter().map(|name| dir.join(name));
    let mut files: Vec<PathBuf> = std::iter::once(PathBuf::from(SOURCES))
        .chain(listed)
        .filter(|path| path.extension().is_some_and(|end| end == "list" || end == "sources"))
        .collect();
    files.sort();
    let mentions = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        lines.flat_map(str::split_whitespace).any(|word| word == suite)
    };
    // A file for another suite would bring the packages of that one in.
    files.retain(mentions);
    files
}

/// The words that say why; `mmdebstrap` tells its whole life.
fn explained(error: ToolError) -> ImageError {
    let ToolError::Failed { program, status, output } = error else { return error.into() };
    let told: Vec<&str> = output.split("; ").filter(|line| line.starts_with("E:")).collect();
    let output = if told.is_empty() { output.clone() } else { told.join("; ") };
    ToolError::Failed { program, status, output }.into()
}
