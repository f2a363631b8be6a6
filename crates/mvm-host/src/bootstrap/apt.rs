//! Asks `apt` which version of a package this machine would get, and downloads it without
//! installing it.
//!
//! The package lists are signed and `apt` checks them; a downloaded file is checked against the
//! digest in the lists before anything reads it.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::BootstrapError;
use crate::image::digest::Digest;
use crate::image::durable::{NameLock, Named};
use crate::image::progress::{OnProgress, Progress, human_size, step};
use crate::process::{Tool, ToolError};
use crate::removal::TempDir;

/// How long to wait for another process that refreshes the package lists.
const LISTS_LOCK_TIMEOUT: Duration = Duration::from_secs(120);

/// The version of a package that this machine would install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The package's name.
    pub(crate) package: String,
    /// Its version.
    pub(crate) version: String,
    /// Its architecture.
    pub(crate) architecture: String,
    /// The file's size in bytes.
    pub(crate) size: u64,
    /// The file's digest.
    pub(crate) sha256: Digest,
    /// Names of the packages that it depends on; of alternatives only the first.
    pub(crate) depends: Vec<String>,
}

impl Candidate {
    /// The file's name in the package cache.
    fn file_name(&self) -> String {
        let version = self.version.replace(':', "%3a");
        format!("{}_{version}_{}.deb", self.package, self.architecture)
    }
}

/// Whether this machine has `apt`.
pub(crate) fn is_available() -> bool {
    crate::process::find_program("apt-get").is_some()
}

/// `apt-get` with the options that every use shares.
pub(crate) fn apt_get() -> Tool {
    Tool::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args([
        "-q",
        "-o",
        "DPkg::Lock::Timeout=120",
        "-o",
        "APT::Status-Fd=1",
    ])
}

/// Reads the percentage from a line that `APT::Status-Fd` writes.
pub(crate) fn percent(line: &str) -> Option<u8> {
    let rest = line.strip_prefix("dlstatus:").or_else(|| line.strip_prefix("pmstatus:"))?;
    let percent: f32 = rest.split(':').nth(1)?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent as u8)
}

/// Refreshes the package lists.
pub(crate) async fn update(progress: OnProgress<'_>) -> Result<(), BootstrapError> {
    step(progress, "refreshing the package lists".to_owned(), refresh()).await
}

/// Waits for another refresh, such as the system's daily one: `apt-get update` itself does not.
async fn refresh() -> Result<(), BootstrapError> {
    let deadline = Instant::now() + LISTS_LOCK_TIMEOUT;
    loop {
        match apt_get().arg("update").run().await {
            Err(ToolError::Failed { output, .. })
                if output.contains("Could not get lock") && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            result => return Ok(result.map(drop)?),
        }
    }
}

/// What the package lists know of a package, or `None` if they do not know it.
pub(crate) async fn candidate(package: &str) -> Result<Option<Candidate>, BootstrapError> {
    let tool = Tool::new("apt-cache").args(["show", "--no-all-versions", "--", package]);
    match tool.run().await {
        Ok(text) => Ok(parse_record(&text)),
        // `apt-cache show` fails for an unknown name.
        Err(ToolError::Failed { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The first package of `names` that the lists know, after refreshing them if they know none.
pub(crate) async fn first_candidate(
    names: &[&str],
    progress: OnProgress<'_>,
) -> Result<Candidate, BootstrapError> {
    for refreshed in [false, true] {
        if refreshed {
            update(progress).await?;
        }
        for name in names {
            if let Some(candidate) = candidate(name).await? {
                return Ok(candidate);
            }
        }
    }
    Err(BootstrapError::UnknownPackage { names: names.join(" or ") })
}

/// Parses the first record of `apt-cache show`.
fn parse_record(text: &str) -> Option<Candidate> {
    let record = text.split("\n\n").next()?;
    let field = |name: &str| {
        record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
    };
    let depends = ["Pre-Depends", "Depends"].iter().filter_map(|name| field(name));
    Some(Candidate {
        package: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        architecture: field("Architecture")?.to_owned(),
        size: field("Size")?.parse().ok()?,
        sha256: field("SHA256")?.parse().ok()?,
        depends: depends
            .flat_map(|list| list.split(','))
            .filter_map(|item| item.split(['|', '(', ':']).next())
            .map(|name| name.trim().to_owned())
            .collect(),
    })
}

/// Downloads a package into the cache directory, unless it is there, and checks its digest.
pub(crate) async fn download(
    wanted: &Candidate,
    cache: &Path,
    progress: OnProgress<'_>,
) -> Result<PathBuf, BootstrapError> {
    let name = wanted.file_name();
    let lock = NameLock::wait(cache, &name).await?;
    let cached = cache.join(&name);
    if cached.exists() && digest_of(&cached).await? == wanted.sha256 {
        return Ok(cached);
    }
    let text = format!("downloading {} ({})", wanted.package, human_size(wanted.size));
    let staged = step(progress, text, stage(wanted, progress)).await?;
    let temp = lock.temp_tree()?;
    let copy = temp.path().join(&name);
    fs::copy(staged.file()?, &copy).named("copy the package to", &copy)?;
    let actual = digest_of(&copy).await?;
    if actual != wanted.sha256 {
        return Err(BootstrapError::WrongDigest {
            path: cached,
            expected: wanted.sha256.to_string(),
            actual: actual.to_string(),
        });
    }
    fs::rename(&copy, &cached).named("create", &cached)?;
    Ok(cached)
}

/// A download in a directory that `apt`'s unprivileged download process can write.
struct Staged(TempDir);

impl Staged {
    fn file(&self) -> Result<PathBuf, BootstrapError> {
        let dir = self.0.path();
        let mut entries = fs::read_dir(dir).named("read directory", dir)?;
        match entries.next().transpose().named("read directory", dir)? {
            Some(entry) => Ok(entry.path()),
            None => Err(BootstrapError::BadPackage {
                path: dir.to_owned(),
                problem: "`apt-get download` left no file".to_owned(),
            }),
        }
    }
}

async fn stage(wanted: &Candidate, progress: OnProgress<'_>) -> Result<Staged, BootstrapError> {
    // The cache may lie below a directory that only root enters, so the download goes elsewhere.
    let base = std::env::temp_dir();
    let dir = TempDir::new_in(&base, "mvm-download-");
    let dir = dir.named("create a directory in", &base)?;
    if let (true, Some(uid)) = (rustix::process::geteuid().is_root(), user_id("_apt")) {
        chown(dir.path(), Some(uid), None).named("change the owner of", dir.path())?;
    }
    let name = format!("{}={}", wanted.package, wanted.version);
    let fetch = || {
        apt_get().arg("download").arg(&name).dir(dir.path()).run_with(|line| {
            if let Some(percent) = percent(line) {
                progress(Progress::Percent(percent));
            }
        })
    };
    match fetch().await {
        // Mirrors drop superseded files: the lists may be older than the mirror.
        Err(ToolError::Failed { .. }) => {
            refresh().await?;
            fetch().await?;
        }
        result => {
            result?;
        }
    }
    Ok(Staged(dir))
}

/// The numeric id of a user of this machine.
fn user_id(name: &str) -> Option<u32> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    fields.into_iter().find(|fields| fields.first() == Some(&name))?.get(2)?.parse().ok()
}

async fn digest_of(path: &Path) -> Result<Digest, BootstrapError> {
    let owned = path.to_owned();
    let digest = tokio::task::spawn_blocking(move || Digest::of_file(&owned)).await;
    let (digest, _) = digest.map_err(std::io::Error::other).flatten().named("read", path)?;
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "Package: linux-image-6.8.0-31-generic
Architecture: amd64
Version: 6.8.0-31.31
Pre-Depends: first-of-all
Depends: kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-6.8.0-31-generic, grub-pc | other
Suggests: not-this
Size: 14562
SHA256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad
Description: text
 Depends: not-this-either

Package: another
";

    #[test]
    fn a_record_of_the_package_lists_is_read() {
        let candidate = parse_record(RECORD).unwrap();
        assert_eq!(candidate.package, "linux-image-6.8.0-31-generic");
        assert_eq!(candidate.version, "6.8.0-31.31");
        assert_eq!(candidate.size, 14562);
        let modules = "linux-modules-6.8.0-31-generic";
        assert_eq!(candidate.depends, ["first-of-all", "kmod", "linux-base", modules, "grub-pc"]);
    }

    #[test]
    fn a_record_without_a_digest_is_no_candidate() {
        let without = RECORD.replace("SHA256", "SHA1");
        assert_ne!(parse_record(RECORD), None);
        assert_eq!(parse_record(&without), None);
        assert_eq!(parse_record(""), None);
    }

    #[test]
    fn an_epoch_does_not_reach_the_file_name() {
        let mut candidate = parse_record(RECORD).unwrap();
        candidate.version = "1:1.35".to_owned();
        assert_eq!(candidate.file_name(), "linux-image-6.8.0-31-generic_1%3a1.35_amd64.deb");
    }

    #[test]
    fn percentages_are_read_from_status_lines_only() {
        assert_eq!(percent("dlstatus:1:5.6370:Retrieving file 1 of 1"), Some(5));
        assert_eq!(percent("pmstatus:qemu:100.0000:Installed"), Some(100));
        assert_eq!(percent("Get:1 http://example bookworm"), None);
        assert_eq!(percent("dlstatus:1:nan:x"), None);
    }
}
