//! Built images: what uses them, and the removal of those that nothing uses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use mvm_core::image::ImageSpec;
use mvm_core::name::{PoolPath, RevisionId};
use mvm_host::images::{Collected, CollectedKind, InUse, StoredImage};
use mvm_wire::view::{CollectedItem, CollectedView, ImageView};
use mvm_wire::{ApiError, ErrorCode};

use crate::node::Node;
use mvm_core::mirror::Mirror;

/// Every built image with what uses it.
pub(crate) async fn list(node: &Node, mirror: &Mirror) -> Result<Vec<ImageView>, ApiError> {
    let users = users(mirror);
    let stored = node.host.images.list().await.map_err(|error| ApiError::internal(&error))?;
    let view = |image: StoredImage| ImageView {
        used_by: users.get(&image.revision).cloned().unwrap_or_default(),
        revision: image.revision,
        source: image.source,
        bytes: image.bytes,
        built_unix_ms: image.built_unix_ms,
        kernel: image.kernel,
        config: image.config.into(),
        layers: image.layers,
        damage: image.damage,
    };
    Ok(stored.into_iter().map(view).collect())
}

/// What uses each revision, in words.
fn users(mirror: &Mirror) -> BTreeMap<RevisionId, Vec<String>> {
    let mut users: BTreeMap<RevisionId, Vec<String>> = BTreeMap::new();
    let mut uses = |revision: &RevisionId, who: String| {
        let users = users.entry(revision.clone()).or_default();
        if !users.contains(&who) {
            users.push(who);
        }
    };
    for (path, pool) in &mirror.desired.pools {
        if let Some(revision) = &pool.rolled_back_to {
            uses(revision, format!("pool {path}"));
        }
    }
    for (path, status) in &mirror.observed.pools {
        if let Some(revision) = &status.revision {
            uses(revision, format!("pool {path}"));
        }
        for past in &status.history {
            uses(&past.revision, format!("pool {path}, to go back to"));
        }
    }
    for (path, status) in &mirror.observed.instances {
        if let Some(revision) = &status.revision {
            uses(revision, format!("instance {path}"));
        }
    }
    users
}

/// Files that pools, but one, are built from now, or were in the revisions that they can go back to.
fn sources(mirror: &Mirror, but: Option<&PoolPath>) -> BTreeSet<PathBuf> {
    let is_of_another = |pool: &PoolPath| Some(pool) != but;
    let now = mirror.desired.pools.values().filter(|pool| is_of_another(&pool.path));
    let before = mirror.observed.pools.iter().filter(|(pool, _)| is_of_another(pool));
    let before = before.flat_map(|(_, status)| &status.history).map(|past| &past.image);
    let images = now.map(|pool| &pool.spec.image).chain(before);
    images.filter_map(ImageSpec::path).map(PathBuf::from).collect()
}

/// The archives that came over standard input for this pool.
pub(crate) fn uploads_of(node: &Node, mirror: &Mirror, pool: &PoolPath) -> BTreeSet<PathBuf> {
    let uploads = node.config.state_dir.uploads();
    let now = mirror.desired.pools.get(pool).map(|pool| &pool.spec.image);
    let before = mirror.observed.pools.get(pool).into_iter().flat_map(|status| &status.history);
    let images = now.into_iter().chain(before.map(|past| &past.image));
    let paths = images.filter_map(ImageSpec::path).map(PathBuf::from);
    // A command may know the state directory by another name.
    let dir = |path: &PathBuf| path.parent().and_then(|dir| dir.canonicalize().ok());
    paths.filter(|path| dir(path).as_deref() == Some(uploads.as_path())).collect()
}

/// Removes those of these archives of a pool that goes which no other pool is built from.
pub(crate) fn forget_uploads(mirror: &Mirror, pool: &PoolPath, uploads: BTreeSet<PathBuf>) {
    // A record that does not parse may name any file.
    if known(mirror).is_err() {
        return;
    }
    for path in uploads.difference(&sources(mirror, Some(pool))) {
        if let Err(error) = mvm_host::removal::remove_tree(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove an archive");
        }
    }
}

/// Removes one image, unless something uses it.
pub(crate) async fn remove(node: &Node, revision: &RevisionId) -> Result<CollectedView, ApiError> {
    let _alone = alone(node)?;
    let mirror = node.state.now();
    known(&mirror)?;
    if let Some(users) = users(&mirror).get(revision) {
        let message = format!("image {revision} is in use by {}", users.join(", "));
        return Err(ApiError::new(ErrorCode::Conflict, message).hint(
            "destroy what uses it, or leave it: an image is shared by all instances that use it",
        ));
    }
    let stored = node.host.images.list().await.map_err(|error| ApiError::internal(&error))?;
    if !stored.iter().any(|image| image.revision == *revision) {
        return Err(ApiError::new(ErrorCode::NotFound, format!("there is no image {revision}"))
            .hint("see `mvm image list`"));
    }
    let bytes =
        node.host.images.remove(revision).await.map_err(|error| ApiError::internal(&error))?;
    let kind = CollectedKind::Revision;
    Ok(view(false, vec![Collected { kind, name: revision.to_string(), bytes }]))
}

/// Removes everything that nothing uses.
pub(crate) async fn collect(node: &Node, dry_run: bool) -> Result<CollectedView, ApiError> {
    let _alone = alone(node)?;
    let mirror = node.state.now();
    known(&mirror)?;
    let in_use =
        InUse { revisions: users(&mirror).into_keys().collect(), paths: sources(&mirror, None) };
    let collected = node.host.images.collect(&in_use, dry_run).await;
    collected.map(|items| view(dry_run, items)).map_err(|error| ApiError::internal(&error))
}

/// Keeps builds from beginning; a build that runs is not waited for.
fn alone(node: &Node) -> Result<tokio::sync::RwLockWriteGuard<'_, ()>, ApiError> {
    node.images.try_write().map_err(|_| {
        let message = "an image is being built, and what it needs cannot be told yet";
        ApiError::new(ErrorCode::Conflict, message)
            .hint("wait until `mvm pool list` shows no build, then try again")
    })
}

/// A record that does not parse may name any image.
fn known(mirror: &Mirror) -> Result<(), ApiError> {
    match mirror.bad.iter().next() {
        None => Ok(()),
        Some((key, reason)) => Err(ApiError::bad_record(key, reason)),
    }
}

fn view(dry_run: bool, collected: Vec<Collected>) -> CollectedView {
    let item = |item: Collected| CollectedItem {
        kind: item.kind.name().to_owned(),
        name: item.name,
        bytes: item.bytes,
    };
    let items: Vec<CollectedItem> = collected.into_iter().map(item).collect();
    CollectedView { dry_run, bytes: items.iter().map(|item| item.bytes).sum(), items }
}
