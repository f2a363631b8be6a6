//! Image builds: one task per pool, the only one that writes what is observed of the image.

use std::sync::Arc;

use mvm_core::record::{self, BuildState, PoolRecord, PoolStatus};
use mvm_core::stored::versioned;
use mvm_host::images::BuiltImage;
use mvm_store::{StoreError, encode};
use tokio::sync::mpsc;

use crate::node::{Node, chain};

/// Builds a pool's image and records how that went.
pub(crate) async fn build(node: Arc<Node>, pool: PoolRecord, generation: u64) {
    let before = node.state.now().observed.pools.get(&pool.path).cloned().unwrap_or_default();
    let failures = match &before.build {
        BuildState::Failed { failures, .. } => *failures,
        _ => 0,
    };
    let began = node.clock.now_ms();
    // Steps are shown, not kept: the channel holds the latest few and drops what nobody reads.
    let (steps, mut step) = mpsc::channel(16);
    let on_step = move |text: String| drop(steps.try_send(text));
    // Until the pool's record names the revision, nothing else says that it is in use.
    let _images = node.images.read().await;
    let building = async {
        let images = &node.host.images;
        let result = match &pool.rolled_back_to {
            None => images.build(&pool.spec.image, &on_step).await,
            Some(revision) => images
                .files(revision)
                .await
                .map(|_| BuiltImage { revision: revision.clone(), already_there: true }),
        };
        drop(on_step);
        result
    };
    let showing = async {
        while let Some(step) = step.recv().await {
            let build = BuildState::Building { step };
            write(&node, &pool, |status| PoolStatus { build: build.clone(), ..status }).await;
        }
    };
    let (result, ()) = tokio::join!(building, showing);
    let now = node.clock.now_ms();
    match result {
        Ok(built) => {
            let already_there = built.already_there;
            tracing::info!(pool = %pool.path, revision = %built.revision, already_there, "built");
            let image = &pool.spec.image;
            let took_ms = now.saturating_sub(began);
            let build = BuildState::Built { already_there, took_ms };
            let built = |status: PoolStatus| {
                let status = match &pool.rolled_back_to {
                    None => status.built(built.revision.clone(), image),
                    Some(revision) => status.rolled_back(revision.clone(), image),
                };
                PoolStatus { build_generation: generation, build: build.clone(), ..status }
            };
            write(&node, &pool, built).await;
        }
        Err(error) => {
            tracing::warn!(pool = %pool.path, error = chain(&error), "build failed");
            let failures = failures.saturating_add(1);
            let build = BuildState::Failed { error: chain(&error), at_unix_ms: now, failures };
            let failed = |status| {
                let build = build.clone();
                PoolStatus { build_generation: generation, build, ..status }
            };
            write(&node, &pool, failed).await;
        }
    }
    node.poke();
}

/// Changes what the build knows of in the pool's observed record, and nothing else.
async fn write(node: &Node, pool: &PoolRecord, change: impl Fn(PoolStatus) -> PoolStatus) {
    let written = node
        .state
        .change(async |mirror| {
            // A pool that was removed meanwhile must not come back as a stray record.
            let is_there = mirror.desired.pools.contains_key(&pool.path);
            let status = mirror.observed.pools.get(&pool.path).cloned().unwrap_or_default();
            let status = change(status);
            let op = encode(record::pool_status_key(&pool.path), &versioned(&status))?;
            Ok::<_, StoreError>((if is_there { vec![op] } else { vec![] }, ()))
        })
        .await;
    let problem = written.err().map(|error| chain(&error));
    node.set_problem(&format!("writing the status of pool {}", pool.path), problem);
}
