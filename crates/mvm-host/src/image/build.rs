//! Builds revisions: the same inputs give the same id, and building what is there does nothing.
//!
//! A revision's directory appears whole or not at all. Builders of the same revision wait for one
//! another; what an interrupted one left behind is removed by the next one or by
//! [`ImageStore::gc_temp`].

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mvm_core::image::ImageConfig;
use mvm_core::init::InitMode;
use mvm_core::name::RevisionId;

use super::ImageError;
use super::digest::{Digest, InputDigest};
use super::durable::{
    FileError, NameLock, Named, abandoned, names, remove_abandoned, remove_dir, write_new,
};
use super::init_links::init_links;
use super::initrd::write_initrd;
use super::progress::{OnProgress, step};
use super::revision::{AgentRecord, KernelRecord, Manifest, Revision, SCHEMA, SourceRecord};
use super::source::{ImageSource, Ownership, Times};
use crate::bootstrap::Outcome;
use crate::bootstrap::kernel::{Kernel, StoredFile};
use crate::process::Tool;
use crate::state_dir::{INITRD, MODULES, ROOT, RevisionDir, StateDir, VMLINUZ};

/// The filesystem's UUID; a random one would make each build differ.
const ROOT_UUID: &str = "6d766d00-0000-4000-8000-726f6f740001";
/// The latest time that a file keeps, in seconds since 1970: in the year 2106.
const LATEST_TIME: &str = "4294967295";

/// The chunks of files in an image that has large holes, in bytes.
const CHUNK: u32 = 64 * 1024;
/// A hole that is worth chunks, in bytes.
const LARGE_HOLE: u64 = 16 * 1024 * 1024;

/// What a revision is made from.
pub struct BuildInputs<'a> {
    /// Gives the root filesystem.
    pub source: &'a dyn ImageSource,
    /// The guest kernel and its modules.
    pub kernel: &'a Kernel,
    /// The guest agent's program.
    pub agent: &'a [u8],
    /// The guest agent's version, for the manifest.
    pub agent_version: &'a str,
    /// The version of mvm, for the manifest.
    pub created_by: &'a str,
}

/// The revisions of one state directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    state: StateDir,
    /// Of all revisions.
    dir: PathBuf,
}

impl ImageStore {
    /// For this state directory; nothing is made yet.
    pub fn new(state: impl Into<StateDir>) -> Self {
        let state = state.into();
        Self { dir: state.images(), state }
    }

    /// A revision that was built; see [`Revision::open`].
    ///
    /// # Errors
    /// There is none of this id, or it is damaged.
    pub fn open(&self, id: &RevisionId) -> Result<Revision, ImageError> {
        Revision::open(&self.dir_of(id))
    }

    /// Where a revision is, or would be.
    pub(crate) fn dir_of(&self, id: &RevisionId) -> RevisionDir {
        self.state.revision(id)
    }

    /// Removes a revision; whoever needs it cannot start any more.
    pub(crate) fn remove(&self, id: &RevisionId) -> Result<(), ImageError> {
        let _lock = NameLock::acquire(&self.dir, id.as_str())?;
        // Under another name first: half a revision must never look like a whole one.
        let dying = self.dir.join(format!(".tmp-{id}"));
        remove_dir(&dying)?;
        let dir = self.dir_of(id);
        match fs::rename(&dir, &dying) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => {
                renamed.named("remove", &dir)?;
                Ok(remove_dir(&dying)?)
            }
        }
    }

    /// What interrupted builds left behind.
    pub(crate) fn leftovers(&self) -> Result<Vec<PathBuf>, ImageError> {
        Ok(abandoned(&self.dir)?)
    }

    /// The ids of all revisions, damaged ones included.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<RevisionId>, ImageError> {
        let mut ids: Vec<RevisionId> =
            names(&self.dir)?.iter().filter_map(|name| name.parse().ok()).collect();
        ids.sort();
        Ok(ids)
    }

    /// Builds a revision, unless it is there. A damaged one is replaced.
    ///
    /// # Errors
    /// Nothing is left behind.
    pub async fn build(
        &self,
        inputs: &BuildInputs<'_>,
        progress: OnProgress<'_>,
    ) -> Result<(Revision, Outcome), ImageError> {
        let fingerprint = inputs.source.fingerprint().await?;
        let root_maker = root_maker().await?;
        let id = revision_id(inputs, fingerprint, &root_maker);
        let lock = NameLock::wait(&self.dir, id.as_str()).await?;
        match self.open(&id) {
            Ok(revision) => return Ok((revision, Outcome::AlreadyThere)),
            Err(ImageError::NoSuchRevision { .. }) => {}
            Err(ImageError::Damaged { dir, .. }) => remove_dir(&dir)?,
            Err(error) => return Err(error),
        }
        let temp = lock.temp_tree()?;
        let mut manifest = Manifest {
            schema: SCHEMA,
            revision: id.clone(),
            source: SourceRecord {
                description: inputs.source.describe(),
                fingerprint,
                layers: inputs.source.layers(),
            },
            config: ImageConfig::default(),
            kernel: KernelRecord {
                id: inputs.kernel.id().clone(),
                release: inputs.kernel.manifest().release.clone(),
            },
            guest_agent: AgentRecord {
                version: inputs.agent_version.to_owned(),
                sha256: Digest::of(inputs.agent),
            },
            root_maker,
            created_by: inputs.created_by.to_owned(),
            files: BTreeMap::new(),
        };
        let new = RevisionDir::from(temp.path());
        write_boot_files(inputs, &new)?;
        if let Some(modules) = link_modules(inputs.kernel, &new)? {
            manifest.files.insert(MODULES.to_owned(), modules);
        }
        let init_links = write_root_filesystem(inputs.source, &new, progress)
            .await
            .map_err(|error| error.at(&self.dir))?;
        manifest.config = ImageConfig { init_links, ..inputs.source.config() };
        let dest = self.dir_of(&id);
        let work = move || {
            for (name, path) in
                [(VMLINUZ, new.vmlinuz()), (INITRD, new.initrd()), (ROOT, new.root())]
            {
                let (sha256, size) = Digest::of_file(&path).named("read", &path)?;
                manifest.files.insert(name.to_owned(), StoredFile { size, sha256 });
            }
            let path = new.manifest();
            let text = serde_json::to_vec_pretty(&manifest).named("encode", &path)?;
            write_new(&path, &text, 0o444)?;
            temp.publish(&dest)?;
            Revision::open(&dest)
        };
        let revision = tokio::task::spawn_blocking(work).await;
        let revision = revision.map_err(io::Error::other).named("build in", &self.dir)??;
        inputs.source.written().await;
        Ok((revision, Outcome::Made))
    }

    /// Removes what interrupted builds left behind; running ones are left alone. Returns how many
    /// directories were removed.
    ///
    /// # Errors
    /// A directory cannot be read or removed.
    pub fn gc_temp(&self) -> Result<usize, ImageError> {
        Ok(remove_abandoned(&self.dir)?)
    }
}

/// The name and version of the program that makes root filesystems: another version may lay out
/// the same tree differently, so it is one of the inputs.
async fn root_maker() -> Result<String, ImageError> {
    Ok(Tool::new("mkfs.erofs").arg("-V").first_line().await?)
}

fn revision_id(inputs: &BuildInputs<'_>, source: Digest, root_maker: &str) -> RevisionId {
    let mut digest = InputDigest::new("revision");
    digest
        .add("schema", &SCHEMA.to_be_bytes())
        .add("source", source.to_string().as_bytes())
        .add("kernel", inputs.kernel.id().as_str().as_bytes())
        .add("agent", Digest::of(inputs.agent).to_string().as_bytes())
        .add("root maker", root_maker.as_bytes());
    RevisionId::from_digest(digest.finish().prefix())
}

fn write_boot_files(inputs: &BuildInputs<'_>, dir: &RevisionDir) -> Result<(), ImageError> {
    let kernel = inputs.kernel;
    write_new(&dir.vmlinuz(), &kernel.read_checked(&kernel.vmlinuz())?, 0o444)?;
    let modules = kernel.modules().into_iter();
    let modules = modules
        .map(|(name, path)| Ok((name, kernel.read_checked(&path)?)))
        .collect::<Result<Vec<_>, ImageError>>()?;
    let path = dir.initrd();
    let mut initrd = Vec::new();
    write_initrd(&mut initrd, inputs.agent, &modules).named("encode", &path)?;
    Ok(write_new(&path, &initrd, 0o444)?)
}

/// Gives a revision the modules of its kernel, which stay with it whatever becomes of the kernel. All
/// revisions of a kernel share the one file, and so do their guests' reads.
fn link_modules(kernel: &Kernel, dir: &RevisionDir) -> Result<Option<StoredFile>, ImageError> {
    let Some((file, stored)) = kernel.module_image() else { return Ok(None) };
    let link = dir.modules();
    // A filesystem may have no links, or not so many.
    fs::hard_link(&file, &link)
        .or_else(|_| fs::copy(&file, &link).map(drop))
        .named("create", &link)?;
    Ok(Some(stored.clone()))
}

/// Makes the root filesystem, and tells which of its links lead to inits.
async fn write_root_filesystem(
    source: &dyn ImageSource,
    dir: &RevisionDir,
    progress: OnProgress<'_>,
) -> Result<BTreeMap<String, InitMode>, ImageError> {
    let tree = dir.join("tree");
    fs::create_dir(&tree).named("create directory", &tree)?;
    source.write_root(&tree, progress).await?;
    let root = dir.root();
    let looked = tree.clone();
    let look = move || Ok::<_, FileError>((has_large_hole(&looked)?, init_links(&looked)?));
    let looked = tokio::task::spawn_blocking(look).await;
    let (has_holes, init_links) = looked.map_err(io::Error::other).named("read", &tree)??;
    step(progress, "making the root filesystem".to_owned(), async {
        // Uncompressed: guests read it faster, and one page cache serves all of them.
        let mut tool = Tool::new("mkfs.erofs").args(["--quiet", "-U", ROOT_UUID]);
        tool = match source.times() {
            Times::Fixed => tool.arg("-T0"),
            // The files keep their times; the filesystem's own is this one, and files' are not later.
            Times::AsWritten => tool.env("SOURCE_DATE_EPOCH", LATEST_TIME).arg("--preserve-mtime"),
        };
        if has_holes {
            // In chunks, of which equal ones are kept once: a hole takes no space then.
            tool = tool.arg(format!("--chunksize={CHUNK}"));
        }
        if source.ownership() == Ownership::AllRoot {
            tool = tool.arg("--all-root");
        }
        tool.arg(&root).arg(&tree).run().await.map_err(ImageError::from)
    })
    .await?;
    fs::set_permissions(&root, Permissions::from_mode(0o444)).named("set the mode of", &root)?;
    remove_dir(&tree)?;
    Ok(init_links)
}

/// Whether a file of the tree leaves a lot of space out that a plain filesystem image would fill.
fn has_large_hole(dir: &Path) -> Result<bool, FileError> {
    for entry in fs::read_dir(dir).named("read directory", dir)? {
        let entry = entry.named("read directory", dir)?;
        let meta = entry.metadata().named("read", &entry.path())?;
        let is_found = match meta.is_dir() {
            true => has_large_hole(&entry.path())?,
            false => meta.is_file() && meta.len() >= meta.blocks() * 512 + LARGE_HOLE,
        };
        if is_found {
            return Ok(true);
        }
    }
    Ok(false)
}
