//! The stored kernels of a machine: fetching, importing, and the default one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::kernel::{Kernel, KernelId, KernelOrigin};
use super::kernel_build::{self, Parts};
use super::{BootstrapError, Outcome, apt, kernel_packages};
use crate::image::durable::{
    FileError, NameLock, Named, remove_abandoned, remove_dir, replace_file,
};
use crate::image::progress::{OnProgress, step};
use crate::state_dir::StateDir;

const DEFAULT: &str = "default";

/// The kernels of one state directory.
#[derive(Debug, Clone)]
pub struct KernelStore {
    dir: PathBuf,
    cache: PathBuf,
}

impl KernelStore {
    /// For this state directory; nothing is made yet.
    pub fn new(state: impl Into<StateDir>) -> Self {
        let state = state.into();
        Self { dir: state.kernels(), cache: state.package_cache() }
    }

    /// Keeps downloaded packages elsewhere than in the state directory.
    pub fn with_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.cache = cache.into();
        self
    }

    /// A stored kernel; its files' presence and sizes are checked.
    ///
    /// # Errors
    /// There is none of this id, or it is damaged.
    pub fn open(&self, id: &KernelId) -> Result<Kernel, BootstrapError> {
        Kernel::open(self.dir.join(id.as_str()).into(), id)
    }

    /// The kernel that new images use, or `None` if none was fetched or imported yet.
    ///
    /// # Errors
    /// It is damaged, or the pointer to it is.
    pub fn default_kernel(&self) -> Result<Option<Kernel>, BootstrapError> {
        let path = self.dir.join(DEFAULT);
        match fs::read_to_string(&path) {
            Ok(id) => self.open(&id.trim().parse()?).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FileError::new("read", &path, error).into()),
        }
    }

    /// Makes a stored kernel the one that new images use.
    ///
    /// # Errors
    /// The pointer cannot be written.
    pub fn set_default(&self, kernel: &Kernel) -> Result<(), BootstrapError> {
        let text = format!("{}\n", kernel.id());
        Ok(replace_file(&self.dir.join(DEFAULT), text.as_bytes(), 0o644)?)
    }

    /// The default kernel, fetched if there is none or if the stored one is damaged. One that an
    /// earlier mvm stored without the modules that guests may load is fetched anew, if it can be.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub async fn ensure_default(
        &self,
        progress: OnProgress<'_>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        match self.default_kernel() {
            Ok(Some(kernel)) if !kernel.lacks_modules() => {
                return Ok((kernel, Outcome::AlreadyThere));
            }
            // It boots guests all the same.
            Ok(Some(kernel)) => match self.fetch(progress).await {
                Ok((whole, _)) => {
                    self.set_default(&whole)?;
                    return Ok((whole, Outcome::Made));
                }
                Err(_) => return Ok((kernel, Outcome::AlreadyThere)),
            },
            Ok(None)
            | Err(BootstrapError::DamagedKernel { .. } | BootstrapError::NoSuchKernel { .. }) => {}
            Err(error) => return Err(error),
        }
        let (kernel, _) = self.fetch(progress).await?;
        self.set_default(&kernel)?;
        Ok((kernel, Outcome::Made))
    }

    /// Fetches the distribution's current kernel for virtual machines, without installing it.
    ///
    /// # Errors
    /// The machine has no `apt`, the packages cannot be fetched, or the kernel lacks what a
    /// microVM needs.
    pub async fn fetch(
        &self,
        progress: OnProgress<'_>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let packages = kernel_packages::resolve(progress).await?;
        let origin = KernelOrigin::Package {
            name: packages[0].package.clone(),
            version: packages[0].version.clone(),
        };
        let mut files = Vec::new();
        for package in &packages {
            files.push(apt::download(package, &self.cache, progress).await?);
        }
        let text = format!("unpacking {}", packages[0].package);
        match step(progress, text.clone(), self.store_packages(&files, &origin)).await {
            Err(BootstrapError::MissingModule { module, place }) => {
                // Some distributions keep filesystems in a package of their own.
                let Some(extra) = kernel_packages::extra_modules(&packages[0]).await? else {
                    return Err(BootstrapError::MissingModule { module, place });
                };
                files.push(apt::download(&extra, &self.cache, progress).await?);
                step(progress, text, self.store_packages(&files, &origin)).await
            }
            result => result,
        }
    }

    async fn store_packages(
        &self,
        files: &[PathBuf],
        origin: &KernelOrigin,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let (files, origin) = (files.to_owned(), origin.clone());
        self.store(move |temp| kernel_build::from_packages(&files, origin, temp)).await
    }

    /// Stores a kernel of the user's own. Without a directory of modules (such as
    /// `/lib/modules/RELEASE`) the kernel must have all that a microVM needs built in.
    ///
    /// # Errors
    /// The file is no bootable kernel or is truncated; a needed module is missing.
    pub async fn import(
        &self,
        vmlinuz: &Path,
        modules: Option<&Path>,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let (vmlinuz, modules) = (vmlinuz.to_owned(), modules.map(Path::to_owned));
        self.store(move |temp| kernel_build::from_files(&vmlinuz, modules.as_deref(), temp)).await
    }

    /// Writes what `parts` gives, which may use an empty directory, unless a sound kernel of the same content is there.
    async fn store(
        &self,
        parts: impl FnOnce(&Path) -> Result<Parts, BootstrapError> + Send + 'static,
    ) -> Result<(Kernel, Outcome), BootstrapError> {
        let store = self.clone();
        let work = move || {
            // The content decides the id, so what it is unpacked from has a name of its own.
            let unpacking = NameLock::acquire(&store.dir, "unpacking")?.temp_tree()?;
            let parts = parts(unpacking.path())?;
            let id = parts.id();
            let lock = NameLock::acquire(&store.dir, id.as_str())?;
            if let Ok(kernel) = store.open(&id)
                && kernel.verify().is_ok()
            {
                return Ok((kernel, Outcome::AlreadyThere));
            }
            // What is at its place is damaged: the name is a digest of the content.
            let dest = store.dir.join(id.as_str());
            remove_dir(&dest)?;
            let temp = lock.temp_tree()?;
            parts.write(&id, &temp.path().into())?;
            temp.publish(&dest)?;
            drop(unpacking);
            Ok((store.open(&id)?, Outcome::Made))
        };
        let result = tokio::task::spawn_blocking(work).await;
        result.map_err(io::Error::other).named("store a kernel in", &self.dir)?
    }

    /// Removes what interrupted operations left behind; running ones are left alone. Returns how
    /// many directories were removed.
    ///
    /// # Errors
    /// A directory cannot be read or removed.
    pub fn gc_temp(&self) -> Result<usize, BootstrapError> {
        Ok(remove_abandoned(&self.dir)? + remove_abandoned(&self.cache)?)
    }
}
