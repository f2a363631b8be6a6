//! Which packages of the distribution make up the current kernel for virtual machines.

use super::BootstrapError;
use super::apt::{self, Candidate};
use crate::image::progress::OnProgress;

/// Metapackages whose dependency is the current kernel for microVMs, best first.
#[cfg(target_arch = "x86_64")]
const METAPACKAGES: &[&str] =
    &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];
#[cfg(target_arch = "aarch64")]
const METAPACKAGES: &[&str] =
    &["linux-image-cloud-arm64", "linux-image-virtual", "linux-image-arm64"];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const METAPACKAGES: &[&str] = &["linux-image-virtual"];

/// The packages that make up the kernel; the first one holds the kernel itself.
pub(super) async fn resolve(progress: OnProgress<'_>) -> Result<Vec<Candidate>, BootstrapError> {
    if !apt::is_available() {
        return Err(BootstrapError::NoApt {
            needed: "a guest kernel",
            instead: "give a kernel of your own with `--kernel PATH [--modules DIR]`",
        });
    }
    let meta = apt::first_candidate(METAPACKAGES, progress).await?;
    let unknown = |name: &str| BootstrapError::UnknownPackage { names: name.to_owned() };
    let image = image_of(&meta).ok_or_else(|| unknown(&format!("{}'s kernel", meta.package)))?;
    let image = apt::first_candidate(&[image], progress).await?;
    let parts: Vec<String> = parts_of(&image).map(str::to_owned).collect();
    let mut packages = vec![image];
    for part in parts {
        packages.push(apt::first_candidate(&[&part], progress).await?);
    }
    Ok(packages)
}

/// The versioned kernel package that a metapackage depends on.
fn image_of(meta: &Candidate) -> Option<&str> {
    let mut names = meta.depends.iter().map(String::as_str);
    names.find(|name| name.strip_prefix("linux-image-").is_some_and(is_versioned))
}

/// Distributions that split their kernel keep the modules in a package of their own.
fn parts_of(image: &Candidate) -> impl Iterator<Item = &str> {
    let names = image.depends.iter().map(String::as_str);
    names.filter(|name| {
        let rest = ["linux-modules-", "linux-binary-"].iter().find_map(|p| name.strip_prefix(p));
        rest.is_some_and(is_versioned)
    })
}

/// The package with the less common modules of a kernel, if the distribution has one.
pub(super) async fn extra_modules(image: &Candidate) -> Result<Option<Candidate>, BootstrapError> {
    match image.package.strip_prefix("linux-image-") {
        Some(release) => apt::candidate(&format!("linux-modules-extra-{release}")).await,
        None => Ok(None),
    }
}

fn is_versioned(rest: &str) -> bool {
    rest.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::digest::Digest;

    fn package(name: &str, depends: &[&str]) -> Candidate {
        Candidate {
            package: name.to_owned(),
            version: "1".to_owned(),
            architecture: "amd64".to_owned(),
            size: 1,
            sha256: Digest::of(b""),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn the_kernel_behind_a_metapackage_is_found() {
        let debian = package("linux-image-cloud-amd64", &["linux-image-6.1.0-56-cloud-amd64"]);
        assert_eq!(image_of(&debian), Some("linux-image-6.1.0-56-cloud-amd64"));
        let ubuntu = package(
            "linux-image-virtual",
            &["linux-image-6.8.0-31-generic", "linux-modules-extra-6.8.0-31-generic"],
        );
        assert_eq!(image_of(&ubuntu), Some("linux-image-6.8.0-31-generic"));
        assert_eq!(image_of(&package("x", &["kmod", "linux-image-generic"])), None);
    }

    #[test]
    fn modules_in_a_package_of_their_own_are_found() {
        let ubuntu = package("i", &["kmod", "linux-base", "linux-modules-6.8.0-31-generic"]);
        assert_eq!(parts_of(&ubuntu).collect::<Vec<_>>(), ["linux-modules-6.8.0-31-generic"]);
        assert_eq!(parts_of(&package("i", &["kmod", "initramfs-tools"])).count(), 0);
    }
}
