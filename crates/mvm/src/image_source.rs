//! Image sources as they are typed: completed here, where the working directory and standard input
//! are, so that the agent gets what it can find by itself.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts are no Markdown")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use mvm_core::image::ImageSpec;
use mvm_host::state_dir::StateDir;

use crate::cli::Context;
use crate::cmd::run::stem;
use crate::error::{Error, Result};

/// Where a pool's root filesystem comes from.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    /// Where the root filesystem comes from: builtin, an image of a registry such as nginx:1.27,
    /// oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], mmdebstrap:SUITE or
    /// rootfs:DIR-OR-TAR; a FILE of - is standard input.
    #[arg(long, value_name = "IMAGE", conflicts_with = "debian")]
    image: Option<ImageSpec>,
    /// Make a Debian system of this release, such as bookworm.
    #[arg(long, value_name = "SUITE")]
    debian: Option<String>,
    /// Packages of the Debian system beside the base; systemd-sysv makes it boot as a whole.
    #[arg(long, value_name = "PACKAGE,...", value_delimiter = ',', requires = "debian")]
    packages: Vec<String>,
}

impl ImageArgs {
    /// The image that was asked for, if any, with an absolute path. What comes over standard input
    /// is in a file of the state directory then.
    pub(crate) async fn into_image(self, context: &Context) -> Result<Option<ImageSpec>> {
        if let Some(suite) = &self.debian {
            let packages = self.packages.iter().map(String::as_str);
            return match ImageSpec::debian(suite, packages) {
                Ok(image) => Ok(Some(image)),
                Err(message) => Err(usage(message)),
            };
        }
        match self.image {
            Some(image) => complete(image, context).await.map(Some),
            None => Ok(None),
        }
    }
}

/// An image as the agent can find it: with an absolute path, and what comes over standard input in
/// a file of the state directory.
pub(crate) async fn complete(image: ImageSpec, context: &Context) -> Result<ImageSpec> {
    if image.path() == Some("-") {
        // The agent makes the state directory as it should be.
        context.client.node().await?;
        let file = upload(context.state_dir()).map_err(|(path, source)| Error::Read {
            what: format!("standard input into {}", path.display()),
            source,
        })?;
        return in_place(image, &file);
    }
    let here = std::env::current_dir()
        .map_err(|source| Error::Read { what: "the working directory".to_owned(), source })?;
    absolute(image, &here).map_err(usage)
}

fn usage(message: String) -> Error {
    let hint = "see `mvm pool create --help` for what an image may be".to_owned();
    Error::Usage { message, hint }
}

/// The same image with a path that does not depend on a working directory.
pub(crate) fn absolute(image: ImageSpec, base: &Path) -> std::result::Result<ImageSpec, String> {
    let Some(path) = image.path() else { return Ok(image) };
    let path = base.join(path);
    let Some(text) = path.to_str() else {
        return Err(format!("the path {} is not UTF-8", path.display()));
    };
    let text = text.to_owned();
    image.with_path(&text)
}

fn in_place(image: ImageSpec, path: &Path) -> Result<ImageSpec> {
    image.with_path(&path.display().to_string()).map_err(usage)
}

/// Copies standard input to a file below the state directory.
fn upload(state: &StateDir) -> std::result::Result<PathBuf, (PathBuf, io::Error)> {
    let dir = state.uploads();
    let copied = || -> io::Result<PathBuf> {
        fs::create_dir_all(&dir)?;
        let mut builder = tempfile::Builder::new();
        let mut file = builder.prefix("upload-").suffix(".tar").tempfile_in(&dir)?;
        io::copy(&mut io::stdin().lock(), file.as_file_mut())?;
        file.as_file().sync_all()?;
        // After the image, if the archive says what that is: a pool is named after it.
        let given = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = match mvm_host::image::name_in_archive(file.path(), &dir) {
            Some(image) => given.replacen("upload-", &format!("{}.", stem(&image)), 1),
            None => given.replacen("upload-", "upload.", 1),
        };
        let path = dir.join(name);
        file.persist(&path).map_err(|error| error.error)?;
        Ok(path)
    };
    copied().map_err(|error| (dir.clone(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_those_of_the_working_directory() {
        let absolute =
            |text: &str| absolute(text.parse().unwrap(), Path::new("/work")).unwrap().to_string();
        assert_eq!(absolute("oci:layout:v1"), "oci:/work/layout:v1");
        assert_eq!(absolute("rootfs:/srv/root"), "rootfs:/srv/root");
        assert_eq!(absolute("builtin"), "builtin");
    }

    #[test]
    fn a_directory_that_cannot_be_in_an_image_source_is_refused() {
        let error = absolute("oci:x".parse().unwrap(), Path::new("/a:b")).unwrap_err();
        assert!(error.contains("without colons"), "{error}");
    }
}
