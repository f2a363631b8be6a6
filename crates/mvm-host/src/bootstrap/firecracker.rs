//! Installs Firecracker and its jailer: those of a path, or a release, whose published checksum is
//! verified. `mvm bootstrap --firecracker` calls it.
//!
//! ```text
//!  MIRROR/v1.15.1/firecracker-v1.15.1-x86_64.tgz               the release
//!                 firecracker-v1.15.1-x86_64.tgz.sha256.txt    its checksum
//! ```
//!
//! Each version is kept beside the others; see the driver. Nothing is put into the machine's `PATH`.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use flate2::read::GzDecoder;

use super::Outcome;
use crate::image::digest::Digest;
use crate::image::durable::{FileError, NameLock, Named};
use crate::image::progress::{OnProgress, Progress};
use crate::state_dir::StateDir;
use crate::tls;
use crate::vmm::VmmError;
use crate::vmm::firecracker::{self, FirecrackerVersion, Kept, MINIMUM_VERSION};

/// Where the project publishes its releases.
pub const RELEASES: &str = "https://github.com/firecracker-microvm/firecracker/releases/download";
/// The largest release that is downloaded, in bytes; they have about 25 MB.
const ARCHIVE_LIMIT: usize = 256 << 20;
/// The largest program that is taken out of it, in bytes.
const PROGRAM_LIMIT: u64 = 256 << 20;
/// The largest file with a checksum, in bytes.
const CHECKSUM_LIMIT: usize = 4 << 10;
/// How long a mirror has to answer, and how long it may send nothing.
const CONNECT: Duration = Duration::from_secs(20);
const STALL: Duration = Duration::from_secs(30);

/// What is to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The program at a path, and the jailer beside it or in `PATH`.
    Program(PathBuf),
    /// A release.
    Release(FirecrackerVersion),
}

impl FromStr for Wanted {
    type Err = std::convert::Infallible;

    /// A version such as `1.15.1` or `v1.15.1`; everything else is a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix('v').unwrap_or(text);
        let version = FirecrackerVersion::parse(number);
        Ok(match version.filter(|version| version.to_string() == number) {
            Some(version) => Self::Release(version),
            None => Self::Program(text.into()),
        })
    }
}

/// Why Firecracker was not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The mirror did not give a file.
    #[error(
        "cannot download {url}: {problem}; `--firecracker-mirror URL` names another place, and \
         `--firecracker PATH` installs a program that is here"
    )]
    Download {
        /// What was asked for.
        url: String,
        /// What happened.
        problem: String,
    },
    /// What was downloaded is not what was published.
    #[error(
        "{url} does not match its published checksum: expected SHA-256 {expected}, got {actual}"
    )]
    WrongDigest {
        /// What was downloaded.
        url: String,
        /// The published checksum.
        expected: String,
        /// The file's.
        actual: Digest,
    },
    /// It is no release, or another one.
    #[error("{url} is not the release of Firecracker {version}: {problem}")]
    BadRelease {
        /// What was downloaded.
        url: String,
        /// What was wanted.
        version: FirecrackerVersion,
        /// What is wrong with it.
        problem: String,
    },
    /// There is nothing at the path.
    #[error("there is no program {path}: name one, or a version such as {MINIMUM_VERSION}")]
    NoProgram {
        /// The path.
        path: PathBuf,
    },
    /// Another program of this version is kept, and may be needed for what sleeps.
    #[error(
        "{dir} has another Firecracker of the same version; if nothing sleeps on it, remove that \
         directory first"
    )]
    Others {
        /// Where it is kept.
        dir: PathBuf,
    },
    /// It cannot be used.
    #[error(transparent)]
    Unusable(#[from] VmmError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Installs it for this state directory's agent, which uses the newest from its next start on.
///
/// # Errors
/// It cannot be had, or not be used. Nothing of it is left behind.
pub async fn install(
    state_dir: &StateDir,
    wanted: &Wanted,
    mirror: &str,
    progress: OnProgress<'_>,
) -> Result<(FirecrackerVersion, Outcome), InstallError> {
    let dir = state_dir.firecrackers();
    match wanted {
        Wanted::Program(path) if !path.is_file() => {
            Err(InstallError::NoProgram { path: path.clone() })
        }
        Wanted::Program(program) => keep(&dir, program).await,
        Wanted::Release(version) => {
            if let Some(problem) = version.problem() {
                let (program, found) = (firecracker::PROGRAM.to_owned(), version.to_string());
                return Err(VmmError::Unfit { program, found, problem }.into());
            }
            let release = Release::new(*version, mirror);
            // Removed when it has been copied to its place, or failed.
            let tree = NameLock::wait(&dir, &format!("release-{version}")).await?.temp_tree()?;
            release.fetch(tree.path(), progress).await?;
            let program = tree.path().join(firecracker::PROGRAM);
            let found = firecracker::find(&program).await?.version;
            match found == *version {
                true => keep(&dir, &program).await,
                false => Err(release.bad(format!("its program says that it is {found}"))),
            }
        }
    }
}

async fn keep(dir: &Path, program: &Path) -> Result<(FirecrackerVersion, Outcome), InstallError> {
    let programs = firecracker::find(program).await?;
    let version = programs.version;
    let to = dir.to_owned();
    let kept = tokio::task::spawn_blocking(move || firecracker::keep(&to, &programs)).await;
    match kept.map_err(io::Error::other).named("write to", dir)?? {
        Kept::Made => Ok((version, Outcome::Made)),
        Kept::AlreadyThere => Ok((version, Outcome::AlreadyThere)),
        Kept::Others => Err(InstallError::Others { dir: dir.join(version.to_string()) }),
    }
}

/// A release on a mirror.
struct Release {
    version: FirecrackerVersion,
    url: String,
}

impl Release {
    fn new(version: FirecrackerVersion, mirror: &str) -> Self {
        let (mirror, arch) = (mirror.trim_end_matches('/'), std::env::consts::ARCH);
        Self { version, url: format!("{mirror}/v{version}/firecracker-v{version}-{arch}.tgz") }
    }

    /// Puts its two programs into a directory.
    async fn fetch(&self, dir: &Path, progress: OnProgress<'_>) -> Result<(), InstallError> {
        tls::ensure_provider();
        let checksum = format!("{}.sha256.txt", self.url);
        let published = download(&checksum, CHECKSUM_LIMIT, &|_| {}).await?;
        let published = String::from_utf8_lossy(&published).into_owned();
        // As `sha256sum` writes it.
        let expected = published.split_ascii_whitespace().next().unwrap_or_default().to_owned();
        if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(self.bad("its published checksum is none".to_owned()));
        }
        progress(Progress::Began(format!("downloading Firecracker {}", self.version)));
        let archive = download(&self.url, ARCHIVE_LIMIT, progress).await?;
        progress(Progress::Ended);
        let actual = Digest::of(&archive);
        if actual.to_string() != expected.to_ascii_lowercase() {
            return Err(InstallError::WrongDigest { url: self.url.clone(), expected, actual });
        }
        for (name, file) in [("firecracker", firecracker::PROGRAM), ("jailer", firecracker::JAILER)]
        {
            self.unpack(&archive, name, &dir.join(file))?;
        }
        Ok(())
    }

    /// Takes one program out of the archive, whatever directory it is in.
    fn unpack(&self, archive: &[u8], name: &str, to: &Path) -> Result<(), InstallError> {
        let wanted = format!("{name}-v{}-{}", self.version, std::env::consts::ARCH);
        let broken = |error: io::Error| self.bad(error.to_string());
        let mut archive = tar::Archive::new(GzDecoder::new(archive));
        for entry in archive.entries().map_err(broken)? {
            let entry = entry.map_err(broken)?;
            let path = entry.path().map_err(broken)?;
            if path.file_name().is_none_or(|file| file != wanted.as_str()) {
                continue;
            }
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o755)
                .open(to)
                .named("create", to)?;
            io::copy(&mut entry.take(PROGRAM_LIMIT), &mut file).named("write", to)?;
            return Ok(());
        }
        Err(self.bad(format!("there is no `{wanted}` in it")))
    }

    fn bad(&self, problem: String) -> InstallError {
        InstallError::BadRelease { url: self.url.clone(), version: self.version, problem }
    }
}

async fn download(
    url: &str,
    limit: usize,
    progress: OnProgress<'_>,
) -> Result<Vec<u8>, InstallError> {
    let failed = |problem: &dyn fmt::Display| InstallError::Download {
        url: url.to_owned(),
        problem: problem.to_string(),
    };
    let client = reqwest::Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(STALL)
        .user_agent(concat!("mvm/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| failed(&chain(&error)))?;
    let mut response = client.get(url).send().await.map_err(|error| failed(&chain(&error)))?;
    if !response.status().is_success() {
        return Err(failed(&format!("it answers {}", response.status())));
    }
    let total = response.content_length();
    let mut content = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| failed(&chain(&error)))? {
        if content.len() + chunk.len() > limit {
            return Err(failed(&format!("it has more than {limit} bytes")));
        }
        content.extend_from_slice(&chunk);
        if let Some(total) = total.filter(|total| *total > 0) {
            let percent = content.len() as u64 * 100 / total;
            progress(Progress::Percent(percent.try_into().unwrap_or(100)));
        }
    }
    Ok(content)
}

/// An error with its causes: what the client says alone names the URL again and nothing else.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    match causes.last() {
        Some(root) => root.to_string(),
        None => error.to_string(),
    }
}
