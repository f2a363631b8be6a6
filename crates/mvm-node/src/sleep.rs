//! Putting an instance's VM into a snapshot, and going on from one.
//!
//! ```text
//!  instances/ID/sleep-1/       manifest.json  device.state  memory.image     the first sleep
//!               sleep-2/       manifest.json  device.state  memory.image     the same file, written to
//!               sleep-3/       manifest.json  device.state  memory.changes   relative to sleep-2's image
//! ```
//!
//! What changed is written into the image if that is the instance's alone and changes are not to be
//! compressed; it is kept apart otherwise. An image is kept as long as a VM maps it or a snapshot is
//! relative to it. The instance's actor
//! calls this; when a snapshot is used up is decided by [`mvm_core::lifecycle`].

use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::WakeReason;
use mvm_core::lifecycle::{Event, InstanceStatus, Phase, StartFrom};
use mvm_core::name::InstancePath;
use mvm_core::record::InstanceRecord;
use mvm_core::snapshot::{
    DiskStamp, FORMAT, Here, ImageRef, Manifest, OwnSnapshot, Refusal, Shape, VmmBuild, verdict,
};
use mvm_host::guest::{Session, SessionError};
use mvm_host::snapshots::{self, SnapshotError, Trust};
use mvm_host::state_dir::{InstanceDir, LAYER, MEMORY_IMAGE, SnapshotDir};
use mvm_host::vmm::{
    Disk, DiskAccess, MemoryImage, MemoryPart, Packing, Restore, SaveChanges, TapPlace, Vm, VmSpec,
    VmmError,
};

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::actor::Message;
use crate::bases;
use crate::effects::{self, EffectError, Given};
use crate::node::{Node, chain, ms_since};
use crate::space;

/// What the guest may take beyond the time of its hooks: writing out what it has in memory.
const SYNC_LIMIT: Duration = Duration::from_secs(60);

/// Prepares the guest, stops its vCPUs and saves everything. The VM stays paused. Given up, before
/// its vCPUs stop, if the VM is to end.
pub(crate) async fn suspend(
    node: &Node,
    given: &Given,
    vm: &dyn Vm,
    (session, mut is_ending): (watch::Receiver<Option<Session>>, watch::Receiver<bool>),
    status: &InstanceStatus,
    hooks_ms: u64,
) -> Result<OwnSnapshot, EffectError> {
    refuse_without_space(node, vm).await?;
    let path = given.path();
    let spec = effects::spec(node, given, status).await?;
    let began = Instant::now();
    let prepared = match hooks_ms {
        0 => None,
        _ => tokio::select! {
            prepared = prepare(path, session, Duration::from_millis(hooks_ms)) => Some(prepared?),
            _ = is_ending.wait_for(|is_ending| *is_ending) => return Err(EffectError::Abandoned),
        },
    };
    let prepare_ms = ms_since(began);
    let paused = Instant::now();
    let suspended = pause_and_save(node, &given.record, &spec, status, vm).await;
    tracing::debug!(instance = %path, prepare_ms, save_ms = ms_since(paused), "suspended");
    if suspended.is_err()
        && let Some(session) = prepared
        && vm.resume().await.is_ok()
    {
        // Its programs have prepared for a sleep that does not come.
        let told = effects::tell_woken(path, &session, WakeReason::Resumed).await;
        if let Err(error) = told {
            tracing::warn!(instance = %path, error = chain(&error), "cannot tell that it stays awake");
        }
    }
    suspended
}

/// A guest that stands still in the middle of a write cannot be saved.
async fn refuse_without_space(node: &Node, vm: &dyn Vm) -> Result<(), EffectError> {
    match vm.lacks_space().await? {
        true => Err(EffectError::LacksSpace(space::words(node))),
        false => Ok(()),
    }
}

async fn pause_and_save(
    node: &Node,
    record: &InstanceRecord,
    spec: &VmSpec,
    status: &InstanceStatus,
    vm: &dyn Vm,
) -> Result<OwnSnapshot, EffectError> {
    vm.pause().await?;
    let number = status.sleeps + 1;
    let dest = spec.dir.sleep(number);
    let new = dest.unfinished();
    let saved = save(node, record, spec, status, vm, &new, dest).await;
    if saved.is_err()
        && let Err(error) = snapshots::remove(&new)
    {
        let path = &record.path;
        tracing::warn!(instance = %path, error = chain(&error), "cannot remove half a snapshot");
    }
    Ok(OwnSnapshot { number, memory: saved? })
}

async fn prepare(
    path: &InstancePath,
    mut session: watch::Receiver<Option<Session>>,
    hooks: Duration,
) -> Result<Session, EffectError> {
    // An agent that has just come back is still on its way to the guest.
    let session = timeout(hooks, session.wait_for(Option::is_some)).await;
    let session = session.ok().and_then(|session| session.ok()?.clone());
    let session = session.ok_or(EffectError::Silent)?;
    match session.prepare_sleep(hooks, hooks + SYNC_LIMIT).await {
        Ok(report) => effects::note_hooks(path, "pre-sleep", &report),
        // A guest agent of an earlier version: its disks are as after a power cut.
        Err(SessionError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(session)
}

/// Saves a VM, whose vCPUs are stopped for it and stay so, for others to begin from: with a copy of
/// its writable layer, and with the image that its memory is relative to.
pub(crate) async fn capture(
    node: &Node,
    given: &Given,
    vm: &dyn Vm,
    status: &InstanceStatus,
    dest: &SnapshotDir,
) -> Result<(), EffectError> {
    refuse_without_space(node, vm).await?;
    let path = given.path();
    let spec = effects::spec(node, given, status).await?;
    if let Some(image) = &status.memory {
        // The copy gets a digest of its own, which must not vouch for a damaged image: nothing is
        // trusted. A sleep that failed has left nothing to compare the image with.
        let image_dir = image_dir(node, &spec.dir, image);
        if snapshots::is_complete(&image_dir) {
            blocking(move || verify_image(&Trust::default(), &image_dir)).await??;
        }
    }
    let new = dest.unfinished();
    snapshots::begin(&new)?;
    vm.pause().await?;
    let saved = vm.save(&new, SaveChanges::Apart(Packing::Plain)).await?;
    if saved.part == MemoryPart::Changes {
        let image = status.memory.as_ref().ok_or(EffectError::NoImage)?;
        let image_dir = image_dir(node, &spec.dir, image);
        snapshots::link(&image_dir.memory_image(), &new.memory_image())?;
    }
    let here = here(node, &spec, status, vm.build().await?)?;
    complete_for_others(node, path, here, &spec, &new, dest).await
}

/// Makes a copy of a sleeping instance's snapshot for others to begin from. It has to be one that
/// the instance itself could go on from: the copy gets digests and a manifest of its own.
pub(crate) async fn copy_for_others(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
    dest: &SnapshotDir,
) -> Result<(), RestoreError> {
    let path = given.path();
    let spec = effects::spec(node, given, status).await?;
    let snapshot = status.snapshot.as_ref().ok_or(EffectError::NoImage)?;
    let own = spec.dir.sleep(snapshot.number);
    let manifest = snapshots::read(&own)?;
    let build = node.host.vmm.build_for(&manifest.build).await.map_err(EffectError::from)?;
    verdict(&manifest, path, &here(node, &spec, status, build)?)?;
    let image_dir = image_dir(node, &spec.dir, &snapshot.memory);
    let (dir, of_snapshot, of_image) = (own.clone(), manifest.clone(), image_dir.clone());
    let verified = move || verify(&Trust::default(), &dir, &of_snapshot, Some(&of_image));
    blocking(verified).await??;
    let new = dest.unfinished();
    snapshots::begin(&new)?;
    for file in manifest.files.iter().filter(|file| file.name != MEMORY_IMAGE) {
        snapshots::link(&own.join(&file.name), &new.join(&file.name))?;
    }
    snapshots::link(&image_dir.memory_image(), &new.memory_image())?;
    let here = here(node, &spec, status, manifest.build)?;
    Ok(complete_for_others(node, path, here, &spec, &new, dest).await?)
}

async fn complete_for_others(
    node: &Node,
    path: &InstancePath,
    mut here: Here,
    spec: &VmSpec,
    new: &SnapshotDir,
    dest: &SnapshotDir,
) -> Result<(), EffectError> {
    node.host.images.copy_layer(&spec.dir.layer(), &new.layer(), 0).await?;
    here.disks = here.disks.into_iter().map(DiskStamp::of_copy).collect();
    let manifest = manifest_of(node, path, here, None);
    let (new, dest) = (new.clone(), dest.clone());
    blocking(move || snapshots::complete(&new, &dest, manifest, None)).await??;
    Ok(())
}

fn manifest_of(node: &Node, path: &InstancePath, here: Here, base: Option<ImageRef>) -> Manifest {
    Manifest {
        format: FORMAT,
        instance: path.clone(),
        created_unix_ms: node.clock.now_ms(),
        build: here.build,
        revision: here.revision,
        shape: here.shape,
        base,
        files: Vec::new(),
        disks: here.disks,
        read_disks: Some(here.read_disks),
    }
}

/// The directory of the snapshot that a memory image belongs to.
fn image_dir(node: &Node, instance_dir: &InstanceDir, image: &ImageRef) -> SnapshotDir {
    match image {
        ImageRef::Own { number } => instance_dir.sleep(*number),
        ImageRef::Shared { id } => node.shared.dir(id),
    }
}

async fn save(
    node: &Node,
    record: &InstanceRecord,
    spec: &VmSpec,
    status: &InstanceStatus,
    vm: &dyn Vm,
    new: &SnapshotDir,
    dest: SnapshotDir,
) -> Result<ImageRef, EffectError> {
    snapshots::begin(new)?;
    let (changes, known) = match own_image(node, record, spec, status) {
        Some(dir) => {
            let known = snapshots::open_image(&dir)?;
            (SaveChanges::IntoImage(dir.memory_image()), known)
        }
        None => (SaveChanges::Apart(packing(node, record)), None),
    };
    let saved = vm.save(new, changes).await?;
    let (base, memory) = match (saved.part, &status.memory) {
        (MemoryPart::Whole, _) => (None, ImageRef::Own { number: status.sleeps + 1 }),
        (MemoryPart::Changes, Some(image)) => (Some(image.clone()), image.clone()),
        (MemoryPart::Changes, None) => return Err(EffectError::NoImage),
    };
    let here = here(node, spec, status, vm.build().await?)?;
    let manifest = manifest_of(node, &record.path, here, base);
    let (new, trust) = (new.clone(), node.trust.clone());
    let opened = known.zip(Some(saved.written)).filter(|(_, written)| !written.is_empty());
    let complete = move || {
        let manifest = snapshots::complete(&new, &dest, manifest, opened)?;
        trust.completed(&dest, &manifest);
        Ok::<_, SnapshotError>(())
    };
    blocking(complete).await??;
    Ok(memory)
}

/// The directory of the image that what an instance changed may be written into: of its own one, if
/// nobody began from it, and if changes are not to be compressed.
fn own_image(
    node: &Node,
    record: &InstanceRecord,
    spec: &VmSpec,
    status: &InstanceStatus,
) -> Option<SnapshotDir> {
    let Some(ImageRef::Own { number }) = status.memory else { return None };
    let dir = spec.dir.sleep(number);
    let may = packing(node, record) == Packing::Plain && snapshots::has_image_alone(&dir);
    may.then_some(dir)
}

/// How an instance's pool wants its snapshots to be kept.
fn packing(node: &Node, record: &InstanceRecord) -> Packing {
    let mirror = node.state.now();
    match mirror.desired.pools.get(&record.path.pool) {
        Some(pool) if pool.spec.sleep_policy.compress => Packing::Zstd,
        _ => Packing::Plain,
    }
}

/// What an instance would go on with, on this build of a VMM.
fn here(
    node: &Node,
    spec: &VmSpec,
    status: &InstanceStatus,
    build: VmmBuild,
) -> Result<Here, EffectError> {
    let revision = status.revision.clone().ok_or(EffectError::NoRevision)?;
    let (layer, of_revision) = (spec.dir.layer(), node.config.state_dir.revision(&revision));
    // What is beside the root's image, such as its kernel's modules, is the revision's and never changes.
    let is_data = |disk: &&Disk| disk.path != layer && disk.path.parent() != Some(&*of_revision);
    let (mut disks, mut read_disks) =
        (vec![snapshots::stamp("the writable layer", &layer)?], Vec::new());
    for (disk, number) in spec.disks.iter().filter(is_data).zip(1..) {
        match disk.access {
            DiskAccess::ReadWrite => {
                disks.push(snapshots::stamp(&format!("data disk {number}"), &disk.path)?);
            }
            DiskAccess::ReadOnly => {
                let name = disk.path.file_stem().unwrap_or_default().to_string_lossy();
                read_disks.push(snapshots::stamp(&format!("disk {name}"), &disk.path)?);
            }
        }
    }
    Ok(Here {
        build,
        revision,
        shape: Shape {
            vcpus: spec.vcpus,
            mem_mib: spec.mem_mib,
            has_nic: spec.nic.is_some(),
            kernel_args: spec.kernel_args.clone(),
        },
        disks,
        read_disks,
    })
}

/// Why an instance does not go on from its snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// It never will.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Its files are not what they were.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Its memory cannot be used.
    #[error("cannot use its memory")]
    Memory(#[source] std::io::Error),
    /// The VMM did not take it.
    #[error("the VMM does not take it")]
    Vmm(#[source] VmmError),
    /// Something else is in the way, which may pass.
    #[error(transparent)]
    Passing(#[from] EffectError),
}

impl RestoreError {
    /// Whether the snapshot is not to blame, so that it may be restored another time: a file that
    /// is there and cannot be read now, or no memory for it.
    fn is_passing(&self) -> bool {
        let is_there = |error: &std::io::Error| error.kind() != std::io::ErrorKind::NotFound;
        match self {
            Self::Passing(_) => true,
            Self::Memory(error) => is_there(error),
            Self::Snapshot(SnapshotError::File(error)) => is_there(&error.source),
            Self::Vmm(error) => is_passing(error),
            Self::Refused(_) | Self::Snapshot(_) => false,
        }
    }
}

/// Prepares the tap, ends strays, and starts a VM from the snapshot that the status names. Its
/// vCPUs are stopped on return.
pub(crate) async fn restore(node: &Node, given: &Given, status: &InstanceStatus) -> Message {
    let path = given.path();
    match try_restore(node, given, status).await {
        Ok(vm) => Message::Launched(vm),
        Err(error) if error.is_passing() => {
            tracing::warn!(instance = %path, error = chain(&error), "cannot be woken now");
            Message::Event(Event::BootFailed { error: chain(&error), program: None })
        }
        Err(refused) => {
            let error = chain(&refused);
            tracing::warn!(instance = %path, error, "its snapshot cannot be restored");
            if let Phase::Starting { begin: StartFrom::Shared { id }, .. } = &status.phase
                && bases::is_base(node, &path.pool, id)
            {
                // It boots as without a base. A fork boots with the disk that it was forked with.
                remove_layer(&node.instance_dir(&path.id));
                bases::give_up(node, &path.pool, id, &error).await;
            }
            Message::Event(Event::RestoreRefused { error })
        }
    }
}

/// Removes a layer on which nothing has run yet.
fn remove_layer(instance_dir: &InstanceDir) {
    let layer = instance_dir.layer();
    match std::fs::remove_file(&layer) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(layer = %layer.display(), %error, "cannot remove the copy of a layer");
        }
        _ => {}
    }
}

async fn try_restore(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
) -> Result<Arc<dyn Vm>, RestoreError> {
    let began = Instant::now();
    let path = given.path();
    let spec = effects::spec(node, given, status).await?;
    node.host.vmm.end_strays(&spec).await.map_err(EffectError::from)?;
    let (dir, image) = match &status.phase {
        Phase::Starting { begin: StartFrom::Shared { id }, .. } => {
            let dir = node.shared.dir(id);
            let layer = spec.dir.layer();
            effects::make_dir(&spec.dir)?;
            let copied = node.host.images.copy_layer(&dir.layer(), &layer, spec.uid).await;
            copied.map_err(EffectError::from)?;
            (dir, ImageRef::Shared { id: id.clone() })
        }
        _ => {
            let snapshot = status.snapshot.clone().ok_or(EffectError::NoImage)?;
            (spec.dir.sleep(snapshot.number), snapshot.memory)
        }
    };
    let manifest = snapshots::read(&dir)?;
    let build = node.host.vmm.build_for(&manifest.build).await.map_err(EffectError::from)?;
    verdict(&manifest, path, &here(node, &spec, status, build.clone())?)?;
    let (memory, image_dir) = match &image {
        ImageRef::Own { number } => {
            let image_dir = spec.dir.sleep(*number);
            let memory = MemoryImage::own(&image_dir.memory_image(), spec.uid);
            (Arc::new(memory.map_err(RestoreError::Memory)?), Some(image_dir))
        }
        // Verified when it was loaded.
        ImageRef::Shared { id } => (node.shared.memory(id).await?, None),
    };
    let vmm = Some(manifest.build.vmm);
    // Where a VMM has its tap to itself, the rules have time until that is connected.
    let is_tap_first = node.host.vmm.tap_place(vmm) == TapPlace::Host;
    let admit = async |is_now: bool| match is_now {
        true => effects::add_to_network(node, given, vmm).await,
        false => Ok(()),
    };
    admit(is_tap_first).await?;
    let from = Restore { dir: dir.clone(), memory, build };
    // Looking at every byte takes as long as the VMM takes to start, or longer.
    let trust = node.trust.clone();
    let verified = blocking(move || verify(&trust, &dir, &manifest, image_dir.as_ref()));
    let prepare_ms = ms_since(began);
    let loading = Instant::now();
    let restored = node.host.vmm.restore(&spec, &from);
    let (verified, vm, admitted) = tokio::join!(verified, restored, admit(!is_tap_first));
    tracing::debug!(instance = %path, prepare_ms, load_ms = ms_since(loading), "restored");
    let verified = verified.map_err(RestoreError::from).and_then(|verified| Ok(verified?));
    let vm = vm.map_err(RestoreError::Vmm);
    match (verified.and(admitted.map_err(RestoreError::from)), vm) {
        (Ok(()), vm) => vm,
        (Err(error), vm) => {
            if let Ok(vm) = vm {
                vm.kill().await.map_err(EffectError::from)?;
                vm.wait().await;
            }
            Err(error)
        }
    }
}

/// Compares the snapshot's own files, and the instance's image that they are relative to, with
/// their manifests, as far as they are not trusted.
fn verify(
    trust: &Trust,
    dir: &SnapshotDir,
    manifest: &Manifest,
    image_dir: Option<&SnapshotDir>,
) -> Result<(), SnapshotError> {
    trust.verify(dir, manifest, |name| name != MEMORY_IMAGE && name != LAYER)?;
    image_dir.map_or(Ok(()), |image_dir| verify_image(trust, image_dir))
}

/// Compares a memory image with the manifest of its snapshot.
fn verify_image(trust: &Trust, image_dir: &SnapshotDir) -> Result<(), SnapshotError> {
    let manifest = snapshots::read(image_dir)?;
    trust.verify(image_dir, &manifest, |name| name == MEMORY_IMAGE)
}

/// Whether the VMM failed for a reason that has nothing to do with the snapshot.
fn is_passing(error: &VmmError) -> bool {
    matches!(
        error,
        VmmError::MissingProgram { .. }
            | VmmError::DiskInUse { .. }
            | VmmError::Spawn { .. }
            | VmmError::TooOld { .. }
            | VmmError::Unfit { .. }
            | VmmError::NotIsolated { .. }
            | VmmError::System { .. }
    )
}

/// Removes the snapshots of an instance that nothing of its status needs any more.
pub(crate) fn prune(
    instance_dir: &InstanceDir,
    status: &InstanceStatus,
) -> Result<(), EffectError> {
    let is_needed = |number: u64| {
        let of = |image: &ImageRef| *image == ImageRef::Own { number };
        status.memory.as_ref().is_some_and(of)
            || status.snapshot.as_ref().is_some_and(|own| own.number == number || of(&own.memory))
    };
    let entries = match std::fs::read_dir(instance_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(EffectError::Dir { path: instance_dir.display().to_string(), source });
        }
    };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        let Some(rest) = name.to_str().and_then(InstanceDir::sleep_of_name) else {
            continue;
        };
        if !rest.parse().is_ok_and(is_needed) {
            snapshots::remove(&SnapshotDir::from(&instance_dir.join(&name)))?;
        }
    }
    Ok(())
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EffectError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| EffectError::Ending)
}
